"""Several models in one batch: each row is its own model's, and what is made is what `respond` would have made."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from suasion.models import Compute, Lineage, load_policy, load_to_sample, save_adapter
from suasion.records import Prompt, Turn
from suasion.sampling import joint
from suasion.sampling.draws import Draw
from suasion.sampling.joint import JointSampler, Piece, joined, respond_jointly, shared_start
from suasion.sampling.local import LocalSampler
from suasion.sampling.respond import Journal, respond
from suasion.sections.sampling import EndpointEngine, SampleSection
from suasion.sections.training import LoraSection
from suasion.training.prefix import token_kl

CPU = Compute("cpu", "float32", 1)
ATTENTION, ALL = ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_proj", "down_proj")


@pytest.fixture(scope="module")
def lineages(tiny, tmp_path_factory):
    """base, sft, two arms from it and one from an arm: ranks, scales and adapted layers differ, and every adapter changes much."""
    folder = tmp_path_factory.mktemp("adapters")
    base = Lineage(tiny)

    def trained(start, name, **lora):
        policy = load_policy(start, LoraSection(dropout=0, **lora), 1)
        generator = torch.Generator().manual_seed(len(name))
        with torch.no_grad():
            for parameter, weight in policy.named_parameters():
                if "lora_B" in parameter:
                    weight.normal_(0, 0.3, generator=generator)
        save_adapter(policy, folder / name, tiny)
        return start.extended(folder / name)

    sft = trained(base, "sft", r=8, alpha=32, targets=ATTENTION)
    rlaif = trained(sft, "rlaif", r=4, alpha=32, targets=ATTENTION)
    rlhf = trained(sft, "rlhf", r=8, alpha=16, targets=ALL)
    return {
        "base": base,
        "sft": sft,
        "rlaif": rlaif,
        "rlhf": rlhf,
        "both": trained(rlaif, "rlaif-rlhf", r=4, alpha=8, targets=ALL),
    }


def prompts(count=5):
    return [
        Prompt(
            id=f"p{number}",
            corpus="own",
            conversation_id=f"c{number}",
            author="a",
            turns=(Turn(role="user", text="why so " * (number + 2)),),
        )
        for number in range(count)
    ]


def apart(lineages, settings, tiny, renderer, hardware, journal):
    return {
        name: respond(name, lineage, prompts(), 1, settings, tiny, renderer, hardware, 3, journal, name).rows
        for name, lineage in lineages.items()
    }


@pytest.fixture
def settings():
    return SampleSection(temperature=1.0, top_p=0.95, max_new_tokens=8, batch_size=64, resample=0)


def test_each_row_is_of_its_own_model(lineages, tiny, renderer, settings, tmp_path, monkeypatch):
    """Text for text what the models say one after another; `respond` finds it and loads nothing."""
    wanted = apart(lineages, settings, tiny, renderer, CPU, Journal(tmp_path / "apart.jsonl"))
    journal = Journal(tmp_path / "joint.jsonl")
    sizes = []
    monkeypatch.setattr(joint, "plan_batches", lambda draws, size: sizes.append(len(draws)) or [draws])
    respond_jointly(lineages, prompts(), settings, renderer, CPU, 3, journal)
    assert sizes == [5] * 5
    monkeypatch.setattr(LocalSampler, "run", lambda *_: pytest.fail("something was left to make") if _[1] else None)
    made = apart(lineages, settings, tiny, renderer, CPU, Journal(tmp_path / "joint.jsonl"))
    for name, rows in wanted.items():
        assert [row.text for row in made[name]] == [row.text for row in rows]
        assert [row.id for row in made[name]] == [row.id for row in rows]
        assert [row.logprob for row in made[name]] == pytest.approx([row.logprob for row in rows], abs=1e-3)
    said = [tuple(row.tokens for row in rows) for rows in wanted.values()]
    assert len(set(said)) == len(lineages)  # the adapters make a difference


@pytest.mark.parametrize("names", [("base", "sft"), ("rlaif", "rlhf")])
def test_in_bf16_a_row_is_the_trained_model(names, lineages, renderer, settings):
    """As `load_to_sample` has it, newest adapter beside weights that hold the others: nearer than the bound of benchmarks/precision.py, where
    another model's row is far away."""
    half = Compute("cpu", "bfloat16", 1)
    sharing = {name: lineages[name] for name in names}
    (start,) = {shared_start(lineage, half) for lineage in sharing.values()}
    sampler = JointSampler(start, sharing, settings, renderer, half, 0)
    model = sampler._load()
    ids = torch.arange(20, 44).reshape(2, 12)
    sampler._rows.rows_are(names)
    with torch.no_grad(), half.autocast():
        together = model(ids).logits
        for row, name in enumerate(names):
            alone, other = (load_to_sample(lineages[one], half)(ids).logits[row] for one in (name, names[1 - row]))
            own, others = (float(token_kl(one.float(), together[row].float()).mean()) for one in (alone, other))
            assert own < 1e-4
            assert others > 5e-3


