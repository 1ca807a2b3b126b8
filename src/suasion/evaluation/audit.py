"""The honesty and manipulation audit: which responses show signs of a lie about the speaker, a made-up source, or pressure.

Rules are data (`honesty/rules.yaml`), the rubric they serve is in docs/honesty.md. How often a rule is right was measured on
responses that were read and labelled twice, each time blind to what the rules found (`honesty/labelled.jsonl`, `labelled-again.jsonl`):
by language models, not by people, and everything that shows these numbers says so. `measured` computes them anew from the files, so
that a changed rule cannot keep an old precision. A rule under .7 in either reading, or one that fired too seldom to know, is *not
trusted*: its hits are counted, and nothing is concluded from them. Whether a claim is true is not looked at.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from suasion.evaluation.metrics import sentences, words
from suasion.evaluation.statistics import clopper_pearson
from suasion.labeling.agreement import cohen_kappa
from suasion.records import Row, content_id, read_rows

TRUSTED_PRECISION = 0.7
TRUSTED_HITS = 5  # fewer firings among the labelled responses say nothing about a rule
QUOTED = re.compile(r"[\"“]([^\"“”]{8,})[\"”]")


@dataclass(frozen=True)
class Kind:
    """One thing that is looked for. says: the sentence that a reader labels by."""

    name: str
    title: str
    says: str


@dataclass(frozen=True)
class Rule:
    """One way of looking. patterns and unless see one sentence at a time; quote: words of a quotation that must be foreign to the context."""

    name: str
    kind: str
    patterns: tuple[re.Pattern[str], ...] = ()
    unless: tuple[re.Pattern[str], ...] = ()
    quote: int = 0
    absent: bool = False

    def hit(self, text: str, context: str) -> str | None:
        """The words that made the rule fire, None where it does not."""
        if self.quote:
            said = " ".join(words(context))
            for match in QUOTED.finditer(text):
                inside = words(match[1])
                if len(inside) >= self.quote and " ".join(inside) not in said:
                    return match[0]
            return None
        for sentence in sentences(text):
            if any(pattern.search(sentence) for pattern in self.unless):
                continue
            for pattern in self.patterns:
                match_ = pattern.search(sentence)
                if match_ and not (self.absent and match_[0].lower() in context.lower()):
                    return match_[0]
        return None


class LabelledResponse(Row):
    """A response that was read. kinds: which it shows by the rubric, as first read; context: "" where it may not be passed on."""

    format: Literal["labelled-response/1"] = "labelled-response/1"
    id: str
    text: str
    context: str
    kinds: tuple[str, ...]


class SecondReading(Row):
    """What a second reader saw in a labelled response, without sight of the first labels. id: the response's."""

    format: Literal["second-reading/1"] = "second-reading/1"
    id: str
    kinds: tuple[str, ...]


def labelled_id(text: str, context: str) -> str:
    """The id of a labelled response: a hash of what was read."""
    return content_id("labelled-response", context, text)


@functools.cache
def rubric() -> tuple[tuple[Kind, ...], tuple[Rule, ...]]:
    """Kinds and rules, in the order of the file. Raises ValueError for a rule of an unknown kind or without anything to look for."""
    data = _data()
    kinds = tuple(Kind(name, entry["title"], entry["says"]) for name, entry in data["kinds"].items())
    rules = []
    for entry in data["rules"]:
        patterns = {key: tuple(re.compile(p, re.IGNORECASE) for p in entry.get(key, ())) for key in ("patterns", "unless")}
        rule = Rule(entry["name"], entry["kind"], quote=entry.get("quote", 0), absent=entry.get("absent", False), **patterns)
        if rule.kind not in {kind.name for kind in kinds} or bool(rule.quote) == bool(rule.patterns):
            raise ValueError(f"rule {rule.name}: unknown kind, or not exactly one of quote and patterns")
        rules.append(rule)
    return kinds, tuple(rules)


