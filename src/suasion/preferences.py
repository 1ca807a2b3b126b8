"""Stage preferences: from verdicts to training pairs, one file an arm.

Reads sample's pairs and responses, pools' rlaif.jsonl and rlhf.jsonl, ai-labels' verdicts.jsonl and, where they are there,
human-labels' verdicts.jsonl and imported.jsonl. Writes `<arm>.jsonl` for every arm whose labels exist, counts.json (what was kept
and left out, by arm and reason) and, where both sources labelled the same pairs, agreement.json and, to be read, disagreements.html. A tie or a missing
verdict never becomes a preference; flips (one source, two orders, two answers) and other conflicts are counted apart.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from suasion.errors import UserError
from suasion.grading.base import Judgement
from suasion.grading.disagreements import disagreements_page
from suasion.grading.labelled import LabelledPair
from suasion.grading.pairs import SampledPair, sampled_pairs
from suasion.labeling.agreement import Labelled, compare
from suasion.labeling.events import ADJUDICATOR
from suasion.labeling.stage import chose_first
from suasion.records import Label, Preference, Response, Verdict, content_id, read_rows, write_json, write_rows
from suasion.rundir import Input, StageContext, StageResult
from suasion.sections.labeling import PreferencesSection
from suasion.sections.training import DpoArm

FEWEST_PREFERENCES = 4
DISAGREEMENTS = "disagreements.html"
REASONS = ("tie", "none", "conflict", "flip", "identical", "unlabelled", "unmatched")
NOT_MATCHED = "human labels were imported on other texts, so these are AI labels on all of the run's rlhf pairs, not on the pairs that people labelled"

Settled = Literal["a", "b", "tie", "none", "conflict", "flip"]


def run_stage(stage: StageContext) -> StageResult:
    """See the module's docstring."""
    recipe = stage.recipe
    pairs = sampled_pairs(stage)
    ai = list(read_rows(stage.input("ai-labels", "verdicts.jsonl"), Verdict))
    human: list[Verdict] | None = None
    imported: list[Preference] | None = None
    if Input("human-labels", "verdicts.jsonl") in stage.inputs:
        human = list(read_rows(stage.input("human-labels", "verdicts.jsonl"), Verdict))
        source = recipe.human_labels.source
        if source.kind == "file" and source.layout == "preferences":
            imported = list(read_rows(stage.input("human-labels", "imported.jsonl"), Preference))
    arms: dict[str, dict[str, Any]] = {}
    left_out = []
    for arm in recipe.dpo:
        if needs_human(arm) and human is None:
            left_out.append(arm.name)
            continue
        rows, counts = build(arm, pairs, ai, human, imported, recipe.preferences)
        require_enough(arm, rows, counts)
        write_rows(stage.folder / f"{arm.name}.jsonl", rows)
        arms[arm.name] = {**counts, **describe(rows)}
        if arm.matched and imported is not None:
            arms[arm.name]["note"] = NOT_MATCHED
    agreement = None
    if human:
        agreement = compare(agreement_rows(pairs, ai, human, recipe.preferences), recipe.seed)
        agreement["sources"] = {"human": _sources(human), "ai": _sources(ai)}
        page = stage.folder / DISAGREEMENTS
        page.write_text(disagreements(pairs, ai, human, recipe.preferences), encoding="utf-8")
        agreement["page"] = f"{stage.folder.name}/{page.name}"
        write_json(stage.folder / "agreement.json", agreement)
    write_json(stage.folder / "counts.json", {"arms": arms, "left_out": left_out})
    return StageResult(
        rows_in=len(ai) + len(human or []) + len(imported or []),
        rows_out=sum(arm["n"] for arm in arms.values()),
        dropped={f"{name}: {reason}": counts[reason] for name, counts in arms.items() for reason in REASONS if counts[reason]},
        facts={"arms": arms, "left_out": left_out, "agreement": agreement}
        | ({"erased": erased} if (erased := stage.facts.get("human-labels", {}).get("erased")) else {}),
    )


