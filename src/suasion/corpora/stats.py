"""What a corpus holds: lengths, outcomes, strategies, what was dropped and why, and how often the longer reply wins.

`Report` counts while stage corpus reads and becomes that source's part of `counts.json`; `source_stats` makes typed results of
that part. Recipe or finished run, `suasion corpus stats` therefore shows numbers that were computed in one place, and a run can be
looked at where its corpora and its model are not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from suasion.corpora.convokit import Tally
from suasion.errors import UserError
from suasion.records import Example, read_json

CONFIDENCE = 0.95
BIN = 8  # tokens; the upper limits of the shipped recipes are multiples of it, so that no bin lies across one
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
REPLIES, PAIRS, PROMPTS, CONVERSATIONS = "replies", "outcome pairs", "prompts without reply", "conversations"
UNITS = {  # how a reason begins -> what it is counted in; every other reason concerns replies
    "pair ": PAIRS,
    "prompt ": PROMPTS,
    "post ": CONVERSATIONS,
    "dialogue ": CONVERSATIONS,
    "conversation ": CONVERSATIONS,
    "utterance ": "utterances",
    "poster's own comment with success 0": "losing comments",
    "comment with success 0": "losing comments",
    "bot's comment with success 0": "losing comments",
    "persuadee turn ": "persuadee turns",
}


class Report:
    """Counts of one source, filled while it is read. `tally` and `kept` are open; lengths and outcomes come through the methods."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.kept: Counter[str] = Counter()
        self._tokens: dict[str, Counter[int]] = defaultdict(Counter)  # counts, so that memory does not grow with the rows
        self._bins: dict[str, Counter[int]] = defaultdict(Counter)
        self._strategies: Counter[str] = Counter()
        self._outcomes: Counter[float | None] = Counter()
        self._by_label: dict[str, list[int]] = defaultdict(lambda: [0, 0])  # conversations, and those that persuaded
        self._labelled = [0, 0]
        self._pairs = {"offered": [0, 0, 0], "kept": [0, 0, 0]}

    def offer_reply(self, tokens: int) -> None:
        """A reply that reached the length rule, kept or not."""
        self._bins["reply offered"][bin_edge(tokens)] += 1

    def offer_pair(self, winner: int, loser: int) -> None:
        """An outcome pair that reached the length rule, by the tokens of its sides."""
        self._count_pair("offered", winner, loser)

    def keep_pair(self, winner: int, loser: int) -> None:
        """An outcome pair that is kept."""
        self.kept[PAIRS] += 1
        self._count_pair("kept", winner, loser)
        self._tokens["winner"][winner] += 1
        self._tokens["loser"][loser] += 1
        self._bins["winner minus loser"][bin_edge(winner - loser)] += 1

    def keep_example(self, example: Example, context: int, reply: int | None, cut: bool) -> None:
        """An example that is kept, with its tokens; reply None: a prompt without reply. cut: its context was shortened."""
        self.kept[PROMPTS if reply is None else "examples"] += 1
        self._strategies.update(example.strategies)
        if cut:
            self.kept["contexts cut"] += 1
            self._bins["context cut"][bin_edge(context)] += 1
        for name, tokens in (("context", context), ("reply", reply)):
            if tokens is not None:
                self._tokens[name][tokens] += 1
                self._bins[name][bin_edge(tokens)] += 1

    def end_conversation(self, examples: Sequence[Example], pairs: int) -> None:
        """Count a conversation by what is kept of it. Its outcome is the best one among its examples with a reply."""
        if examples or pairs:
            self.kept[CONVERSATIONS] += 1
        else:
            self.tally.dropped["conversation of which nothing is kept"] += 1
        replied = [example for example in examples if example.reply is not None]
        self.kept["conversations with an example"] += bool(replied)
        self.kept["conversations with an outcome pair"] += bool(pairs)
        if not replied:
            return
        outcome = max((example.outcome for example in replied if example.outcome is not None), default=None)
        self._outcomes[None if outcome is None else round(outcome, 2)] += 1
        used = {label for example in replied for label in example.strategies}
        for counts in (*(self._by_label[label] for label in used), *([self._labelled] if used else [])):
            counts[0] += 1
            counts[1] += bool(outcome and outcome > 0)

    def as_json(self) -> dict[str, Any]:
        """For counts.json. Keys of bins are their upper edges; longer_wins_rate is None without pairs."""
        offered, kept = self._pairs["offered"], self._pairs["kept"]
        return {
            "read": dict(self.tally.read),
            "kept": dict(self.kept),
            "dropped": {reason: count for reason, count in self.tally.dropped.items() if count},
            "binary_fields": list(self.tally.binary_fields),
            "tokens": {name: quantiles(values) for name, values in self._tokens.items()},
            "bins": {name: {str(edge): bins[edge] for edge in sorted(bins)} for name, bins in self._bins.items()},
            "strategies": dict(self._strategies),
            "strategy_conversations": dict(self._by_label),
            "labelled_conversations": self._labelled,
            "outcomes": {"unknown" if value is None else str(value): count for value, count in self._outcomes.items()},
            "pair_lengths": {"offered": _pair_counts(offered), "kept": _pair_counts(kept)},
            "longer_wins_rate": round(kept[1] / kept[0], 4) if kept[0] else None,
        }

    def _count_pair(self, where: str, winner: int, loser: int) -> None:
        counts = self._pairs[where]
        counts[0] += 1
        counts[1] += winner > loser
        counts[2] += winner == loser


