"""Stage pools: who trains what, and what is sealed.

Reads the corpus stage's `examples.jsonl` and `outcome_pairs.jsonl`; writes `sft.jsonl`, `rlaif.jsonl`, `rlhf.jsonl`, `eval.jsonl`,
`grader_pairs.jsonl` (of the SFT pool's conversations), `judge_pairs.jsonl` (of conversations in no pool) and `held_out.json`
(hashes of conversations that nothing may train on: those of the evaluation and judge pairs, and all that are linked to them).

Two conversations are linked if they have an author or a reply (of some length) in common or are near-duplicates of each other.
What is linked, however indirectly, is one component and goes into one pool whole: that makes the pools disjoint by conversation,
author and text at once.
Large components (a persuader with many dialogues) go to the SFT pool, which has room. Every choice is a hash of seed and id, so
that the order of the rows changes nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, combinations
from typing import Any, TypeVar

import numpy as np

from suasion.errors import UserError
from suasion.records import Example, OutcomePair, Prompt, canonical_json, content_id, read_rows, turns_key, write_json, write_rows
from suasion.rundir import StageContext, StageResult
from suasion.sections.corpus import PoolsSection
from suasion.seeding import derive_seed

Drawn = TypeVar("Drawn", Example, Prompt)
Key = tuple[str, str]  # corpus and conversation id

SMALL = 3  # conversations of a component up to which the small pools take it as readily as any other
SHINGLE = 5  # words
LEAST_SHINGLES = 20  # shorter texts ("Hello, how are you?") are alike by chance
PASTED = 12  # words from which two equal replies are one text, pasted twice
PERMUTATIONS = 128  # standard error of an estimated similarity of .5: .044
SIZES = ("sft", "rlaif", "rlhf", "eval", "judge_conversations")


def run_stage(stage: StageContext) -> StageResult:
    """Split the corpus and write the pools. Raises UserError with sizes that fit where the corpus is too small."""
    section, seed = stage.recipe.pools, stage.recipe.seed
    examples = list(read_rows(stage.input("corpus", "examples.jsonl"), Example))
    pairs = list(read_rows(stage.input("corpus", "outcome_pairs.jsonl"), OutcomePair))
    components = link(examples, pairs, section.near_duplicate)
    pools = split(components, section, seed)
    lacking = pools.lacking(section)
    if lacking:
        raise UserError(_too_small(lacking, components, section, seed))
    rows_out = sum(
        (
            write_rows(stage.folder / "sft.jsonl", pools.sft),
            write_rows(stage.folder / "rlaif.jsonl", pools.rlaif),
            write_rows(stage.folder / "rlhf.jsonl", pools.rlhf),
            write_rows(stage.folder / "eval.jsonl", pools.eval),
            write_rows(stage.folder / "grader_pairs.jsonl", pools.grader_pairs),
            write_rows(stage.folder / "judge_pairs.jsonl", pools.judge_pairs),
        )
    )
    write_json(stage.folder / "held_out.json", {"conversation_hashes": sorted(map(conversation_hash, pools.held_out))})
    return StageResult(
        rows_in=len(examples) + len(pairs),
        rows_out=rows_out,
        facts={**pools.facts(components), "eval_seal": eval_seal(pools.eval)},
    )


def eval_seal(examples: Iterable[Example]) -> str:
    """SHA-256 over ids, contexts and replies of the evaluation pool, in any order."""
    rows = sorted([example.id, turns_key(example.turns), example.reply or ""] for example in examples)
    return hashlib.sha256(canonical_json(rows).encode()).hexdigest()


def conversation_hash(conversation_id: str) -> str:
    """SHA-256 of an id: held-out conversations can be recognised without a list of what is in them."""
    return hashlib.sha256(conversation_id.encode()).hexdigest()


@dataclass(frozen=True)
class Conversation:
    """The rows of one conversation, each list sorted by id."""

    key: Key
    authors: tuple[str, ...]
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


@dataclass
class Pools:
    """The finished pools. `judge` counts the conversations with judge pairs; `held_out` are the ids that nothing may train on."""

    sft: list[Example] = field(default_factory=list)
    rlaif: list[Prompt] = field(default_factory=list)
    rlhf: list[Prompt] = field(default_factory=list)
    eval: list[Example] = field(default_factory=list)
    grader_pairs: list[OutcomePair] = field(default_factory=list)
    judge_pairs: list[OutcomePair] = field(default_factory=list)
    held_out: set[str] = field(default_factory=set)
    judge: int = 0
    leftover: int = 0

    def sizes(self) -> dict[str, int]:
        """Rows of each pool, and conversations with judge pairs, by the recipe's keys."""
        rows = (len(self.sft), len(self.rlaif), len(self.rlhf), len(self.eval))
        return dict(zip(SIZES, [*rows, self.judge], strict=True))

    def lacking(self, section: PoolsSection) -> dict[str, tuple[int, int]]:
        """Pool -> (wanted, had) where the corpus has too little. 'rest' wants at least one example."""
        had = self.sizes()
        wanted = {name: 1 if (size := getattr(section, name)) == "rest" else int(size) for name in SIZES}
        return {name: (wanted[name], had[name]) for name in SIZES if had[name] < wanted[name]}

    def facts(self, components: Sequence[Component]) -> dict[str, Any]:
        """Sizes, conversations and corpora of each pool, for the manifest."""
        pools: dict[str, Sequence[Example] | Sequence[Prompt]] = {
            "sft": self.sft,
            "rlaif": self.rlaif,
            "rlhf": self.rlhf,
            "eval": self.eval,
        }
        return {
            "sizes": {name: len(rows) for name, rows in pools.items()},
            "conversations": {name: len({(row.corpus, row.conversation_id) for row in rows}) for name, rows in pools.items()},
            "corpora": {name: dict(sorted(Counter(row.corpus for row in rows).items())) for name, rows in pools.items()},
            "eval_replies_that_persuaded": sum((example.outcome or 0) > 0 for example in self.eval),
            "grader_pairs": len(self.grader_pairs),
            "judge_pairs": len(self.judge_pairs),
            "judge_conversations": self.judge,
            "held_out_conversations": len(self.held_out),
            "leftover_conversations": self.leftover,
            "components": len(components),
            "largest_component": max((len(component.conversations) for component in components), default=0),
        }


