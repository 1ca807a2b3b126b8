"""Supervised fine-tuning on human replies, those that persuaded first: `pools/sft.jsonl` -> `adapter/`, `metrics.jsonl`.

TRL's SFTTrainer on rows that chat.py has rendered: its own tokenising, masking and truncation are switched off, the labels are
ours. The loss covers the reply and its stop token, and is the mean over tokens of the whole optimiser step. Rows are packed to a
token budget under a mask that lets no row see another (prefix.py); TRL's own packing keeps rows apart only with FlashAttention.
The head is applied only where a trained token is predicted: TRL's scores every position off the GPU, prompts included, which
halves the speed of a small model on a CPU (94 against 178 tokens/s, see docs/LOG.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from suasion.chat import Renderer
from suasion.errors import UserError
from suasion.models import Compute, Lineage, base_hash, compute, load_tokenizer
from suasion.records import Example, read_rows
from suasion.rundir import StageContext, StageResult
from suasion.sections.training import SftSection
from suasion.training.attention import attention_of
from suasion.training.loop import arguments, policy_of, speed_file, train
from suasion.training.prefix import pack, reply_logits
from suasion.training.processes import save_trained
from suasion.training.steps import WholeSteps

IGNORED = -100


def training_rows(examples: list[Example], renderer: Renderer, max_length: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rendered rows {id, input_ids, labels}, and what was dropped by reason. Order follows ids, not the file."""
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
        rows.append({"id": example.id, "input_ids": list(rendered.ids), "labels": labels})
    return rows, dropped


class PackedSftTrainer(WholeSteps, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer on packed rows: the mean loss over the trained tokens of the whole optimiser step."""

    def __init__(self, *args: Any, section: SftSection, hardware: Compute, **kwargs: Any):
        super().__init__(*args, data_collator=list, **kwargs)
        self.section, self.hardware = section, hardware

    def row_id(self, row: dict[str, Any]) -> str:
        return str(row["id"])

    def row_tokens(self, row: dict[str, Any]) -> int:
        return len(row["input_ids"])

    def row_weight(self, row: dict[str, Any]) -> float:
        return float(trained_tokens(row))

    def micro_loss(self, model: Any, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        parts = [(row["input_ids"][: -trained_tokens(row)], [row["input_ids"][-trained_tokens(row) :]]) for row in rows]
        packed = pack(parts).to(self.args.device)
        with self.hardware.autocast():
            logits = reply_logits(model, packed)
        return F.cross_entropy(logits, packed.targets, reduction="sum"), {}


def trained_tokens(row: dict[str, Any]) -> int:
    """Tokens of the reply and its stop token; they are the row's last."""
    return sum(label != IGNORED for label in row["labels"])


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
    policy = policy_of(lineage, section.lora, recipe.seed, hardware)
    args = arguments(
        SFTConfig, section, stage.folder, hardware, len(rows), recipe.seed, "sft",
        max_length=None, packing=False, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = PackedSftTrainer(
        model=policy,
        section=section,
        hardware=hardware,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    metrics = train(trainer, stage.folder, "sft", speed_file(stage.folder))
    save_trained(policy, stage.folder / "adapter", recipe.model)
    trained = [trained_tokens(row) for row in rows]
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
            "attention": attention_of(policy),
            "steps": metrics[-1]["step"],
            "first_loss": metrics[0]["loss"],
            "final_loss": metrics[-1]["loss"],
            "tokens_a_row": round(sum(len(row["input_ids"]) for row in rows) / len(rows), 1),
            "trained_tokens_a_row": round(sum(trained) / len(rows), 1),
        },
    )