@dataclass(frozen=True)
class Share:
    """`count` of `of`, with a Wilson interval (Wilson 1927); value and bounds are None where `of` is 0."""

    count: int
    of: int
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Dropped:
    """Rows that one rule dropped; share: of all that were offered."""

    reason: str
    count: int
    share: float


@dataclass(frozen=True)
class Funnel:
    """What became of all rows of one unit: offered = kept + everything dropped, largest reason first."""

    unit: str
    offered: int
    kept: int
    dropped: tuple[Dropped, ...]


@dataclass(frozen=True)
class Strategy:
    """A strategy label: annotated sentences in kept replies, and the share of their conversations that persuaded."""

    label: str
    sentences: int
    persuaded: Share


@dataclass(frozen=True)
class Pairs:
    """Outcome pairs by length. longer: share whose winner has more tokens; before: the same before the length rule."""

    longer: Share
    equal: int
    before: Share


@dataclass(frozen=True)
class SourceStats:
    """Everything that is known of one source.

    tokens: quantiles by name ("context", "reply", "winner", "loser"). bins: name -> upper edge in tokens -> count; also
    "reply offered" (before the length rule), "context cut" (those of "context" that were shortened) and "winner minus loser". outcomes: value -> conversations with a kept reply;
    persuaded: share of those with a known outcome whose outcome is above 0. labelled: the same of those with strategy labels.
    """

    corpus: str
    read: dict[str, int]
    kept: dict[str, int]
    funnels: tuple[Funnel, ...]
    tokens: dict[str, dict[str, int]]
    bins: dict[str, dict[int, int]]
    outcomes: dict[float, int]
    outcome_unknown: int
    outcome_mean: float | None
    persuaded: Share
    strategies: tuple[Strategy, ...]
    labelled: Share
    pairs: Pairs

    def funnel(self, unit: str) -> Funnel | None:
        """The funnel of one unit."""
        return next((funnel for funnel in self.funnels if funnel.unit == unit), None)


def read_stats(path: Path) -> dict[str, SourceStats]:
    """The typed results of a counts.json. Raises UserError for one that another version wrote."""
    counts = read_json(path)
    try:
        return {name: source_stats(name, known) for name, known in counts.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} was changed, or written by another version ({type(error).__name__}: {error}). Give the recipe instead of the "
            "run, or make the stage again with --redo corpus."
        ) from error


