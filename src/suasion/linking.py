"""Which conversations belong together: linked ones may not stand in different pools.

Two conversations are linked if they have an author or a reply (of some length) in common, whatever their corpora, or are
near-duplicates of each other. What is linked, however indirectly, is one component, and a component goes into one pool whole: that
makes the pools disjoint by conversation, author and text at once. The order of the rows changes nothing.

The rows stay where they are: what is kept of each is an `Entry` of some hundred bytes, so that memory hardly grows with the corpus.
"""

from __future__ import annotations

import sys
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np

from suasion.errors import UserError
from suasion.near_duplicates import Sketches, words
from suasion.progress import progress, tracked
from suasion.records import Example, OutcomePair, content_id
from suasion.seeding import derive_seed

Key = tuple[str, str]  # corpus and conversation id
Linked = TypeVar("Linked", Example, OutcomePair)

PASTED = 12  # words from which two equal replies are one text, pasted twice


class Entry(NamedTuple):
    """What linking and dividing need to know of a row.

    place: its number among the examples, or among the outcome pairs. author: of a pair its group. prompt: the id of the prompt that
    an example can become, "" of a pair.
    """

    id: str
    corpus: str
    conversation_id: str
    author: str
    prompt: str
    replied: bool
    outcome: float | None
    place: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """The rows of one conversation, each list sorted by id. persuadees: those that are known and no authors."""

    key: Key
    persuadees: tuple[str, ...]
    examples: tuple[Entry, ...]
    pairs: tuple[Entry, ...]

    @property
    def authors(self) -> tuple[str, ...]:
        """Everybody who must not occur in two pools."""
        return tuple(sorted({entry.author for entry in (*self.examples, *self.pairs)}))

    @property
    def replied(self) -> tuple[Entry, ...]:
        """Examples with a human reply."""
        return tuple(example for example in self.examples if example.replied)

    @property
    def won(self) -> tuple[Entry, ...]:
        """Examples with a human reply that persuaded."""
        return tuple(example for example in self.examples if example.replied and (example.outcome or 0) > 0)

    @property
    def prompts(self) -> tuple[Entry, ...]:
        """The distinct contexts, each with the id of its prompt and the place of an example that has it."""
        return tuple({example.prompt: example._replace(id=example.prompt) for example in self.examples}.values())


@dataclass(frozen=True, slots=True)
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


def link(examples: Sequence[Example], pairs: Sequence[OutcomePair], near_duplicate: float) -> list[Component]:
    """Connected components of conversations that have an author, a reply or a near-duplicate text in common, by first key.

    Rows are gone through once, and then asked for by their number, conversation by conversation; none is kept. A row that occurs
    twice counts once. near_duplicate: estimated Jaccard similarity, of a first user turn (a post) or of all words together, from
    which two conversations are linked. Raises UserError for different rows with one id.
    """
    entries: dict[Key, tuple[list[Entry], list[Entry]]] = defaultdict(lambda: ([], []))
    with progress("reading examples and pairs", len(examples) + len(pairs)) as advance:
        for entry in _entries(examples, advance):
            entries[entry.corpus, entry.conversation_id][0].append(entry)
        for entry in _entries(pairs, advance):
            entries[entry.corpus, entry.conversation_id][1].append(entry)
    keys = sorted(entries)
    groups = _Groups(len(keys))
    conversations = []
    with Sketches(near_duplicate) as sketches:
        for number, key in enumerate(tracked(keys, "marks and sketches of texts", "conversations")):
            said, offered = (sorted(each, key=lambda entry: entry.id) for each in entries.pop(key))
            whole = [examples[entry.place] for entry in said]
            compared = [pairs[entry.place] for entry in offered]
            persuadees = tuple(sorted({example.persuadee for example in whole if example.persuadee}))
            conversations.append(Conversation(key, persuadees, tuple(said), tuple(offered)))
            for author in conversations[-1].authors:
                groups.mark(number, "author", author)
            for reply in _replies(whole, compared):
                groups.mark(number, "reply", *reply)
            for text in _texts(whole, compared):
                sketches.add(number, text)
        groups.unite_marked()
        for one, other in sketches.pairs(groups.together):
            groups.unite(one, other)
    grouped: dict[int, list[Conversation]] = defaultdict(list)
    for number, conversation in enumerate(conversations):
        grouped[groups.find(number)].append(conversation)
    return sorted((Component(tuple(members)) for members in grouped.values()), key=lambda c: c.conversations[0].key)


