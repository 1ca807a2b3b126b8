"""`suasion verify RUN|RECIPE`: whether a run is what its manifests say, and whether the comparison it makes is fair.

Bytes first: every artefact is hashed again, nothing is missing and nothing is there that no manifest knows. Then meaning, from the
rows themselves and not from what stages claimed: row counts, disjoint pools and grader pairs, the evaluation seal, lineages, one way
of rendering text, and the first loss of every arm. An unfinished run is judged as far as it goes; what it lacks is said apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from suasion.errors import UserError
from suasion.pipeline import needs_people, recipe_slice, stages
from suasion.recipe import Recipe, dump_recipe
from suasion.records import sha256_file
from suasion.rundir import Manifest, RunDir, relative_files
from suasion.status import load_run
from suasion.verifying import counts, losses, meaning
from suasion.verifying.evidence import Evidence


class Findings(NamedTuple):
    """What verify found, in words. unfinished: stages that are still to be made, with their state; people's labels may be waited for."""

    faults: list[str]
    checks: list[str]
    unfinished: list[str]


class Check(NamedTuple):
    """A check of meaning. needs: stages without which there is nothing to look at ("dpo": any arm). untold: what it cannot judge."""

    title: str
    needs: tuple[str, ...]
    faults: Callable[[Evidence], Iterable[str]]
    untold: Callable[[Evidence], Iterable[str]] = lambda evidence: ()


CHECKS = (
    Check("rows add up", (), counts.row_counts),
    Check("pools are disjoint", ("pools",), meaning.pools),
    Check("evaluation pool is sealed", ("pools",), meaning.seal),
    Check("lineages fit together", ("sft",), meaning.lineages),
    Check("text is rendered in one way", ("sft",), meaning.rendering),
    Check("first losses are right", ("preferences", "dpo"), losses.first_losses, losses.not_told),
)


def verify_run(path: Path) -> Findings:
    """Look at a run. Raises UsageError where there is none."""
    try:
        directory, recipe = load_run(path)
    except UserError as error:
        if not (path / "recipe.yaml").is_file():
            raise
        return Findings([str(error)], [], [])
    found = Findings([], [], [])
    if (path / "recipe.yaml").read_text(encoding="utf-8") != dump_recipe(recipe):
        found.faults.append("recipe.yaml was changed after it was written")
    manifests = dict(_manifests(directory, recipe, found))
    unchanged = {}
    for name, manifest in manifests.items():
        bytes_changed = list(_bytes(directory, name, manifest))
        linked_wrong = list(_links(directory, recipe, name, manifest, manifests))
        found.faults.extend([*bytes_changed, *linked_wrong])
        if not bytes_changed:
            unchanged[name] = manifest  # rows that were changed are not worth interpreting
        if not bytes_changed and not linked_wrong:
            found.checks.append(f"{name}: {len(manifest.outputs)} artefacts unchanged")
    evidence = Evidence(directory, recipe, unchanged)
    there = {*unchanged, *(["dpo"] if evidence.arms() else [])}
    for check in CHECKS:
        if unchanged and there.issuperset(check.needs):
            _judge(check, evidence, found)
    return found


def _judge(check: Check, evidence: Evidence, found: Findings) -> None:
    """Make one check. A row or a manifest that it cannot even read is a fault too."""
    untold: list[str] = []
    try:
        faults = list(check.faults(evidence))
        untold += check.untold(evidence)
    except UserError as error:
        faults = [str(error)]
    except (KeyError, TypeError, ValueError) as error:
        faults = [f"{check.title}: cannot be told, a manifest or a row lacks what it should say ({error!r})"]
    found.faults.extend(faults)
    if not faults:
        found.checks.append("; ".join([check.title, *untold]))


def _manifests(directory: RunDir, recipe: Recipe, found: Findings) -> Iterator[tuple[str, Manifest]]:
    """The manifests that can be read. A stage may wait for people's labels; what is finished must not stand on what is not."""
    waiting = needs_people(recipe) | {"human-labels"}
    provisional = False
    absent: set[str] = set()
    for stage in stages(recipe):
        state = directory.state(stage.name)
        if state == "complete":
            try:
                manifest = directory.manifest(stage.name)
            except UserError as error:
                found.faults.append(str(error))
                absent.add(stage.name)
                continue
            provisional = provisional or bool(manifest.facts.get("waiting"))
            folders = {file.split("/")[0] for file in manifest.inputs_of_run()}
            for name in sorted(name for name in absent if directory.folders[name] in folders):
                found.faults.append(f"{stage.name} is finished, but {name}, which it reads, is not there as it was")
            yield stage.name, manifest
            continue
        absent.add(stage.name)
        if not (stage.name in waiting and (provisional or stage.name == "human-labels")):
            found.unfinished.append(f"{stage.name} is not finished ({state})")


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
    """Inputs are the outputs of the stages before, and the recipe slice is the recipe's."""
    provisional = frozenset(needs_people(recipe) | {"human-labels"}) if manifest.facts.get("waiting") else frozenset[str]()
    stage = next(stage for stage in stages(recipe, provisional) if stage.name == name)
    if manifest.recipe != recipe_slice(recipe, stage.sections):
        yield f"{name}: its recipe is not the one in recipe.yaml"
    if not all(item.stage in manifests for item in stage.inputs):
        return
    try:
        hashes = directory.input_hashes(name, stage.inputs)
    except UserError as error:
        yield f"{name}: {error}"
        return
    for file, digest in hashes.items():
        if manifest.inputs.get(file) != digest:
            yield f"{name} was made from another {file}"
