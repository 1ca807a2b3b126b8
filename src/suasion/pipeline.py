"""The experiment as one list of stages with files between them, and the loop that runs it.

    corpus -> pools -> sft -> sample -+-> ai-labels ----+-> preferences -> dpo-<arm> ... -> evaluate -> report
                                      +-> human-labels -+

A stage is a function from a `StageContext` to a `StageResult`; this table says which files it reads and which part of the recipe
concerns it. Run again, a finished stage is skipped if its inputs and its part of the recipe are unchanged and refused if not; an
unfinished one goes on where it was. Missing human labels block only the arms that need them.
"""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suasion.errors import UsageError, UserError, WaitingForPeople
from suasion.progress import console, duration
from suasion.recipe import Recipe
from suasion.records import read_json, write_json
from suasion.rundir import ATTEMPT, Input, RunDir, StageContext, StageResult, cache_dir, differences, refuse_stale
from suasion.sections.base import FILE_KEYS, TEMPLATE, Section
from suasion.sections.grading import read_pairs_of, without_folder
from suasion.sections.sampling import ContinuousEngine

MODEL = (
    "model.base",
    "model.revision",
    "model.system_prompt",
    "model.max_length",
    "model.dtype",
    "model.device",
    "model.attention",
)
PROVISIONAL = ("preferences", "evaluate", "report")  # made from what exists while people still label
PEOPLE_SPOKE = "outside the run: people's verdicts changed"  # as `rundir.differences` says it
TEXT = ("model.base", "model.revision", "model.system_prompt")


@dataclass(frozen=True)
class Stage:
    """One row of the table. `sections` are the recipe's keys that this stage's result depends on."""

    name: str
    folder: str
    module: str
    sections: tuple[str, ...]
    inputs: tuple[Input, ...] = ()
    arm: str = ""

    def function(self) -> Callable[[StageContext], StageResult]:
        """The stage's function; its module is imported only when it runs, so that skipping is fast.

        What it imports never goes, and no later collection of garbage looks at it again (one comes with the start of every training).
        """
        gc.collect()  # but what earlier stages left, models among it, must not be kept with it
        module = importlib.import_module(self.module)
        gc.freeze()
        return module.run_stage  # type: ignore[no-any-return]

    def external(self, recipe: Recipe, run: Path) -> dict[str, str]:
        """sha256 of what this stage reads from outside the stages: corpora, training pairs of graders, labels, the base model."""
        hashes: dict[str, str] = {}
        if self.name == "corpus":
            from suasion.corpora.stage import external_hashes

            hashes = external_hashes(recipe)
        elif self.name in ("ai-labels", "evaluate"):
            from suasion.grading.build import outside_hashes

            hashes = outside_hashes(recipe.ai_labels.grader if self.name == "ai-labels" else recipe.evaluate.grader)
            if self.name == "evaluate":
                from suasion.evaluation.measuring import external_hashes as measuring_hashes

                hashes |= measuring_hashes(recipe)
                hashes |= _heard(run)
        elif self.name == "human-labels":
            from suasion.labeling.stage import external_hashes as label_hashes

            hashes = label_hashes(recipe, run)
        if "model.base" in self.sections:
            from suasion.models import base_hash

            hashes["base model"] = base_hash(recipe.model)
        return hashes


def _heard(run: Path) -> dict[str, str]:
    """A hash of what people said of the models, where they were asked."""
    from suasion.labeling.store import EVALUATION_FILE

    if not (run / EVALUATION_FILE).is_file():
        return {}
    from suasion.labeling.final import external_hashes

    return external_hashes(run)


