"""fsdp2: one whole copy on the host, shares everywhere else, and the same model out of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sharding_stage import CPU
from small_training import nonzero_adapter, preference_pairs

from suasion.models import Lineage, load_to_score, load_tokenizer
from suasion.recipe import load_recipe
from suasion.records import read_json
from suasion.rundir import StageContext
from suasion.training.processes import is_sharded, train_apart
from suasion.training.reference import reference_logprobs

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"


def in_processes(count: int, folder: Path, monkeypatch: Any, base: str = "random:tiny", **told: Any) -> list[dict[str, Any]]:
    """What each of so many processes of a sharded training found."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path(__file__).parents[1] / 'src'}")
    recipe = load_recipe(TINY, (f"processes={{profile: fsdp2, count: {count}}}", "model.dtype=float32", f"model.base={base}"))
    for name in ("first", "again"):
        (folder / name).mkdir(parents=True)
    facts = {"adapters": [], "folder": str(folder), "pairs": 0, "compare": False, **told}
    train_apart(StageContext(recipe, "sft", folder / "03-sft", {}, folder, facts={"test": facts}), "sharding_stage", "cpu")
    return [read_json(folder / f"{rank}.json") for rank in range(count)]


def test_outside_of_accelerate_nothing_is_sharded(monkeypatch):
    assert not is_sharded()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not is_sharded()  # one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert is_sharded()


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_process_holds_its_share_and_they_are_the_model(tmp_path, monkeypatch, count):
    """Odd numbers of pairs, so that a process has none left while another still needs it; the second time with some of them cached."""
    model = load_recipe(TINY).model
    adapters = [nonzero_adapter(model, tmp_path / "sft")]
    found = in_processes(count, tmp_path / "out", monkeypatch, adapters=[str(adapters[0])], pairs=5, compare=True)
    whole = found[0]["whole"]
    assert [one["sharded"] and one["shards"] for one in found] == [True] * count
    assert found[0]["absent"] == 0
    assert all(one["present"] == one["trained"] > 0 and one["addresses"] for one in found[1:])
    assert all(one["present"] + one["absent"] == found[0]["present"] for one in found[1:])
    assert sum(one["share"] for one in found) == whole
    assert max(one["share"] for one in found) < 1.2 * whole / count
    assert found[0]["difference"] == 0
    start = load_to_score(Lineage(model, tuple(adapters)))
    for name, pairs in (("first", 5), ("again", 8)):
        alone = reference_logprobs(start, preference_pairs(pairs), CPU, tmp_path / f"{name}.jsonl")
        assert len(alone) == pairs
        for one in found:
            assert one[name].keys() == alone.keys()
            for key, value in alone.items():
                assert one[name][key] == pytest.approx(value.sums(), abs=1e-4)


@pytest.mark.slow
def test_only_the_first_process_ever_holds_the_whole_model(tmp_path, monkeypatch):
    """0.6 GB of fp32 weights, four processes: the first holds them once, the others a quarter; before, each held all."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(load_recipe(TINY).model)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=4096, num_hidden_layers=9, num_attention_heads=8
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert weights > 600e6
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    del model
    first, *others = in_processes(4, tmp_path / "out", monkeypatch, base=str(tmp_path / "base"))
    print([{name: round(one[name] / 1e6) for name in ("before", "policy", "scorer", "peak")} for one in (first, *others)])
    assert first["peak"] - first["before"] > 0.9 * weights
    for one in others:
        assert one["policy"] - one["before"] < 0.1 * weights
        assert one["scorer"] - one["before"] < 0.3 * weights
        assert (
            one["peak"] - one["before"] < 0.9 * weights
        )  # a tensor at a time passes through; glibc is slow to give freed blocks back
