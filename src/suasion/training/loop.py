"""What both trainings share: arguments of transformers' Trainer, metrics, progress, checkpoints that survive kill -9.

`metrics.jsonl` gets one line an optimiser step and holds no times, so that equal trainings have equal files. A checkpoint counts
only once its `complete` mark is there: a process killed while saving leaves a folder without it, which is passed over.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from suasion.errors import UserError
from suasion.models import Compute, Lineage, round_for_training
from suasion.records import canonical_json
from suasion.rundir import CHECKPOINTS
from suasion.sections.training import LoraSection, TrainingSection, optimiser_steps
from suasion.training.processes import barrier, is_sharded, rank
from suasion.training.sharding import policy_here
from suasion.training.steps import OWN, SPEED, training_seed

MARK = "complete"
KEPT_METRICS = ("loss", "grad_norm", "learning_rate", "epoch")


def policy_of(start: Lineage, lora: LoraSection | None, seed: int, hardware: Compute) -> Any:
    """The policy of a training in this process, its frozen layers rounded once where compute is bf16. FSDP2 wants one type a layer: there they are not."""
    policy = policy_here(start, lora, seed, hardware.device)
    return policy if is_sharded() else round_for_training(policy, hardware)


def arguments(
    kind: type[TrainingArguments],
    section: TrainingSection,
    folder: Path,
    compute: Compute,
    rows: int,
    seed: int,
    purpose: str,
    **extra: Any,
) -> Any:
    """Trainer arguments of one training; everything that is not a default of the library stands here."""
    steps = optimiser_steps(rows, section)
    seed32 = training_seed(seed, purpose)
    save_every = math.ceil(steps / (section.checkpoints + 1)) if section.checkpoints else 0
    extra = {"activation_checkpointing": section.recompute_activations, **extra}
    return kind(
        output_dir=str(folder / CHECKPOINTS),
        per_device_train_batch_size=section.batch_size,  # a whole step; steps.py cuts it into micro-batches
        gradient_accumulation_steps=1,
        num_train_epochs=section.epochs,
        learning_rate=section.learning_rate,
        lr_scheduler_type=section.scheduler,
        warmup_steps=math.ceil(steps * section.warmup_ratio),
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        optim="adamw_torch",
        seed=seed32,
        data_seed=seed32,
        use_cpu=compute.device == "cpu",
        # With shards the Trainer's bf16 would round the weights themselves; the steps' own autocast rounds what they compute.
        bf16=compute.dtype == "bfloat16" and not is_sharded(),
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN must be seen, not averaged away
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or 1,
        **tracking(section.report_to, folder),
        run_name=purpose,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=compute.device == "cuda",
        ddp_find_unused_parameters=False,
        # Else the arguments forget what accelerate was told (processes.py), and nothing would be sharded.
        accelerator_config={"use_configured_state": is_sharded()},
        **extra,
    )


def tracking(tracker: str, folder: Path) -> dict[str, Any]:
    """Trainer arguments for an experiment tracker, whose files go to the run's logs. Nothing leaves this machine unless its user asks.

    wandb: $WANDB_MODE decides (offline works). trackio: a local store. Raises UserError where the tracker is not installed.
    """
    if tracker == "none":
        return {"report_to": "none"}
    if importlib.util.find_spec(tracker) is None:
        raise UserError(
            f"report_to is {tracker}, which is not installed: pip install {tracker}. Or set report_to to none; metrics.jsonl has it all."
        )
    logs = folder.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_DIR", str(logs))
    os.environ.setdefault("WANDB_PROJECT", "suasion")
    os.environ.setdefault("TRACKIO_DIR", str(logs / "trackio"))
    return {"report_to": [tracker], "project": "suasion", "trackio_space_id": None, "trackio_static_space_id": False}


def on_first_gpu(args: TrainingArguments) -> TrainingArguments:
    """For a training that one process does, however many GPUs there are: the Trainer would split its rows among all of them."""
    if args.n_gpu > 1:
        args._n_gpu = 1
    return args


def speed_file(stage_folder: Path) -> Path:
    """Where a stage's speeds go: the run's logs, which no manifest hashes."""
    return stage_folder.parent / "logs" / f"{stage_folder.name}-speed.jsonl"


def train(trainer: Trainer, folder: Path, purpose: str, speeds: Path | None = None) -> list[dict[str, Any]]:
    """Train, or go on from the newest complete checkpoint; returns the metrics rows.

    speeds: JSONL that gets tokens, seconds and memory of each step: what no artefact may hold, because it differs every time.
    Raises UserError where one process sees several GPUs: Trainer would split the rows of a step by itself.
    """
    if trainer.args.n_gpu > 1:
        raise UserError(
            f"{trainer.args.n_gpu} GPUs are visible to one process. Train in one process a GPU, processes={{profile: ddp, count: {trainer.args.n_gpu}}}, or "
            "show it one: CUDA_VISIBLE_DEVICES=0."
        )
    first = rank() == 0
    checkpoint = newest_checkpoint(folder / CHECKPOINTS)
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    metrics = MetricsFile(folder / "metrics.jsonl", keep_until=done) if first else None
    trainer.remove_callback(PrinterCallback)  # prints every log line when tqdm is off
    trainer.add_callback(_Watch(metrics, purpose, done, speeds if first else None))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if metrics:
        metrics.close()
    barrier()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "metrics.jsonl has a gap"
    return rows


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step; incomplete ones are removed, by the first process."""
    if rank() > 0:
        barrier()
    complete = []
    for path in folder.glob("checkpoint-*"):
        if (path / MARK).is_file():
            complete.append(path)
        elif rank() == 0:
            shutil.rmtree(path)
    if rank() == 0:
        barrier()
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class MetricsFile:
    """One JSON object a step. Steps after the checkpoint that is resumed from are dropped: they will be made again."""

    def __init__(self, path: Path, keep_until: int):
        kept = []
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break  # a line torn by a kill is the last one
            if row["step"] <= keep_until:
                kept.append(line)
        temporary = path.with_name(path.name + ".tmp")  # by rename: a kill here must not lose what the checkpoint counts on
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        temporary.replace(path)
        self._handle = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        self._handle.write(canonical_json(row) + "\n")
        self._handle.flush()

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Writes metrics, moves the bar, marks checkpoints, and stops on a loss that is no number."""

    def __init__(self, metrics: MetricsFile | None, purpose: str, done: int, speeds: Path | None):
        self.metrics, self.purpose, self.done, self.speeds = metrics, purpose, done, speeds
        self.advance: Callable[[int], None] = lambda count: None
        self.bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        from suasion.progress import progress

        if rank() > 0:
            return
        self.bar = progress(self.purpose, state.max_steps, "steps", self.done)
        self.advance = self.bar.__enter__()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.__exit__(None, None, None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.advance(1)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise UserError(
                f"{self.purpose}: the loss is {logs['loss']} at step {state.global_step}. Lower learning_rate or max_grad_norm, or set "
                "model.dtype to float32, then run again: with other settings the stage begins anew."
            )
        if self.metrics is None:
            return
        row = {key: value for key, value in logs.items() if key in KEPT_METRICS or key.startswith(OWN)}
        self.metrics.write({"step": state.global_step, **{key.removeprefix(OWN): float(value) for key, value in row.items()}})
        speed = {key.removeprefix(SPEED): round(float(value), 3) for key, value in logs.items() if key.startswith(SPEED)}
        if self.speeds is not None and speed:
            self.speeds.parent.mkdir(exist_ok=True)
            with self.speeds.open("a", encoding="utf-8") as handle:
                handle.write(canonical_json({"step": state.global_step, **speed}) + "\n")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        barrier()  # every process has written its part
        if rank() > 0:
            return
        newest = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (newest / MARK).touch()
        for path in Path(args.output_dir).glob("checkpoint-*"):
            if path != newest:
                shutil.rmtree(path)