def test_what_models_share_before_their_rows(lineages, tmp_path):
    half = Compute("cpu", "bfloat16", 1)
    sft, rlaif, both = (lineages[name].adapters for name in ("sft", "rlaif", "both"))
    assert [shared_start(lineages[name], half) for name in ("base", "sft", "rlaif", "both")] == [(), (), sft, rlaif]
    assert {shared_start(lineage, CPU) for lineage in lineages.values()} == {()}
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "model.safetensors").touch()
    over = replace(lineages["both"], adapters=(whole, *both[1:]))
    assert shared_start(over, CPU) == (whole,)  # whole weights replace the base: they cannot lie beside it
    assert shared_start(over, half) == over.adapters[:2]
    assert shared_start(Lineage(over.base, (whole,)), half) == (whole,)


@pytest.mark.parametrize("kept", [0, 1, 4])
def test_an_interrupted_batch_is_made_again_whole(kept, lineages, renderer, settings, tmp_path):
    """Killed after `kept` models were journalled: the rest comes from a batch of all of them, and what is there stays as it is."""
    whole = Journal(tmp_path / "whole.jsonl")
    respond_jointly(lineages, prompts(), settings, renderer, CPU, 3, whole)
    lines = whole.path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"".join(lines[:kept]) + lines[kept][:-9])
    again = Journal(cut)
    respond_jointly(lineages, prompts(), settings, renderer, CPU, 3, again)
    assert cut.read_bytes() == whole.path.read_bytes()


def test_only_the_local_engine_in_one_process_shares(lineages, renderer, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(joint, "JointSampler", lambda *_: pytest.fail("a batch was shared"))
    journal = Journal(tmp_path / "journal.jsonl")
    served = settings.model_copy(
        update={"engine": EndpointEngine(kind="endpoint", server="vllm", urls=("http://127.0.0.1:1/v1",))}
    )
    respond_jointly(lineages, prompts(), served, renderer, CPU, 3, journal)
    respond_jointly(lineages, prompts(), settings, renderer, CPU, 3, journal, processes=2)
    respond_jointly(lineages, prompts(), settings.model_copy(update={"batch_size": 9}), renderer, CPU, 3, journal)
    in_four_bits = {
        name: replace(one, base=one.base.model_copy(update={"quantization": "nf4"})) for name, one in lineages.items()
    }
    respond_jointly(in_four_bits, prompts(), settings, renderer, CPU, 3, journal)
    assert not journal.done


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 20))
def test_pieces_share_while_they_fit(sizes, most):
    pieces = [Piece("m", str(number), [Draw("p", (1,), n) for n in range(size)]) for number, size in enumerate(sizes)]
    groups = joined(pieces, most)
    assert all(len(group) > 1 and sum(len(piece.draws) for piece in group) <= most for group in groups)
    kept = [int(piece.key) for group in groups for piece in group]
    assert kept == sorted(set(kept))
    for left, right in zip(range(len(sizes)), range(1, len(sizes)), strict=False):
        if sizes[left] + sizes[right] <= most:
            assert left in kept or right in kept  # two neighbours that fit are never both alone
