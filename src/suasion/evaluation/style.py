"""What changed in the text: every measure of every speaker, and how it differs from the base model's on the same prompts.

Reads texts in the order of the prompts and numbers made elsewhere (`Measured`); writes nothing. A measure of one response has a mean
and, against base, a paired difference with an interval by conversation. Pooled measures (diversity, reading grade) need many words
and have a value only. All of it is exploratory: the family of planned tests is about winning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from suasion.evaluation import audit, metrics
from suasion.evaluation.statistics import mean_estimate, real_mean_estimate
from suasion.records import Response

TextMeasure = Callable[[str, str], float | None]

PER_RESPONSE: dict[str, TextMeasure] = {
    "words": lambda text, _: len(metrics.words(text)),
    "repetition": lambda text, _: metrics.repetition(text),
    "hedging": lambda text, _: metrics.hedging(text),
    "questions": lambda text, _: metrics.questions(text),
    "second_person": lambda text, _: metrics.second_person(text),
    "links": lambda text, _: metrics.links(text),
    "numbers": lambda text, _: metrics.numbers(text),
    "claims": lambda text, _: metrics.claims(text),
    "context_overlap": metrics.context_overlap,
}
POOLED: dict[str, Callable[[Sequence[str]], float | None]] = {
    "distinct_2": metrics.distinct,
    "mattr": metrics.moving_type_token_ratio,
    "reading_grade": metrics.reading_grade,
}


@dataclass(frozen=True)
class Measured:
    """What needs a model to measure, handed over by the stage; empty where it was not measured.

    per_response: measure -> speaker -> prompt id -> value. likelihood and strategies: as `likelihood.compare` and
    `strategies.compare` return them.
    """

    per_response: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    likelihood: dict[str, Any] = field(default_factory=dict)
    strategies: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Speech:
    """What one speaker said to the prompts, in their order; None where it said nothing. responses: of models only."""

    name: str
    texts: tuple[str | None, ...]
    responses: tuple[Response | None, ...] = ()

    def said(self) -> list[str]:
        """The texts that exist."""
        return [text for text in self.texts if text is not None]


@dataclass(frozen=True)
class Sample:
    """The prompts that all speakers answered: ids and contexts, conversations and their bootstrap weights."""

    prompt_ids: tuple[str, ...]
    contexts: tuple[str, ...]
    clusters: np.ndarray
    weights: np.ndarray
    confidence: float


def values(speech: Speech, sample: Sample, measured: Measured) -> dict[str, np.ndarray]:
    """measure -> (n,) over prompts, NaN where there is none."""
    rows: dict[str, list[float | None]] = {
        name: [None if text is None else measure(text, context) for text, context in zip(speech.texts, sample.contexts, strict=True)]
        for name, measure in PER_RESPONSE.items()
    }  # fmt: skip
    if speech.responses:
        rows["tokens"] = [None if r is None or r.tokens is None else len(r.tokens) for r in speech.responses]
        rows["cut_off"] = [None if r is None else float(r.finish == "length") for r in speech.responses]
    for name, by_speaker in measured.per_response.items():
        known = by_speaker.get(speech.name, {})
        rows[name] = [known.get(prompt_id) for prompt_id in sample.prompt_ids]
    return {name: np.array([np.nan if value is None else value for value in row], dtype=float) for name, row in rows.items()}


def facts(speech: Speech, sample: Sample, measured: Measured) -> dict[str, float | None]:
    """How a speaker writes: means over responses, and the pooled measures. None where there is nothing to measure."""
    found: dict[str, float | None] = {"tokens": None, "cut_off": None}
    for name, row in values(speech, sample, measured).items():
        found[name] = float(np.nanmean(row)) if (~np.isnan(row)).any() else None
    return found | {name: measure(speech.said()) for name, measure in POOLED.items()}


def drift(speech: Speech, base: Speech, sample: Sample, measured: Measured) -> dict[str, dict[str, Any]]:
    """measure -> mean difference to base on the prompts that both answered, with its interval by conversation."""
    own, other = values(speech, sample, measured), values(base, sample, measured)
    return {
        name: real_mean_estimate(own[name] - other[name], sample.clusters, sample.weights, sample.confidence).as_json()
        for name in own
        if name in other
    }


def honesty(speeches: Sequence[Speech], sample: Sample) -> dict[str, Any]:
    """The audit of every speaker: rates by trusted rules, counts of the others, and how good each rule is."""
    kinds, rules = audit.rubric()
    quality = audit.quality()
    trusted = {entry["rule"] for entry in quality if entry["trusted"]}
    base = next((speech for speech in speeches if speech.name == "base"), None)
    flags = {speech.name: _flags(speech, sample) for speech in speeches}
    speakers: dict[str, Any] = {}
    for speech in speeches:
        entry: dict[str, Any] = {"responses": len(speech.said()), "rates": {}, "vs_base": {}, "counts": {}}
        for rule in rules:
            entry["counts"][rule.name] = int(np.nansum(flags[speech.name][rule.name]))
        for kind in kinds:
            names = [rule.name for rule in rules if rule.kind == kind.name and rule.name in trusted]
            if not names:
                continue
            own = np.max([flags[speech.name][name] for name in names], axis=0)
            entry["rates"][kind.name] = mean_estimate(own, sample.clusters, sample.weights, sample.confidence).as_json()
            if base is not None and speech is not base:
                against = np.max([flags["base"][name] for name in names], axis=0)
                entry["vs_base"][kind.name] = real_mean_estimate(
                    own - against, sample.clusters, sample.weights, sample.confidence
                ).as_json()
        speakers[speech.name] = entry
    return {
        "labelled": len(audit.labelled()),
        "threshold": audit.TRUSTED_PRECISION,
        "fewest_hits": audit.TRUSTED_HITS,
        "kinds": [{"kind": kind.name, "title": kind.title, "says": kind.says} for kind in kinds],
        "rules": quality,
        "readers": audit.readers(),
        "readings": audit.agreement(audit.labelled(), audit.labelled_again()),
        "speakers": speakers,
    }


def _flags(speech: Speech, sample: Sample) -> dict[str, np.ndarray]:
    """rule -> (n,) 1 where it fires, 0 where not, NaN without a text."""
    found = [
        None if text is None else audit.findings(text, context)
        for text, context in zip(speech.texts, sample.contexts, strict=True)
    ]
    return {
        rule.name: np.array([np.nan if hits is None else float(rule.name in hits) for hits in found], dtype=float)
        for rule in audit.rubric()[1]
    }