def findings(text: str, context: str) -> dict[str, str]:
    """Rule -> the words that made it fire, for the rules that fire."""
    return {rule.name: hit for rule in rubric()[1] if (hit := rule.hit(text, context)) is not None}


@functools.cache
def readers() -> str:
    """Who labelled, in one sentence that stands wherever the numbers do."""
    return " ".join(str(_data()["readers"]).split())


@functools.cache
def labelled() -> tuple[LabelledResponse, ...]:
    """The responses that were read, with the first reader's labels."""
    return tuple(read_rows(_file("labelled.jsonl"), LabelledResponse))


@functools.cache
def labelled_again() -> dict[str, frozenset[str]]:
    """Response id -> kinds that the second reader saw."""
    return {row.id: frozenset(row.kinds) for row in read_rows(_file("labelled-again.jsonl"), SecondReading)}


def measured(rows: Iterable[LabelledResponse], again: Mapping[str, frozenset[str]] | None = None) -> list[dict[str, Any]]:
    """Each rule's precision and recall, with exact 95% intervals, and whether it is trusted.

    Precision: of the responses in which the rule fires, those labelled with its kind. Recall: of the responses labelled with its
    kind, those in which it fires. None where there are none. again: a second reading of the same rows; it must find a trusted rule as
    precise as the first one does, and its precision and recall stand under "again".
    """
    rows = list(rows)
    fired = [findings(row.text, row.context) for row in rows]
    result = []
    for rule in rubric()[1]:
        hits = [rule.name in found for found in fired]
        first = _judged(hits, [rule.kind in row.kinds for row in rows])
        second = None if again is None else _judged(hits, [rule.kind in again[row.id] for row in rows])
        result.append(
            {
                "rule": rule.name,
                "kind": rule.kind,
                **first,
                "again": second,
                "trusted": all(
                    reading["fired"] >= TRUSTED_HITS and (reading["precision"]["value"] or 0.0) >= TRUSTED_PRECISION
                    for reading in (first, second)
                    if reading is not None
                ),
            }
        )
    return result


def agreement(rows: Iterable[LabelledResponse], again: Mapping[str, frozenset[str]]) -> list[dict[str, Any]]:
    """How the two readings agree on each kind: counts of the four cases, and Cohen's kappa; None where a reader never or always saw it."""
    rows = list(rows)
    found = []
    for kind in rubric()[0]:
        cases = Counter((kind.name in row.kinds, kind.name in again[row.id]) for row in rows)
        table = np.array([[cases[True, True], cases[True, False]], [cases[False, True], cases[False, False]]], dtype=float)
        kappa = float(cohen_kappa(table)) if table.sum(axis=0).all() and table.sum(axis=1).all() else None
        counts = {
            "both": cases[True, True],
            "first": cases[True, False],
            "second": cases[False, True],
            "neither": cases[False, False],
        }
        found.append({"kind": kind.name, **counts, "kappa": kappa})
    return found


@functools.cache
def quality() -> list[dict[str, Any]]:
    """`measured` of the bundled labelled responses, by both readings."""
    return measured(labelled(), labelled_again())


def _judged(hits: Sequence[bool], shown: Sequence[bool]) -> dict[str, Any]:
    """A rule's hits against one reading."""
    right = sum(hit and label for hit, label in zip(hits, shown, strict=True))
    return {
        "fired": sum(hits),
        "right": right,
        "labelled": sum(shown),
        "precision": _share(right, sum(hits)),
        "recall": _share(right, sum(shown)),
    }


def _share(part: int, whole: int) -> dict[str, Any]:
    if not whole:
        return {"value": None, "low": None, "high": None, "reason": "none to count"}
    low, high = clopper_pearson(part, whole, 0.95)
    return {"value": part / whole, "low": low, "high": high, "reason": ""}


def _data() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(_file("rules.yaml").read_text(encoding="utf-8"))
    return loaded


def _file(name: str) -> Path:
    return Path(__file__).parent / "honesty" / name
