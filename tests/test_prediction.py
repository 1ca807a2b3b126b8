"""Hours, dollars and memory on machines that are not here: formulas by hand, and advice that helps when it is taken."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from suasion.cli import app
from suasion.errors import UsageError, UserError
from suasion.machines import TABLE, Gpu, Machine, load_machines
from suasion.planning import Lengths
from suasion.prediction import (
    Shape,
    Shares,
    Sizes,
    flops_a_token,
    four_bit_bytes,
    gpu_memory,
    lines,
    measured_shares,
    predict,
    rates_of,
    read_sizes,
    rounded_bytes,
)
from suasion.recipe import load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
SHAPE = Shape(parameters=1000, layers=2, width=8, inner=16, vocabulary=50, cache_width=4)
HALF_BILLION = Shape(494_032_768, 24, 896, 4864, 151_936, 256)
LENGTHS = Lengths(context=30.0, reply=10.0)
MACHINE = Machine(vcpus=4, host_gib=16, gpus=1, gpu=Gpu(name="X", tflops=1e-6, gbps=1e-3, gib=24), price=2.0)
SHARES = Shares(train=0.5, prefill=0.25, decode=0.1, layer_seconds=0.0, trained_layer_seconds=0.0, source="by hand")


@pytest.fixture(scope="module")
def full():
    return load_recipe(RECIPES / "persuasion-rl.yaml")


def sizes(shape: Shape = HALF_BILLION) -> Sizes:
    return Sizes(shape, Lengths(520.0, 175.0), 9_400, None, 10**9)


def test_rates_by_hand() -> None:
    assert flops_a_token(SHAPE, 20, trained=False) == 2 * (1000 + 2 * 2 * 8 * 20)
    assert flops_a_token(SHAPE, 20, trained=True) == 2 * flops_a_token(SHAPE, 20, trained=False)
    rates = rates_of(SHAPE, LENGTHS, 4, MACHINE, SHARES)
    assert rates.prefill == rates.prompts == pytest.approx(1e6 * 0.25 / 3280)
    assert rates.train == pytest.approx(1e6 * 0.5 / 6560)
    step = 2 * (1000 + 4 * 35 * 2 * 4) / (1e6 * 0.1)  # weights in bf16, and the cache of four responses half way
    assert rates.decode == pytest.approx(4 / step)
    slow = rates_of(SHAPE, LENGTHS, 4, MACHINE, replace(SHARES, layer_seconds=1.0))
    assert slow.decode == pytest.approx(4 / 2.0)
    assert slow.prefill == pytest.approx(50 / 2.0)  # a pair of 30 + 2 x 10 tokens a pass
    assert slow.prompts == pytest.approx(4 * 30 / 2.0)  # four prompts together
    assert slow.train == rates.train
    slow = rates_of(SHAPE, LENGTHS, 4, MACHINE, replace(SHARES, trained_layer_seconds=3.0), micro_batch=120)
    assert slow.train == pytest.approx(100 / 6.0)  # two pairs a pass
    assert slow.prefill == rates.prefill
    longer = rates_of(SHAPE, LENGTHS, 4, MACHINE, replace(SHARES, trained_layer_seconds=3.0), micro_batch=40)
    assert longer.train == pytest.approx(50 / 6.0)  # a longer row stands alone
    odd = replace(LENGTHS, context=30.3)
    few = rates_of(SHAPE, odd, 4, MACHINE, replace(SHARES, trained_layer_seconds=3.0), rows=3)
    assert few.train == pytest.approx(3 * 50.3 / 6.0)  # no more than a process has of a step
    whole = rates_of(SHAPE, LENGTHS, 4, MACHINE, SHARES, number_bytes=4)
    assert whole.decode == pytest.approx(rates.decode / 2)
    untied = rates_of(replace(SHAPE, tables=2), LENGTHS, 4, MACHINE, SHARES)  # 50 x 8 embeddings are looked up, not read
    assert untied.decode == pytest.approx(4 / (2 * (600 + 4 * 35 * 2 * 4) / (1e6 * 0.1)))


def test_measured_shares_give_the_measured_rates_back() -> None:
    measured = rates_of(SHAPE, LENGTHS, 4, MACHINE, SHARES)
    shares = measured_shares(measured, SHAPE, LENGTHS, 4, MACHINE, "X")
    again = rates_of(SHAPE, LENGTHS, 4, MACHINE, shares)
    assert (again.train, again.prefill, again.decode) == pytest.approx((measured.train, measured.prefill, measured.decode))
    assert "measured here, on X" in shares.source


def test_the_full_size_fits_on_an_a10g_and_its_dollars_are_hours_times_price(full) -> None:
    table = load_machines()
    machine = table.machines["g5.xlarge"]
    made = predict(full, sizes(), machine)
    assert made.problems == []
    assert made.seconds == pytest.approx(sum(stage.seconds for stage in made.stages))
    unpriced = table.machines["p5.48xlarge"].model_copy(update={"price": None})
    asked = table.model_copy(update={"machines": {**table.machines, "p5.48xlarge": unpriced}})
    text = "\n".join(lines(full, sizes(), ["g5.xlarge", "p5.48xlarge"], asked))
    assert f"${made.seconds / 3600 * 1.006:.2f} at $1.006 an hour of {table.date}" in text
    assert "price asked at launch" in text
    assert "assumed" in text


def test_more_processes_train_faster_and_need_gpus(full) -> None:
    machine = load_machines().machines["g5.12xlarge"]
    several = full.model_copy(update={"processes": full.processes.model_copy(update={"profile": "ddp", "count": 4})})
    one, four = predict(full, sizes(), machine), predict(several, sizes(), machine)
    assert four.rates.train == 4 * one.rates.train
    assert four.rates.decode == 4 * one.rates.decode
    two_machines = several.model_copy(update={"processes": several.processes.model_copy(update={"machines": 2})})
    assert predict(two_machines, sizes(), machine).rates.train == 8 * one.rates.train
    assert predict(two_machines, sizes(), machine).rates.decode == 4 * one.rates.decode
    assert four.problems == []
    too_many = predict(several, sizes(), load_machines().machines["g5.xlarge"])
    assert "processes.count is 4, it has 1 GPUs: processes.count=1 and processes.profile=one" in too_many.problems
    load_recipe(RECIPES / "persuasion-rl.yaml", ("processes.count=1", "processes.profile=one"))
    sharded = several.model_copy(update={"processes": several.processes.model_copy(update={"profile": "fsdp2"})})
    assert gpu_memory(sharded, HALF_BILLION, 4)["sft"] < gpu_memory(several, HALF_BILLION, 4)["sft"]


def test_sharded_with_servers_one_copy_on_the_host_is_enough_and_a_model_may_be_larger_than_a_gpu(full) -> None:
    """70B, by hand: 2.6e11 bytes of weights on the host once, of which each of eight GPUs holds an eighth and nothing else whole."""
    giant = replace(HALF_BILLION, parameters=70 * 10**9)
    machine = load_machines().machines["p5.48xlarge"]
    servers = "sample.engine={kind: endpoint, server: vllm, urls: ['http://10.0.0.2:8000/v1'], parity_prompts: %d}"
    found = {}
    for name, options in {
        "local": (),
        "compared": (servers % 4,),
        "servers": (servers % 0, "evaluate.likelihood_pairs=0"),
    }.items():
        recipe = load_recipe(RECIPES / "persuasion-rl.yaml", ("processes={profile: fsdp2, count: 8}", *options))
        found[name] = predict(recipe, sizes(giant), machine)
    weights = 4 * 70 * 10**9
    host = {name: {stage: (held - 4 * 10**9) // weights for stage, held in one.host_bytes.items()} for name, one in found.items()}
    assert host["local"] == dict.fromkeys(host["local"], 1) | {"sample": 8, "evaluate": 8}
    assert host["compared"] == dict.fromkeys(host["local"], 1)
    assert host["servers"] == host["compared"] | {"sample": 0, "evaluate": 0}
    several = load_recipe(RECIPES / "persuasion-rl.yaml", ("processes={profile: ddp, count: 8}",))
    assert predict(several, sizes(giant), machine).host_bytes["sft"] == 4 * 10**9 + 8 * weights
    whole = load_recipe(RECIPES / "persuasion-rl.yaml", ("model.dtype=float32",))  # shards are not rounded
    assert found["servers"].gpu_bytes["sft"] - weights / 8 == pytest.approx(gpu_memory(whole, giant, 1)["sft"] - weights)
    assert found["servers"].gpu_bytes["sample"] == found["servers"].gpu_bytes["evaluate"] == 0
    assert not any(problem.startswith(("sample", "evaluate", "loading")) for problem in found["servers"].problems)
    assert any("sample.engine" in problem for problem in found["compared"].problems)


@given(gib=st.floats(4, 30), micro=st.sampled_from([1, 2048, 8192, 65536]), batch=st.integers(1, 2_000))
def test_advice_that_names_a_value_makes_it_fit(full, gib, micro, batch) -> None:
    machine = Machine(vcpus=4, host_gib=64, gpus=1, gpu=Gpu(name="X", tflops=70, gbps=600, gib=gib))
    recipe = load_recipe(RECIPES / "persuasion-rl.yaml", (f"sft.micro_batch_tokens={micro}", f"sample.batch_size={batch}"))
    problems = predict(recipe, sizes(), machine).problems
    settings = tuple(dict.fromkeys(word for problem in problems for word in problem.split() if "=" in word and word[0] != "("))
    assert len(settings) == len({setting.split("=")[0] for setting in settings})
    if all("=" in problem for problem in problems):
        better = load_recipe(
            RECIPES / "persuasion-rl.yaml", (f"sft.micro_batch_tokens={micro}", f"sample.batch_size={batch}", *settings)
        )
        assert predict(better, sizes(), machine).problems == []


def test_recomputed_activations_need_less_memory_and_more_time(full) -> None:
    """Of 24 layers 896 wide and 4,864 inside a token keeps 24 inputs in fp32 and one layer whole in bf16, instead of 24 whole."""
    spared = full.model_copy(update={"sft": full.sft.model_copy(update={"recompute_activations": True})})
    layer = 2 * (12 * 896 + 4 * 4864)
    before, after = (gpu_memory(recipe, HALF_BILLION, 1) for recipe in (full, spared))
    assert before["sft"] - after["sft"] == 4096 * (23 * layer - 24 * 896 * 4)
    assert before["dpo-rlaif"] == after["dpo-rlaif"]
    machine = load_machines().machines["g5.xlarge"]
    seconds = [{stage.stage: stage.seconds for stage in predict(recipe, sizes(), machine).stages} for recipe in (full, spared)]
    assert seconds[1]["sft"] > 1.2 * seconds[0]["sft"]
    assert seconds[1]["dpo-rlaif"] == seconds[0]["dpo-rlaif"]


def test_what_fits_only_recomputed_is_told_so(full) -> None:
    """Rows of 4,096 tokens keep too much in 8 GiB, recomputed they do not."""
    long = full.model_copy(update={"model": full.model.model_copy(update={"max_length": 4096})})
    small = Machine(vcpus=4, host_gib=64, gpus=1, gpu=Gpu(name="X", tflops=70, gbps=600, gib=9))
    told = next(problem for problem in predict(long, sizes(), small).problems if problem.startswith("sft"))
    assert "sft.recompute_activations=true" in told
    spared = long.model_copy(update={"sft": long.sft.model_copy(update={"recompute_activations": True})})
    assert not any(problem.startswith("sft") for problem in predict(spared, sizes(), small).problems)


def test_four_bits_are_counted_by_hand(full) -> None:
    """50 x 8 numbers of the token table in fp32; the other 600 with 4 bits, a byte for 64 of them, and a float for 256 of those bytes."""
    assert four_bit_bytes(SHAPE) == 4 * 400 + int(600 * (0.5 + 1 / 64 + 4 / 64 / 256))
    assert four_bit_bytes(replace(SHAPE, tables=2)) == 4 * 800 + int(200 * (0.5 + 1 / 64 + 4 / 64 / 256))
    quantised = full.model_copy(update={"model": full.model.model_copy(update={"quantization": "nf4"})})
    saved = rounded_bytes(full, HALF_BILLION) - four_bit_bytes(HALF_BILLION)
    for stage, needed in gpu_memory(full, HALF_BILLION, 1).items():
        assert needed - gpu_memory(quantised, HALF_BILLION, 1)[stage] == saved > 0


def test_weights_at_work_are_counted_by_hand(full) -> None:
    """50 x 8 embeddings in fp32, the head's copy of them in bf16, and the other 600 numbers in bf16; in fp32 all 1,000."""
    assert rounded_bytes(full, SHAPE) == 4 * 400 + 2 * 400 + 2 * 600
    assert rounded_bytes(full, replace(SHAPE, tables=2)) == 4 * 400 + 2 * 400 + 2 * 200
    assert rounded_bytes(load_recipe(RECIPES / "persuasion-rl.yaml", ("model.dtype=float32",)), SHAPE) == 4000
    loading = replace(
        HALF_BILLION, parameters=10 * HALF_BILLION.parameters
    )  # more than its rounded copy and a small batch together
    small = load_recipe(RECIPES / "persuasion-rl.yaml", ("sample.batch_size=1",))
    assert gpu_memory(small, loading, 1)["sample"] == 4 * loading.parameters


