"""Which conversations belong together: linked ones may not stand in different pools.

Two conversations are linked if they have an author or a reply (of some length) in common, whatever their corpora, or are
near-duplicates of each other. What is linked, however indirectly, is one component, and a component goes into one pool whole: that
makes the pools disjoint by conversation, author and text at once. The order of the rows changes nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations
from typing import TypeVar

import numpy as np

from suasion.errors import UserError
from suasion.records import Example, OutcomePair, Prompt, content_id
from suasion.seeding import derive_seed

Key = tuple[str, str]  # corpus and conversation id
Linked = TypeVar("Linked", Example, OutcomePair)

SHINGLE = 5  # words
LEAST_SHINGLES = 20  # shorter texts ("Hello, how are you?") are alike by chance
PASTED = 12  # words from which two equal replies are one text, pasted twice
PERMUTATIONS = 128  # standard error of an estimated similarity of .5: .044


@dataclass(frozen=True)
class Conversation:
    """The rows of one conversation, each list sorted by id. persuadees: those that are known and no authors."""

    key: Key
    authors: tuple[str, ...]
    persuadees: tuple[str, ...]
    examples: tuple[Example, ...]
    pairs: tuple[OutcomePair, ...]

    @cached_property
    def replied(self) -> tuple[Example, ...]:
        """Examples with a human reply."""
        return tuple(example for example in self.examples if example.reply is not None)

    @cached_property
    def won(self) -> tuple[Example, ...]:
        """Examples with a human reply that persuaded."""
        return tuple(example for example in self.replied if (example.outcome or 0) > 0)

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """The distinct contexts."""
        return tuple({prompt.id: prompt for prompt in (example.prompt() for example in self.examples)}.values())


@dataclass(frozen=True)
class Component:
    """Linked conversations, sorted by key. Its corpus is the first one's."""

    conversations: tuple[Conversation, ...]

    @property
    def corpus(self) -> str:
        """The corpus whose share of a pool it counts for."""
        return self.conversations[0].key[0]

    def rank(self, seed: int, purpose: str) -> int:
        """Its place in the lottery for one pool."""
        return derive_seed(seed, purpose, *self.conversations[0].key)


def link(examples: Iterable[Example], pairs: Iterable[OutcomePair], near_duplicate: float) -> list[Component]:
    """Connected components of conversations that have an author, a reply or a near-duplicate text in common, by first key.

    A row that occurs twice counts once. Raises UserError for different rows with one id.
    """
    rows: dict[Key, tuple[list[Example], list[OutcomePair]]] = defaultdict(lambda: ([], []))
    for example in _distinct(examples):
        rows[example.corpus, example.conversation_id][0].append(example)
    for pair in _distinct(pairs):
        rows[pair.corpus, pair.conversation_id][1].append(pair)
    conversations = [_conversation(key, *rows[key]) for key in sorted(rows)]
    parent = {conversation.key: conversation.key for conversation in conversations}

    def find(key: Key) -> Key:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    firsts: dict[tuple[str, ...], Key] = {}
    for conversation in conversations:
        shared = [("author", author) for author in conversation.authors]
        for mark in (*shared, *(("reply", reply) for reply in _replies(conversation))):
            parent[find(conversation.key)] = find(firsts.setdefault(mark, conversation.key))
    for one, other in near_duplicates(conversations, near_duplicate):
        parent[find(one)] = find(other)
    grouped: dict[Key, list[Conversation]] = defaultdict(list)
    for conversation in conversations:
        grouped[find(conversation.key)].append(conversation)
    return sorted((Component(tuple(members)) for members in grouped.values()), key=lambda c: c.conversations[0].key)


def near_duplicates(conversations: Sequence[Conversation], threshold: float) -> Iterator[tuple[Key, Key]]:
    """Yield pairs of conversations of which a text has an estimated Jaccard similarity of word 5-grams of at least `threshold`.

    Compared are what the persuaded person first said (a post), and everything said in the conversation. Estimates are MinHash's
    (Broder 1997), candidates those that agree in a whole band of it. datasketch makes the sketches and chooses the bands; its index
    of them would take ten times the memory of the sketches, so that the bands are gone through one by one instead.
    """
    from datasketch import MinHash, MinHashLSH

    # Bands are tuned to a lower threshold, since they miss half of what lies just above theirs; the estimate then decides.
    bands = MinHashLSH(threshold=min(0.8 * threshold, 0.9), num_perm=PERMUTATIONS)
    blank = MinHash(num_perm=PERMUTATIONS, hashfunc=_hash32)
    keys: list[Key] = []
    sketches: list[np.ndarray] = []
    for conversation in conversations:
        for text in _texts(conversation):
            grams = shingles(text)
            if len(grams) >= LEAST_SHINGLES:
                sketch = blank.copy()
                sketch.update_batch(sorted(grams))
                keys.append(conversation.key)
                sketches.append(sketch.hashvalues)
    tried: set[tuple[int, int]] = set()
    for start in range(0, bands.b * bands.r, bands.r):
        alike: dict[bytes, list[int]] = defaultdict(list)
        for number, sketch in enumerate(sketches):
            alike[sketch[start : start + bands.r].tobytes()].append(number)
        for one, other in chain.from_iterable(combinations(numbers, 2) for numbers in alike.values()):
            if keys[one] != keys[other] and (one, other) not in tried:
                tried.add((one, other))
                if np.mean(sketches[one] == sketches[other]) >= threshold:
                    yield keys[one], keys[other]


def shingles(text: str) -> set[bytes]:
    """Word 5-grams of a text, in lower case and without punctuation."""
    words = _words(text)
    return {" ".join(words[i : i + SHINGLE]).encode() for i in range(len(words) - SHINGLE + 1)}


def _distinct(rows: Iterable[Linked]) -> Iterator[Linked]:
    seen: dict[str, Linked] = {}
    for row in rows:
        first = seen.get(row.id)
        if first is None:
            seen[row.id] = row
            yield row
        elif first != row:
            raise UserError(
                f"two rows have the id {row.id}: of conversations {first.corpus} {first.conversation_id} and {row.corpus} "
                f"{row.conversation_id}. Give own rows ids that occur once in all files, or leave the ids out."
            )


def _conversation(key: Key, examples: list[Example], pairs: list[OutcomePair]) -> Conversation:
    authors = {example.author for example in examples} | {pair.group for pair in pairs}
    return Conversation(
        key=key,
        authors=tuple(sorted(authors)),
        persuadees=tuple(sorted({example.persuadee for example in examples if example.persuadee})),
        examples=tuple(sorted(examples, key=lambda example: example.id)),
        pairs=tuple(sorted(pairs, key=lambda pair: pair.id)),
    )


def _texts(conversation: Conversation) -> list[str]:
    said = [example.turns for example in conversation.examples] + [pair.turns for pair in conversation.pairs]
    whole = dict.fromkeys(turn.text for turns in said for turn in turns)
    whole.update(dict.fromkeys(example.reply for example in conversation.replied if example.reply))
    texts = sorted({turns[0].text for turns in said if turns and turns[0].role == "user"})
    everything = "\n".join(sorted(whole))
    return texts if everything in texts else [*texts, everything]


def _replies(conversation: Conversation) -> list[str]:
    """Hashes of a conversation's human replies, word by word, that are too long to be equal by chance."""
    said = [example.reply or "" for example in conversation.examples]
    said += [text for pair in conversation.pairs for text in (pair.winner, pair.loser)]
    return sorted({content_id("reply", *words) for words in map(_words, said) if len(words) >= PASTED})


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _hash32(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "big")
