"""Supervised fine-tuning on human replies, those that persuaded first: `pools/sft.jsonl` -> `adapter/`, `metrics.jsonl`.

TRL's SFTTrainer on rows that chat.py has rendered: its own tokenising, masking and truncation are switched off, the labels are
ours. The loss covers the reply and its stop token, and is the mean over tokens of the whole optimiser step. Off the GPU the loss
is computed here: TRL's head then scores every position, prompts included, which halves the speed of a small model on a CPU
(94 against 178 tokens/s, see docs/LOG.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, concatenate_datasets
from trl import SFTConfig, SFTTrainer

from suasion.chat import Renderer
from suasion.errors import UserError
from suasion.models import Lineage, base_hash, compute, load_policy, load_tokenizer
from suasion.records import Example, read_rows
from suasion.rundir import StageContext, StageResult
from suasion.training.loop import arguments, train
from suasion.training.processes import save_trained

IGNORED = -100


def training_rows(examples: list[Example], renderer: Renderer, max_length: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rendered rows {input_ids, labels}, and what was dropped by reason. Order follows ids, not the file."""
    rows, dropped = [], {"no reply": 0, "longer than max_length": 0}
    for example in sorted(examples, key=lambda example: example.id):
        if not example.reply or not example.reply.strip():
            dropped["no reply"] += 1
            continue
        rendered = renderer.render(example.turns, example.reply)
        if len(rendered.ids) > max_length:
            dropped["longer than max_length"] += 1
            continue
        labels = [token if trained else IGNORED for token, trained in zip(rendered.ids, rendered.mask, strict=True)]
        rows.append({"input_ids": list(rendered.ids), "labels": labels})
    return rows, dropped


class ReplyHeadTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose language-model head is applied only where a trained token is predicted. The loss is the same."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        labels = inputs["labels"][:, 1:]
        keep = (labels != IGNORED).any(dim=0).nonzero()[:, 0]
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], logits_to_keep=keep, use_cache=False
        ).logits.float()  # fmt: skip
        total = F.cross_entropy(logits.flatten(0, 1), labels[:, keep].flatten(), ignore_index=IGNORED, reduction="sum")
        loss: torch.Tensor = total / num_items_in_batch * self.args.world_size
        return loss


def with_fillers(dataset: Dataset, count: int) -> Dataset:
    """The rows and so many more that carry no loss: they complete the last micro-batches of several processes."""
    shortest = min(dataset, key=lambda row: len(row["input_ids"]))["input_ids"]
    empty = {"input_ids": shortest, "labels": [IGNORED] * len(shortest)}
    return concatenate_datasets([dataset, Dataset.from_list([empty] * count, features=dataset.features)]) if count else dataset


def persuaded_share(examples: list[Example]) -> float | None:
    """Share of the examples whose reply persuaded; None where no outcome is known."""
    known = [example.outcome > 0 for example in examples if example.outcome is not None]
    return round(sum(known) / len(known), 4) if known else None


def run_stage(stage: StageContext) -> StageResult:
    """Train the SFT adapter on the base model."""

    recipe = stage.recipe
    section = recipe.sft
    hardware = compute(recipe.model)
    tokenizer = load_tokenizer(recipe.model)
    renderer = Renderer(tokenizer, recipe.model.system_prompt)
    examples = list(read_rows(stage.input("pools", "sft.jsonl"), Example))
    rows, dropped = training_rows(examples, renderer, recipe.model.max_length)
    if not rows:
        raise UserError(f"none of the {len(examples)} SFT examples fits model.max_length {recipe.model.max_length}. Raise it.")
    lineage = Lineage(recipe.model)
    policy = load_policy(lineage, section.lora, recipe.seed, hardware.device)
    args = arguments(
        SFTConfig, section, stage.folder, hardware, len(rows), recipe.seed, "sft",
        max_length=None, packing=False, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    kind = SFTTrainer if hardware.device == "cuda" else ReplyHeadTrainer
    trainer = kind(model=policy, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    metrics = train(trainer, stage.folder, "sft", section.batch_size, "rows", with_fillers)
    save_trained(policy, stage.folder / "adapter", recipe.model)
    trained = [sum(label != IGNORED for label in row["labels"]) for row in rows]
    return StageResult(
        rows_in=len(examples),
        rows_out=len(rows),
        dropped={reason: count for reason, count in dropped.items() if count},
        facts={
            "start_lineage": lineage.hash,
            "lineage": lineage.extended(stage.folder / "adapter").hash,
            "template_hash": renderer.template_hash,
            "base_hash": base_hash(recipe.model),
            "persuaded_share": persuaded_share(examples),
            "stop_token": renderer.stop_id,
            "steps": metrics[-1]["step"],
            "first_loss": metrics[0]["loss"],
            "final_loss": metrics[-1]["loss"],
            "tokens_a_row": round(sum(len(row["input_ids"]) for row in rows) / len(rows), 1),
            "trained_tokens_a_row": round(sum(trained) / len(rows), 1),
        },
    )
