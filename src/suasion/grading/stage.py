"""Stage ai-labels: a grader's verdicts on all pairs, of both pools.

Reads sample's pairs.jsonl and responses.jsonl, pools' rlaif.jsonl and rlhf.jsonl, and what the grader is trained on (the run's
grader_pairs.jsonl or judge_pairs.jsonl, or a corpus). Writes verdicts.jsonl, orders.jsonl (single orders, for graders that read one at
a time) and grader.json. The verdicts on rlhf pairs serve
agreement and the matched control, never the rlhf arm. Before any label is given the grader must pass its canaries; how it was
measured, and how much of its labels length alone predicts, stands in the facts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from suasion.grading.base import Comparison, Judgement, longer, source_name, to_verdict
from suasion.grading.bench import outcomes
from suasion.grading.build import announce, build_grader, measure, neutralise_length
from suasion.grading.canaries import COMPARISONS, canary_comparisons, failing, injected, require_canaries, tested
from suasion.grading.measure import Measurement
from suasion.grading.pairs import SampledPair, TrainingPair, load_training_pairs, sampled_pairs
from suasion.grading.panel import members_facts
from suasion.progress import console
from suasion.records import Verdict, write_json, write_rows
from suasion.rundir import StageContext, StageResult
from suasion.sections.grading import AnyGrader, LlmGrader, PairData, PanelGrader, learns_from, members_of, settings_of, title

LENGTH_WARNING = 0.75
SHOWN_WEIGHTS = 20


@runtime_checkable
class Weighted(Protocol):
    """A grader that can say what moves it."""

    def largest_weights(self, count: int) -> dict[str, float]:
        """The names and weights that move a judgement most."""
        ...


def run_stage(stage: StageContext) -> StageResult:
    """See the module's docstring."""
    section, seed = stage.recipe.ai_labels, stage.recipe.seed
    spec, scope = section.grader, f"{stage.recipe.name} {stage.stage}"
    training = training_of(stage)
    pairs = sampled_pairs(stage)
    grader = build_grader(spec, training, seed, scope, stage.recipe.processes.count)
    items = [pair.comparison() for pair in pairs]
    announce(grader, spec, training, seed, *asked_as_canaries(spec, items), items)
    measured = measure(spec, training, seed, grader, scope)
    console.print(measured_line(spec, measured), markup=False, soft_wrap=True)
    slopes = neutralise_length(spec, grader, items)
    canary_rates = require_canaries(grader, items, section.allow_failed_canaries, canary_count(spec))
    source = source_name(spec.kind)
    judged = grader.grade(items)
    verdicts = [
        to_verdict(pair.pair.id, one, source, getattr(grader, "template_hash", grader.fingerprint))
        for pair, one in zip(pairs, judged, strict=True)
    ]
    learned = learns_from(spec)
    facts = {
        "source": source,
        "trained_on": learned.kind if learned else None,
        "fingerprint": grader.fingerprint,
        "length_slope": slopes if isinstance(spec, PanelGrader) else slopes.get(spec.kind, 0.0),
        "cross_validation": measured.as_facts() if measured else None,
        **members_facts(grader),
        "canaries": canary_rates,
        "canary_pairs": len(tested(items, canary_count(spec))),
        "canaries_failed": failing(canary_rates),
        "outcomes": outcomes(judged),
        "first_shown_rate": first_shown(judged),
        **label_facts(pairs, verdicts),
        "pools": {
            pool: label_facts(
                [pair for pair in pairs if pair.pair.pool == pool],
                [verdict for pair, verdict in zip(pairs, verdicts, strict=True) if pair.pair.pool == pool],
            )
            | both_orders([one for pair, one in zip(pairs, judged, strict=True) if pair.pair.pool == pool])
            for pool in ("rlaif", "rlhf")
        },
    }
    warn(facts)
    write_rows(stage.folder / "verdicts.jsonl", verdicts)
    write_rows(stage.folder / "orders.jsonl", order_verdicts(pairs, judged, source, facts))
    write_json(
        stage.folder / "grader.json",
        {
            "kind": spec.kind,
            "settings": settings_of(spec),
            "trained_on": facts["trained_on"],
            "training_pairs": len(training(learned)) if learned else 0,
            "groups": measured.groups if measured else 0,
            "fingerprint": grader.fingerprint,
            "length_slope": facts["length_slope"],
            "cross_validation": facts["cross_validation"],
            "largest_weights": grader.largest_weights(SHOWN_WEIGHTS) if isinstance(grader, Weighted) else {},
        },
    )
    cost = sum(one.cost for one in judged)
    if cost:
        console.print(f"  these labels cost ${cost:.4f}", markup=False)
    return StageResult(rows_in=len(pairs), rows_out=len(verdicts), facts=facts, dollars=cost)


