"""One training in several processes, of one machine or of several: started through `accelerate launch`, one command for every profile.

`train_apart` runs in the process of `suasion run`: it writes the stage's context to a file, starts the workers, and turns the death of
any of them into a message. On the other machines joining.py starts theirs. `main` is a worker: it is the stage's own function, run in every process, of which only the first (rank 0)
writes. What the trainings need to know of one another stands here too: ranks and sums over processes.

The rows of an optimiser step are those of a single process: every process plans the whole step and takes its share (steps.py).
accelerate would repeat rows from the start of the epoch where they do not come out even, which is another training.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from suasion.errors import UserError
from suasion.models import save_adapter
from suasion.recipe import Recipe, validate_recipe
from suasion.records import read_json, write_json
from suasion.rundir import CHECKPOINTS, Input, StageContext, StageResult
from suasion.sections.training import ModelSection
from suasion.workers import environment, launcher, leave_with_parent, require_gpus

CONTEXT, RESULT, FAILURE = "context.json", "result.json", "failure.json"
ALIVE_SECONDS = 2.0


def rank() -> int:
    """Number of this process among those that train together, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together; 1 outside of `accelerate launch`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_sharded() -> bool:
    """Whether this process is one of several that hold a share of a model each."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true" and world_size() > 1


def holds_shards(model: Any) -> bool:
    """Whether a pass through this model needs all processes at once."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def barrier() -> None:
    """Wait for the other processes; nothing where there are none."""
    if world_size() > 1:
        torch.distributed.barrier()


def summed(values: dict[str, float], device: str) -> dict[str, float]:
    """The sums of these numbers over all processes. Every process must call it with the same names."""
    if world_size() == 1:
        return values
    names = sorted(values)
    total = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return dict(zip(names, total.tolist(), strict=True))


def largest(value: int, device: str) -> int:
    """The largest of all processes' values. Every process must call it."""
    if world_size() == 1:
        return value
    most = torch.tensor(value, device=device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return int(most)


def save_trained(policy: Any, folder: Path, base: ModelSection) -> None:
    """`save_adapter` by the first process, of tensors gathered from all of them where they are sharded."""
    state = None
    assert holds_shards(policy) == is_sharded(), (
        "a profile that shards trained a model that is not in shards, or the other way round"
    )
    if holds_shards(policy):
        state = {}
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:  # gathered by all, kept by the one that writes
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                if rank() == 0:
                    state[name] = whole.detach().cpu()
    if rank() == 0:
        save_adapter(policy, folder, base, state)
    barrier()


def launch_command(recipe: Recipe, context: Path, device: str, machine: int = 0) -> list[str]:
    """The `accelerate launch` command of one training on one of its machines, numbered from 0."""
    section = recipe.processes
    command = launcher(section.count, device, section.machines)
    if section.machines > 1:
        command += [
            "--machine_rank",
            str(machine),
            "--main_process_ip",
            section.address,
            "--main_process_port",
            str(section.port),
        ]
    else:
        command += ["--main_process_port", "0"]
    if section.profile == "fsdp2":
        command += [
            "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_reshard_after_forward", "true",
            "--fsdp_state_dict_type", "FULL_STATE_DICT", "--fsdp_cpu_ram_efficient_loading", "true",  # sharding.py
        ]  # fmt: skip
    else:
        command.append("--multi_gpu")  # accelerate's name for several processes; on a CPU they talk through gloo
    return [*command, "-m", "suasion.training.processes", str(context)]


def train_apart(stage: StageContext, module: str, device: str) -> StageResult:
    """Run a training stage in the recipe's number of processes.

    Raises UserError with a worker's own message where it gave one, and otherwise with what to do: the next run goes on from the
    last checkpoint. An interrupt ends the workers too.
    """
    section = stage.recipe.processes
    if device == "cuda":
        require_gpus(section.count)
    folder = stage.folder / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    for name in (RESULT, FAILURE):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / CONTEXT, {"module": module, "attempt": secrets.token_hex(8), **_as_json(stage)})
    workers = subprocess.Popen(
        launch_command(stage.recipe, folder / CONTEXT, device), env=environment(device), stderr=subprocess.PIPE, text=True
    )
    try:
        said = _last_words(workers, folder / CONTEXT)
    except BaseException:  # Ctrl-C reached the workers as well, where there is a terminal; elsewhere they must be told
        workers.terminate()
        workers.communicate()
        raise
    if (folder / FAILURE).is_file():
        raise UserError(read_json(folder / FAILURE)["message"])
    if workers.returncode or not (folder / RESULT).is_file():
        log = folder / "workers.log"
        log.write_text(said, encoding="utf-8")
        several = f" on {section.machines} machines" if section.machines > 1 else ""
        raise UserError(
            f"{stage.stage}: one of {section.count * section.machines} processes{several} died (exit code {workers.returncode}); the others were ended. What they "
            f"said stands in {log}. Run again: it goes on from the last checkpoint. If memory was short, set recompute_activations (it still goes on), "
            "or lower micro_batch_tokens or use processes.profile=fsdp2 (the stage then begins anew)."
        )
    result = StageResult(**read_json(folder / RESULT))
    result.facts["processes"] = {"profile": section.profile, "count": section.count * section.machines}
    return result


