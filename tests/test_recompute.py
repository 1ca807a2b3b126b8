"""Recomputed activations: less is kept, and nothing else changes; neither in a step, nor in a training, nor by switching it on midway."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from small_training import CPU, LORA, interrupt, nonzero_adapter, preference_pairs, run_dpo
from test_reward import SETTINGS, outcome_pairs
from trl import SFTConfig

from suasion.models import Lineage, load_policy, load_tokenizer, round_for_training
from suasion.pipeline import recipe_slice
from suasion.recipe import load_recipe
from suasion.sections.training import LoraSection, SftSection
from suasion.training import dpo
from suasion.training.loop import arguments, train
from suasion.training.pairs import score
from suasion.training.reward import train_reward
from suasion.training.sft import IGNORED, PackedSftTrainer


@pytest.fixture(scope="module")
def lineage(tiny, tmp_path_factory):
    return Lineage(tiny, (nonzero_adapter(tiny, tmp_path_factory.mktemp("sft") / "adapter"),))


@pytest.fixture
def layers(monkeypatch) -> list[int]:
    """One entry for each pass through a layer of which only the input was kept."""
    passes, real = [], torch.utils.checkpoint.checkpoint

    def counted(*args, **kwargs):
        passes.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    return passes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_equal_bit_by_bit_and_less_is_kept(lineage, dtype):
    """Of a packed row of several pairs that share their prompts, with dropout on; log-probs too."""
    found = []
    longer = [replace(pair, prompt=pair.prompt * 3) for pair in preference_pairs(5)]  # the head is applied to replies alone
    for recompute in (False, True):
        hardware = replace(CPU, dtype=dtype)
        policy = round_for_training(load_policy(lineage, LoraSection(r=4, dropout=0.2), 0), hardware).train()
        if recompute:
            policy.activation_checkpointing_enable()
        kept = []

        def note(tensor, kept=kept):
            kept.append(tensor.numel() * tensor.element_size())
            return tensor

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            sums = score(policy, longer, hardware)[0]
        (sums[:, 0] - sums[:, 1]).pow(2).sum().backward()
        gradients = {name: value.grad for name, value in policy.named_parameters() if value.grad is not None}
        found.append((sums.detach(), gradients, sum(kept)))
    (sums, gradients, kept), (again, regained, less) = found
    assert torch.equal(sums, again)
    assert gradients.keys() == regained.keys()
    assert any(value.abs().max() > 0 for value in gradients.values())
    for name, value in gradients.items():
        assert torch.equal(value, regained[name]), name
    assert less < 0.8 * kept  # the head's stays: two layers of 32, and a vocabulary of 4,000


@pytest.mark.parametrize("settings", [{}, {"lora": None, "learning_rate": 1e-3}, {"engine": "trl"}], ids=["lora", "whole", "trl"])
def test_a_training_keeps_less_and_leaves_the_same_bytes(lineage, tmp_path, layers, settings):
    runs = []
    for recompute in (False, True):
        policy, _, metrics = run_dpo(
            lineage, tmp_path / str(recompute), preference_pairs(), epochs=2, recompute_activations=recompute, **settings
        )
        runs.append((metrics, {name: value.detach() for name, value in policy.named_parameters() if value.requires_grad}))
        assert bool(layers) is recompute
    assert runs[0][0] == runs[1][0]
    for name, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][name]), name


def test_a_reward_model_too(tiny, tmp_path, layers):
    for recompute in (False, True):
        settings = SETTINGS.model_copy(
            update={"recompute_activations": recompute, "epochs": 2, "lora": LoraSection(r=4, dropout=0.1)}
        )
        train_reward(outcome_pairs(7), tiny, settings, tmp_path / str(recompute), seed=1)
        assert bool(layers) is recompute
    for file in ("adapter/adapter_model.safetensors", "head.safetensors", "metrics.jsonl"):
        assert (tmp_path / "True" / file).read_bytes() == (tmp_path / "False" / file).read_bytes(), file


def test_supervised_fine_tuning_too(lineage, tmp_path, layers):
    draw = torch.Generator().manual_seed(4)
    rows = []
    for number in range(6):
        ids = torch.randint(10, 900, (12 + number,), generator=draw).tolist()
        rows.append({"id": f"r{number}", "input_ids": ids, "labels": [IGNORED] * 6 + ids[6:]})
    runs = []
    for recompute in (False, True):
        section = SftSection(
            epochs=2, batch_size=4, checkpoints=0, lora=LoraSection(r=4, dropout=0.1), recompute_activations=recompute
        )
        args = arguments(
            SFTConfig, section, tmp_path / str(recompute), CPU, len(rows), 0, "sft",
            max_length=None, packing=False, dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        trainer = PackedSftTrainer(
            model=load_policy(lineage, section.lora, 0), section=section, hardware=CPU, args=args,
            train_dataset=Dataset.from_list(rows), processing_class=load_tokenizer(lineage.base),
        )  # fmt: skip
        (tmp_path / str(recompute)).mkdir(exist_ok=True)
        runs.append(train(trainer, tmp_path / str(recompute), "sft"))
        assert bool(layers) is recompute
    assert runs[0] == runs[1]


def test_it_may_be_switched_on_midway(lineage, tmp_path):
    fields = {"epochs": 4, "checkpoints": 3}
    run_dpo(lineage, tmp_path / "whole", preference_pairs(), **fields)
    with pytest.raises(KeyboardInterrupt):
        run_dpo(lineage, tmp_path / "cut", preference_pairs(), at_step=interrupt(5), **fields)
    run_dpo(lineage, tmp_path / "cut", preference_pairs(), recompute_activations=True, **fields)
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_what_the_advice_says_of_going_on_is_true():
    """An unfinished stage is gone on with where its slice of the recipe is the same (pipeline.py)."""

    def slices(*settings):
        recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "tiny.yaml", settings)
        return [json.dumps(recipe_slice(recipe, (section,)), sort_keys=True) for section in ("sft", "dpo.rlaif", "model")]

    before = slices()
    assert slices("sft.recompute_activations=true", "dpo.rlaif.recompute_activations=true") == before
    for setting in ("sft.micro_batch_tokens=99", "dpo.rlaif.micro_batch_tokens=99", "model.max_length=999"):
        assert slices(setting) != before


def test_memory_advice_follows_what_is_set(lineage, tmp_path, monkeypatch):
    def full(model, rows, hardware):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(dpo, "score", full)
    told = []
    for recompute in (False, True):
        with pytest.raises(dpo.UserError) as caught:
            run_dpo(lineage, tmp_path / str(recompute), preference_pairs(), recompute_activations=recompute, lora=LORA)
        told.append(str(caught.value))
    assert "Set recompute_activations to true" in told[0]
    assert "recompute_activations" not in told[1]
    assert all("lower micro_batch_tokens (now 512)" in text.lower() for text in told)
