"""`suasion verify RUN`: whether a run is what its manifests say, and whether the comparison it makes is fair.

Bytes first: every artefact is hashed again, nothing is missing and nothing is there that no manifest knows. Then meaning, from
the rows themselves and not from what stages claimed: counts, disjoint pools and grader pairs, the evaluation seal, lineages, and
the first loss of every arm that starts from its reference (of the others training itself checks each pair).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from suasion.errors import UserError
from suasion.pipeline import needs_people, recipe_slice, stages
from suasion.pools import eval_seal
from suasion.recipe import Recipe, dump_recipe
from suasion.records import Example, OutcomePair, Preference, Prompt, Response, read_json_lines, read_rows, sha256_file
from suasion.rundir import Manifest, RunDir, relative_files
from suasion.status import load_run
from suasion.training.losses import logprob_tolerance, loss_rounding, zero_margin_loss

ONE_TO_ONE = ("sft", "sample")  # with the dpo arms: stages in which every row in is a row out or dropped
ROWS_OUT = {"sample": "pairs.jsonl", "ai-labels": "verdicts.jsonl", "evaluate": "verdicts.jsonl", "dpo": "reference.jsonl"}


def verify_run(path: Path) -> tuple[list[str], list[str]]:
    """(faults, checks that held), each in words. Raises UsageError where there is no run."""
    try:
        directory, recipe = load_run(path)
    except UserError as error:
        if not (path / "recipe.yaml").is_file():
            raise
        return [str(error)], []
    faults: list[str] = []
    checks: list[str] = []
    if (path / "recipe.yaml").read_text(encoding="utf-8") != dump_recipe(recipe):
        faults.append("recipe.yaml was changed after it was written")
    manifests = dict(_manifests(directory, recipe, faults))
    for name, manifest in manifests.items():
        found = [*_bytes(directory, name, manifest), *_links(directory, recipe, name, manifest, manifests)]
        faults += found
        if not found:
            checks.append(f"{name}: {len(manifest.outputs)} artefacts unchanged")
    if faults:
        return faults, checks  # rows that were changed are not worth interpreting
    for title, check in (
        ("pools are disjoint", _pools),
        ("evaluation pool is sealed", _seal),
        ("lineages fit together", _lineages),
        ("first losses are right", _losses),
    ):
        found = list(check(directory, recipe, manifests))
        faults += found
        if not found:
            checks.append(title)
    return faults, checks


def _manifests(directory: RunDir, recipe: Recipe, faults: list[str]) -> Iterator[tuple[str, Manifest]]:
    waiting = needs_people(recipe) | {"human-labels"}
    provisional = False
    for stage in stages(recipe):
        state = directory.state(stage.name)
        if state == "complete":
            try:
                manifest = directory.manifest(stage.name)
            except UserError as error:
                faults.append(str(error))
                continue
            provisional = provisional or bool(manifest.facts.get("waiting"))
            yield stage.name, manifest
        elif stage.name in waiting and (provisional or stage.name == "human-labels"):
            continue
        else:
            faults.append(f"{stage.name} is not finished ({state})")


def _bytes(directory: RunDir, name: str, manifest: Manifest) -> Iterator[str]:
    folder = directory.folder(name)
    there = set(relative_files(folder))
    for file, output in manifest.outputs.items():
        if file not in there:
            yield f"{folder.name}/{file} is missing"
        elif sha256_file(folder / file) != output.sha256:
            yield f"{folder.name}/{file} was changed after the stage finished"
    for file in sorted(there - manifest.outputs.keys()):
        yield f"{folder.name}/{file} does not belong to this run: no manifest knows it"


def _links(directory: RunDir, recipe: Recipe, name: str, manifest: Manifest, manifests: dict[str, Manifest]) -> Iterator[str]:
    """Inputs are the outputs of the stages before, the recipe slice is the recipe's, and row counts add up."""
    provisional = frozenset(needs_people(recipe) | {"human-labels"}) if manifest.facts.get("waiting") else frozenset[str]()
    stage = next(stage for stage in stages(recipe, provisional) if stage.name == name)
    if manifest.recipe != recipe_slice(recipe, stage.sections):
        yield f"{name}: its recipe is not the one in recipe.yaml"
    if all(item.stage in manifests for item in stage.inputs):
        for file, digest in directory.input_hashes(name, stage.inputs).items():
            if manifest.inputs.get(file) != digest:
                yield f"{name} was made from another {file}"
    if (name in ONE_TO_ONE or name.startswith("dpo-")) and manifest.rows_in != manifest.rows_out + sum(manifest.dropped.values()):
        yield f"{name}: {manifest.rows_in} rows in are not {manifest.rows_out} out and {sum(manifest.dropped.values())} dropped"
    files = _row_files(name, manifest)
    counted = sum(_lines(directory.folder(name) / file) for file in files)
    if files and counted != manifest.rows_out:
        yield f"{name}: {counted} rows in its files, {manifest.rows_out} in its manifest"


