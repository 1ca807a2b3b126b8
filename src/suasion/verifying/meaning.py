"""Whether the comparison that a run makes is fair: disjoint pools, a sealed evaluation pool, models that are who they are said to be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from suasion.pools import eval_seal
from suasion.records import Example, OutcomePair, Preference, Prompt, Response, read_rows
from suasion.rundir import EVAL_POOL, MAY_READ_EVAL_POOL
from suasion.verifying.evidence import Evidence


def pools(run: Evidence) -> Iterator[str]:
    """No conversation and no author in two pools; grader pairs are of the SFT pool's conversations, judge pairs of none in any pool."""
    folder = run.directory.folder("pools")
    rows: dict[str, list[Any]] = {
        "sft": list(read_rows(folder / "sft.jsonl", Example)),
        "eval": list(read_rows(folder / "eval.jsonl", Example)),
        "rlaif": list(read_rows(folder / "rlaif.jsonl", Prompt)),
        "rlhf": list(read_rows(folder / "rlhf.jsonl", Prompt)),
    }
    where: dict[str, dict[tuple[str, str], str]] = {"conversation_id": {}, "author": {}}
    for key, seen in where.items():
        for pool, members in rows.items():
            for row in members:
                other = seen.setdefault((row.corpus, getattr(row, key)), pool)
                if other != pool:
                    yield f"{key} {getattr(row, key)} is in the pools {other} and {pool}"
    for kind, home in (("grader", "sft"), ("judge", "none")):
        for pair in read_rows(folder / f"{kind}_pairs.jsonl", OutcomePair):
            pool = where["conversation_id"].get((pair.corpus, pair.conversation_id), "none")
            if pool != home:
                yield f"{kind} pair {pair.id} is of a conversation in pool {pool}, not {home}"
            elif where["author"].get((pair.corpus, pair.group), home) != home:
                yield f"{kind} pair {pair.id} is of an author in pool {where['author'][pair.corpus, pair.group]}"


def seal(run: Evidence) -> Iterator[str]:
    """The evaluation pool is the one that was sealed, and nothing before the evaluation has used it."""
    examples = list(read_rows(run.path("pools", "eval.jsonl"), Example))
    if eval_seal(examples) != run.manifests["pools"].facts.get("eval_seal"):
        yield "the evaluation pool is not the one that was sealed"
    file = f"{run.directory.folders[EVAL_POOL.stage]}/{EVAL_POOL.file}"
    for name, manifest in run.manifests.items():
        if file in manifest.inputs and name not in MAY_READ_EVAL_POOL:
            yield f"{name} read the evaluation pool"
    sealed = {example.prompt().id for example in examples}
    if "sample" in run.manifests:
        for response in read_rows(run.path("sample", "responses.jsonl"), Response):
            if response.prompt_id in sealed:
                yield f"sample/responses.jsonl: response {response.id} answers a sealed prompt"
    held = {(example.corpus, example.conversation_id) for example in examples}
    for arm in run.recipe.dpo if "preferences" in run.manifests else ():
        path = run.path("preferences", f"{arm.name}.jsonl")
        for preference in read_rows(path, Preference) if path.is_file() else ():
            if preference.prompt.id in sealed or (preference.prompt.corpus, preference.prompt.conversation_id) in held:
                yield f"preferences of {arm.name} use the sealed prompt {preference.prompt.id}"


def lineages(run: Evidence) -> Iterator[str]:
    """Sampling used the SFT model, every arm started where the recipe says, and the evaluated models are those trained here."""
    manifests = run.manifests
    base = manifests["sft"].facts["base_hash"]
    known = {model: lineage(run, base, model) for model in ("base", "sft")}
    if manifests["sft"].facts["lineage"] != known["sft"]:
        yield "sft: the adapter is not the one that its manifest names"
    if "sample" in manifests:
        wrote = {response.lineage for response in read_rows(run.path("sample", "responses.jsonl"), Response)}
        if wrote - {known["sft"]}:
            yield "sample did not use this run's SFT model"
    for arm, manifest in run.arms():
        reference = arm.start if arm.reference == "start" else arm.reference
        if not {arm.start, reference} <= known.keys():
            continue  # its start is not finished, or was changed: that is said already
        if manifest.facts["start_lineage"] != known[arm.start]:
            yield f"dpo {arm.name} did not start from {arm.start}"
        if manifest.facts["reference_lineage"] != known[reference]:
            yield f"dpo {arm.name}: the reference is not {reference}"
        known[arm.name] = lineage(run, base, arm.name)
        if manifest.facts["lineage"] != known[arm.name]:
            yield f"dpo {arm.name}: the adapter is not the one that its manifest names"
    for model, value in manifests["evaluate"].facts["models"].items() if "evaluate" in manifests else ():
        if known.get(model, value) != value:
            yield f"evaluate used another {model} than the one trained here"


def rendering(run: Evidence) -> Iterator[str]:
    """Training, sampling and evaluation made tokens of text in one way."""
    hashes = {
        name: manifest.facts["template_hash"] for name, manifest in run.manifests.items() if "template_hash" in manifest.facts
    }
    if len(set(hashes.values())) > 1:
        told = ", ".join(f"{name} {value}" for name, value in hashes.items())
        yield f"stages rendered text in different ways (template hashes: {told})"


def lineage(run: Evidence, base: str, model: str) -> str:
    """The lineage hash of a model, from the adapters on disk."""
    from suasion.models import lineage_hash

    return lineage_hash(base, [run.directory.folder(name) / "adapter" for name in run.recipe.adapter_stages(model)])