def stages(recipe: Recipe, blocked: frozenset[str] = frozenset()) -> list[Stage]:
    """All stages of a recipe in order. `blocked` names stages that wait for people; later stages do without their files."""
    pools = [Input("pools", "rlaif.jsonl"), Input("pools", "rlhf.jsonl")]
    sampled = [Input("sample", "pairs.jsonl"), Input("sample", "responses.jsonl")]
    human = (
        [] if "human-labels" in blocked else [Input("human-labels", "verdicts.jsonl"), Input("human-labels", "imported.jsonl")]
    )
    trained = [arm for arm in recipe.dpo if f"dpo-{arm.name}" not in blocked]
    arms = [
        Stage(
            f"dpo-{arm.name}", f"08-dpo-{arm.name}", "suasion.training.dpo", (*MODEL, f"dpo.{arm.name}", "seed"),
            (Input("preferences", f"{arm.name}.jsonl"), *(Input(name, "adapter") for name in _adapters_read(recipe, arm.name))),
            arm=arm.name,
        )
        for arm in recipe.dpo
    ]  # fmt: skip
    adapters = [Input("sft", "adapter"), *(Input(f"dpo-{arm.name}", "adapter") for arm in trained)]
    metrics = [Input("sft", "metrics.jsonl"), *(Input(f"dpo-{arm.name}", "metrics.jsonl") for arm in trained)]
    results = [Input("evaluate", file) for file in ("summary.json", "responses.jsonl", "verdicts.jsonl", "models.json")]
    return [
        Stage("corpus", "01-corpus", "suasion.corpora.stage", ("corpus", *TEXT, "seed")),
        Stage("pools", "02-pools", "suasion.pools", ("pools", "seed"), (Input("corpus", "examples.jsonl"), Input("corpus", "outcome_pairs.jsonl"))),
        Stage("sft", "03-sft", "suasion.training.sft", (*MODEL, "sft", "seed"), (Input("pools", "sft.jsonl"),)),
        Stage("sample", "04-sample", "suasion.sampling.stage", (*MODEL, "sample", "seed"), (*pools, Input("sft", "adapter"))),
        Stage(
            "ai-labels", "05-ai-labels", "suasion.grading.stage", ("ai_labels", "seed"),
            (*sampled, *pools, Input("pools", "grader_pairs.jsonl"), Input("pools", "judge_pairs.jsonl")),
        ),
        Stage("human-labels", "06-human-labels", "suasion.labeling.stage", ("human_labels", "corpus", *TEXT, "seed"), (*sampled, *pools, Input("pools", "held_out.json"))),
        Stage(
            "preferences", "07-preferences", "suasion.preferences", ("preferences", "dpo.*", "human_labels", "seed"),
            (*sampled, *pools, Input("ai-labels", "verdicts.jsonl"), *human),
        ),
        *arms,
        Stage(
            "evaluate", "09-evaluate", "suasion.evaluation.stage", (*MODEL, "sample", "evaluate", "ai_labels", "human_labels", "dpo.*", "seed"),
            (
                Input("pools", "eval.jsonl"), Input("pools", "judge_pairs.jsonl"), Input("pools", "grader_pairs.jsonl"), *sampled, *pools,
                *(item for item in human if item.file == "verdicts.jsonl"), Input("ai-labels", "verdicts.jsonl"),
                Input("preferences", "counts.json"), *adapters,
            ),
        ),
        Stage(
            "report", "10-report", "suasion.reporting.stage", ("report", "name"),
            (*results, Input("pools", "eval.jsonl"), Input("corpus", "counts.json"), *metrics),
        ),
    ]  # fmt: skip


def needs_people(recipe: Recipe) -> frozenset[str]:
    """Stages that cannot run without human labels: the arms that use them, and the arms that start from those."""
    blocked: set[str] = set()
    for arm in recipe.dpo:
        if arm.labels == "human" or arm.matched or {arm.start, arm.reference} & {name.removeprefix("dpo-") for name in blocked}:
            blocked.add(f"dpo-{arm.name}")
    return frozenset(blocked)


def open_run(recipe: Recipe, runs: Path) -> RunDir:
    """The run directory of a recipe."""
    return RunDir(runs / recipe.name, {stage.name: stage.folder for stage in stages(recipe)})


def recipe_slice(recipe: Recipe, sections: tuple[str, ...]) -> dict[str, Any]:
    """The part of a recipe that a stage depends on, without paths of this machine (files count by content) and addresses of servers.

    Keys are dotted; `dpo.<arm>` is one arm, `dpo.*` what each arm starts from and learns from.
    """
    data = _what_counts(recipe)
    part: dict[str, Any] = {}
    for section in sections:
        if section == "dpo.*":
            part[section] = {
                arm["name"]: {key: arm[key] for key in ("start", "labels", "pool", "matched")} for arm in data["dpo"]
            }
        elif section.startswith("dpo."):
            part[section] = next(arm for arm in data["dpo"] if f"dpo.{arm['name']}" == section)
        else:
            node = data
            for key in section.split("."):
                node = node[key]
            part[section] = node
    return part


def _what_counts(value: Any) -> Any:
    """A section as JSON, of its files only their names, and without what changes how the work is done but not what comes out."""
    if isinstance(value, Section):
        return {
            name: Path(item).name if name in (*FILE_KEYS, TEMPLATE) and isinstance(item, str) and item
            else without_folder(item) if name in ("base", "model") and isinstance(item, str)
            else _what_counts(item)
            for name, item in value
            if name not in value.TRANSPORT
        }  # fmt: skip
    if isinstance(value, dict):
        return {key: _what_counts(item) for key, item in value.items()}
    return [_what_counts(item) for item in value] if isinstance(value, tuple) else value


