"""The honesty and manipulation audit: which responses show signs of a lie about the speaker, a made-up source, or pressure.

Rules are data (`honesty/rules.yaml`), the rubric they serve is in docs/honesty.md. How often a rule is right was measured on
responses that a person read and labelled before seeing what the rules found (`honesty/labelled.jsonl`); `measured` computes it
anew from that file, so that a changed rule cannot keep an old precision. A rule under .7, or one that fired too seldom to know, is
*not trusted*: its hits are counted, and nothing is concluded from them. Whether a claim is true is not looked at.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

import yaml

from suasion.evaluation.metrics import sentences, words
from suasion.evaluation.statistics import clopper_pearson
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
    """A response that a person read. kinds: which it shows by the rubric, as read; context: "" where it may not be passed on."""

    format: Literal["labelled-response/1"] = "labelled-response/1"
    id: str
    text: str
    context: str
    kinds: tuple[str, ...]


def labelled_id(text: str, context: str) -> str:
    """The id of a labelled response: a hash of what was read."""
    return content_id("labelled-response", context, text)


@functools.cache
def rubric() -> tuple[tuple[Kind, ...], tuple[Rule, ...]]:
    """Kinds and rules, in the order of the file. Raises ValueError for a rule of an unknown kind or without anything to look for."""
    data = yaml.safe_load((files("suasion.evaluation") / "honesty" / "rules.yaml").read_text(encoding="utf-8"))
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
def labelled() -> tuple[LabelledResponse, ...]:
    """The responses that were read and labelled."""
    with_path = files("suasion.evaluation") / "honesty" / "labelled.jsonl"
    return tuple(read_rows(with_path, LabelledResponse))  # type: ignore[arg-type]


def measured(rows: Iterable[LabelledResponse]) -> list[dict[str, Any]]:
    """Each rule's precision and recall, with exact 95% intervals, and whether it is trusted.

    Precision: of the responses in which the rule fires, those labelled with its kind. Recall: of the responses labelled with its
    kind, those in which it fires. None where there are none.
    """
    rows = list(rows)
    fired = [findings(row.text, row.context) for row in rows]
    result = []
    for rule in rubric()[1]:
        hits = [rule.name in found for found in fired]
        right = sum(hit and rule.kind in row.kinds for hit, row in zip(hits, rows, strict=True))
        shown = sum(rule.kind in row.kinds for row in rows)
        precision = _share(right, sum(hits))
        result.append(
            {
                "rule": rule.name,
                "kind": rule.kind,
                "fired": sum(hits),
                "right": right,
                "labelled": shown,
                "precision": precision,
                "recall": _share(right, shown),
                "trusted": sum(hits) >= TRUSTED_HITS and (precision["value"] or 0.0) >= TRUSTED_PRECISION,
            }
        )
    return result


@functools.cache
def quality() -> list[dict[str, Any]]:
    """`measured` of the bundled labelled responses."""
    return measured(labelled())


def _share(part: int, whole: int) -> dict[str, Any]:
    if not whole:
        return {"value": None, "low": None, "high": None, "reason": "none to count"}
    low, high = clopper_pearson(part, whole, 0.95)
    return {"value": part / whole, "low": low, "high": high, "reason": ""}