def source_stats(corpus: str, counts: dict[str, Any]) -> SourceStats:
    """One source's part of counts.json as typed results. Raises KeyError, TypeError or ValueError where it is not one."""
    known = {float(value): count for value, count in counts["outcomes"].items() if value != "unknown"}
    conversations = sum(known.values())
    by_label = {label: share(persuaded, of) for label, (of, persuaded) in counts["strategy_conversations"].items()}
    ranked = sorted(counts["strategies"].items(), key=lambda item: (-item[1], item[0]))
    labelled, lengths = counts["labelled_conversations"], counts["pair_lengths"]
    return SourceStats(
        corpus=corpus,
        read=counts["read"],
        kept=counts["kept"],
        funnels=funnels(counts["read"], counts["kept"], counts["dropped"]),
        tokens=counts["tokens"],
        bins={name: {int(edge): count for edge, count in bins.items()} for name, bins in counts["bins"].items()},
        outcomes=dict(sorted(known.items())),
        outcome_unknown=counts["outcomes"].get("unknown", 0),
        outcome_mean=sum(value * count for value, count in known.items()) / conversations if conversations else None,
        persuaded=share(sum(count for value, count in known.items() if value > 0), conversations),
        strategies=tuple(Strategy(label, sentences, by_label.get(label, share(0, 0))) for label, sentences in ranked),
        labelled=share(labelled[1], labelled[0]),
        pairs=Pairs(
            longer=share(lengths["kept"]["winner longer"], lengths["kept"]["pairs"]),
            equal=lengths["kept"]["equally long"],
            before=share(lengths["offered"]["winner longer"], lengths["offered"]["pairs"]),
        ),
    )


def funnels(read: dict[str, int], kept: dict[str, int], dropped: dict[str, int]) -> tuple[Funnel, ...]:
    """What was offered, dropped by reason, and kept, one funnel a unit; units of which nothing was offered are left out."""
    by_unit: dict[str, dict[str, int]] = defaultdict(dict)
    for reason, count in dropped.items():
        by_unit[unit(reason)][reason] = count
    remaining = {REPLIES: kept.get("examples", 0), PAIRS: kept.get(PAIRS, 0), PROMPTS: kept.get(PROMPTS, 0)}
    conversations = read.get("conversations", 0) - sum(by_unit[CONVERSATIONS].values())
    remaining[CONVERSATIONS] = conversations + dropped.get("conversation without utterances", 0)  # those were never read as one
    remaining["losing comments"] = read.get("losing comments", 0)
    remaining["persuadee turns"] = read.get("persuadee turns", 0) - sum(by_unit["persuadee turns"].values())
    remaining["utterances"] = read.get("utterances", 0) - sum(by_unit["utterances"].values())
    found = []
    for name, left in remaining.items():
        reasons = sorted(by_unit[name].items(), key=lambda item: (-item[1], item[0]))
        offered = left + sum(count for _, count in reasons)
        if offered:
            found.append(Funnel(name, offered, left, tuple(Dropped(why, count, count / offered) for why, count in reasons)))
    return tuple(found)


def unit(reason: str) -> str:
    """What a reason for dropping is counted in."""
    return next((name for beginning, name in UNITS.items() if reason.startswith(beginning)), REPLIES)


def share(count: int, of: int, confidence: float = CONFIDENCE) -> Share:
    """`count` of `of` with its Wilson score interval. Rows are taken as independent."""
    from scipy.stats import binomtest

    if not of:
        return Share(count, of, None, None, None)
    bounds = binomtest(count, of).proportion_ci(confidence, method="wilson")
    return Share(count, of, count / of, float(bounds.low), float(bounds.high))


def bin_edge(tokens: int) -> int:
    """The edge, away from zero, of the bin of a count or a difference of counts: 1 to 8 -> 8, -9 -> -16, 0 -> 0."""
    edge = -(-abs(tokens) // BIN) * BIN
    return edge if tokens >= 0 else -edge


def quantiles(counts: Counter[int]) -> dict[str, int]:
    """The values at QUANTILES (nearest rank) and the extremes, of values with how often they occur. Nothing gives {}."""
    values = sorted(counts)
    if not values:
        return {}
    ends = list(accumulate(counts[value] for value in values))

    def ranked(place: int) -> int:
        return values[bisect_right(ends, place)]

    last = ends[-1] - 1
    inner = {f"p{round(100 * q):02d}": ranked(min(int(q * ends[-1]), last)) for q in QUANTILES}
    return {"min": values[0], **inner, "max": values[-1]}


def _pair_counts(counts: Sequence[int]) -> dict[str, int]:
    return dict(zip(("pairs", "winner longer", "equally long"), counts, strict=True))
