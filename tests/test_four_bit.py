"""A base in 4 bits (QLoRA): what trains, samples, scores and is exported is one model; the reference is the start; clear refusals."""

import importlib.util
import json
import math

import pytest
import torch
from small_training import CPU, nonzero_adapter, preference_pairs, run_dpo

from suasion import four_bit
from suasion.bases import base_folder
from suasion.errors import UsageError, UserError
from suasion.export import write_merged, write_one_adapter
from suasion.models import (
    Compute,
    Lineage,
    as_it_samples,
    load_base,
    load_merged,
    load_policy,
    load_to_sample,
    load_to_score,
    save_adapter,
)
from suasion.recipe import load_recipe
from suasion.sections.training import LoraSection, ModelSection
from suasion.training.dpo import kl_to_start
from suasion.training.pairs import score

TINY = ModelSection(base="random:tiny", max_length=512, quantization="nf4", dtype="float32", device="cpu")
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is an extra")


def logprobs(model, hardware=CPU) -> torch.Tensor:
    """Summed log-probs of some pairs, scored one by one as a reference is."""
    model.eval()
    with torch.no_grad():
        return torch.cat([score(model, [pair], hardware)[0] for pair in preference_pairs(4)])


@pytest.fixture(scope="module")
def lineage(tmp_path_factory) -> Lineage:
    """Two adapters on the 4-bit base, as sft -> rlaif leaves them."""
    folder = tmp_path_factory.mktemp("four")
    first = Lineage(TINY, (nonzero_adapter(TINY, folder / "sft"),))
    policy = load_policy(first, LoraSection(r=3, alpha=7, dropout=0.0, targets=("q_proj", "up_proj")), 0)
    torch.manual_seed(7)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(policy, folder / "rlaif", TINY)
    return first.extended(folder / "rlaif")


@needs_bitsandbytes
def test_linear_layers_are_in_four_bits_and_everything_else_in_fp32():
    model = load_base(TINY)
    assert four_bit.is_four_bit(model)
    assert not four_bit.is_four_bit(load_base(TINY.model_copy(update={"quantization": None})))
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds.pop("model.embed_tokens.weight") == torch.float32
    assert {dtype for name, dtype in kinds.items() if "norm" in name} == {torch.float32}
    assert {dtype for name, dtype in kinds.items() if "proj" in name} == {torch.uint8}


@needs_bitsandbytes
def test_rounding_makes_another_base():
    plain = TINY.model_copy(update={"quantization": None})
    assert Lineage(TINY).hash != Lineage(plain).hash
    assert (logprobs(load_base(TINY)) - logprobs(load_base(plain))).abs().max() > 1e-2


@needs_bitsandbytes
def test_dequantised_weights_are_the_same_model(lineage):
    """Scored in 4 bits with adapters beside, and merged into the de-quantised weights in fp32: pitfall 14."""
    merged = load_merged(lineage)
    assert not four_bit.is_four_bit(merged)
    scored = logprobs(load_to_score(lineage, "cpu"))
    assert (scored - logprobs(merged)).abs().max() < 1e-4
    assert (scored - logprobs(load_base(TINY))).abs().max() > 0.1  # or nothing was tested
    assert (scored - logprobs(load_to_score(Lineage(TINY, lineage.adapters[:1])))).abs().max() > 0.1


@needs_bitsandbytes
def test_what_is_merged_into_four_bits_is_another_model(lineage):
    """Why it is never done: rounding the sum moves log-probs by more than all that training is checked to."""
    from peft import PeftModel

    with pytest.warns(UserWarning, match="rounding errors"):
        rounded = PeftModel.from_pretrained(load_base(TINY), str(lineage.adapters[0])).merge_and_unload()
    assert (logprobs(rounded) - logprobs(load_to_score(Lineage(TINY, lineage.adapters[:1])))).abs().max() > 1e-2


@needs_bitsandbytes
def test_scoring_changes_no_weight_and_dropout_no_score(lineage):
    """bitsandbytes repacks weights in eval mode on some processors: a training after a reference pass would see others."""
    policy = load_policy(lineage, LoraSection(r=4, dropout=0.5), 0)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    first = logprobs(policy)
    policy.train()
    with torch.no_grad():
        again = torch.cat([score(policy, [pair], CPU)[0] for pair in preference_pairs(4)])  # the fresh adapter adds nothing
    assert torch.equal(first, again)
    assert torch.equal(first, logprobs(load_to_score(lineage, "cpu")))
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