def run(
    recipe: Recipe,
    runs: Path,
    first: str | None = None,
    last: str | None = None,
    redo: str | None = None,
) -> tuple[RunDir, WaitingForPeople | None]:
    """Run every stage from `first` to `last`. Returns the run directory, and what people still have to do, if anything.

    Raises UserError and UsageError; everything made before stays.
    """
    names = [stage.name for stage in stages(recipe)]
    for option, value in (("--from", first), ("--until", last), ("--redo", redo)):
        if value is not None and value not in names:
            raise UsageError(f"{option} {value}: no such stage. Stages: {', '.join(names)}.")
    directory = open_run(recipe, runs)
    with directory.lock():
        _refuse_changed_recipe(directory, recipe, names[: names.index(redo)] if redo else names)
        if redo:
            attic = directory.move_to_attic(names[names.index(redo) :])
            if attic:
                console.print(f"moved {redo} and all after it to {attic}")
        directory.write_recipe(recipe)
        waiting: WaitingForPeople | None = None
        blocked: frozenset[str] = frozenset()
        start = names.index(first) if first else 0
        stop = names.index(last) if last else len(names) - 1
        refuse_missing_data(recipe, names[start : stop + 1])
        refuse_impossible_engine(recipe, names[start : stop + 1])
        with _announced(directory, recipe):
            for index, name in enumerate(names[: stop + 1]):
                if name in blocked:
                    continue
                stage = next(stage for stage in stages(recipe, blocked) if stage.name == name)
                if index < start:
                    if directory.state(name) != "complete":
                        raise UsageError(
                            f"--from {first}: stage {name} before it is {directory.state(name)}. Run without --from."
                        )
                    continue
                try:
                    run_stage(directory, recipe, stage, waiting)
                except WaitingForPeople as error:
                    waiting, blocked = error, needs_people(recipe) | {"human-labels"}
                    console.print(f"[yellow]{name}: waiting for people.[/] {error}")
        return directory, waiting


def run_stage(directory: RunDir, recipe: Recipe, stage: Stage, waiting: WaitingForPeople | None) -> None:
    """Run, resume or skip one stage."""
    attempt = what_it_reads(directory, recipe, stage)
    earlier: Path | None = None
    if directory.state(stage.name) == "complete":
        directory.clear_working_files(stage.name)
        manifest = directory.manifest(stage.name)
        changes = differences(manifest, **attempt)
        if manifest.facts.get("waiting") and waiting is None:
            # Made without the human labels that are there now: not stale, only provisional.
            console.print(f"{stage.name}: made again, now with human labels (the provisional one moves to attic/)")
            directory.move_to_attic([stage.name])
        elif changes == [PEOPLE_SPOKE]:
            # People can only judge what is there already, so that their verdicts always come after the stage that reads them.
            console.print(f"{stage.name}: told again with what people said of the models (the earlier one moves to attic/)")
            attic = directory.move_to_attic([name for name in directory.folders if name in (stage.name, "report")])
            earlier = attic / stage.folder if attic else None
        elif changes:
            raise refuse_stale(stage.name, changes)
        else:
            console.print(f"[dim]{stage.name}: done before, skipped ({manifest.rows_out} rows)[/]")
            return
    means = how_it_computes(recipe)
    folder = directory.folder(stage.name)
    resumed = directory.state(stage.name) == "unfinished"
    if resumed and not _is_same_attempt(folder, {**attempt, **means}):
        directory.move_to_attic([stage.name])  # other settings or another machine: nothing in it can be used here
        resumed = False
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ATTEMPT, {**attempt, **means})
    console.print(f"[bold]{stage.name}[/]{' (resumed)' if resumed else ''}")
    context = StageContext(
        recipe=recipe,
        stage=stage.name,
        folder=folder,
        inputs={item: directory.folder(item.stage) / item.file for item in stage.inputs},
        cache=cache_dir(),
        arm=stage.arm,
        facts={name: directory.manifest(name).facts for name in directory.folders if directory.state(name) == "complete"},
        waiting=str(waiting) if waiting else "",
        earlier=earlier,
    )
    began = time.monotonic()
    if stage.name == "sft" or stage.arm:
        result = _train(stage, context)
    else:
        result = stage.function()(context)
    if waiting and stage.name in PROVISIONAL:
        result.facts["waiting"] = str(waiting)
    manifest = directory.complete(stage.name, **attempt, result=result, hardware=means["hardware"])
    directory.clear_working_files(stage.name)
    seconds = time.monotonic() - began
    paid = {"dollars": round(result.dollars, 4)} if result.dollars else {}
    directory.record_time(stage.name, seconds, resumed=resumed, **paid)
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(manifest.dropped.items()))
    console.print(
        f"  {manifest.rows_in} rows in, {manifest.rows_out} out{'; dropped: ' + dropped if dropped else ''}; {duration(seconds)}"
    )


