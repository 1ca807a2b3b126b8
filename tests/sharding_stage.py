"""What one of several processes of a sharded training holds and computes; started by test_sharding.py as a stage of its own."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

import psutil
import torch
from small_training import preference_pairs

from suasion.models import Compute, Lineage, load_to_score
from suasion.records import write_json
from suasion.rundir import StageContext, StageResult
from suasion.training.processes import holds_shards, is_sharded, rank
from suasion.training.reference import shared_logprobs
from suasion.training.sharding import policy_here, scorer_here

CPU = Compute("cpu", "float32", 1)


def held() -> int:
    """Bytes of this process that are in memory, those of files that it maps included (weights are read that way), without what glibc keeps."""
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def run_stage(stage: StageContext) -> StageResult:
    """Writes RANK.json into the folder of `facts`."""
    told = stage.facts["test"]
    lineage = Lineage(stage.recipe.model, tuple(Path(name) for name in told["adapters"]))
    found: dict[str, object] = {"sharded": is_sharded(), "before": held()}
    policy = policy_here(lineage, stage.recipe.sft.lora, 0, "cpu")
    found["policy"] = held()
    sizes = {True: 0, False: 0}
    for parameter in policy.parameters():
        sizes[parameter.is_meta] += parameter.numel()
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    found |= {
        "absent": sizes[True],
        "present": sizes[False],
        "trained": sum(parameter.numel() for parameter in trained),
        "addresses": len({parameter.data_ptr() for parameter in trained}) == len(trained),
    }
    del policy, trained
    scorer = scorer_here(lineage, "cpu")
    found |= {
        "scorer": held(),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "shards": holds_shards(scorer),
        "share": sum(parameter.to_local().numel() for parameter in scorer.parameters()),
        "whole": sum(parameter.numel() for parameter in scorer.parameters()),
    }
    if told["compare"]:
        tensors = {name: parameter.full_tensor() for name, parameter in scorer.named_parameters()}
        if rank() == 0:  # the others would load a model without weights
            known = dict(load_to_score(lineage).named_parameters())
            assert known.keys() == tensors.keys()
            found["difference"] = max(float((known[name] - tensors[name]).abs().max()) for name in known)
        folder = Path(told["folder"])
        for name, pairs in (("first", preference_pairs(told["pairs"])), ("again", preference_pairs(told["pairs"] + 3))):
            logprobs = shared_logprobs(scorer, pairs, CPU, folder / name / "reference.jsonl", folder / "cache.jsonl")
            found[name] = {key: value.sums() for key, value in logprobs.items()}
    torch.distributed.barrier()
    write_json(Path(told["folder"]) / f"{os.environ['RANK']}.json", found)
    return StageResult(rows_in=0, rows_out=0)
