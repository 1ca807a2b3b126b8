"""Continuous batching against static batches: the same tokens from the same random numbers, whatever the places; bit-equal when made again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_local_sampling import CPU, draws
from transformers import Qwen3NextConfig

from suasion.chat import Renderer
from suasion.errors import UserError
from suasion.models import Compute, Lineage, load_merged, load_tokenizer, prepare_to_decode
from suasion.pipeline import run
from suasion.recipe import load_recipe
from suasion.sampling import continuous, local
from suasion.sampling.draws import Draw, nobody
from suasion.sampling.local import LocalSampler, decode
from suasion.sections.sampling import ContinuousEngine, SampleSection

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
LOGPROB = 1e-3  # as between batch sizes of static batches (test_local_sampling.py)


@pytest.fixture(scope="module")
def model(tiny):
    return load_merged(Lineage(tiny))


def long_draws() -> list[Draw]:
    """One prompt of more than a pass, and short ones, two responses each."""
    prompt = tuple(10 + (7 * place) % 1800 for place in range(continuous.PASS_TOKENS + 40))
    return [*(Draw("long", prompt, n) for n in (0, 1)), *draws(6, 2)]


@pytest.mark.parametrize("places", [1, 3, 14])
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 1.0, "top_p": 0.95},
        {"temperature": 0.8, "top_p": 1.0, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.3},
    ],
)
def test_it_says_what_static_batches_say(model, places, fields):
    """With a stop token that is said in the middle, so that places become free at different times."""
    settings = SampleSection(max_new_tokens=10, **fields)
    stop = decode(model, long_draws(), settings, 5, -1, 2, CPU)[3].tokens[4]
    wanted = decode(model, long_draws(), settings, 5, stop, 2, CPU)
    made = continuous.decode(model, long_draws(), settings, 5, stop, CPU, places)
    assert [drawn.tokens for drawn in made] == [drawn.tokens for drawn in wanted]
    assert {drawn.finish for drawn in made} == {"stop", "length"}
    for drawn, other in zip(made, wanted, strict=True):
        assert replace(drawn, logprob=0.0) == replace(other, logprob=0.0)
        assert drawn.logprob == pytest.approx(other.logprob, abs=LOGPROB)


def test_a_queue_made_again_is_bit_equal_and_leaves_the_model_as_it_was(model):
    settings = SampleSection(temperature=1.0, top_p=0.9, max_new_tokens=8)
    before = decode(model, draws(4, 2), settings, 1, -1, 2, CPU)
    attention = model.config._attn_implementation
    first = continuous.decode(model, draws(6, 2), settings, 1, -1, CPU, 4)
    assert continuous.decode(model, draws(6, 2), settings, 1, -1, CPU, 4) == first
    assert model.config._attn_implementation == attention
    assert "forward" not in vars(model)
    assert decode(model, draws(4, 2), settings, 1, -1, 2, CPU) == before


def test_compute_in_bf16_is_the_trained_model_under_autocast(tiny):
    """The log-probability of what was said, against a scoring pass under the same autocast; in fp32 it is another."""
    hardware = Compute("cpu", "bfloat16", 1)
    model = load_merged(Lineage(tiny))
    plain = load_merged(Lineage(tiny))
    rounded = prepare_to_decode(model, hardware)
    settings = SampleSection(temperature=0, max_new_tokens=6)
    exact = []
    for drawn in continuous.decode(rounded, draws(3), settings, 0, -1, hardware, 2):
        ids = torch.tensor([[*drawn.draw.prompt, *drawn.tokens]])
        start = len(drawn.draw.prompt) - 1
        scores = []
        for dtype in ("bfloat16", "float32"):
            with torch.no_grad(), Compute("cpu", dtype, 1).autocast():
                logits = plain(ids).logits[0].float().log_softmax(-1)
            scores.append(sum(logits[start + place, token].item() for place, token in enumerate(drawn.tokens)))
        assert drawn.logprob == pytest.approx(scores[0], abs=2e-2)
        exact.append(drawn.logprob == pytest.approx(scores[1], abs=1e-5))
    assert not all(exact)


def sampler(tiny, model, device="cpu", **fields) -> LocalSampler:
    settings = SampleSection(engine=ContinuousEngine(kind="continuous"), max_new_tokens=6, **fields)
    renderer = Renderer(load_tokenizer(tiny), tiny.system_prompt)
    return LocalSampler(lambda: model, settings, renderer, Compute(device, "float32", 1), 3)


def test_the_engine_makes_queues_of_several_batches_and_halves_its_places(tiny, model, monkeypatch, capsys):
    engine = sampler(tiny, model, batch_size=4)
    assert [len(queue) for queue in engine.batches(draws(20, 2))] == [4 * local.QUEUE, 40 - 4 * local.QUEUE]
    tried = []
    real = continuous.choose

    def scarce(logits, *rest):
        tried.append(len(logits))
        if len(logits) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(logits, *rest)

    monkeypatch.setattr(continuous, "choose", scarce)
    engine.model = model
    (queue,) = engine.batches(draws(5, 2))
    made = engine._queue(queue, nobody)
    assert max(tried) == 4
    assert engine.most == 2
    assert "2 from here on" in capsys.readouterr().out
    assert [drawn.tokens for drawn in made] == [
        d.tokens for d in decode(model, queue, engine.settings, 3, engine.renderer.stop_id, 2, CPU)
    ]


def test_a_cpu_and_layers_without_keys_and_values_are_refused(tiny, model, tmp_path):
    engine = sampler(tiny, model)
    with pytest.raises(UserError, match=r"for GPUs.*Use kind: local"):
        engine.run([("", draws(1))], lambda *_: None)

    recipe = load_recipe(RECIPE, ("sample.engine={kind: continuous}", "model.device=cpu"))
    with pytest.raises(UserError, match="for GPUs"):
        run(recipe, tmp_path)
    assert not list(tmp_path.glob("*/0*"))  # not even a corpus was read
    run(recipe, tmp_path, last="corpus")

    class Other:
        config = Qwen3NextConfig()

    with pytest.raises(UserError, match=r"linear_attention.*Use sample.engine.kind: local"):
        continuous.refuse_unsupported(Other())
