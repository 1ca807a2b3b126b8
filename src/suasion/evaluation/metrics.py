"""What a text looks like: length, repetition, diversity, questions, copying. Pure functions; lengths in words.

They describe style and are no measure of quality or honesty.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

WORD = re.compile(r"\w+(?:['’]\w+)*")


def words(text: str) -> list[str]:
    """Lower-case words; apostrophes stay inside a word."""
    return WORD.findall(text.lower())


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of n neighbouring words, in order."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-word runs that occurred in it before; 0 for shorter texts."""
    runs = ngrams(words(text), n)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def distinct(texts: Sequence[str], n: int = 2) -> float | None:
    """Distinct n-word runs of all texts together over their number (Li et al. 2016); falls as texts get longer. None without any."""
    runs = [run for text in texts for run in ngrams(words(text), n)]
    return len(set(runs)) / len(runs) if runs else None


def questions(text: str) -> int:
    """Questions asked: runs of marks that hold a question mark."""
    return len(re.findall(r"[?!]*\?[?!]*", text))


def context_overlap(text: str, context: str, n: int = 3) -> float:
    """Share of a text's n-word runs that stand in the context too: copying; 0 for shorter texts."""
    runs = ngrams(words(text), n)
    source = set(ngrams(words(context), n))
    return sum(run in source for run in runs) / len(runs) if runs else 0.0


def same_text(first: str, second: str) -> bool:
    """Equal but for white space."""
    return first.split() == second.split()
