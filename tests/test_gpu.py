"""What only a GPU can show: the same numbers as a processor, FlexAttention where it trains, static and continuous batching, a whole run.

Skipped where torch sees no CUDA device; nothing else of the suite needs one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_training import CPU, nonzero_adapter, preference_pairs, run_dpo, stir
from test_local_sampling import draws

from suasion.models import Compute, Lineage, load_merged, load_policy, load_to_sample, load_tokenizer, prepare_to_decode
from suasion.records import read_json
from suasion.sampling import continuous
from suasion.sampling.local import decode, plan_batches
from suasion.sampling.noise import gumbel
from suasion.sections.sampling import SampleSection
from suasion.sections.training import LoraSection, ModelSection
from suasion.training.attention import FLEX, attention_of, try_attention
from suasion.training.losses import LOGPROB_TOLERANCE
from suasion.training.pairs import score
from suasion.verify import verify_run

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
GPU = Compute("cuda", "float32", 1)
GPU_BF16 = Compute("cuda", "bfloat16", 1)
STILL = LoraSection(r=4, dropout=0)  # dropout draws other masks on another device


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> ModelSection:
    """A random model with heads of 64, as real ones have: FlexAttention's kernels take none under 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    tokenizer = load_tokenizer(ModelSection(base="random:tiny"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelSection(base=str(folder), max_length=512)


@pytest.fixture(scope="module")
def start(wide, tmp_path_factory) -> Lineage:
    return Lineage(wide, (nonzero_adapter(wide, tmp_path_factory.mktemp("sft") / "adapter"),))


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
@pytest.mark.parametrize("hardware", [GPU, GPU_BF16], ids=["fp32", "bf16"])
def test_a_training_is_that_of_the_processor(start, tmp_path, attention, hardware):
    """Loss by loss in fp32; in bf16 within what rounding moves log-probabilities of so few tokens."""
    wanted = run_dpo(start, tmp_path / "cpu", preference_pairs(), lora=STILL)[2]
    lineage = Lineage(start.base.model_copy(update={"attention": attention}), start.adapters)
    policy, _, found = run_dpo(lineage, tmp_path / "gpu", preference_pairs(), hardware=hardware, lora=STILL)
    assert attention_of(policy) == attention
    tolerance = 1e-3 if hardware == GPU else 5e-2
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in wanted], abs=tolerance)
    assert found[-1]["loss"] < found[0]["loss"] - 0.05


@pytest.mark.parametrize("hardware", [GPU, GPU_BF16], ids=["fp32", "bf16"])
def test_flex_attention_trains_here_and_auto_takes_it(wide, hardware):
    policy = load_policy(Lineage(wide), STILL, 0, "cuda")
    stir(policy, 1)
    assert try_attention(policy, hardware, FLEX) == ""
    pairs = preference_pairs()
    flex = score(policy, pairs, hardware)[0].detach()
    policy.set_attn_implementation("sdpa")
    sdpa = score(policy, pairs, hardware)[0].detach()
    torch.testing.assert_close(flex, sdpa, atol=8 * LOGPROB_TOLERANCE[hardware.dtype], rtol=0)
    auto = load_policy(Lineage(wide), STILL, 0, "cuda")
    assert attention_of(auto) == "flex"


def test_log_probabilities_are_those_of_the_processor(start):
    pairs = preference_pairs(20)
    one, other = (
        score(load_policy(start, STILL, 0, hardware.device), pairs, hardware)[0].detach().cpu() for hardware in (CPU, GPU)
    )
    torch.testing.assert_close(one, other, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"temperature": 1.0, "top_p": 0.95}, {"top_k": 40, "repetition_penalty": 1.2}]
)
def test_responses_are_those_of_the_processor_whatever_the_batches(start, settings):
    """Random numbers belong to the response: in fp32 a GPU says what a processor says, at most 1 response in 200 by another rounding."""
    section = SampleSection(max_new_tokens=12, **settings)
    asked = draws(50, 4)
    on_cpu = decode(prepare_to_decode(load_merged(start), CPU), asked, section, 5, -1, 2, CPU)
    model = prepare_to_decode(load_merged(start, "cuda"), GPU)
    for size in (100, 32, 7):
        found = {
            drawn.draw: drawn for batch in plan_batches(asked, size) for drawn in decode(model, batch, section, 5, -1, 2, GPU)
        }
        differ = sum(found[drawn.draw].tokens != drawn.tokens for drawn in on_cpu)
        assert differ <= len(asked) // 200, f"{differ} of {len(asked)} responses differ in batches of {size}"


def test_noise_is_that_of_the_processor():
    """In float64, up to the last digits of two logarithms."""
    seeds, tokens = np.random.default_rng(0).integers(0, 2**64, 8, dtype=np.uint64), torch.arange(50_000).expand(8, -1)
    torch.testing.assert_close(gumbel(seeds, 3, tokens.cuda()).cpu(), gumbel(seeds, 3, tokens), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("hardware", [GPU, GPU_BF16], ids=["fp32", "bf16"])
def test_continuous_batching_says_what_static_batches_say(start, hardware):
    section = SampleSection(temperature=1.0, top_p=0.95, max_new_tokens=12)
    asked = draws(8, 2)
    model = load_to_sample(start, hardware)
    stop = decode(model, asked, section, 5, -1, 2, hardware)[3].tokens[4]
    wanted = decode(model, asked, section, 5, stop, 2, hardware)
    made = continuous.decode(model, asked, section, 5, stop, hardware, 5)
    same = sum(one.tokens == other.tokens for one, other in zip(made, wanted, strict=True))
    assert same == len(asked) if hardware == GPU else same >= len(asked) - 2
    assert continuous.decode(model, asked, section, 5, stop, hardware, 5) == made
    if hardware == GPU:
        for one, other in zip(made, wanted, strict=True):
            assert replace(one, logprob=0.0) == replace(other, logprob=0.0)
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


def test_a_stored_log_probability_is_that_of_the_model_under_autocast(start):
    """In bf16, against a pass of the same model over the whole sequence."""
    section = SampleSection(temperature=1.0, max_new_tokens=12)
    model = load_to_sample(start, GPU_BF16)
    for drawn in decode(model, draws(6, 2), section, 1, -1, 2, GPU_BF16):
        ids = torch.tensor([[*drawn.draw.prompt, *drawn.tokens]], device="cuda")
        with torch.no_grad(), GPU_BF16.autocast():
            logits = model(ids).logits[0].float().log_softmax(-1)
        first = len(drawn.draw.prompt) - 1
        expected = sum(logits[first + place, token].item() for place, token in enumerate(drawn.tokens))
        assert drawn.logprob == pytest.approx(expected, abs=12 * LOGPROB_TOLERANCE["bfloat16"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_run_is_sound(wide, tmp_path, dtype):
    """Every stage on the GPU in a process of its own, interrupted between stages; the manifests say where it computed."""
    command = [
        sys.executable, "-m", "suasion", "run", str(RECIPE), "--runs", str(tmp_path), "--set", "model.device=cuda",
        "--set", f"model.dtype={dtype}", "--set", f"model.base={wide.base}",
    ]  # fmt: skip
    for until in (["--until", "sample"], []):
        done = subprocess.run(
            [*command, *until], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"}, timeout=500
        )
        assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "tiny"
    assert verify_run(folder)[0] == []
    assert read_json(folder / "03-sft" / "manifest.json")["device"] == "cuda"
    assert json.loads((folder / "09-evaluate" / "summary.json").read_text())["models"]
