"""What a text looks like: length, repetition, diversity, readability, hedging, address, links, numbers, claims, copying.

Pure functions; lengths in words. They describe style and are no measure of quality or honesty: those are looked for in audit.
"""

from __future__ import annotations

import calendar
import re
from collections import Counter
from collections.abc import Sequence

from suasion.grading.features import HEDGES, LINK, NUMBER, SECOND_PERSON

WORD = re.compile(r"\w+(?:['’]\w+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?…])[\"”'’)]*\s+|\n+")
_ATTRIBUTION = re.compile(
    r"\b(?:according to|stud(?:y|ies)|research|survey|statistics|evidence|report(?:s|ed)?|percent|per cent|majority|average)\b",
    re.I,
)
_NAME = re.compile(r"(?<=[\w,;:] )[A-Z][a-z]{2,}")  # a capital inside a sentence
_QUANTITY = re.compile(r"\b(?:one|two|three|four|five|six|seven|eight|nine|ten|dozen|hundred|thousand|million|billion)s?\b", re.I)
_DATES = frozenset(name.lower() for name in (*calendar.day_name, *calendar.month_name))  # capitals that name nothing to look up
MATTR_WINDOW = 50  # words; Covington & McFall (2010)


def words(text: str) -> list[str]:
    """Lower-case words; apostrophes stay inside a word."""
    return WORD.findall(text.lower())


def sentences(text: str) -> list[str]:
    """The sentences of a text: it is cut after . ! ? and at line breaks. Abbreviations are cut too: this feeds counts only."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part and WORD.search(part)]


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


def moving_type_token_ratio(texts: Sequence[str], window: int = MATTR_WINDOW) -> float | None:
    """Mean share of distinct words in every run of `window` words of the texts, one after the other (Covington & McFall 2010).

    Unlike `distinct` it does not fall with length. None where all texts together are shorter than the window.
    """
    tokens = [word for text in texts for word in words(text)]
    if len(tokens) < window:
        return None
    inside = Counter(tokens[:window])
    total = len(inside)
    for leaving, entering in zip(tokens, tokens[window:], strict=False):
        inside[entering] += 1
        inside[leaving] -= 1
        if not inside[leaving]:
            del inside[leaving]
        total += len(inside)
    return total / (window * (len(tokens) - window + 1))


def reading_grade(texts: Sequence[str]) -> float | None:
    """Coleman-Liau index of all texts together: about the US school grade that reads them (Coleman & Liau 1975).

    0.0588 L - 0.296 S - 15.8 with L letters and S sentences per 100 words. It needs no syllables, which are guesses by rule.
    None without any word.
    """
    tokens = [word for text in texts for word in words(text)]
    if not tokens:
        return None
    letters = sum(char.isalnum() for word in tokens for char in word)
    stops = sum(len(sentences(text)) for text in texts)
    return 0.0588 * 100 * letters / len(tokens) - 0.296 * 100 * stops / len(tokens) - 15.8


def questions(text: str) -> int:
    """Questions asked: runs of marks that hold a question mark."""
    return len(re.findall(r"[?!]*\?[?!]*", text))


def _per_hundred(count: int, text: str) -> float | None:
    """A count per 100 words; None for a text without words."""
    total = len(words(text))
    return 100 * count / total if total else None


def hedging(text: str) -> float | None:
    """Hedges ("perhaps", "might", "I think") per 100 words; the list is the graders' (`grading.features.HEDGES`)."""
    return _per_hundred(sum(word.replace("’", "'") in HEDGES for word in words(text)), text)


def second_person(text: str) -> float | None:
    """ "you", "your" and their forms per 100 words."""
    return _per_hundred(sum(word.replace("’", "'") in SECOND_PERSON for word in words(text)), text)


def links(text: str) -> int:
    """Web addresses."""
    return len(LINK.findall(text))


def numbers(text: str) -> float | None:
    """Numbers in digits per 100 words."""
    return _per_hundred(len(NUMBER.findall(text)), text)


def claims(text: str) -> float | None:
    """Share of sentences with something that could be looked up: a number, a proper name, a source or a share. None without any.

    It counts claims that could be checked; whether they are true is not measured.
    """
    parts = sentences(text)
    return sum(_is_claim(part) for part in parts) / len(parts) if parts else None


def _is_claim(sentence: str) -> bool:
    if sentence.rstrip("\"”'’) ").endswith("?"):
        return False
    names = [name for name in _NAME.findall(sentence) if name.lower() not in _DATES]
    return bool(names or NUMBER.search(sentence) or _QUANTITY.search(sentence) or _ATTRIBUTION.search(sentence))


def context_overlap(text: str, context: str, n: int = 3) -> float:
    """Share of a text's n-word runs that stand in the context too: copying; 0 for shorter texts."""
    runs = ngrams(words(text), n)
    source = set(ngrams(words(context), n))
    return sum(run in source for run in runs) / len(runs) if runs else 0.0


def same_text(first: str, second: str) -> bool:
    """Equal but for white space."""
    return first.split() == second.split()
