"""Reference log-probabilities: computed once by the start model, cached by content, and compared with what sampling stored.

A row of the cache is keyed by the hash of the weights, of the pair's token ids (which hold template and lengths), and of how the
model computes. Every pair is scored alone, so that a value does not depend on what else was scored, and a cached one is the one
that would be computed. `$SUASION_CACHE/reference/` may be deleted at any time; what a run used stands in its `reference.jsonl`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from suasion.errors import UserError
from suasion.memory import memory_advice
from suasion.models import Compute
from suasion.progress import progress
from suasion.records import Preference, canonical_json, content_id, read_json_lines
from suasion.rundir import CHECKPOINTS, cache_dir
from suasion.training.pairs import Logprobs, PairIds, score
from suasion.training.processes import barrier, holds_shards, largest, rank, world_size


def cache_file(lineage: str, hardware: Compute) -> Path:
    """Where log-probs of these weights, computed like this, are kept."""
    how = content_id("compute", canonical_json(hardware.as_dict()), torch.__version__)
    return cache_dir() / "reference" / f"{lineage}-{how}.jsonl"


def pair_key(pair: PairIds) -> str:
    """Identity of what is scored: the token ids of prompt and responses."""
    return content_id("pair-ids", *(",".join(map(str, part)) for part in (pair.prompt, pair.chosen, pair.rejected)))


@torch.no_grad()
def reference_logprobs(
    model: Any, pairs: Sequence[PairIds], hardware: Compute, path: Path, cache: Path | None = None, spare: PairIds | None = None
) -> dict[str, Logprobs]:
    """Log-probs of every pair by id, written to `path`; what the cache holds is not computed again, and what is computed is added.

    The model scores in eval mode: dropout must not touch a reference. spare: of a model in shards, a pair to score for nothing as long as another
    process has pairs left, since every pass needs all of them.
    """
    was_training = model.training
    model.eval()
    known = _read_cache(cache)
    values: dict[str, Logprobs] = {}
    done = sum(pair_key(pair) in known for pair in pairs)
    missing = len({pair_key(pair) for pair in pairs} - known.keys())
    idle = largest(missing, hardware.device) - missing if spare is not None else 0
    if cache:
        cache.parent.mkdir(parents=True, exist_ok=True)
    with progress("reference log-probs", len(pairs), "pairs", done) as advance:
        for pair in pairs:
            key = pair_key(pair)
            if key not in known:
                with memory_advice(partial(_alone, pair)):
                    sums, heads, _, _ = score(model, [pair], hardware)
                known[key] = Logprobs(*sums[0].tolist(), *heads[0].tolist())
                if cache:
                    _append(cache, {"key": key, **dataclasses.asdict(known[key])})
                advance(1)
            values[pair.id] = known[key]
        if spare is not None:
            for _ in range(idle):
                score(model, [spare], hardware)
    model.train(was_training)
    _write(path, pairs, values)
    return values


def _alone(pair: PairIds) -> str:
    return (
        f"while scoring preference {pair.id} before the training, {pair.tokens} tokens alone in one pass. Lower model.max_length (longer pairs are "
        "then left out; --redo sft) or sample.max_new_tokens (shorter responses; --redo sample), or use a device with more memory."
    )


def shared_logprobs(model: Any, pairs: Sequence[PairIds], hardware: Compute, path: Path, cache: Path) -> dict[str, Logprobs]:
    """`reference_logprobs`, of which every process makes its share; the first one puts them together."""
    if world_size() == 1:
        return reference_logprobs(model, pairs, hardware, path, cache)
    (path.parent / CHECKPOINTS).mkdir(exist_ok=True)
    shares = [path.parent / CHECKPOINTS / f"{path.stem}-{number}-of-{world_size()}.jsonl" for number in range(world_size())]
    spare = pairs[0] if holds_shards(model) else None
    reference_logprobs(model, pairs[rank() :: world_size()], hardware, shares[rank()], cache, spare)
    barrier()
    made = {row.pop("id"): Logprobs(**row) for share in shares for _, row in read_json_lines(share)}
    if rank() == 0:
        _write(path, pairs, made)
    barrier()
    return {pair.id: made[pair.id] for pair in pairs}


def _write(path: Path, pairs: Sequence[PairIds], values: dict[str, Logprobs]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    lines = [canonical_json({"id": pair.id, **dataclasses.asdict(values[pair.id])}) + "\n" for pair in pairs]
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)


def _append(cache: Path, row: dict[str, Any]) -> None:
    """Add a row in one write, since processes may share the file; behind a line that a kill tore it begins a line of its own."""
    with cache.open("ab+") as handle:
        handle.seek(max(handle.seek(0, os.SEEK_END) - 1, 0))
        torn = handle.read(1) not in (b"", b"\n")
        handle.write((b"\n" if torn else b"") + f"{canonical_json(row)}\n".encode())


def _read_cache(path: Path | None) -> dict[str, Logprobs]:
    """Rows by key. A line that a kill tore, or that anything else spoiled, is passed over and computed again."""
    known: dict[str, Logprobs] = {}
    if path is None or not path.is_file():
        return known
    fields = {field.name for field in dataclasses.fields(Logprobs)}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.keys() == fields | {"key"} and all(isinstance(row[name], float) for name in fields):
            known[row["key"]] = Logprobs(**{name: row[name] for name in fields})
    return known


def check_stored_logprobs(
    preferences: Sequence[Preference], reference: dict[str, Logprobs], lineage: str, allowed: Callable[[int], float], arm: str
) -> int:
    """Compare the start model's log-prob of every response with the one stored when it was sampled. Returns how many were compared.

    allowed: tokens of a response -> nats by which both may differ.

    Only responses that this model itself wrote can be compared; for a second-stage arm (rlaif-rlhf) there are none. Raises UserError
    where a log-prob differs, or where a response that counts as the start model's own was written by another model.
    """
    compared = 0
    for preference in preferences:
        for side, response in enumerate((preference.chosen, preference.rejected)):
            if response.lineage != lineage:
                if preference.on_policy:
                    raise UserError(
                        f"dpo {arm}: response {response.id} was sampled from model {response.lineage}, this arm starts from {lineage}. The "
                        "start model or the base model's files changed since: run again with --redo sample."
                    )
                continue
            if response.logprob is None or not response.tokens or preference.id not in reference:
                continue
            now = reference[preference.id].sums()[side]
            if abs(response.logprob - now) > allowed(len(response.tokens)):
                raise UserError(
                    f"dpo {arm}: response {response.id} had log-probability {response.logprob:.3f} when it was sampled, the reference gives "
                    f"{now:.3f}. Prompt, template or weights differ from sampling: run again with --redo sample."
                )
            compared += 1
    return compared
