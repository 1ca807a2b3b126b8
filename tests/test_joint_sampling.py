"""Several models in one batch: each row is its own model's, and what is made is what `respond` would have made."""

import copy
import gc
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_training import stir

from suasion.adapters import AdaptersByRow
from suasion.models import Compute, Lineage, attach_adapter, load_policy, load_to_sample, save_adapter
from suasion.records import Prompt, Turn
from suasion.sampling import joint, local
from suasion.sampling.draws import Draw
from suasion.sampling.joint import JointSampler, Piece, joined, respond_jointly, shared_start
from suasion.sampling.local import decode
from suasion.sampling.respond import Journal, respond
from suasion.sections.sampling import EndpointEngine, SampleSection
from suasion.sections.training import LoraSection
from suasion.training.losses import LOGPROB_TOLERANCE
from suasion.training.prefix import token_kl

CPU = Compute("cpu", "float32", 1)
SETTINGS = SampleSection(temperature=1.0, top_p=0.95, max_new_tokens=12, batch_size=64, resample=0)
ATTENTION, ALL = ("q_proj", "k_proj", "v_proj", "o_proj"), ("q_proj", "down_proj")


@pytest.fixture(scope="module")
def lineages(tiny, tmp_path_factory):
    """base, sft, two arms from it and one from an arm: ranks, scales and adapted layers differ, and every adapter changes much."""
    folder = tmp_path_factory.mktemp("adapters")
    base = Lineage(tiny)

    def trained(start, name, **lora):
        policy = load_policy(start, LoraSection(dropout=0, **lora), 1)
        stir(policy, len(name))
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
    return SETTINGS


@pytest.fixture(scope="module")
def said(lineages, tiny, renderer, tmp_path_factory):
    """A stop token that rows draw at different places, and what each model says alone with it."""
    folder = tmp_path_factory.mktemp("said")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(renderer, "stop_id", -1)
        free = apart(lineages, SETTINGS, tiny, renderer, CPU, Journal(folder / "free.jsonl"))
        drawn = Counter(token for rows in free.values() for row in rows for token in row.tokens[2:9])
        stop = drawn.most_common(1)[0][0]
        patch.setattr(renderer, "stop_id", stop)
        return stop, apart(lineages, SETTINGS, tiny, renderer, CPU, Journal(folder / "apart.jsonl"))


@pytest.mark.parametrize(("size", "shared"), [(64, 5 * 5), (8, 0), (4, 4)])
def test_each_row_is_of_its_own_model(size, shared, said, lineages, tiny, renderer, tmp_path, monkeypatch):
    """Text for text what the models say one after another, though rows end at different tokens and change places; `respond` finds what was
    shared under its own names, whatever the batches are, and makes the rest."""
    stop, wanted = said
    assert len({len(row.tokens) for rows in wanted.values() for row in rows}) > 1  # some end early
    monkeypatch.setattr(renderer, "stop_id", stop)
    settings = SETTINGS.model_copy(update={"batch_size": size})
    journal = Journal(tmp_path / "joint.jsonl")
    respond_jointly(lineages, prompts(), settings, renderer, CPU, 3, journal)
    assert sum(map(len, journal.done.values())) == shared
    drawn = []
    monkeypatch.setattr(
        local, "decode", lambda model, batch, *rest, **others: drawn.extend(batch) or decode(model, batch, *rest, **others)
    )
    made = apart(lineages, settings, tiny, renderer, CPU, Journal(tmp_path / "joint.jsonl"))
    assert len(drawn) == 25 - shared
    for name, rows in wanted.items():
        assert [row.text for row in made[name]] == [row.text for row in rows]
        assert [row.id for row in made[name]] == [row.id for row in rows]
        assert [row.logprob for row in made[name]] == pytest.approx([row.logprob for row in rows], abs=1e-3)
    assert len({tuple(row.tokens for row in rows) for rows in wanted.values()}) == len(lineages)  # the adapters make a difference