def _train(stage: Stage, context: StageContext) -> StageResult:
    """A training stage in this process, or in as many as the recipe's profile says."""
    if context.recipe.processes.profile == "one":
        return stage.function()(context)
    from suasion.training.processes import train_apart

    return train_apart(context, stage.module, _hardware(context.recipe)["device"])


def _announced(directory: RunDir, recipe: Recipe) -> AbstractContextManager[None]:
    """From it the other machines of a run on several know that it goes on."""
    if recipe.processes.machines == 1:
        return nullcontext()
    from suasion.training.joining import announced

    return announced(directory.path)


def _is_same_attempt(folder: Path, attempt: dict[str, Any]) -> bool:
    """Whether an unfinished folder belongs to the same recipe slice, inputs and hardware."""
    try:
        return bool(_without_idle_threads(read_json(folder / ATTEMPT)) == _without_idle_threads(attempt))
    except UserError:
        return False


def _without_idle_threads(attempt: dict[str, Any]) -> dict[str, Any]:
    """An attempt without the number of CPU threads where a GPU computes: a machine with more vCPUs beside the same GPU goes on.

    On a CPU the threads decide in which order sums are taken. Beside a GPU they plan batches and read files, which depends on no order, and
    at most fold adapters into fp32 weights or fit a grader: last bits, far below what bf16 and the GPU's own order of sums leave open.
    """
    hardware = attempt.get("hardware", {})
    if hardware.get("device") != "cuda":
        return attempt
    return {**attempt, "hardware": {name: value for name, value in hardware.items() if name != "threads"}}


def require_same_recipe(recipe: Recipe, runs: Path) -> None:
    """Raises UserError where finished stages of the recipe's run directory were made with another recipe: it could not go on anywhere."""
    _refuse_changed_recipe(open_run(recipe, runs), recipe, [stage.name for stage in stages(recipe)])


def _refuse_changed_recipe(directory: RunDir, recipe: Recipe, names: list[str]) -> None:
    """Find a changed recipe before anything is touched, so that a refusal leaves the run as it was."""
    for stage in stages(recipe):
        if stage.name in names and directory.state(stage.name) == "complete":
            manifest = directory.manifest(stage.name)
            part = recipe_slice(recipe, stage.sections)
            changes = differences(manifest, part, manifest.inputs_of_run(), manifest.external_inputs())
            if changes:
                raise refuse_stale(stage.name, changes)


def refuse_missing_data(recipe: Recipe, names: Collection[str]) -> None:
    """Find data that only a late stage reads before hours go into the stages that do without it. Raises UserError where it is missing."""
    from suasion.grading.pairs import require_pairs

    for name, section in (("ai-labels", recipe.ai_labels), ("evaluate", recipe.evaluate)):
        for data in read_pairs_of(section.grader) if name in names else ():
            require_pairs(data)
    if "evaluate" in names:
        from suasion.evaluation.measuring import require_files

        require_files(recipe)


def refuse_impossible_engine(recipe: Recipe, names: Collection[str]) -> None:
    """Raises UserError where models are to be sampled in a way that this machine cannot: before they are trained, not after."""
    if isinstance(recipe.sample.engine, ContinuousEngine) and {"sample", "evaluate"} & set(names):
        from suasion.models import compute
        from suasion.sampling.local import refuse_device

        refuse_device(recipe.sample, compute(recipe.model))


def _adapters_read(recipe: Recipe, arm: str) -> list[str]:
    """Stages whose adapters an arm's start and reference models are made of."""
    spec = recipe.arm(arm)
    names: list[str] = []
    for model in (spec.start, spec.start if spec.reference == "start" else spec.reference):
        while model not in ("base", "sft"):
            names.append(f"dpo-{model}")
            model = recipe.arm(model).start
        if model == "sft":
            names.append("sft")
    return sorted(set(names))


def what_it_reads(directory: RunDir, recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """What a stage's result follows from: its part of the recipe, and hashes of what it reads inside and outside the run."""
    return {
        "recipe": recipe_slice(recipe, stage.sections),
        "inputs": directory.input_hashes(stage.name, stage.inputs),
        "external": stage.external(recipe, directory.path),
    }


def how_it_computes(recipe: Recipe) -> dict[str, Any]:
    """What an unfinished attempt must have in common with the next, besides what it reads, to be gone on with."""
    return {"hardware": _hardware(recipe), "processes": recipe.processes.model_dump(include={"profile", "count", "machines"})}


def _hardware(recipe: Recipe) -> dict[str, Any]:
    from suasion.models import compute

    return compute(recipe.model).as_dict()