@needs_bitsandbytes
def test_a_training_starts_at_zero_margin_learns_and_resumes(lineage, tmp_path):
    settings = {"epochs": 2, "checkpoints": 3, "micro_batch_tokens": 1}
    policy, rows, metrics = run_dpo(lineage, tmp_path / "whole", preference_pairs(), **settings)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert kl_to_start(policy, rows, CPU, 0, lineage) > 1e-6
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    from small_training import interrupt

    with pytest.raises(KeyboardInterrupt):
        run_dpo(lineage, tmp_path / "cut", preference_pairs(), at_step=interrupt(3), **settings)
    assert run_dpo(lineage, tmp_path / "cut", preference_pairs(), **settings)[2] == metrics


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_samples_is_what_was_trained(lineage, dtype):
    section = TINY.model_copy(update={"dtype": dtype})
    hardware = Compute("cpu", dtype, 1)
    *older, newest = lineage.adapters
    from peft import PeftModel

    policy = PeftModel.from_pretrained(load_to_score(Lineage(section, tuple(older))), str(newest), autocast_adapter_dtype=False)
    trained = logprobs(policy, hardware)
    sampled = logprobs(load_to_sample(Lineage(section, lineage.adapters), hardware), hardware)
    if dtype == "bfloat16":
        assert torch.equal(trained, sampled)
    else:
        assert (trained - sampled).abs().max() < 1e-4
    assert (logprobs(as_it_samples(policy, hardware), hardware) - trained).abs().max() < 1e-4


@needs_bitsandbytes
def test_a_reward_model_on_a_base_in_four_bits(tmp_path):
    """Trained beside 4-bit weights, scored with the adapter in the de-quantised ones: the same rewards."""
    from peft import PeftModel
    from safetensors.torch import load_file
    from test_reward import SETTINGS, outcome_pairs

    from suasion.training.reward import RewardModel, train_reward

    facts = train_reward(outcome_pairs(12), TINY, SETTINGS, tmp_path, seed=1)
    assert facts["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    model = RewardModel.load(tmp_path, TINY)
    pair = outcome_pairs(1, seed=5)[0]
    live = PeftModel.from_pretrained(load_base(TINY).base_model, str(tmp_path / "adapter")).eval()
    ids = model.renderer.render(pair.turns, pair.winner).ids
    with torch.no_grad():
        expected = (
            live(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] @ load_file(tmp_path / "head.safetensors")["weight"][0]
        )
    assert model.score(pair.turns, [pair.winner]) == pytest.approx([float(expected)], abs=1e-4)


@needs_bitsandbytes
def test_exports_are_read_by_plain_libraries(lineage, tmp_path):
    """One adapter is exact on the base in 4 bits; merged weights are exact everywhere, and plain fp32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    (tmp_path / "one").mkdir()
    write_one_adapter(lineage, tmp_path / "one")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(base_folder(TINY), dtype=torch.float32, quantization_config=config, device_map={"": "cpu"})  # fmt: skip
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    expected = logprobs(load_to_score(lineage))
    assert (logprobs(PeftModel.from_pretrained(base, str(tmp_path / "one"))) - expected).abs().max() < 1e-4
    write_merged(lineage, tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logprobs(plain) - expected).abs().max() < 1e-4


@needs_bitsandbytes
def test_a_device_that_bitsandbytes_cannot_use_is_named(monkeypatch):
    import bitsandbytes.functional as functional

    def fails(*args, **kwargs):
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(functional, "quantize_4bit", fails)
    with pytest.raises(UserError, match=r"cannot quantise on cpu \(RuntimeError: no kernel image"):
        load_base(TINY)


def test_without_the_extra_the_message_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(UserError, match=r"pip install 'suasion\[qlora\]'"):
        load_base(TINY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("sft.lora=null",), "4 bits cannot be trained"),
        (("dpo.rlaif.lora=null",), "4 bits cannot be trained"),
        (("processes={profile: fsdp2, count: 2}",), "not sharded"),
        (("model.quantization=int8",), "nf4"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    from pathlib import Path

    with pytest.raises(UsageError, match=message):
        load_recipe(Path(__file__).parents[1] / "recipes" / "tiny.yaml", ("model.quantization=nf4", *settings))


@needs_bitsandbytes
@pytest.mark.slow
def test_a_whole_run_in_four_bits_and_its_training_in_two_processes(tmp_path):
    """Every stage, with sampled log-probs compared in dpo and lineages in verify; then SFT under DDP, step by step the same."""
    from test_processes import STILL, assert_alike, metrics
    from test_processes import TINY as RECIPE

    from suasion.pipeline import run
    from suasion.verify import verify_run

    settings = (*STILL, "model.quantization=nf4")
    whole, _ = run(load_recipe(RECIPE, settings), tmp_path / "one")
    faults = verify_run(whole.path).faults
    assert faults == []
    assert whole.manifest("dpo-rlaif-rlhf").facts["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert whole.manifest("dpo-rlaif").facts["logprobs_checked"] > 0
    two, _ = run(load_recipe(RECIPE, (*settings, "processes={profile: ddp, count: 2}")), tmp_path / "two", last="sft")
    assert_alike(metrics(whole.path, "03-sft"), metrics(two.path, "03-sft"))