def link(examples: Iterable[Example], pairs: Iterable[OutcomePair], near_duplicate: float) -> list[Component]:
    """Connected components of conversations that have an author, a reply or a near-duplicate text in common, by first key."""
    rows: dict[Key, tuple[list[Example], list[OutcomePair]]] = defaultdict(lambda: ([], []))
    for example in examples:
        rows[example.corpus, example.conversation_id][0].append(example)
    for pair in pairs:
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
        shared = [("author", conversation.key[0], author) for author in conversation.authors]
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


def split(components: Sequence[Component], section: PoolsSection, seed: int) -> Pools:
    """Fill the pools as far as the components go: evaluation first, then judge, rlhf, rlaif, and SFT with what remains.

    Small pools take small components first, and those that other pools need less: posts without reply or pair become prompts,
    posts that persuaded stay for evaluation and SFT. Each pool has each corpus's share of the available conversations.
    """
    free = list(components)
    pools = Pools()

    def take(purpose: str, need: int, capacity: Callable[[Component], int], cost: Callable[[Component], int]) -> list[Component]:
        nonlocal free
        ranked = sorted(
            (component for component in free if capacity(component)),
            key=lambda c: (max(len(c.conversations), SMALL), cost(c), c.rank(seed, purpose)),
        )
        taken = _stratified(ranked, need, capacity)
        chosen = set(map(id, taken))
        free = [component for component in free if id(component) not in chosen]
        return taken

    chosen = take("eval", section.eval, lambda c: _count(c, "won"), lambda c: 0)
    if (had := sum(_count(c, "replied") for c in chosen)) < section.eval:  # too few replies that persuaded: any reply
        chosen += take("eval", section.eval - had, lambda c: _count(c, "replied"), lambda c: 0)
    answered = (conversation for conversation in _members(chosen) if conversation.replied)
    pools.held_out = {conversation.key[1] for conversation in _members(chosen)}
    for conversation in _first(answered, section.eval, seed, "eval", lambda c: (not c.won,)):
        pools.eval.append(_draw(conversation.won or conversation.replied, seed, "eval"))

    judge = take("judge", section.judge_conversations, lambda c: _count(c, "pairs"), lambda c: 0)

    chosen = take("rlhf", section.rlhf, lambda c: _count(c, "prompts"), _use_elsewhere)
    asked = (conversation for conversation in _members(chosen) if conversation.prompts)
    pools.rlhf = [
        _draw(conversation.prompts, seed, "rlhf") for conversation in _first(asked, section.rlhf, seed, "rlhf", lambda c: ())
    ]

    most = section.rlaif_per_conversation
    chosen = take("rlaif", section.rlaif, lambda c: sum(min(most, len(each.prompts)) for each in c.conversations), _use_elsewhere)
    drawn = [
        (place, derive_seed(seed, "rlaif", prompt.id), prompt)
        for conversation in _members(chosen)
        for place, prompt in enumerate(_ranked(conversation.prompts, seed, "rlaif")[:most])
    ]
    pools.rlaif = [prompt for _, _, prompt in sorted(drawn, key=lambda row: row[:2])[: section.rlaif]]

    pools.sft, left = _sft(free, section.sft, seed)
    in_sft = {(example.corpus, example.conversation_id) for example in pools.sft}
    pools.grader_pairs = [pair for c in _members(free) if c.key in in_sft for pair in c.pairs]
    outside = [*judge, *left]
    pools.judge_pairs = [pair for conversation in _members(outside) for pair in conversation.pairs]
    pools.held_out |= {each.key[1] for component in outside if _count(component, "pairs") for each in component.conversations}
    pools.judge = sum(bool(conversation.pairs) for conversation in _members(outside))
    pools.leftover = sum(1 for _ in _members(left))
    for rows in (pools.sft, pools.rlaif, pools.rlhf, pools.eval, pools.grader_pairs, pools.judge_pairs):
        rows.sort(key=lambda row: row.id)
    return pools


