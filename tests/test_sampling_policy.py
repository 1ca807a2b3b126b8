"""Faults of responses: detected, drawn again, dropped or kept as the recipe says, and counted; memory that does not suffice."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from suasion.errors import UserError
from suasion.models import Compute, Lineage, load_merged
from suasion.records import Prompt, Response, Turn
from suasion.sampling import local, respond
from suasion.sampling.draws import Draw, Drawn
from suasion.sampling.local import LocalSampler, decode, memory_needed
from suasion.sampling.respond import Journal
from suasion.sampling.stage import pairs_of
from suasion.sections.sampling import SampleSection

CPU = Compute("cpu", "float32", 2)
CONTEXT = " ".join(f"w{i}" for i in range(40))
LOOP = "over and over again and " * 8
COPY = "as you say, " + " ".join(f"w{i}" for i in range(30))


def prompts(count):
    return [
        Prompt(id=f"p{i}", corpus="c", conversation_id=f"c{i}", author="a", turns=(Turn(role="user", text=CONTEXT),))
        for i in range(count)
    ]


class Scripted:
    """Says what a table (prompt, n) -> [text of attempt 0, 1, ...] says."""

    peers = ""

    def __init__(self, table):
        self.table, self.asked = table, []

    def batches(self, draws):
        return [[draw] for draw in draws]

    def check(self, draws):
        return {}

    def run(self, work, deliver, ended):
        for key, (draw,) in work:
            self.asked.append((draw.prompt_id, draw.n, draw.attempt))
            text = self.table[draw.prompt_id, draw.n][draw.attempt]
            finish = "length" if text.endswith("...") else "stop"
            deliver(key, [Drawn(draw, None, finish, None, 1, text)])
            ended(1)


def sample(table, tiny, renderer, tmp_path, monkeypatch, **settings):
    sampler = Scripted(table)
    monkeypatch.setattr(respond, "sampler_for", lambda *_: sampler)
    asked = prompts(len({prompt for prompt, _ in table}))
    settings = SampleSection(max_new_tokens=16, **settings)
    journal = Journal(tmp_path / "journal.jsonl")
    made = respond.respond("sft", Lineage(tiny), asked, 2, settings, tiny, renderer, CPU, 0, journal, "sample")
    rows = {(row.prompt_id, row.n): row for row in made.rows}
    pairs, dropped = pairs_of([("rlaif", prompt) for prompt in asked], rows, settings)
    return made, [pair.prompt_id for pair in pairs], dropped, sampler


TABLE = {
    ("p0", 0): ["fine one"] * 3, ("p0", 1): ["fine two"] * 3,
    ("p1", 0): ["cut...", "cut...", "whole at last"], ("p1", 1): ["good"] * 3,
    ("p2", 0): [LOOP, "no loop", "-"], ("p2", 1): ["good"] * 3,
    ("p3", 0): ["good"] * 3, ("p3", 1): [COPY, COPY, COPY],
    ("p4", 0): ["same"] * 3, ("p4", 1): ["same", "same", "other"],
    ("p5", 0): ["", "", ""], ("p5", 1): ["good"] * 3,
}  # fmt: skip


def test_by_default_unfinished_responses_are_drawn_again_and_others_kept_flagged(tiny, renderer, tmp_path, monkeypatch):
    made, pairs, dropped, sampler = sample(TABLE, tiny, renderer, tmp_path, monkeypatch)
    assert made.drawn_again == {"cut-off": 2, "empty": 2}
    assert sorted(item for item in sampler.asked if item[2]) == [("p1", 0, 1), ("p1", 0, 2), ("p5", 0, 1), ("p5", 0, 2)]
    assert pairs == ["p0", "p1", "p2", "p3"]
    assert dropped == {"identical responses": 1, "cut-off or empty response": 1}
    flagged = {(row.prompt_id, row.n): row.flags for row in made.rows if row.flags}
    assert flagged == {("p2", 0): ("looping",), ("p3", 1): ("copying",), ("p5", 0): ("empty",)}


def test_every_fault_can_be_drawn_again_and_dropped(tiny, renderer, tmp_path, monkeypatch):
    everything = ("cut-off", "empty", "looping", "copying", "identical")
    made, pairs, dropped, sampler = sample(
        TABLE, tiny, renderer, tmp_path, monkeypatch, resample_for=everything, degenerate="drop"
    )
    assert made.drawn_again == {"copying": 2, "cut-off": 2, "empty": 2, "identical": 2, "looping": 1}
    assert {item[:2] for item in sampler.asked if item[2]} == {("p1", 0), ("p2", 0), ("p3", 1), ("p4", 1), ("p5", 0)}
    assert pairs == ["p0", "p1", "p2", "p4"]
    assert dropped == {"looping or copying response": 1, "cut-off or empty response": 1}


def test_nothing_is_drawn_again_without_resample(tiny, renderer, tmp_path, monkeypatch):
    made, _, _, sampler = sample(TABLE, tiny, renderer, tmp_path, monkeypatch, resample=0, unfinished="keep")
    assert made.drawn_again == {}
    assert len(sampler.asked) == len(TABLE)


def test_a_resumed_run_decides_the_same_from_its_journal(tiny, renderer, tmp_path, monkeypatch):
    first, *_ = sample(TABLE, tiny, renderer, tmp_path, monkeypatch)
    lines = (tmp_path / "journal.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (0, 1, 7, 12, 13, len(lines)):
        folder = tmp_path / str(kept)
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(b"".join(lines[:kept]))
        again, _, _, sampler = sample(TABLE, tiny, renderer, folder, monkeypatch)
        assert again == first
        assert len(sampler.asked) == len(lines) - kept


def test_a_resumed_run_of_the_local_engine_is_bit_equal(tiny, renderer, tmp_path):
    """Killed after any batch, also in the middle of drawing again: the same rows, to the last digit of their log-probabilities."""
    settings = SampleSection(max_new_tokens=6, batch_size=4, temperature=1.0, top_p=0.95, resample=1)

    def run(path):
        return respond.respond("sft", Lineage(tiny), prompts(5), 2, settings, tiny, renderer, CPU, 0, Journal(path), "sample")

    first = run(tmp_path / "journal.jsonl")
    assert first.drawn_again["cut-off"] >= 8  # six tokens are not enough for most
    lines = (tmp_path / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) >= 5
    for kept in range(len(lines)):
        resumed = tmp_path / f"{kept}.jsonl"
        resumed.write_bytes(b"".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])  # the batch under way is torn
        assert run(resumed) == first
        assert resumed.read_bytes() == (tmp_path / "journal.jsonl").read_bytes()


def test_two_models_of_equal_weights_say_the_same(tiny, renderer, tmp_path):
    """The comparison draws the same random numbers for every model: what differs between two of them is their weights. Another seed is not the same."""
    settings = SampleSection(max_new_tokens=6, temperature=1.0, top_p=0.95, resample=0)

    def said(name: str, seed: int) -> list[str]:
        journal = Journal(tmp_path / f"{name}-{seed}.jsonl")
        rows = respond.respond(name, Lineage(tiny), prompts(4), 1, settings, tiny, renderer, CPU, seed, journal, name).rows
        return [row.text for row in rows]

    assert said("base", 0) == said("arm", 0)
    assert said("base", 1) != said("base", 0)


def test_a_pair_is_never_made_of_equal_texts(tiny):
    rows = {
        ("p0", n): Response(
            id=str(n), prompt_id="p0", n=n, text="same", finish="stop", tokens=None, logprob=None, lineage="L", seed=0
        )
        for n in (0, 1)
    }
    assert pairs_of([("rlaif", prompts(1)[0])], rows, SampleSection(unfinished="keep"))[1] == {"identical responses": 1}


@pytest.fixture(scope="module")
def model(tiny):
    return load_merged(Lineage(tiny))


def draws(count, length=8):
    return [Draw(f"p{i}", tuple(range(10, 10 + length + i % 3)), n) for i in range(count) for n in (0, 1)]


def short_of_memory(monkeypatch, most, error):
    sizes = []

    def limited(model, batch, *rest, ended, **others):
        sizes.append(len(batch))
        if len(batch) > most:
            ended(1)  # one was through
            raise error
        return decode(model, batch, *rest, ended=ended, **others)

    monkeypatch.setattr(local, "decode", limited)
    return sizes


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python"])
def test_out_of_memory_halves_the_batch_for_good_and_says_so(error, model, renderer, monkeypatch, capsys):
    settings = SampleSection(max_new_tokens=4, batch_size=16)
    sampler = LocalSampler(lambda: model, settings, renderer, CPU, 0)
    batches = sampler.batches(draws(16))
    assert [len(batch) for batch in batches] == [16, 16]
    sizes = short_of_memory(monkeypatch, 5, error)
    made = {}
    ended = []
    sampler.run([(str(i), batch) for i, batch in enumerate(batches)], made.__setitem__, ended.append)
    assert sum(ended) == 32  # what has to be made again is taken back
    assert max(np.cumsum(ended)) == 32
    assert sizes == [16, 8, 4, 4, 4, 4, 4, 4, 4, 4]  # halved twice, and never tried again at the old size
    said = " ".join(capsys.readouterr().out.split())
    assert "out of memory with 16 responses at once: 8 from here on" in said
    assert "sample.batch_size=4 saves the detour" in said
    for i, batch in enumerate(batches):
        assert [drawn.draw for drawn in made[str(i)]] == batch  # all of them, once, in order


def test_one_response_that_does_not_fit_is_a_message(model, renderer, monkeypatch):
    sampler = LocalSampler(lambda: model, SampleSection(max_new_tokens=4), renderer, CPU, 0)
    short_of_memory(monkeypatch, 0, ERRORS[0])
    with pytest.raises(UserError, match=r"out of memory on a single response. Lower sample.max_new_tokens"):
        sampler.run([("k", draws(2))], lambda *_: None)


def test_other_runtime_errors_are_not_taken_for_want_of_memory(model, renderer, monkeypatch):
    sampler = LocalSampler(lambda: model, SampleSection(max_new_tokens=4), renderer, CPU, 0)
    short_of_memory(monkeypatch, 0, RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        sampler.run([("k", draws(2))], lambda *_: None)


def test_a_batch_that_cannot_fit_is_halved_before_it_is_tried(model, renderer, monkeypatch, capsys):
    settings = SampleSection(max_new_tokens=4, batch_size=8)
    sampler = LocalSampler(lambda: model, settings, renderer, CPU, 0)
    (batch,) = sampler.batches(draws(4))
    monkeypatch.setattr(
        local, "free_memory", lambda device: int(memory_needed(model, batch[:2], settings, "float32") / 0.9) + 100
    )
    sizes = short_of_memory(monkeypatch, 99, None)
    sampler.run([("k", batch)], lambda *_: None)
    assert sizes == [2, 2, 2, 2]
    assert "GB free with 8 responses at once: 4 from here on" in " ".join(capsys.readouterr().out.split())


def test_memory_is_estimated_from_shapes(model):
    config, settings = model.config, SampleSection(max_new_tokens=16)
    batch = [Draw("p", (1,) * 32, 0), Draw("p", (1,) * 32, 1)]
    position = 2 * 2 * 8 * 2  # keys and values, heads, width, layers
    cache = 2 * (32 + 16) * position
    prefill = 1 * 32 * (position + 3 * 64 + 8 * 32)
    rest = 4 * (prefill + 6 * 2 * config.vocab_size)
    assert memory_needed(model, batch, settings, "float32") == 4 * cache + rest
    assert memory_needed(model, batch, settings, "bfloat16") == 2 * cache + rest


def test_on_a_processor_activations_are_those_of_one_pass():
    """40 prompts of 50 tokens: their caches all at once, what is between layers of 20 of them (1,024 tokens hold 20 whole ones)."""
    shape = {"position": 64, "inner": 64, "width": 32, "vocabulary": 0, "dtype": "float32"}
    assert local.passes([50] * 40, local.READ_TOKENS) == [(0, 20), (20, 40)]
    cache, prefilled, between = 40 * (50 + 8) * 64, 40 * 50 * 64, 3 * 64 + 8 * 32
    assert local.batch_bytes(40, 40, 50, 8, **shape) == 4 * (cache + prefilled + 40 * 50 * between)
    assert local.batch_bytes(40, 40, 50, 8, **shape, at_once=1024) == 4 * (cache + prefilled + 1024 * between)
    assert local.batch_bytes(1, 1, 50, 8, **shape, at_once=10) == 4 * (
        58 * 64 + 50 * 64 + 50 * between
    )  # one prompt is never cut


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.none() | st.integers(1, 200))
def test_every_prompt_is_read_in_one_pass_and_passes_stay_small(lengths, most):
    lengths = sorted(lengths, reverse=True)
    cut = local.passes(lengths, most)
    assert [row for first, stop in cut for row in range(first, stop)] == list(range(len(lengths)))
    for first, stop in cut:
        assert stop > first
        assert most is None or stop - first == 1 or (stop - first) * lengths[first] <= most


def test_at_most_one_response_in_200_differs_between_batch_sizes(model):
    """The bound in fp32 with the tiny model, whose nearly flat distributions make ties far likelier than a trained model's
    (`benchmarks/batch_sizes.py` measures one). 100 different prompts of 4 to 60 tokens, so that what stands beside and is padded differs."""
    settings = SampleSection(temperature=1.0, top_p=0.95, max_new_tokens=12)
    rng = np.random.default_rng(3)
    asked = [tuple(rng.integers(10, 1900, size=4 + i % 57).tolist()) for i in range(100)]
    drawn = [Draw(f"p{i}", prompt, n) for i, prompt in enumerate(asked) for n in (0, 1)]
    said = {}
    for size in (2, 7, 32):
        plan = local.plan_batches(drawn, size)
        said[size] = {
            (one.draw.prompt_id, one.draw.n): one.tokens
            for batch in plan
            for one in decode(model, batch, settings, 5, -1, 2, CPU)
        }
    assert len(said[2]) == 200
    assert len(set(said[2].values())) == 200
    for size in (7, 32):
        assert sum(said[2][key] != said[size][key] for key in said[2]) <= 1