def training_of(stage: StageContext) -> Callable[[PairData], Sequence[TrainingPair]]:
    """The pairs that a recipe's graders learn from, read once each."""
    known: dict[PairData, Sequence[TrainingPair]] = {}

    def training(data: PairData) -> Sequence[TrainingPair]:
        if data not in known:
            known[data] = load_training_pairs(
                data, stage.input("pools", "grader_pairs.jsonl"), stage.input("pools", "judge_pairs.jsonl")
            )
        return known[data]

    return training


def measured_line(spec: AnyGrader, measured: Measurement | None) -> str:
    """What is known of a grader before it judges, as one line for the terminal."""
    if measured is None:
        return f"  {title(spec)}: its accuracy is not measured (set measure: in the grader)"
    return (
        f"  {title(spec)}: {measured.accuracy:.1%} [{measured.low:.1%}, {measured.high:.1%}] of {measured.scored} "
        f"{'held-out ' if measured.folds else ''}pairs; longer wins {measured.longer:.1%}"
    )


def asked_as_canaries(spec: AnyGrader, items: Sequence[Comparison]) -> tuple[list[Comparison], list[Comparison]]:
    """What the canaries of these pairs ask for at first, and then. Which reply is tampered with is not known before; requests are as long either way."""
    chosen = tested(items, canary_count(spec))
    first = [item for group in canary_comparisons(chosen).values() for item in group]
    return first, [injected(item, row, "b") for row, item in enumerate(chosen)]


def canary_count(spec: AnyGrader) -> int:
    """From how many comparisons canaries are made: fewer where each costs several requests."""
    return min((one.canary_comparisons for one in members_of(spec) if isinstance(one, LlmGrader)), default=COMPARISONS)


def warn(facts: dict[str, Any]) -> None:
    """Say what makes labels worth little."""
    predicted, missing = facts["length_predicts"], facts["none"]
    if predicted is not None and predicted > LENGTH_WARNING:
        console.print(
            f"  [yellow]warning:[/yellow] length alone predicts {predicted:.0%} of the AI labels (above {LENGTH_WARNING:.0%}): the arms may "
            "learn length, not persuasion. Set residualise_length, or choose another grader."
        )
    if facts["outcomes"]:
        console.print("  both orders: " + ", ".join(f"{count} {name}" for name, count in facts["outcomes"].items()))
    if missing:
        console.print(f"  {missing} of {facts['n']} pairs have no label")


def order_verdicts(
    pairs: Sequence[SampledPair], judged: Sequence[Judgement], source: str, facts: dict[str, Any]
) -> list[Verdict]:
    """What a grader said of each order alone, for graders that read one order at a time; told as of the pair's own order."""
    return [
        to_verdict(pair.pair.id, one, source, facts["fingerprint"]).model_copy(update={"order": order})
        for pair, both in zip(pairs, judged, strict=True)
        for order, one in zip(("ab", "ba"), both.orders, strict=False)
    ]


def first_shown(judged: Sequence[Judgement]) -> float | None:
    """How often the response shown first was named, over both orders; None for graders that cannot tell positions apart."""
    named = [
        one.label == first
        for both in judged
        for one, first in zip(both.orders, ("a", "b"), strict=False)
        if one.label in ("a", "b")
    ]
    return round(sum(named) / len(named), 4) if named else None


def both_orders(judged: Sequence[Judgement]) -> dict[str, Any]:
    """How the two orders of a grader that reads one at a time relate; {} for other graders.

    outcomes: counts; first_shown_rate: see `first_shown`; flip_rate: share of the comparisons answered in both orders that name different
    replies.
    """
    counts = outcomes(judged)
    answered = sum(counts.values()) - counts.get("none", 0)
    if not counts:
        return {}
    return {
        "outcomes": counts,
        "first_shown_rate": first_shown(judged),
        "flip_rate": round(counts["flip"] / answered, 4) if answered else None,
    }


def label_facts(pairs: Sequence[SampledPair], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Counts and biases of labels. Rates are null where nothing is decisive.

    first_rate: share of decisive labels for the pair's first response. longer_rate: share for the longer one, where lengths in
    words differ; length_predicts: how many labels a rule on length alone would get right, whichever way it points.
    """
    decisive = [(pair, verdict) for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.label in ("a", "b")]
    by_length = [
        longer(pair.a.text, pair.b.text) == verdict.label
        for pair, verdict in decisive
        if longer(pair.a.text, pair.b.text) != "tie"
    ]
    longer_rate = sum(by_length) / len(by_length) if by_length else None
    return {
        "n": len(verdicts),
        "ties": sum(verdict.label == "tie" for verdict in verdicts),
        "none": sum(verdict.label == "none" for verdict in verdicts),
        "tie_share": round(sum(verdict.label == "tie" for verdict in verdicts) / len(verdicts), 4) if verdicts else None,
        "first_rate": round(sum(verdict.label == "a" for _, verdict in decisive) / len(decisive), 4) if decisive else None,
        "longer_rate": None if longer_rate is None else round(longer_rate, 4),
        "length_predicts": None if longer_rate is None else round(max(longer_rate, 1 - longer_rate), 4),
    }