def attainable(components: Sequence[Component], section: PoolsSection, seed: int) -> dict[str, int]:
    """Sizes in the recipe's proportions that the corpus can fill, by the recipe's keys; the recipe's own sizes where they fit.

    An SFT pool of 'rest' is given with the examples that then remain; smaller sizes are proposed so that these are at least as
    many as the rlaif prompts. All zero where not even one row per pool can be had.
    """
    wanted = {name: int(size) for name in SIZES if (size := getattr(section, name)) != "rest"}

    def attempt(share: float) -> dict[str, int] | None:
        sizes = {name: min(size, max(1, round(size * share))) for name, size in wanted.items()}
        scaled = section.model_copy(update=sizes)
        pools = split(components, scaled, seed)
        starved = share < 1 and len(pools.sft) < sizes["rlaif"]
        return None if starved or pools.lacking(scaled) else {**sizes, "sft": len(pools.sft)}

    found = attempt(1.0)
    low, high = 0.0, 1.0
    for _ in range(0 if found else 10):
        middle = (low + high) / 2
        smaller = attempt(middle)
        if smaller is None:
            high = middle
        else:
            low, found = middle, smaller
    return {name: found[name] if found else 0 for name in SIZES}


def _too_small(lacking: dict[str, tuple[int, int]], components: Sequence[Component], section: PoolsSection, seed: int) -> str:
    conversations = sum(1 for _ in _members(components))
    short = "; ".join(
        f"pools.{name} needs {wanted} but {had} can be had ({wanted - had} too few)" for name, (wanted, had) in lacking.items()
    )
    text = f"the corpus ({conversations} conversations in {len(components)} unlinked groups) cannot fill the pools: {short}."
    sizes = attainable(components, section, seed)
    if not any(sizes.values()):
        return text + " No sizes in these proportions fit: use a larger corpus, or widen corpus.reply_tokens."
    kept = [name for name in SIZES if getattr(section, name) != "rest" and sizes[name] != getattr(section, name)]
    return text + " These sizes fit: " + " ".join(f"--set pools.{name}={sizes[name]}" for name in kept)