def test_in_bf16_models_share_with_those_of_their_start(lineages, tiny, renderer, settings, tmp_path):
    """Three starts, of which one has a single model; what was said is as likely as a scoring pass of the model alone finds it."""
    half = Compute("cpu", "bfloat16", 1)
    journal = Journal(tmp_path / "journal.jsonl")
    respond_jointly(lineages, prompts(), settings, renderer, half, 3, journal)
    assert {key.split("/")[0] for key in journal.done} == {"base", "sft", "rlaif", "rlhf"}
    asked = {prompt.id: renderer.render(prompt.turns).ids for prompt in prompts()}
    for key, rows in journal.done.items():
        model = load_to_sample(lineages[key.split("/")[0]], half)
        for row in rows:
            ids = torch.tensor([[*asked[row["prompt_id"]], *row["tokens"]]])
            with torch.no_grad(), half.autocast():
                scores = model(ids).logits[0, -len(row["tokens"]) - 1 : -1].float().log_softmax(-1)
            score = float(scores.gather(1, ids[0, -len(row["tokens"]) :, None]).sum())
            assert row["logprob"] == pytest.approx(score, abs=LOGPROB_TOLERANCE["bfloat16"] * len(row["tokens"]))


def test_adapters_that_cannot_lie_beside_weights_are_left_to_peft(lineages, tiny, renderer, settings, tmp_path):
    """An adapted head is saved whole: such a model answers alone, the others go on sharing."""
    policy = load_policy(lineages["sft"], LoraSection(r=4, dropout=0, targets=("q_proj", "lm_head")), 1)
    save_adapter(policy, tmp_path / "head", tiny)
    with_head = {**lineages, "head": lineages["sft"].extended(tmp_path / "head")}
    journal = Journal(tmp_path / "journal.jsonl")
    respond_jointly(with_head, prompts(), settings, renderer, CPU, 3, journal)
    assert {key.split("/")[0] for key in journal.done} == set(lineages)
    assert len(apart(with_head, settings, tiny, renderer, CPU, journal)["head"]) == 5


def test_layers_that_get_rows_and_tokens_as_one_dimension(tmp_path, tiny):
    """OPT flattens what its feed-forward layers read."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=60,
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
    )
    torch.manual_seed(0)
    model = OPTForCausalLM(config).eval()
    ids = torch.arange(8, 26).reshape(3, 6)
    wanted, folders = [], []
    for seed in (1, 2):
        policy = attach_adapter(
            copy.deepcopy(model), LoraSection(r=2, dropout=0, targets=("fc1", "fc2", "q_proj")), seed, "opt", "opt"
        )
        stir(policy, seed, 0.5)
        save_adapter(policy, tmp_path / str(seed), tiny)
        folders.append(tmp_path / str(seed))
        wanted.append(policy.eval()(ids).logits)
    rows = AdaptersByRow(model, {"none": [], "one": folders[:1], "two": folders[1:]})
    rows.rows_are(["two", "none", "one"])
    together = model(ids).logits
    torch.testing.assert_close(together[0], wanted[1][0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[2], wanted[0][2], atol=1e-5, rtol=1e-4)
    rows.rows_are(["none"] * 3)
    torch.testing.assert_close(together[1], model(ids).logits[1], atol=1e-5, rtol=1e-4)
    assert (wanted[0] - wanted[1]).abs().max() > 0.1


def test_the_shared_model_is_let_go_at_once(lineages, renderer, settings, tmp_path, monkeypatch):
    """Not when the collector comes round: the next model is loaded before."""
    held = []
    real = joint.load_merged
    monkeypatch.setattr(joint, "load_merged", lambda *args: held.append(weakref.ref(model := real(*args))) or model)
    gc.collect()
    gc.disable()
    try:
        respond_jointly(lineages, prompts(), settings, renderer, CPU, 3, Journal(tmp_path / "journal.jsonl"))
        assert [model() for model in held] == [None]
    finally:
        gc.enable()


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
    assert len(kept) == len(set(kept))
    alone = [size for number, size in enumerate(sizes) if number not in kept]
    assert all(one + other > most for place, one in enumerate(alone) for other in alone[:place])  # no two that fit are both alone
