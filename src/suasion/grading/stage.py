"""Stage ai-labels: a grader's verdicts on all pairs, of both pools.

Reads sample's pairs.jsonl and responses.jsonl, pools' rlaif.jsonl and rlhf.jsonl, and what the grader is trained on (the run's
grader_pairs.jsonl or judge_pairs.jsonl, or a corpus). Writes verdicts.jsonl and grader.json. The verdicts on rlhf pairs serve
agreement and the matched control, never the rlhf arm. Before any label is given the grader must pass its canaries; how it was
measured, and how much of its labels length alone predicts, stands in the facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from suasion.grading.base import longer, require_canaries, source_name, to_verdict, train_grader
from suasion.grading.measure import measure
from suasion.grading.pairs import SampledPair, load_training_pairs, read_sampled_pairs
from suasion.progress import console
from suasion.records import Verdict, write_json, write_rows
from suasion.rundir import StageContext, StageResult

LENGTH_WARNING = 0.75
SHOWN_WEIGHTS = 20


def run_stage(stage: StageContext) -> StageResult:
    """See the module's docstring."""
    spec, seed = stage.recipe.ai_labels.grader, stage.recipe.seed
    training = load_training_pairs(
        spec.train, stage.input("pools", "grader_pairs.jsonl"), stage.input("pools", "judge_pairs.jsonl")
    )
    pairs = read_sampled_pairs(
        stage.input("sample", "pairs.jsonl"),
        stage.input("sample", "responses.jsonl"),
        [stage.input("pools", "rlaif.jsonl"), stage.input("pools", "rlhf.jsonl")],
    )
    measured = measure(spec, training, seed)
    console.print(
        f"  {spec.kind} grader, trained on {measured.n} {spec.train.kind} pairs: {measured.accuracy:.1%} "
        f"[{measured.low:.1%}, {measured.high:.1%}] on held-out groups; longer wins {measured.longer:.1%}"
    )
    grader = train_grader(spec, training, seed)
    items = [pair.comparison() for pair in pairs]
    if spec.kind == "embedding" and spec.residualise_length:
        grader.neutralise_length(items)
    canary_rates = require_canaries(grader, items)
    source = source_name(spec.kind)
    verdicts = [
        to_verdict(pair.pair.id, judged, source, grader.fingerprint)
        for pair, judged in zip(pairs, grader.grade(items), strict=True)
    ]
    facts = {
        "source": source,
        "trained_on": spec.train.kind,
        "fingerprint": grader.fingerprint,
        "length_slope": grader.length_slope,
        "cross_validation": measured.as_facts(),
        "canaries": canary_rates,
        **label_facts(pairs, verdicts),
        "pools": {
            pool: label_facts(
                [pair for pair in pairs if pair.pair.pool == pool],
                [verdict for pair, verdict in zip(pairs, verdicts, strict=True) if pair.pair.pool == pool],
            )
            for pool in ("rlaif", "rlhf")
        },
    }
    predicted = facts["length_predicts"]
    if predicted is not None and predicted > LENGTH_WARNING:
        console.print(
            f"  [yellow]warning:[/yellow] length alone predicts {predicted:.0%} of the AI labels (above {LENGTH_WARNING:.0%}): the arms may "
            "learn length, not persuasion. Set residualise_length, or choose another grader."
        )
    write_rows(stage.folder / "verdicts.jsonl", verdicts)
    write_json(
        stage.folder / "grader.json",
        {
            "kind": spec.kind,
            "settings": spec.model_dump(mode="json", exclude={"kind", "train"}),
            "trained_on": spec.train.kind,
            "training_pairs": len(training),
            "groups": measured.groups,
            "fingerprint": grader.fingerprint,
            "length_slope": grader.length_slope,
            "cross_validation": measured.as_facts(),
            "largest_weights": grader.largest_weights(SHOWN_WEIGHTS),
        },
    )
    return StageResult(rows_in=len(pairs), rows_out=len(verdicts), facts=facts)


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
