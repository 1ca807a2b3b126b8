"""The simulated annotator: a documented stand-in for people, so that a demo runs from end to end without any.

It is no model of persuasion. Its taste is fixed by hand, and by design it shares nothing with the graders: no training rows, no
features, no parameters. It scores a response by three things that grading/features.py leaves out:

    score = -0.7 z(redundancy) + 0.5 z(share of long words) + 0.5 z(variation of sentence lengths)

redundancy: what zlib saves, beyond what it saves on any text of that length; long words: more than 6 letters; variation: standard
deviation of the sentences' lengths over their mean. z() uses the constants below and is cut at +-3, so that scores have a standard
deviation of about 1. Shown a pair in a seeded order, it compares score(left) + side_bias with score(right) plus logistic noise and
calls the closest `tie_share` of all pairs a tie. Its labels are called "simulated" everywhere.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from suasion.grading.pairs import SampledPair
from suasion.records import Label, Verdict
from suasion.sections.labeling import SimulatedAnnotator
from suasion.seeding import uniforms

SOURCE = "simulated"
WEIGHTS = (-0.7, 0.5, 0.5)  # redundancy, long words, variation; their squares sum to 1
# Mean and standard deviation, read off once from 400 model-written and 1,400 human-written replies of 15 to 700 words.
REDUNDANCY = (0.0, 0.033)
LONG_WORDS = (0.18, 0.055)
VARIATION = (0.50, 0.17)
TYPICAL_SAVING = (-1.44, 0.474, -0.0285)  # what zlib saves on ordinary prose: c0 + c1 ln(bytes) + c2 ln(bytes)^2
_LETTERS = re.compile(r"[^\W\d_]+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


def redundancy(text: str) -> float:
    """Share of bytes that zlib saves, minus what it typically saves on a text of this length (short texts hardly compress)."""
    raw = text.strip().encode()
    if not raw:
        return 0.0
    size = math.log(len(raw))
    typical = TYPICAL_SAVING[0] + TYPICAL_SAVING[1] * size + TYPICAL_SAVING[2] * size * size
    return 1.0 - len(zlib.compress(raw, 9)) / len(raw) - typical


def long_words(text: str) -> float:
    """Share of words with more than 6 letters."""
    found = _LETTERS.findall(text)
    return sum(len(word) > 6 for word in found) / len(found) if found else 0.0


def sentence_variation(text: str) -> float:
    """Standard deviation of the sentences' lengths in words, over their mean; 0 for fewer than two sentences."""
    lengths = [count for part in _SENTENCE_END.split(text) if (count := len(_LETTERS.findall(part)))]
    return float(np.std(lengths) / np.mean(lengths)) if len(lengths) > 1 else 0.0


def score(text: str) -> float:
    """The annotator's taste; higher is better. An empty response scores minus infinity."""
    if not text.strip():
        return -math.inf
    values = (redundancy(text), long_words(text), sentence_variation(text))
    standard = (
        (value - mean) / spread for value, (mean, spread) in zip(values, (REDUNDANCY, LONG_WORDS, VARIATION), strict=True)
    )
    return sum(weight * max(-3.0, min(3.0, z)) for weight, z in zip(WEIGHTS, standard, strict=True))


def annotate(
    pairs: Sequence[SampledPair], settings: SimulatedAnnotator, seed: int, orders: Mapping[str, Literal["ab", "ba"]] | None = None
) -> list[Verdict]:
    """A verdict on each pair, in the pair's own order; `order` says how it was shown.

    orders: pair id -> "ab" (a on the left) or "ba"; pairs that it does not name are shown in the seeded order. The tie band is a
    quantile over these pairs: round(tie_share * n) of them are ties, identical texts always.
    """
    shown: list[Literal["ab", "ba"]] = []
    margins = np.empty(len(pairs))  # utility of left minus right
    identical = np.zeros(len(pairs), dtype=bool)
    for i, item in enumerate(pairs):
        coin, draw = uniforms(2, seed, "annotator", item.pair.id)
        order: Literal["ab", "ba"] = (orders or {}).get(item.pair.id, "ab" if coin < 0.5 else "ba")
        left, right = (item.a, item.b) if order == "ab" else (item.b, item.a)
        identical[i] = left.text.strip() == right.text.strip()
        draw = min(max(float(draw), 1e-12), 1 - 1e-12)
        noise = settings.noise * math.log(draw / (1 - draw))
        margins[i] = 0.0 if identical[i] else score(left.text) + settings.side_bias - score(right.text) + noise
        shown.append(order)
    closest = sorted(range(len(pairs)), key=lambda i: (abs(margins[i]), pairs[i].pair.id))
    tied = identical.copy()
    tied[closest[: settings.ties(len(pairs))]] = True
    verdicts = []
    for item, order, margin, tie in zip(pairs, shown, margins, tied, strict=True):
        label: Label = "tie" if tie else "a" if (margin > 0) == (order == "ab") else "b"
        verdicts.append(
            Verdict(pair_id=item.pair.id, source=SOURCE, order=order, label=label, p_a=None, reason="simulated annotator")
        )
    return verdicts
