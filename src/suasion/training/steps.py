"""One optimiser step from whole rows: packed to a token budget, shared among processes, with one result however it is cut.

The loader hands out the rows of a whole optimiser step; `WholeSteps` cuts them into micro-batches of at most `micro_batch_tokens`
tokens, each one packed row (prefix.py), and divides every loss by the weight of the whole step. So a token weighs the same whatever
the micro-batches are (a mean of means does not: trl #2604), and two processes see exactly the rows that one would: each plans
the same micro-batches and takes its share, none is dropped or doubled at an epoch's end.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from suasion.memory import memory_advice, peak_memory_mb
from suasion.models import Compute
from suasion.sections.training import CPU_TOKENS, GPU_TOKENS, TrainingSection
from suasion.seeding import derive_seed
from suasion.training.processes import summed

OWN, SPEED = "step/", "speed/"  # prefixes of logged values: of the step itself, and of the clock
GOES_ON = "it goes on from the last checkpoint, with the same results"


def token_budget(section: TrainingSection, hardware: Compute) -> int:
    """Tokens of one micro-batch: the recipe's, else what suits the device."""
    return section.micro_batch_tokens or (GPU_TOKENS if hardware.device == "cuda" else CPU_TOKENS)


def plan_micro_batches(lengths: Sequence[int], budget: int, processes: int = 1) -> list[list[list[int]]]:
    """Cut the rows of a step into micro-batches and deal them to processes: [process][micro-batch][row number].

    First-fit decreasing (Johnson 1973): rows from the longest to the shortest, each into the first micro-batch that has room.
    A row longer than the budget stands alone. With several processes the budget shrinks until there is work for each.
    """
    fair = max(max(lengths), -(-sum(lengths) // processes))
    budget = min(budget, fair) if processes > 1 else budget
    batches: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        fitting = next((n for n, left in enumerate(room) if left >= lengths[row]), None)
        if fitting is None:
            batches.append([row])
            room.append(budget - lengths[row])
        else:
            batches[fitting].append(row)
            room[fitting] -= lengths[row]
    return [batches[process::processes] for process in range(processes)]


def training_seed(seed: int, purpose: str) -> int:
    """The seed of a training, which also orders its rows; purpose: "sft" or "dpo-<arm>"."""
    return derive_seed(seed, "training", purpose) % 2**31


class EpochOrder(Sampler[list[int]]):
    """Batches of row numbers, in an order that is a function of (seed, epoch, row id): a resumed training sees the same."""

    def __init__(self, ids: Sequence[str], batch_size: int, seed: int):
        self.ids, self.batch_size, self.seed, self.epoch = list(ids), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.ids) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = sorted(range(len(self.ids)), key=lambda row: (derive_seed(self.seed, "order", self.epoch, self.ids[row]), row))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]


