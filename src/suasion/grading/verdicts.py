"""An LLM's answer becomes a verdict. Pure functions: text in, verdict or the reason why there is none out.

The last verdict binds: a model may think aloud or correct itself, and what it says last is what it says. A verdict counts only as a
member of a whole JSON object; a mention in prose, in a quoted reply or in a broken object is none, and what cannot be read is missing
data, never a tie and never a default.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from suasion.grading.ledger import Answer

Side = Literal["first", "second", "tie"]
SIDES: tuple[Side, ...] = ("first", "second", "tie")
LEAST_MASS = 0.5  # of the verdict token's probability must lie on verdicts for it to be read as one
_VALUE = re.compile(r'"verdict"\s*:\s*"')


@dataclass(frozen=True)
class Said:
    """A verdict in one order: the side, how likely the first is better, and the reasons given."""

    side: Side
    p_first: float
    reasons: str


class Unreadable(ValueError):
    """No verdict in an answer; the message says why, in words that the model can be told."""


PAIR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "reasons": {"type": "string"},
        "verdict": {"type": "string", "enum": list(SIDES)},
        "confidence": {"type": "number"},
    },
    "required": ["reasons", "verdict", "confidence"],
    "additionalProperties": False,
}


def ranking_schema(count: int) -> dict[str, Any]:
    """The schema of a ranking of so many replies."""
    return {
        "type": "object",
        "properties": {
            "reasons": {"type": "string"},
            "ranking": {"type": "array", "items": {"type": "integer", "enum": list(range(1, count + 1))}},
        },
        "required": ["reasons", "ranking"],
        "additionalProperties": False,
    }


def read_pair(answer: Answer, from_tokens: bool) -> Said:
    """The verdict of an answer. from_tokens: its probability from the verdict's tokens where the server told them.

    Raises Unreadable.
    """
    found = last_object(answer, "verdict")
    side = found["verdict"]
    if side not in SIDES:
        raise Unreadable(f'"verdict" must be "first", "second" or "tie", not {json.dumps(side)[:60]}')
    stated = found.get("confidence")
    p = 0.5
    if side != "tie":
        sure = (
            float(stated) if isinstance(stated, int | float) and not isinstance(stated, bool) and math.isfinite(stated) else 1.0
        )
        sure = min(max(sure, 0.5), 1.0)
        p = sure if side == "first" else 1.0 - sure
    if from_tokens and (told := token_probability(answer)) is not None:
        p = told
    reasons = found.get("reasons")
    return Said(side, p, reasons if isinstance(reasons, str) else "")


def read_ranking(answer: Answer, count: int) -> tuple[list[int], str]:
    """(places of the replies 1..count, best first, counted from 0; reasons). Raises Unreadable."""
    found = last_object(answer, "ranking")
    ranking = found["ranking"]
    if not isinstance(ranking, list) or sorted(map(str, ranking)) != sorted(map(str, range(1, count + 1))):
        raise Unreadable(f'"ranking" must hold each number from 1 to {count} once')
    reasons = found.get("reasons")
    return [int(place) - 1 for place in ranking], reasons if isinstance(reasons, str) else ""


def last_object(answer: Answer, key: str) -> dict[str, Any]:
    """The last whole JSON object of an answer that has `key`. Raises Unreadable where it refused, broke off, or has none.

    An answer that mentions the key again after that object is not understood: the object may be a quotation out of a broken one.
    """
    if answer.finish == "refusal":
        raise Unreadable("the model refused to answer")
    if answer.finish == "length":
        raise Unreadable("the answer broke off at its longest length; write shorter reasons")
    decoder, text = json.JSONDecoder(parse_constant=lambda name: None), answer.text
    found: dict[str, Any] | None = None
    at, end = text.find("{"), 0
    while at >= 0:
        try:
            value, stop = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at = text.find("{", at + 1)
            continue
        if isinstance(value, dict) and key in value:
            found, end = value, stop
        at = text.find("{", stop)
    if found is None:
        raise Unreadable(f'there is no JSON object with "{key}"')
    if f'"{key}"' in text[end:]:
        raise Unreadable("the JSON is broken (quotation marks inside a text must be escaped)")
    return found


def token_probability(answer: Answer) -> float | None:
    """P(first) from the alternatives at the token where the last verdict's word begins; None where they cannot be read.

    A tie's probability counts half for each side. Alternatives that begin no verdict are left out; where they hold most of the
    probability there is nothing to read.
    """
    if not answer.alternatives or "".join(answer.tokens) != answer.text:
        return None
    places = [match.end() for match in _VALUE.finditer(answer.text)]
    if not places:
        return None
    start = 0
    for token, alternatives in zip(answer.tokens, answer.alternatives, strict=False):
        # The token that holds the word's first letter: it may begin with the quotation mark before it.
        if start <= places[-1] < start + len(token):
            return _mass(alternatives)
        start += len(token)
    return None


def _mass(alternatives: Sequence[tuple[str, float]]) -> float | None:
    mass = dict.fromkeys(SIDES, 0.0)
    for token, logprob in alternatives:
        word = token.strip().lstrip('":').strip().rstrip('",}').lower()
        side = next((side for side in SIDES if word and side.startswith(word)), None)
        if side is not None:
            mass[side] += math.exp(min(logprob, 0.0))
    total = sum(mass.values())
    return (mass["first"] + mass["tie"] / 2) / total if total >= LEAST_MASS else None