def _row_files(name: str, manifest: Manifest) -> list[str]:
    """The files whose lines are a stage's rows out."""
    if name == "preferences":
        return [file for file in manifest.outputs if file.endswith(".jsonl")]
    kind = "dpo" if name.startswith("dpo-") else name
    return [ROWS_OUT[kind]] if kind in ROWS_OUT else []


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _pools(directory: RunDir, recipe: Recipe, manifests: dict[str, Manifest]) -> Iterator[str]:
    """No conversation and no author in two pools; grader pairs from the SFT pool only, judge pairs from none."""
    folder = directory.folder("pools")
    rows: dict[str, list[Any]] = {
        "sft": list(read_rows(folder / "sft.jsonl", Example)),
        "eval": list(read_rows(folder / "eval.jsonl", Example)),
        "rlaif": list(read_rows(folder / "rlaif.jsonl", Prompt)),
        "rlhf": list(read_rows(folder / "rlhf.jsonl", Prompt)),
    }
    for key in ("conversation_id", "author"):
        seen: dict[tuple[str, str], str] = {}
        for pool, members in rows.items():
            for row in members:
                other = seen.setdefault((row.corpus, getattr(row, key)), pool)
                if other != pool:
                    yield f"{key} {getattr(row, key)} is in the pools {other} and {pool}"
    sft = {(row.corpus, row.conversation_id) for row in rows["sft"]}
    every = {(row.corpus, row.conversation_id) for members in rows.values() for row in members}
    for pair in read_rows(folder / "grader_pairs.jsonl", OutcomePair):
        if (pair.corpus, pair.conversation_id) not in sft:
            yield f"grader pair {pair.id} is of a conversation outside the SFT pool"
    for pair in read_rows(folder / "judge_pairs.jsonl", OutcomePair):
        if (pair.corpus, pair.conversation_id) in every:
            yield f"judge pair {pair.id} is of a conversation that is in a pool"
    for pool, members in rows.items():
        wanted = getattr(recipe.pools, pool)
        if wanted != "rest" and len(members) != wanted:
            yield f"pool {pool} has {len(members)} rows, the recipe asks for {wanted}"


def _seal(directory: RunDir, recipe: Recipe, manifests: dict[str, Manifest]) -> Iterator[str]:
    """The evaluation pool is the one that was sealed, and nothing before the evaluation has read it."""
    examples = list(read_rows(directory.folder("pools") / "eval.jsonl", Example))
    if eval_seal(examples) != manifests["pools"].facts.get("eval_seal"):
        yield "the evaluation pool is not the one that was sealed"
    sealed = {example.prompt().id for example in examples}
    for name, file in (("sample", "responses.jsonl"),):
        for response in read_rows(directory.folder(name) / file, Response):
            if response.prompt_id in sealed:
                yield f"{name}/{file}: response {response.id} answers a sealed prompt"
    for arm in recipe.dpo:
        path = directory.folder("preferences") / f"{arm.name}.jsonl"
        if path.is_file():
            held = {(example.corpus, example.conversation_id) for example in examples}
            for preference in read_rows(path, Preference):
                if preference.prompt.id in sealed or (preference.prompt.corpus, preference.prompt.conversation_id) in held:
                    yield f"preferences of {arm.name} use the sealed prompt {preference.prompt.id}"


