"""Near-duplicates: what the sketches find is what comparing every text with every other one finds."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from datasketch import MinHash

from suasion import near_duplicates
from suasion.near_duplicates import LEAST_SHINGLES, PERMUTATIONS, Sketches, shingles

WORDS = [f"{a}{b}" for a in "bcdfghjklmnprstvwz" for b in ("ale", "ime", "ond", "ush", "ark")]


def texts(count: int, rng: random.Random) -> list[str]:
    """Texts of which many are copies of others, or copies with other words somewhere."""
    made: list[list[str]] = []
    for _ in range(count):
        words = list(rng.choice(made)) if made and rng.random() < 0.6 else [rng.choice(WORDS) for _ in range(rng.randint(10, 90))]
        for place in range(len(words)):
            if rng.random() < rng.choice([0, 0, 0.01, 0.1]):
                words[place] = rng.choice(WORDS)
        made.append(words)
    return [" ".join(words) for words in made]


def groups(pairs: list[tuple[int, int]], count: int) -> list[int]:
    """For each number the least number that it is tied to."""
    group = list(range(count))
    for one, other in pairs:
        group = [min(group[one], group[other]) if each in (group[one], group[other]) else each for each in group]
    return group


def by_comparing_all(said: list[str], owners: list[int], threshold: float) -> list[tuple[int, int]]:
    """Every pair whose estimate reaches the threshold, with datasketch's own estimate."""
    sketches = []
    for text in said:
        sketch = MinHash(num_perm=PERMUTATIONS, hashfunc=near_duplicates._hash32)
        sketch.update_batch(sorted(shingles(text)))
        sketches.append(sketch)
    return [
        (owners[one], owners[other])
        for one, other in combinations(range(len(said)), 2)
        if min(len(shingles(said[one])), len(shingles(said[other]))) >= LEAST_SHINGLES
        and sketches[one].jaccard(sketches[other]) >= threshold
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.9])
def test_the_same_texts_are_tied_as_by_comparing_all(seed: int, threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands miss a pair just above the threshold once in a hundred times; what else ties the two makes that rare enough for these seeds."""
    monkeypatch.setattr(near_duplicates, "CHUNK", 7)
    said = texts(60, random.Random(seed))
    owners = [number // 2 for number in range(len(said))]
    found: list[tuple[int, int]] = []
    with Sketches(threshold) as sketches:
        for owner, text in zip(owners, said, strict=True):
            sketches.add(owner, text)
        for pair in sketches.pairs(lambda one, other: groups(found, 30)[one] == groups(found, 30)[other]):
            found.append(pair)
    assert groups(found, 30) == groups(by_comparing_all(said, owners, threshold), 30)
    assert all(one != other for one, other in found)


def test_a_text_that_everybody_has_costs_little() -> None:
    """Equal sketches are tied one to the next: n - 1 pairs, not n (n - 1) / 2."""
    text = " ".join(random.Random(1).choices(WORDS, k=60))
    with Sketches(0.5) as sketches:
        for owner in range(3000):
            sketches.add(owner, text)
        pairs = list(sketches.pairs(lambda one, other: False))
    assert len(pairs) == 2999
    assert groups(pairs[:50], 51) == [0] * 51


def test_nothing_and_short_texts_give_no_pairs() -> None:
    with Sketches(0.5) as sketches:
        assert list(sketches.pairs(lambda one, other: False)) == []
        sketches.add(0, "Hello, how are you today?")
        sketches.add(1, "Hello, how are you today?")
        assert list(sketches.pairs(lambda one, other: False)) == []


def test_hash_values_fit_into_what_is_stored() -> None:
    sketch = MinHash(num_perm=PERMUTATIONS, hashfunc=near_duplicates._hash32)
    assert sketch.hashvalues.max() < 2**32  # the values of an empty sketch are the largest there are