def test_a_batch_takes_what_the_sampler_reckons_with(full) -> None:
    from types import SimpleNamespace

    from suasion.sampling.draws import Draw
    from suasion.sampling.local import memory_needed

    config = SimpleNamespace(
        num_key_value_heads=2,
        num_attention_heads=14,
        hidden_size=896,
        num_hidden_layers=24,
        intermediate_size=4864,
        vocab_size=151_936,
    )
    batch = [Draw(str(number), tuple(range(full.corpus.context_tokens)), 0) for number in range(full.sample.batch_size)]
    model = SimpleNamespace(config=config, device=torch.device("cuda"))
    reckoned = memory_needed(model, batch, full.sample, "bfloat16")
    assert gpu_memory(full, HALF_BILLION, 1)["evaluate"] == rounded_bytes(full, HALF_BILLION) + reckoned


def test_a_local_judge_takes_its_fp32_weights(full) -> None:
    """7B are 28 GB: too much for 24 of a GPU and for 16 of a host, on which two would have to be loaded by two processes."""
    machine = load_machines().machines["g5.xlarge"]
    judged = replace(sizes(), judges={"ai-labels": 28 * 10**9})
    made = predict(full, judged, machine)
    assert (made.gpu_bytes["ai-labels"], made.host_bytes["ai-labels"]) == (28 * 10**9, 32 * 10**9)
    assert made.problems[0].startswith("ai-labels needs 26.1 GiB of the GPU's 22.5: a smaller model as judge")
    assert made.problems[1].startswith("loading for ai-labels needs 29.8 GiB of the host's 16")
    small = predict(full, replace(sizes(), judges={"evaluate": 10**9}), machine)
    assert small.problems == []
    assert small.gpu_bytes == predict(full, sizes(), machine).gpu_bytes