class _Groups:
    """Numbers below `count` that belong together: a union-find, and marks that two of them may share."""

    def __init__(self, count: int) -> None:
        self._parents = array("I", range(count))
        self._marks, self._marked = array("Q"), array("I")

    def find(self, number: int) -> int:
        """The number that stands for the group."""
        parents = self._parents
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    def together(self, one: int, other: int) -> bool:
        """Whether both are in one group."""
        return self.find(one) == self.find(other)

    def unite(self, one: int, other: int) -> None:
        """Make one group of two."""
        self._parents[self.find(one)] = self.find(other)

    def mark(self, number: int, kind: str, *content: str) -> None:
        """Give a number a mark. It is kept as 64 bits: of a million marks two look alike by chance in one corpus of 30 million."""
        self._marks.append(int(content_id(kind, *content), 16))
        self._marked.append(number)

    def unite_marked(self) -> None:
        """Make one group of all that share a mark."""
        marks, marked = np.array(self._marks, dtype=np.uint64), self._marked
        order = np.argsort(marks, kind="stable")
        for place in np.flatnonzero(marks[order][1:] == marks[order][:-1]):
            self.unite(marked[order[place]], marked[order[place + 1]])


def _entries(rows: Sequence[Linked], advance: Callable[[int], None]) -> Iterator[Entry]:
    """An entry for each different row, at its first place. advance: is told of every row."""
    seen: dict[str, int] = {}
    for place, row in enumerate(rows):
        advance(1)
        first = seen.setdefault(row.id, place)
        if first == place:
            yield _entry(row, place)
        elif (other := rows[first]) != row:
            raise UserError(
                f"two rows have the id {row.id}: of conversations {other.corpus} {other.conversation_id} and {row.corpus} "
                f"{row.conversation_id}. Give own rows ids that occur once in all files, or leave the ids out."
            )


def _entry(row: Example | OutcomePair, place: int) -> Entry:
    example = row if isinstance(row, Example) else None
    return Entry(
        id=row.id,
        corpus=sys.intern(row.corpus),
        conversation_id=sys.intern(row.conversation_id),
        author=sys.intern(row.author if isinstance(row, Example) else row.group),
        prompt=example.prompt().id if example else "",
        replied=bool(example and example.reply is not None),
        outcome=example.outcome if example else None,
        place=place,
    )


def _texts(examples: Sequence[Example], pairs: Sequence[OutcomePair]) -> list[str]:
    """What is compared of a conversation: what the persuaded person first said, and everything that was said, together."""
    said = [example.turns for example in examples] + [pair.turns for pair in pairs]
    whole = {turn.text for turns in said for turn in turns} | {example.reply for example in examples if example.reply}
    texts = sorted({turns[0].text for turns in said if turns and turns[0].role == "user"})
    everything = "\n".join(sorted(whole))
    return texts if everything in texts else [*texts, everything]


def _replies(examples: Sequence[Example], pairs: Sequence[OutcomePair]) -> set[tuple[str, ...]]:
    """A conversation's human replies, word by word, that are too long to be equal by chance."""
    said = [example.reply or "" for example in examples]
    said += [text for pair in pairs for text in (pair.winner, pair.loser)]
    return {tuple(spoken) for spoken in map(words, said) if len(spoken) >= PASTED}
