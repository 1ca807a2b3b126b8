"""A DPO training of seconds on the random tiny model, for tests; and as a program, to be killed or started twice.

python small_training.py FOLDER ADAPTER [--pause SECONDS] [--report-to TRACKER]   writes FOLDER/metrics.jsonl and FOLDER/adapter
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from suasion.models import Compute, Lineage, load_policy, load_tokenizer, round_for_training, save_adapter
from suasion.sections.training import DpoArm, LoraSection, ModelSection
from suasion.training.dpo import DpoTrainer, with_reference
from suasion.training.loop import arguments, train
from suasion.training.pairs import PairIds
from suasion.training.reference import reference_logprobs
from suasion.training.trl_engine import trl_trainer

CPU = Compute("cpu", "float32", torch.get_num_threads())
LORA = LoraSection(r=4, dropout=0.1)


def preference_pairs(count: int = 7) -> list[PairIds]:
    """Pairs of random ids, of unequal lengths."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(10, 900, (length,), generator=generator).tolist())

    return [PairIds(f"p{i}", ids(5 + i), ids(3 + i % 4), ids(6 - i % 3), 1.0) for i in range(count)]


def stir(policy, seed: int, std: float = 0.3) -> None:
    """Let a fresh adapter change the model: its B matrices are drawn instead of zero."""
    torch.manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)


def nonzero_adapter(model: ModelSection, folder: Path) -> Path:
    """An adapter that changes the model, as SFT would have left it."""
    policy = load_policy(Lineage(model), LORA, 0)
    stir(policy, 5)
    save_adapter(policy, folder, model)
    return folder


class AtStep(TrainerCallback):
    """Calls something when a step has ended."""

    def __init__(self, action):
        self.action = action

    def on_step_end(self, args, state, control, **kwargs):
        self.action(state.global_step)


def interrupt(step: int):
    """Stands for a kill: leaves the training in the middle of a step's bookkeeping."""

    def action(now: int) -> None:
        if now == step:
            raise KeyboardInterrupt

    return action


def run_dpo(lineage: Lineage, folder: Path, pairs: list[PairIds], at_step: Any = None, hardware: Compute = CPU, **settings: Any):
    """Train, or go on; returns (policy, pairs with their reference, metrics). settings: fields of the arm."""
    fields = {"learning_rate": 5e-3, "epochs": 3.0, "batch_size": 4, "checkpoints": 0, "lora": LORA, **settings}
    arm = DpoArm(name="t", labels="ai", pool="rlaif", **fields)
    folder.mkdir(parents=True, exist_ok=True)
    policy = round_for_training(load_policy(lineage, arm.lora, 1, hardware.device), hardware)
    reference = reference_logprobs(policy, pairs, hardware, folder / "reference.jsonl")
    rows = [with_reference(pair, reference[pair.id], reference[pair.id], arm) for pair in pairs]
    if arm.engine == "trl":
        trainer = trl_trainer(policy, arm, rows, load_tokenizer(lineage.base), folder, hardware, 1)
    else:
        args = arguments(TrainingArguments, arm, folder, hardware, len(rows), 1, "dpo-t")
        trainer = DpoTrainer(model=policy, arm=arm, hardware=hardware, train_dataset=rows, args=args)
    if at_step is not None:
        trainer.add_callback(AtStep(at_step))
    return policy, rows, train(trainer, folder, "dpo-t", folder / "logs" / "speed.jsonl")


def main() -> None:
    """Train in FOLDER, slowly if told, from a start model with ADAPTER."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--report-to", default="none")
    given = parser.parse_args()
    model = ModelSection(base="random:tiny", max_length=512)
    still = LoraSection(r=4, dropout=0.0)
    policy, _, _ = run_dpo(
        Lineage(model, (given.adapter,)), given.folder, preference_pairs(), lambda step: time.sleep(given.pause),
        epochs=5, checkpoints=4, lora=still, micro_batch_tokens=30, report_to=given.report_to,
    )  # fmt: skip
    if int(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0) == 0:
        save_adapter(policy, given.folder / "adapter", model)


if __name__ == "__main__":
    main()