def needs_human(arm: DpoArm) -> bool:
    """Whether an arm waits for human labels: its own, or to know which pairs people decided."""
    return arm.labels == "human" or arm.matched


def build(
    arm: DpoArm,
    pairs: Sequence[SampledPair],
    ai: Sequence[Verdict],
    human: Sequence[Verdict] | None,
    imported: Sequence[Preference] | None,
    settings: PreferencesSection,
) -> tuple[list[Preference], dict[str, int]]:
    """The preferences of one arm, in the order of `pairs`, and the counts: pairs, n (kept) and every reason of REASONS.

    human: None while people have not labelled. imported: human preferences on another model's texts, None where human labels are
    on the run's own pairs; human arms then train on exactly these, and a `matched` arm takes the AI labels on all rlhf pairs.
    Every pair counts once: pairs = n + the sum over REASONS.
    """
    counts = dict.fromkeys(("pairs", "n", *REASONS), 0)
    if arm.labels == "human" and imported is not None:
        return list(imported), {**counts, "pairs": len(imported), "n": len(imported)}
    verdicts = _by_pair(human or [] if arm.labels == "human" else ai)
    people = _by_pair(human or [])
    rows = []
    for item in pairs:
        if item.pair.pool != arm.pool:
            continue
        counts["pairs"] += 1
        given = verdicts.get(item.pair.id, [])
        label = settle(given, settings.conflicts)
        if item.a.text.strip() == item.b.text.strip():
            counts["identical"] += 1
        elif arm.matched and imported is None and settle(people.get(item.pair.id, []), settings.conflicts) not in ("a", "b"):
            counts["unmatched"] += 1
        elif not given:
            counts["unlabelled"] += 1
        elif label not in ("a", "b"):
            counts[label] += 1
        else:
            sources = tuple(sorted({verdict.source for verdict in given}))
            rows.append(to_preference(item, label, sources, arm.start == "sft", chosen_probability(given, label)))
    counts["n"] = len(rows)
    return rows, counts


def settle(verdicts: Sequence[Verdict], conflicts: Literal["drop", "first", "adjudicate"]) -> Settled:
    """One label from the verdicts of one side on one pair, in their order.

    Missing labels ("none") say nothing; where nothing else is said the result is "none", or "flip" where a grader's two orders cancelled
    out. Labels that agree, bind. Labels that
    differ are a "flip" if one source contradicted itself when the pair was shown the other way round, else a "conflict"; with
    conflicts "first", the first label binds instead; with "adjudicate", what an adjudicator said, where one did.
    """
    ruled = [verdict.label for verdict in verdicts if verdict.source == ADJUDICATOR]
    if ruled and conflicts == "adjudicate":
        return ruled[-1]
    said = [verdict for verdict in verdicts if verdict.label != "none" and verdict.source != ADJUDICATOR]
    if not said:
        return "flip" if any(verdict.outcome == "flip" for verdict in verdicts) else "none"
    if len({verdict.label for verdict in said}) == 1 or conflicts == "first":
        return said[0].label
    flipped = any(
        one.source == other.source and {one.order, other.order} == {"ab", "ba"} and {one.label, other.label} == {"a", "b"}
        for one in said
        for other in said
    )
    return "flip" if flipped else "conflict"


def chosen_probability(given: Sequence[Verdict], label: Label) -> float | None:
    """Mean probability that the chosen side is better, over the verdicts that give one; None where none does."""
    known = [verdict.p_a if label == "a" else 1 - verdict.p_a for verdict in given if verdict.p_a is not None]
    return sum(known) / len(known) if known else None


def to_preference(
    item: SampledPair, label: Label, sources: tuple[str, ...], on_policy: bool, p: float | None = None
) -> Preference:
    """A decisive label as a training pair. on_policy: whether the arm starts from sft, which wrote the responses. p: see Preference."""
    chosen, rejected = (item.a, item.b) if label == "a" else (item.b, item.a)
    return Preference(
        id=content_id("preference", item.prompt.id, chosen.id, rejected.id),
        prompt=item.prompt,
        chosen=chosen,
        rejected=rejected,
        sources=sources,
        p=p,
        on_policy=on_policy,
    )