def _last_words(workers: subprocess.Popen[str], context: Path) -> str:
    """What the workers said on stderr, once they have ended; until then the context is touched, as a sign of life for other machines."""
    while True:
        try:
            return workers.communicate(timeout=ALIVE_SECONDS)[1]
        except subprocess.TimeoutExpired:
            os.utime(context)


def _as_json(stage: StageContext) -> dict[str, Any]:
    return {
        "recipe": stage.recipe.model_dump(mode="json"),
        "stage": stage.stage,
        "folder": str(stage.folder.resolve()),
        "inputs": [[item.stage, item.file, str(path.resolve())] for item, path in stage.inputs.items()],
        "cache": str(stage.cache),
        "arm": stage.arm,
        "facts": stage.facts,
        "waiting": stage.waiting,
    }


def make_accelerate_shard() -> None:
    """Have accelerate shard in this process, on a CPU too.

    accelerate 1.15 takes FSDP for a matter of GPUs (AcceleratorState.__init__): told to shard where processes compute on CPUs it trains a whole
    model in each, and does not say so. torch's own fully_shard works there, through gloo. Raises UserError where nothing would be sharded.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    if PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # until the next line makes it FSDP
    Accelerator()
    if AcceleratorState().distributed_type != DistributedType.FSDP:
        raise UserError("processes.profile is fsdp2, but this accelerate shards nothing here. Use processes.profile=ddp.")


def _from_json(data: dict[str, Any]) -> StageContext:
    return StageContext(
        recipe=validate_recipe(data["recipe"], "the recipe of the run"),
        stage=data["stage"],
        folder=Path(data["folder"]),
        inputs={Input(stage, file): Path(path) for stage, file, path in data["inputs"]},
        cache=Path(data["cache"]),
        arm=data["arm"],
        facts=data["facts"],
        waiting=data["waiting"],
    )


def main(context: Path) -> int:
    """A worker: the stage's function in one of several processes."""
    import importlib

    from accelerate import PartialState

    from suasion.progress import console

    leave_with_parent()
    data = read_json(context)
    PartialState(cpu=os.environ["ACCELERATE_USE_CPU"] == "true")  # joins the others, and chooses this process's GPU
    console.quiet = rank() > 0
    try:
        if is_sharded():
            make_accelerate_shard()
        result = importlib.import_module(data["module"]).run_stage(_from_json(data))
    except UserError as error:
        write_json(context.with_name(FAILURE), {"message": str(error)})
        return error.exit_code
    if rank() == 0:
        write_json(context.with_name(RESULT), vars(result))
    barrier()
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
