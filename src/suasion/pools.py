"""Stage pools: who trains what, and what is sealed.

Reads the corpus stage's `examples.jsonl` and `outcome_pairs.jsonl`; writes `sft.jsonl`, `rlaif.jsonl`, `rlhf.jsonl`, `eval.jsonl`,
`grader_pairs.jsonl` (of the SFT pool's conversations), `judge_pairs.jsonl` (of conversations in no pool) and `held_out.json`
(hashes of conversations that nothing may train on: those of the evaluation and judge pairs, and all that are linked to them).

What is linked (`linking.py`: one author, one reply, or nearly one text) goes into one pool whole. Large components (a persuader with
many dialogues) go to the SFT pool, which has room. Every choice is a hash of seed and id, so that the order of the rows changes nothing.
What is divided are entries (`linking.Entry`); the rows stay in the corpus stage's files until they are written.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from suasion.errors import UserError
from suasion.linking import Component, Conversation, Entry, Key, link
from suasion.progress import console
from suasion.records import Example, OutcomePair, RowFile, canonical_json, turns_key, write_json, write_rows
from suasion.rundir import StageContext, StageResult
from suasion.sections.corpus import PoolsSection
from suasion.seeding import derive_seed

SMALL = 3  # conversations of a component up to which the small pools take it as readily as any other
SIZES = ("sft", "rlaif", "rlhf", "eval", "judge_conversations")
TRAINING = ("sft", "rlaif", "rlhf")
EVAL_SHARED, EVAL_PERSUADING = "of eval in any other pool", "of eval persuading in any other pool"  # keys of facts.persuadees


def run_stage(stage: StageContext) -> StageResult:
    """Split the corpus and write the pools. Raises UserError with sizes that fit where the corpus is too small."""
    section, seed = stage.recipe.pools, stage.recipe.seed
    with (
        RowFile(stage.input("corpus", "examples.jsonl"), Example) as examples,
        RowFile(stage.input("corpus", "outcome_pairs.jsonl"), OutcomePair) as pairs,
    ):
        components = link(examples, pairs, section.near_duplicate)
        pools = split(components, section, seed)
        lacking = pools.lacking(section)
        if lacking:
            raise UserError(_too_small(lacking, components, section, seed))
        if unknown := sum((entry.outcome or 0) <= 0 for entry in pools.eval):
            console.print(
                f"  [yellow]{unknown} of {len(pools.eval)} evaluation prompts have a human reply that is not known to have persuaded: "
                "the corpus has no more that did, and a smaller pools.eval takes these first.[/]"
            )
        sealed = [examples[entry.place] for entry in pools.eval]
        rows_out = sum(
            (
                write_rows(stage.folder / "sft.jsonl", (examples[entry.place] for entry in pools.sft)),
                write_rows(stage.folder / "rlaif.jsonl", (examples[entry.place].prompt() for entry in pools.rlaif)),
                write_rows(stage.folder / "rlhf.jsonl", (examples[entry.place].prompt() for entry in pools.rlhf)),
                write_rows(stage.folder / "eval.jsonl", sealed),
                write_rows(stage.folder / "grader_pairs.jsonl", (pairs[entry.place] for entry in pools.grader_pairs)),
                write_rows(stage.folder / "judge_pairs.jsonl", (pairs[entry.place] for entry in pools.judge_pairs)),
            )
        )
        rows_in = len(examples) + len(pairs)
    write_json(stage.folder / "held_out.json", {"conversation_hashes": sorted(map(conversation_hash, pools.held_out))})
    return StageResult(
        rows_in=rows_in,
        rows_out=rows_out,
        dropped=unused(rows_in, components, pools),
        facts={**pools.facts(components), "eval_seal": eval_seal(sealed)},
    )


def eval_seal(examples: Iterable[Example]) -> str:
    """SHA-256 over ids, contexts and replies of the evaluation pool, in any order."""
    rows = sorted([example.id, turns_key(example.turns), example.reply or ""] for example in examples)
    return hashlib.sha256(canonical_json(rows).encode()).hexdigest()


def conversation_hash(conversation_id: str) -> str:
    """SHA-256 of an id: held-out conversations can be recognised without a list of what is in them."""
    return hashlib.sha256(conversation_id.encode()).hexdigest()


@dataclass
class Pools:
    """The finished pools, each sorted by id. Those of prompts hold the ids of prompts and the places of examples that have them.

    `places` says in which pool a conversation's component went ("judge": kept for judging, absent: in none), `judge` counts the
    conversations with judge pairs, and `held_out` are the ids that nothing may train on.
    """

    sft: list[Entry] = field(default_factory=list)
    rlaif: list[Entry] = field(default_factory=list)
    rlhf: list[Entry] = field(default_factory=list)
    eval: list[Entry] = field(default_factory=list)
    grader_pairs: list[Entry] = field(default_factory=list)
    judge_pairs: list[Entry] = field(default_factory=list)
    places: dict[Key, str] = field(default_factory=dict)
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
        pools = self._rows()
        keys = {name: {(row.corpus, row.conversation_id) for row in rows} for name, rows in pools.items()}
        return {
            "sizes": {name: len(rows) for name, rows in pools.items()},
            "conversations": {name: len(theirs) for name, theirs in keys.items()},
            "corpora": {name: dict(sorted(Counter(row.corpus for row in rows).items())) for name, rows in pools.items()},
            "eval_replies_that_persuaded": sum((example.outcome or 0) > 0 for example in self.eval),
            "grader_pairs": len(self.grader_pairs),
            "judge_pairs": len(self.judge_pairs),
            "judge_conversations": self.judge,
            "held_out_conversations": len(self.held_out),
            "leftover_conversations": self.leftover,
            "components": len(components),
            "largest_component": max((len(component.conversations) for component in components), default=0),
            "persuadees": _persuadees(components, keys),
        }

    def _rows(self) -> dict[str, list[Entry]]:
        return {"sft": self.sft, "rlaif": self.rlaif, "rlhf": self.rlhf, "eval": self.eval}


def split(components: Sequence[Component], section: PoolsSection, seed: int) -> Pools:
    """Fill the pools as far as the components go: evaluation first, then judge, rlhf, rlaif, and SFT with what remains.

    Small pools take small components first, and those that other pools need less: posts without reply or pair become prompts,
    posts that persuaded stay for evaluation and SFT. Each pool has each corpus's share of the available conversations.
    """
    free = list(components)
    pools = Pools()

    def settle(components: Iterable[Component], place: str) -> None:
        pools.places.update((conversation.key, place) for conversation in _members(components))

    def take(purpose: str, need: int, capacity: Callable[[Component], int], cost: Callable[[Component], int]) -> list[Component]:
        nonlocal free
        ranked = sorted(
            (component for component in free if capacity(component)),
            key=lambda c: (max(len(c.conversations), SMALL), cost(c), c.rank(seed, purpose)),
        )
        taken = _stratified(ranked, need, capacity)
        chosen = set(map(id, taken))
        free = [component for component in free if id(component) not in chosen]
        settle(taken, purpose)
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
    idle = set(map(id, left))
    settle((component for component in free if id(component) not in idle), "sft")
    pools.judge_pairs = [pair for conversation in _members(outside) for pair in conversation.pairs]
    pools.held_out |= {each.key[1] for component in outside if _count(component, "pairs") for each in component.conversations}
    pools.judge = sum(bool(conversation.pairs) for conversation in _members(outside))
    pools.leftover = sum(1 for _ in _members(left))
    for rows in (pools.sft, pools.rlaif, pools.rlhf, pools.eval, pools.grader_pairs, pools.judge_pairs):
        rows.sort(key=lambda row: row.id)
    return pools


def unused(rows_in: int, components: Sequence[Component], pools: Pools) -> dict[str, int]:
    """Of the rows that went into the stage those that did not come out, by reason.

    A prompt stands for one example, whatever number share its context.
    """
    kept = {row.id for rows in (pools.sft, pools.eval, pools.grader_pairs, pools.judge_pairs) for row in rows}
    prompts = {prompt.id for prompt in (*pools.rlaif, *pools.rlhf)}
    dropped: Counter[str] = Counter()
    rows = 0
    for conversation in _members(components):
        place = pools.places.get(conversation.key)
        where = {None: "a conversation in no pool", "judge": "a conversation kept for judging"}.get(
            place, f"a conversation in pool {place}"
        )
        rows += len(conversation.examples) + len(conversation.pairs)
        for example in conversation.examples:
            if example.id in kept:
                continue
            if place in ("rlaif", "rlhf") and example.prompt in prompts:
                prompts.remove(example.prompt)
            else:
                dropped[f"example of {where}, not drawn"] += 1
        dropped[f"pair of {where}"] += sum(pair.id not in kept for pair in conversation.pairs)
    dropped["row that occurs twice"] = rows_in - rows
    return dict(sorted((+dropped).items()))


def attainable(components: Sequence[Component], section: PoolsSection, seed: int) -> dict[str, int]:
    """Sizes that the corpus can fill, by the recipe's keys; the recipe's own sizes where they fit.

    Where they do not, the pool that lacks most shrinks and the others keep their sizes; if that does not suffice, all that lack rows
    shrink in proportion, and then all. An SFT pool of 'rest' is given with the examples that then remain, at least as many as the rlaif prompts. All zero where
    not even one row per pool can be had.
    """
    wanted = {name: int(size) for name in SIZES if (size := getattr(section, name)) != "rest"}

    def attempt(share: float, shrinking: Collection[str]) -> dict[str, int] | None:
        sizes = {name: min(size, max(1, round(size * share))) if name in shrinking else size for name, size in wanted.items()}
        scaled = section.model_copy(update=sizes)
        pools = split(components, scaled, seed)
        starved = "sft" not in wanted and share < 1 and len(pools.sft) < sizes["rlaif"]
        return None if starved or pools.lacking(scaled) else {**sizes, "sft": len(pools.sft)}

    if found := attempt(1.0, ()):
        return found
    missing = {
        name: need - had for name, (need, had) in split(components, section, seed).lacking(section).items() if name in wanted
    }
    for shrinking in ({max(missing, key=missing.__getitem__)} if missing else set(), missing.keys(), wanted.keys()):
        low, high = 0.0, 1.0
        for _ in range(10):
            middle = (low + high) / 2
            smaller = attempt(middle, shrinking)
            if smaller is None:
                high = middle
            else:
                low, found = middle, smaller
        if found:
            return found
    return dict.fromkeys(SIZES, 0)


def _too_small(lacking: dict[str, tuple[int, int]], components: Sequence[Component], section: PoolsSection, seed: int) -> str:
    conversations = sum(1 for _ in _members(components))
    short = "; ".join(
        f"pools.{name} needs {wanted} but {had} can be had ({wanted - had} too few)" for name, (wanted, had) in lacking.items()
    )
    text = f"the corpus ({conversations} conversations in {len(components)} unlinked groups) cannot fill the pools: {short}."
    sizes = attainable(components, section, seed)
    if not any(sizes.values()):
        return text + " No smaller sizes fit: use a larger corpus, or widen corpus.reply_tokens."
    kept = [name for name in SIZES if getattr(section, name) != "rest" and sizes[name] != getattr(section, name)]
    return text + " These sizes fit: " + " ".join(f"--set pools.{name}={sizes[name]}" for name in kept)


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


def _sft(free: Sequence[Component], size: int | str, seed: int) -> tuple[list[Entry], list[Component]]:
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
        chosen, passed = list[Entry](), list[Entry]()
        for _, _, example in candidates:
            room = shares.get(example.corpus, 0) > 0
            (chosen if room else passed).append(example)
            shares[example.corpus] = shares.get(example.corpus, 0) - room
        chosen = [*chosen, *passed[: int(size) - len(chosen)]]
    used = {(example.corpus, example.conversation_id) for example in chosen}
    return chosen, [c for c in free if not any(conversation.key in used for conversation in c.conversations)]


def _persuadees(components: Sequence[Component], keys: dict[str, set[Key]]) -> dict[str, Any]:
    """How many persuadees each pool has, and how many of them two pools share; {} where nobody but authors is known.

    Pools are disjoint by author only. A worker may also be persuadee in one dialogue and persuader in another.
    """
    members = {conversation.key: conversation for conversation in _members(components)}
    people = {name: {who for key in theirs for who in members[key].persuadees} for name, theirs in keys.items()}
    if not any(people.values()):
        return {}
    authors = {who for name in TRAINING for key in keys[name] for who in members[key].authors}
    return {
        "in": {name: len(theirs) for name, theirs in people.items()},
        "shared": {f"{one} and {other}": len(people[one] & people[other]) for one, other in combinations(people, 2)},
        EVAL_SHARED: len(people["eval"] & set().union(*(people[name] for name in TRAINING))),
        EVAL_PERSUADING: len(people["eval"] & authors),
    }


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


def _ranked(rows: Sequence[Entry], seed: int, purpose: str) -> list[Entry]:
    return sorted(rows, key=lambda row: derive_seed(seed, purpose, row.id))


def _draw(rows: Sequence[Entry], seed: int, purpose: str) -> Entry:
    return _ranked(rows, seed, purpose)[0]
