"""Row counts: what a stage says it took lies in the files that it read, what it says it made lies in its own, and nothing is unaccounted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import comb

from suasion.corpora.stats import PAIRS, PROMPTS
from suasion.records import Example, Pair, read_json, read_json_lines, read_rows
from suasion.rundir import Manifest
from suasion.sections.labeling import ImportedLabels
from suasion.sections.training import TrainingSection, optimiser_steps
from suasion.verifying.evidence import Evidence

Files = tuple[tuple[str, str], ...]  # of (stage, file)

POOLS = ("sft", "rlaif", "rlhf", "eval")
PAIR_SETS = ("grader_pairs", "judge_pairs")
TOOK: dict[str, Files] = {
    "pools": (("corpus", "examples.jsonl"), ("corpus", "outcome_pairs.jsonl")),
    "sft": (("pools", "sft.jsonl"),),
    "sample": (("pools", "rlaif.jsonl"), ("pools", "rlhf.jsonl")),
    "ai-labels": (("sample", "pairs.jsonl"),),
    "evaluate": (("pools", "eval.jsonl"),),
    "report": (("evaluate", "verdicts.jsonl"),),
}
MADE: dict[str, tuple[str, ...]] = {
    "corpus": ("examples.jsonl", "outcome_pairs.jsonl"),
    "pools": tuple(f"{name}.jsonl" for name in (*POOLS, *PAIR_SETS)),
    "sample": ("pairs.jsonl",),
    "ai-labels": ("verdicts.jsonl",),
    "human-labels": ("verdicts.jsonl", "imported.jsonl"),
    "evaluate": ("verdicts.jsonl",),
}
ACCOUNTED = ("pools", "sft", "sample", "ai-labels")  # with the arms: stages in which every row in is a row out, or dropped


def row_counts(run: Evidence) -> Iterator[str]:
    """Faults in the row counts of the finished stages."""
    for name, manifest in run.manifests.items():
        taken = _took(run, name, manifest)
        if taken and all(stage in run.manifests for stage, _ in taken):
            yield from _differs(run, f"{name} took {manifest.rows_in} rows", manifest.rows_in, taken)
        if made := _made(name, manifest):
            yield from _differs(run, f"{name} made {manifest.rows_out} rows", manifest.rows_out, made)
        dropped = sum(manifest.dropped.values())
        if (name in ACCOUNTED or name.startswith("dpo-")) and manifest.rows_in != manifest.rows_out + dropped:
            yield f"{name}: {manifest.rows_in} rows in are not {manifest.rows_out} out and {dropped} dropped"
    for stage, check in (
        ("corpus", _corpus),
        ("pools", _pools),
        ("sample", _sample),
        ("preferences", _preferences),
        ("evaluate", _evaluate),
    ):
        if stage in run.manifests:
            yield from check(run, run.manifests[stage])
    if "human-labels" in run.manifests and "sample" in run.manifests:
        yield from _people(run, run.manifests["human-labels"])
    if "sft" in run.manifests:
        yield from _steps(run, "sft", run.manifests["sft"], run.recipe.sft)
    for arm, manifest in run.arms():
        yield from _steps(run, f"dpo-{arm.name}", manifest, arm)


def _took(run: Evidence, name: str, manifest: Manifest) -> Files:
    """The files whose rows are a stage's rows in; () where they lie outside the run."""
    if name.startswith("dpo-"):
        return (("preferences", f"{name.removeprefix('dpo-')}.jsonl"),)
    if name == "preferences":
        folders = {folder: stage for stage, folder in run.directory.folders.items()}
        read = (file.split("/") for file in manifest.inputs_of_run() if file.endswith(("/verdicts.jsonl", "/imported.jsonl")))
        return tuple((folders[folder], file) for folder, file in read)
    return TOOK.get(name, ())


def _made(name: str, manifest: Manifest) -> Files:
    """The files whose rows are a stage's rows out; () where what it makes is no row."""
    if name.startswith("dpo-"):
        return ((name, "reference.jsonl"),)
    if name == "preferences":
        return tuple((name, file) for file in manifest.outputs if file.endswith(".jsonl"))
    return tuple((name, file) for file in MADE.get(name, ()))


def _differs(run: Evidence, said: str, count: int, files: Files) -> Iterator[str]:
    found = sum(run.lines(stage, file) for stage, file in files)
    if found != count:
        yield f"{said}, but {found} lie in {', '.join(f'{stage}/{file}' for stage, file in files)}"