def _conversation(key: Key, examples: list[Example], pairs: list[OutcomePair]) -> Conversation:
    unique = {example.id: example for example in examples}
    authors = {example.author for example in examples} | {pair.group for pair in pairs}
    return Conversation(
        key=key,
        authors=tuple(sorted(authors)),
        examples=tuple(unique[identity] for identity in sorted(unique)),
        pairs=tuple(sorted({pair.id: pair for pair in pairs}.values(), key=lambda pair: pair.id)),
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


def _stratified(ranked: Sequence[Component], need: int, capacity: Callable[[Component], int]) -> list[Component]:
    """Components in rank order until `need` is reached, each corpus up to its share of conversations, then whatever is left."""
    available: Counter[str] = Counter()
    for component in ranked:
        available[component.corpus] += len(component.conversations)
    shares = apportion(need, available)
    filled: Counter[str] = Counter()
    taken: list[Component] = []
    passed: list[Component] = []
    for component in ranked:
        if filled[component.corpus] < shares.get(component.corpus, 0):
            taken.append(component)
            filled[component.corpus] += capacity(component)
        else:
            passed.append(component)
    for component in passed:
        if filled.total() >= need:
            break
        taken.append(component)
        filled[component.corpus] += capacity(component)
    return taken


def apportion(total: int, weights: Counter[str]) -> dict[str, int]:
    """`total` seats in proportion to the weights, by largest remainders (Hamilton); ties go to the first name."""
    everything = weights.total()
    if not everything:
        return {}
    exact = {name: total * weights[name] / everything for name in sorted(weights)}
    seats = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: (seats[name] - exact[name], name))[: total - sum(seats.values())]:
        seats[name] += 1
    return seats


def _sft(free: Sequence[Component], size: int | str, seed: int) -> tuple[list[Example], list[Component]]:
    """The SFT examples, and the components none of whose conversations they use.

    Replies that persuaded come first; then every conversation gives its first example before any gives its second.
    """
    candidates = []
    for component in free:
        for conversation in component.conversations:
            for place, example in enumerate(_ranked(conversation.replied, seed, "sft")):
                small = len(component.conversations) <= SMALL
                order = (not conversation.won, place, small, derive_seed(seed, "sft", example.id))
                candidates.append((order, component, example))
    candidates.sort(key=lambda row: row[0])
    if size == "rest":
        chosen = [example for _, _, example in candidates]
    else:
        conversations = Counter(c.corpus for c in free for each in c.conversations if each.replied)
        shares = apportion(int(size), conversations)
        chosen, passed = list[Example](), list[Example]()
        for _, _, example in candidates:
            room = shares.get(example.corpus, 0) > 0
            (chosen if room else passed).append(example)
            shares[example.corpus] = shares.get(example.corpus, 0) - room
        chosen = [*chosen, *passed[: int(size) - len(chosen)]]
    used = {(example.corpus, example.conversation_id) for example in chosen}
    return chosen, [c for c in free if not any(conversation.key in used for conversation in c.conversations)]


def _members(components: Iterable[Component]) -> Iterator[Conversation]:
    return (conversation for component in components for conversation in component.conversations)


def _count(component: Component, what: str) -> int:
    """Conversations of a component that have any of `what`."""
    return sum(bool(getattr(conversation, what)) for conversation in component.conversations)


def _use_elsewhere(component: Component) -> int:
    """How much a component is worth to the other pools: 0 bare posts, 1 with a pair that only graders can use, 2 with a reply."""
    return 2 if _count(component, "replied") else 1 if _count(component, "pairs") else 0


def _first(
    conversations: Iterable[Conversation], most: int, seed: int, purpose: str, before: Callable[[Conversation], tuple[bool, ...]]
) -> list[Conversation]:
    """The first `most` conversations by preference, then by lot."""
    return sorted(conversations, key=lambda c: (before(c), derive_seed(seed, purpose, *c.key)))[:most]


def _ranked(rows: Sequence[Drawn], seed: int, purpose: str) -> list[Drawn]:
    return sorted(rows, key=lambda row: derive_seed(seed, purpose, row.id))


def _draw(rows: Sequence[Drawn], seed: int, purpose: str) -> Drawn:
    return _ranked(rows, seed, purpose)[0]