def test_sizes_know_the_models_that_judge_here() -> None:
    judge = "{kind: llm, provider: local, model: 'bundled:smollm2-135m-instruct'}"
    alone, judged = (read_sizes(load_recipe(RECIPES / "tiny.yaml", options)) for options in ((), (f"ai_labels.grader={judge}",)))
    assert alone.judges == {}
    assert judged.judges == {"ai-labels": 4 * 134_515_008}
    assert judged.disk_bytes - alone.disk_bytes == 4 * 134_515_008


def test_a_model_that_does_not_fit_at_all_is_told_so(full) -> None:
    giant = replace(HALF_BILLION, parameters=70 * 10**9)
    problems = predict(full, sizes(giant), load_machines().machines["g5.xlarge"]).problems
    assert all("the weights alone do not fit" in problem for problem in problems if not problem.startswith("loading"))
    assert any(problem.startswith("loading for sft needs") for problem in problems)


def test_the_table_is_valid_dated_and_can_be_replaced(tmp_path) -> None:
    table = load_machines()
    assert {"g5.xlarge", "p5.48xlarge"} <= set(table.machines)
    assert table.side_costs(73.0) == pytest.approx(73 * 0.08 / 730 + 0.005)
    own = tmp_path / "own.yaml"
    own.write_text(TABLE.read_text().replace("tflops: 70", "tflops: -1", 1))
    with pytest.raises(UsageError, match=r"machines\.g5\.xlarge\.gpu\.tflops"):
        load_machines(own)
    own.write_text(TABLE.read_text() + "  c7i.large: {vcpus: 2, host_gib: 4, gpus: 0, price: 0.1}\n")
    with pytest.raises(UsageError, match=r"machines\.c7i\.large\.gpu"):
        load_machines(own)
    with pytest.raises(UsageError, match="cannot be read"):
        load_machines(tmp_path / "none.yaml")