def _corpus(run: Evidence, manifest: Manifest) -> Iterator[str]:
    """What counts.json says was kept of each corpus is there, and what it says was dropped is what the manifest says."""
    counts = read_json(run.path("corpus", "counts.json"))
    examples = Counter[tuple[str, str]]()
    for _, row in read_json_lines(run.path("corpus", "examples.jsonl")):
        examples[row["corpus"], PROMPTS if row["reply"] is None else "examples"] += 1
    pairs = Counter((row["corpus"], PAIRS) for _, row in read_json_lines(run.path("corpus", "outcome_pairs.jsonl")))
    there = examples + pairs
    said = Counter(
        {(label, kind): count["kept"].get(kind, 0) for label, count in counts.items() for kind in ("examples", PROMPTS, PAIRS)}
    )
    for label, kind in sorted(there.keys() | said.keys()):
        if there[label, kind] != said[label, kind]:
            yield f"corpus/counts.json says {said[label, kind]} {kind} of {label}, but {there[label, kind]} are there"
    for key, found in (("examples", examples.total()), ("outcome_pairs", pairs.total())):
        if manifest.facts[key] != found:
            yield f"corpus says {manifest.facts[key]} rows of {key}, {found} lie in {key}.jsonl"
    dropped = Counter[str]()
    for count in counts.values():
        dropped.update(count["dropped"])
    if dropped != Counter(manifest.dropped):
        yield "corpus: what counts.json says was dropped is not what the manifest says"


def _pools(run: Evidence, manifest: Manifest) -> Iterator[str]:
    """Each pool has the rows that it says it has, and those that the recipe asks for."""
    for name in (*POOLS, *PAIR_SETS):
        said = manifest.facts["sizes"][name] if name in POOLS else manifest.facts[name]
        found = run.lines("pools", f"{name}.jsonl")
        if said != found:
            yield f"pools says {said} rows of {name}, {found} lie in {name}.jsonl"
        wanted = getattr(run.recipe.pools, name) if name in POOLS else "rest"
        if wanted not in ("rest", found):
            yield f"pool {name} has {found} rows, the recipe asks for {wanted}"


def _sample(run: Evidence, manifest: Manifest) -> Iterator[str]:
    """Two responses a prompt."""
    found = run.lines("sample", "responses.jsonl")
    if {manifest.facts["responses"], 2 * manifest.rows_in} != {found}:
        yield f"sample says {manifest.facts['responses']} responses to {manifest.rows_in} prompts, {found} lie in responses.jsonl"


def _people(run: Evidence, manifest: Manifest) -> Iterator[str]:
    """People were asked about all rlhf pairs, unless their labels came with texts of their own."""
    source = run.recipe.human_labels.source
    if isinstance(source, ImportedLabels) and source.layout == "preferences":
        return
    found = sum(pair.pool == "rlhf" for pair in read_rows(run.path("sample", "pairs.jsonl"), Pair))
    if manifest.rows_in != found:
        yield f"human-labels took {manifest.rows_in} rows, but {found} of the rlhf pool lie in sample/pairs.jsonl"


def _preferences(run: Evidence, manifest: Manifest) -> Iterator[str]:
    """Each arm has the preferences that counts.json says, and every pair it looked at is kept or left out for one reason."""
    for source, arms in (
        ("counts.json", read_json(run.path("preferences", "counts.json"))["arms"]),
        ("the manifest", manifest.facts["arms"]),
    ):
        for arm, counts in arms.items():
            found = run.lines("preferences", f"{arm}.jsonl")
            if counts["n"] != found:
                yield f"preferences: {source} says {counts['n']} of {arm}, {found} lie in {arm}.jsonl"


def _evaluate(run: Evidence, manifest: Manifest) -> Iterator[str]:
    """One response a model and prompt, and one verdict on every two texts of a prompt, the human reply among them."""
    models = len(manifest.facts["models"])
    found = run.lines("evaluate", "responses.jsonl")
    if found != models * manifest.rows_in:
        yield f"evaluate: {models} models and {manifest.rows_in} prompts do not give the {found} responses in responses.jsonl"
    if "pools" in run.manifests:
        asked = sum(comb(models + bool(row.reply), 2) for row in read_rows(run.path("pools", "eval.jsonl"), Example))
        if asked != manifest.rows_out:
            yield f"evaluate made {manifest.rows_out} verdicts, its texts give {asked} comparisons"


def _steps(run: Evidence, name: str, manifest: Manifest, section: TrainingSection) -> Iterator[str]:
    """A training has one line of metrics for every optimiser step that its rows give."""
    found, said, wanted = run.lines(name, "metrics.jsonl"), manifest.facts["steps"], optimiser_steps(manifest.rows_out, section)
    if {found, said, wanted} != {found}:
        yield f"{name}: {manifest.rows_out} rows give {wanted} steps, it says {said}, and {found} lie in metrics.jsonl"
