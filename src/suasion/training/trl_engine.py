"""`engine: trl`: TRL's DPOTrainer on the very ids, reference log-probs and order of rows that our own step gets.

It is the oracle of our step (tests), its opponent (benchmarks), and a way out if ours should fail on a model. TRL's own tokenising
and reference pass are switched off: it would split replies that a model sampled otherwise, and take the base for the reference
where only a peft_config is passed. It reads one pair a time, so that its mean over micro-batches is the mean over pairs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from trl import DPOConfig, DPOTrainer

from suasion.errors import UserError
from suasion.memory import memory_advice, peak_memory_mb
from suasion.models import Compute
from suasion.sections.training import DpoArm
from suasion.training.attention import use_sdpa
from suasion.training.loop import arguments
from suasion.training.pairs import PairIds
from suasion.training.processes import world_size
from suasion.training.steps import OWN, SPEED, EpochOrder

LOSSES = {"sigmoid": "sigmoid", "robust": "robust", "length-normalised": "sigmoid_norm", "length-desensitised": "sigmoid"}
NAMES = {
    "logps/chosen": "chosen_logp",
    "logps/rejected": "rejected_logp",
    "rewards/chosen": "chosen_reward",
    "rewards/rejected": "rejected_reward",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
}


class RowOrder(Sampler[int]):
    """The rows one by one in the order of our own steps."""

    def __init__(self, order: EpochOrder):
        self.order = order

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.order.ids)

    def __iter__(self) -> Iterator[int]:
        return (row for batch in self.order for row in batch)


class TrlDpoTrainer(DPOTrainer):  # type: ignore[misc]
    """DPOTrainer that takes rows as they are, with their reference log-probs, and logs what our own step logs."""

    def __init__(self, *args: Any, hardware: Compute, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.hardware = hardware
        self._own: list[dict[str, float]] = []  # of the pairs of the step so far
        self._spent = {"tokens": 0.0, "seconds": 0.0}

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return RowOrder(EpochOrder(self.train_dataset["id"], size, self.args.data_seed))

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """One pair: TRL's own step, with what our step says beside it."""
        began = time.perf_counter()
        tokens = int(inputs["attention_mask"].sum())
        with memory_advice(lambda: _pair_advice(tokens)):
            loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        chosen, rejected = inputs["completion_mask"].sum(1).tolist()
        values = {"chosen_tokens": chosen, "rejected_tokens": rejected}
        if self.ld_alpha is None:  # with it TRL's log-probs are weighted ones
            said = self._metrics["train"]
            policy = said["logps/chosen"][-1] + said["logps/rejected"][-1]
            known = float(inputs["ref_chosen_logps"].sum() + inputs["ref_rejected_logps"].sum())
            values["kl"] = (known - policy) / (chosen + rejected)
        self._own.append(values)
        self._spent["tokens"] += tokens
        self._spent["seconds"] += time.perf_counter() - began
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._own:
            means = {name: sum(values) / len(values) for name, values in self._metrics["train"].items() if values}
            pairs, self._own = self._own, []
            spent, self._spent = self._spent, {"tokens": 0.0, "seconds": 0.0}
            speed = {
                **spent,
                "tokens_per_second": spent["tokens"] / spent["seconds"],
                "memory_mb": peak_memory_mb(self.hardware.device),
            }
            logs = {
                **logs,
                **{OWN + ours: means[theirs] for theirs, ours in NAMES.items() if theirs in means},
                **{OWN + name: sum(pair[name] for pair in pairs) / len(pairs) for name in pairs[0]},
                **{SPEED + name: value for name, value in speed.items()},
            }
        super().log(logs, *args, **kwargs)


def _pair_advice(tokens: int) -> str:
    return (
        f"at a pair of {tokens} tokens, read one pair a time. Set recompute_activations to true and run again: it goes on from the last checkpoint. "
        "Or use engine: suasion, which reads the prompt once: the stage then begins anew; or lower model.max_length (long rows are then left out), "
        "which all trainings read: --redo sft."
    )


def refuse_unsupported(arm: DpoArm, pairs: Sequence[PairIds]) -> None:
    """Raises UserError where TRL would compute something else than the recipe says, or cannot compute it."""
    if arm.loss == "ipo":
        raise UserError(
            f"dpo {arm.name}: TRL's IPO divides by the number of tokens, ours (as the paper's eq. 17) does not. Use engine: suasion."
        )
    if world_size() > 1:
        raise UserError(f"dpo {arm.name}: engine: trl trains in one process here. Use engine: suasion, or processes.profile=one.")
    if arm.lora is None:
        raise UserError(f"dpo {arm.name}: lora: null is trained by engine: suasion only.")
    if arm.soft_labels or any(pair.weight != 1 for pair in pairs):
        raise UserError(f"dpo {arm.name}: TRL knows neither soft labels nor weights of pairs. Use engine: suasion.")


def trl_trainer(
    policy: Any, arm: DpoArm, pairs: Sequence[PairIds], tokenizer: Any, folder: Path, hardware: Compute, seed: int
) -> Any:
    """A trainer for pairs that carry their reference log-probs. Raises UserError for what TRL cannot do."""
    refuse_unsupported(arm, pairs)
    use_sdpa(policy)
    rows = []
    for pair in pairs:
        assert pair.reference is not None, "the reference log-probs come before the first step"
        chosen, rejected = (
            pair.reference.sums()
            if arm.loss != "length-desensitised"
            else tuple(
                head + arm.length_alpha * (whole - head)
                for whole, head in zip(pair.reference.sums(), pair.reference.heads(), strict=True)
            )
        )
        rows.append(
            {
                "id": pair.id, "prompt_ids": list(pair.prompt), "chosen_ids": list(pair.chosen), "rejected_ids": list(pair.rejected),
                "ref_chosen_logps": chosen, "ref_rejected_logps": rejected,
            }
        )  # fmt: skip
    args = arguments(
        DPOConfig, arm, folder, hardware, len(rows), seed, f"dpo-{arm.name}",
        beta=arm.beta, loss_type=[LOSSES[arm.loss]], label_smoothing=arm.label_smoothing,
        ld_alpha=arm.length_alpha if arm.loss == "length-desensitised" else None,
        max_length=None, precompute_ref_log_probs=True, disable_dropout=False,
    )  # fmt: skip
    args.per_device_train_batch_size, args.gradient_accumulation_steps = 1, arm.batch_size
    return TrlDpoTrainer(
        model=policy, hardware=hardware, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