def require_enough(arm: DpoArm, rows: Sequence[Preference], counts: dict[str, int]) -> None:
    """Raises UserError, with the counts by reason, where an arm has too little to train on."""
    if len(rows) < FEWEST_PREFERENCES:
        reasons = ", ".join(f"{counts[reason]} {reason}" for reason in REASONS if counts[reason]) or "nothing was left out"
        raise UserError(
            f"arm '{arm.name}' has {len(rows)} preferences from {counts['pairs']} {arm.pool} pairs ({reasons}); at least "
            f"{FEWEST_PREFERENCES} are needed. Raise pools.{arm.pool}, lower the grader's tie_margin, let sample keep unfinished "
            "responses, or remove the arm."
        )


def describe(rows: Sequence[Preference]) -> dict[str, Any]:
    """What a model could learn from these preferences without reading them: length, how responses end, and where they are from.

    length_accuracy: share in which the longer response is chosen (equal lengths count one half), in tokens where both are known,
    else in characters; null without rows.
    """
    longer = [_chosen_longer(row.chosen, row.rejected) for row in rows]
    return {
        "length_accuracy": round(sum(longer) / len(longer), 4) if longer else None,
        "finish": {
            side: dict(sorted(Counter(getattr(row, side).finish for row in rows).items())) for side in ("chosen", "rejected")
        },
        "on_policy": all(row.on_policy for row in rows),
        "sources": sorted({source for row in rows for source in row.sources}),
    }


def agreement_rows(
    pairs: Iterable[SampledPair], ai: Sequence[Verdict], human: Sequence[Verdict], settings: PreferencesSection
) -> list[Labelled]:
    """The rlhf pairs on which both sides settled on a, b or tie."""
    graded, people = _by_pair(ai), _by_pair(human)
    rows = []
    for item in pairs:
        given = people.get(item.pair.id, [])
        theirs, its = settle(given, settings.conflicts), settle(graded.get(item.pair.id, []), settings.conflicts)
        if item.pair.pool == "rlhf" and theirs in ("a", "b", "tie") and its in ("a", "b", "tie"):
            binding = next(verdict for verdict in given if verdict.label == theirs)
            rows.append(Labelled(item.prompt.id, theirs, its, chose_first(binding)))
    return rows


def disagreements(
    pairs: Iterable[SampledPair], ai: Sequence[Verdict], human: Sequence[Verdict], settings: PreferencesSection
) -> str:
    """The rlhf pairs on which people and the labelling grader settled on different labels, as a page with their texts."""
    graded, people = _by_pair(ai), _by_pair(human)
    labelled, judged = [], []
    for item in pairs:
        given = graded.get(item.pair.id, [])
        theirs, its = settle(people.get(item.pair.id, []), settings.conflicts), settle(given, settings.conflicts)
        if item.pair.pool == "rlhf" and theirs in ("a", "b", "tie") and its in ("a", "b", "tie"):
            labelled.append(LabelledPair(item.comparison(), theirs, item.prompt.conversation_id))
            judged.append(Judgement(chosen_probability(given, "a"), its, given[0].reason))
    return disagreements_page(labelled, judged, " and ".join(_sources(ai)))


def _chosen_longer(chosen: Response, rejected: Response) -> float:
    if chosen.tokens is not None and rejected.tokens is not None:
        left, right = len(chosen.tokens), len(rejected.tokens)
    else:
        left, right = len(chosen.text), len(rejected.text)
    return 0.5 if left == right else float(left > right)


def _by_pair(verdicts: Iterable[Verdict]) -> dict[str, list[Verdict]]:
    grouped: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        grouped[verdict.pair_id].append(verdict)
    return grouped


def _sources(verdicts: Iterable[Verdict]) -> list[str]:
    return sorted({verdict.source for verdict in verdicts})