class _StepLoader(DataLoader[Any]):
    """A loader of whole steps. The Trainer reaches `set_epoch` here, and in the sampler itself where it skips steps on resume."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class WholeSteps:
    """Mixin in front of transformers' Trainer. A subclass says what a row costs, weighs and loses.

    To be set before training: section, hardware. `train_dataset` holds the rows.
    """

    section: TrainingSection
    hardware: Compute
    # Of what is said where memory does not suffice: where the settings stand, and what changed ones mean for what is trained already.
    SETTINGS = ""
    SMALLER_PASSES = "the stage then begins anew"
    SHORTER_ROWS = "lower model.max_length (long rows are then left out), which all trainings read: --redo sft"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._sums: dict[str, torch.Tensor] = {}

    def row_id(self, row: Any) -> str:
        """What orders the row."""
        raise NotImplementedError

    def row_tokens(self, row: Any) -> int:
        """Tokens that the model reads for a row."""
        raise NotImplementedError

    def row_weight(self, row: Any) -> float:
        """What the row counts in the mean of the step's losses: 1, its weight, or its number of trained tokens."""
        raise NotImplementedError

    def micro_loss(self, model: Any, rows: list[Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted sum of the rows' losses, and sums of what is to be logged as weighted means."""
        raise NotImplementedError

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Whole steps, the same in every process."""
        rows: Any = self.train_dataset  # type: ignore[attr-defined]
        ids = [self.row_id(row) for row in rows]
        order = EpochOrder(ids, self.section.batch_size, self.args.data_seed)  # type: ignore[attr-defined]
        return _StepLoader(rows, batch_sampler=order, collate_fn=list)

    def training_step(self, model: Any, inputs: list[Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of a whole optimiser step. Returns this process's part of the loss, times the number of processes."""
        trainer: Any = self
        began = time.perf_counter()
        model.train()
        processes, process = trainer.args.world_size, trainer.args.process_index
        lengths = [self.row_tokens(row) for row in inputs]
        plan = plan_micro_batches(lengths, token_budget(self.section, self.hardware), processes)
        total = sum(self.row_weight(row) for row in inputs)
        rounds = max(map(len, plan))  # every process makes as many passes, or gradients would wait for one another forever
        loss_of_step = torch.zeros((), device=trainer.args.device)
        for number in range(rounds):
            idle = number >= len(plan[process])
            rows = [min(inputs, key=self.row_tokens)] if idle else [inputs[row] for row in plan[process][number]]
            waits = processes > 1 and number < rounds - 1
            with (
                trainer.accelerator.no_sync(model) if waits else contextlib.nullcontext(),
                memory_advice(partial(self._what_did_not_fit, rows)),
            ):
                loss, values = self.micro_loss(model, rows)
                loss = loss * (0.0 if idle else processes / total)
                trainer.accelerator.backward(loss)
            loss_of_step += loss.detach()
            weight = torch.tensor(float(sum(self.row_weight(row) for row in rows)))
            self._add({**values, "weight": weight}, 0.0 if idle else 1.0)
        self._speed = {
            "tokens": float(sum(lengths)),
            "seconds": time.perf_counter() - began,
            "memory_mb": peak_memory_mb(self.hardware.device),
        }
        return loss_of_step

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the step's own means, and speeds, to what the Trainer logs."""
        if "loss" in logs and self._sums:
            sums, self._sums = self._sums, {}
            means = summed({name: float(value) for name, value in sums.items()}, self.hardware.device)
            weight = means.pop("weight")
            speed = {**self._speed, "tokens_per_second": self._speed["tokens"] / self._speed["seconds"]}
            logs = {
                **logs,
                **{OWN + name: value / weight for name, value in means.items()},
                **{SPEED + name: value for name, value in speed.items()},
            }
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _add(self, values: dict[str, torch.Tensor], share: float) -> None:
        """Add to the step's sums; an idle pass adds zeros, since every process must name the same values."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, torch.zeros(())) + share * value.detach().cpu()

    def _less_memory(self, alone: bool) -> str:
        """The settings that need less, and what a changed one means for what is trained already. alone: what did not fit is one row."""
        ways = (
            []
            if self.section.recompute_activations
            else [f"set {self.SETTINGS}recompute_activations to true and run again: {GOES_ON}"]
        )
        if not alone:
            ways.append(
                f"lower {self.SETTINGS}micro_batch_tokens (now {token_budget(self.section, self.hardware)}) and run again: {self.SMALLER_PASSES}"
            )
        told = "; or ".join([*ways, self.SHORTER_ROWS])
        return told[0].upper() + told[1:] + "."

    def _what_did_not_fit(self, rows: list[Any]) -> str:
        tokens = [self.row_tokens(row) for row in rows]
        return (
            f"in a micro-batch of {len(rows)} rows and {sum(tokens)} tokens, the longest row {self.row_id(rows[tokens.index(max(tokens))])} with "
            f"{max(tokens)}. {self._less_memory(len(rows) == 1)}"
        )