def _lineages(directory: RunDir, recipe: Recipe, manifests: dict[str, Manifest]) -> Iterator[str]:
    """Sampling used the SFT model, every arm started where the recipe says, and the evaluated models are those trained here."""
    if "sft" not in manifests:
        return
    base = manifests["sft"].facts["base_hash"]
    lineage = {model: _lineage(directory, recipe, base, model) for model in ("base", "sft")}
    if manifests["sft"].facts["lineage"] != lineage["sft"]:
        yield "sft: the adapter is not the one that its manifest names"
    if {response.lineage for response in read_rows(directory.folder("sample") / "responses.jsonl", Response)} - {lineage["sft"]}:
        yield "sample did not use this run's SFT model"
    for arm in recipe.dpo:
        manifest = manifests.get(f"dpo-{arm.name}")
        if manifest is None:
            continue
        reference = arm.start if arm.reference == "start" else arm.reference
        if manifest.facts["start_lineage"] != lineage.get(arm.start):
            yield f"dpo {arm.name} did not start from {arm.start}"
        if manifest.facts["reference_lineage"] != lineage.get(reference):
            yield f"dpo {arm.name}: the reference is not {reference}"
        lineage[arm.name] = _lineage(directory, recipe, base, arm.name)
        if manifest.facts["lineage"] != lineage[arm.name]:
            yield f"dpo {arm.name}: the adapter is not the one that its manifest names"
    for model, value in manifests["evaluate"].facts["models"].items() if "evaluate" in manifests else ():
        if lineage.get(model) != value:
            yield f"evaluate used another {model} than the one trained here"
    hashes = {manifest.facts["template_hash"] for manifest in manifests.values() if "template_hash" in manifest.facts}
    if len(hashes) > 1:
        yield f"stages rendered text in different ways (template hashes {', '.join(sorted(hashes))})"


def _lineage(directory: RunDir, recipe: Recipe, base: str, model: str) -> str:
    """The lineage hash of a model, from the adapters on disk."""
    from suasion.models import lineage_hash
    from suasion.training.dpo import adapter_stages

    return lineage_hash(base, [directory.folder(name) / "adapter" for name in adapter_stages(recipe, model)])


def _length(response: Response) -> float:
    """Tokens of a response; where its ids are not known, no fewer than it has."""
    return float(len(response.tokens or response.text.encode()))


def _losses(directory: RunDir, recipe: Recipe, manifests: dict[str, Manifest]) -> Iterator[str]:
    """The first loss of an arm equals its value at zero margin where policy and reference are one model, and stored log-probs agree."""
    for arm in recipe.dpo:
        manifest = manifests.get(f"dpo-{arm.name}")
        if manifest is None or arm.reference not in ("start", arm.start):
            continue
        metrics = (directory.folder(f"dpo-{arm.name}") / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        expected, first = zero_margin_loss(arm.loss, arm.beta), json.loads(metrics[0])["loss"]
        rows = list(read_rows(directory.folder("preferences") / f"{arm.name}.jsonl", Preference))
        lengths = torch.tensor([[_length(row.chosen), _length(row.rejected)] for row in rows])
        rounding = loss_rounding(lengths, manifest.dtype, arm.loss, arm.beta).max().item() / min(len(rows), arm.batch_size) ** 0.5
        if abs(first - expected) > rounding:
            yield f"dpo {arm.name}: first loss {first:.6f}, expected {expected:.6f} within {rounding:.6f}"
        reference = {row["id"]: row for _, row in read_json_lines(directory.folder(f"dpo-{arm.name}") / "reference.jsonl")}
        for row in rows:
            for side, response in (("chosen", row.chosen), ("rejected", row.rejected)):
                if not row.on_policy or row.id not in reference or response.logprob is None or not response.tokens:
                    continue
                allowed = logprob_tolerance(len(response.tokens), manifest.dtype, recipe.sample)
                if abs(reference[row.id][side] - response.logprob) > allowed:
                    yield f"dpo {arm.name}: the reference's log-prob of response {response.id} is not the one stored when it was sampled"