def test_plan_on_other_machines() -> None:
    done = CliRunner().invoke(app, ["plan", str(RECIPES / "tiny.yaml"), "--on", "g5.xlarge"])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("g5.xlarge (1 x A10G, 22.5 GiB; host 16 GiB): ")
    assert "sft" in done.output
    assert len(re.findall(r"^  [\w-]+ +[\w. ]+ +\$\d+\.\d\d +\d+\.\d GiB GPU +\d+\.\d GiB host$", done.output, re.MULTILINE)) == 7
    assert len(re.findall(r"^  [\w-]+ +[\w. ]+ +\$\d+\.\d\d$", done.output, re.MULTILINE)) == 6  # corpus, pools, labels, report
    assert "model.dtype is float32, these peaks are of bf16" in done.output
    judged = CliRunner().invoke(
        app,
        ["plan", str(RECIPES / "tiny.yaml"), "--on", "g5.12xlarge", "--set", "ai_labels.grader={kind: llm, model: some-model}"],
    )
    assert "uses 1 of its 4 GPUs; all of them: processes.profile=ddp processes.count=4" in judged.output
    assert "warning: ai-labels asks a language model" in judged.output
    refused = CliRunner().invoke(app, ["plan", str(RECIPES / "tiny.yaml"), "--on", "g9.huge"])
    assert isinstance(refused.exception, UsageError)


def test_a_plan_of_a_hubs_model_fetches_no_weights(tiny, tmp_path, monkeypatch) -> None:
    """Of 70B they would be 140 GB, for a question about money."""
    import huggingface_hub

    from suasion.bases import base_folder

    asked = []

    def snapshot(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        for path in base_folder(tiny).glob("*.json"):
            shutil.copy(path, tmp_path / path.name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    recipe = load_recipe(RECIPES / "tiny.yaml", ("model.base=somebody/some-model",))
    assert read_sizes(recipe).shape == read_sizes(load_recipe(RECIPES / "tiny.yaml")).shape
    assert asked
    assert all("*.safetensors" not in patterns and "*.json" in patterns for patterns in asked)
    with pytest.raises(UserError, match="safetensors"):
        base_folder(recipe.model)
    assert "*.safetensors" in asked[-1]
