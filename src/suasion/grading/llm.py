"""The `llm` grader: a language model compares two replies by a written rubric, in both orders.

Each order is one request (or, in ranking mode, all replies to one context are ranked twice, the second time in reverse). Judged texts
stand between marker lines with a code that is drawn for each row, so that no text can close its own fence. Answers that cannot be read
are asked for again at most `repairs` times and are then missing data. How the two orders become one label is the recipe's choice:

    both name the same reply    consistent    its label; the probability is the mean of both
    they name different ones    flip          drop: no label; tie: a tie; soft: the mean probability decides
    one or both say tie         tie           a tie; soft: the mean probability decides
    one is missing              none          no label

Only a DPO arm with soft_labels trains on the probability itself; without it a label is a label.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from suasion.grading.base import Comparison, Judgement, Outcome, rule
from suasion.grading.ledger import Answer, Missing
from suasion.grading.rubric import Rubric
from suasion.grading.verdicts import PAIR_SCHEMA, Said, Side, Unreadable, ranking_schema, read_pair, read_ranking
from suasion.records import Label, canonical_json, content_id
from suasion.sections.grading import LlmGrader, settings_of
from suasion.seeding import derive_seed

SHOWN_RAW = 4000  # characters of an answer that are kept with a verdict
LABEL_OF: dict[Side, Label] = {"first": "a", "second": "b", "tie": "tie"}
Body = dict[str, Any]


class Asker(Protocol):
    """What an LLM grader asks: the runner of a server."""

    def announce(self, bodies: Sequence[Body]) -> None:
        """Print what asking these would take."""
        ...

    def ask(self, bodies: Sequence[Body], what: str) -> list[Answer | Missing]:
        """An answer, or the reason why there is none, for each."""
        ...


@dataclass(frozen=True)
class Question:
    """One request: its messages and the schema of its answer."""

    text: str
    schema: Body


@dataclass(frozen=True)
class Read:
    """What became of a question: a value, or the reason why there is none; the last answer's text and what all tries cost."""

    value: Any
    reason: str
    raw: str
    cost: float


class ServedLlmGrader:
    """See the module's docstring. make_body: messages and schema as a provider's request."""

    kind = "llm"

    def __init__(
        self,
        spec: LlmGrader,
        rubric: Rubric,
        asker: Asker,
        make_body: Callable[[str, list[dict[str, str]], Body], Body],
        seed: int,
    ):
        self.spec, self.rubric, self.asker, self.make_body, self.seed = spec, rubric, asker, make_body, seed
        self.template_hash = rubric.hash
        settings = {key: value for key, value in settings_of(spec).items() if key != "template"}
        self.fingerprint = content_id("grader", canonical_json(settings), rubric.hash, seed)

    def grade(self, items: Sequence[Comparison]) -> list[Judgement]:
        """One judgement a comparison, both orders combined. Equal comparisons are asked once."""
        ruled = [rule(item) for item in items]
        asked = list(dict.fromkeys(item for item, known in zip(items, ruled, strict=True) if known is None))
        judged = self._by_ranking(asked) if self.spec.mode == "ranking" else self._by_pair(asked)
        paid: set[Comparison] = set()
        found = []
        for item, known in zip(items, ruled, strict=True):
            one = known or judged[item]
            found.append(replace(one, cost=0.0) if item in paid else one)  # asked once, paid once
            paid.add(item)
        return found

    def estimate(self, *groups: Sequence[Comparison]) -> None:
        """Print what grading these would take, before anything is asked."""
        questions: list[Question] = []
        for items in groups:
            asked = list(dict.fromkeys(item for item in items if rule(item) is None))
            if self.spec.mode == "ranking":
                questions += [
                    self._ranking(context, order)
                    for context, texts in _contexts(asked).items()
                    for order in self._orders(context, texts)
                ]
            else:
                questions += [self._pair(shown) for item in asked for shown in self._shown(item)]
        self.asker.announce([self._body(question, []) for question in questions])

    def _by_pair(self, items: Sequence[Comparison]) -> dict[Comparison, Judgement]:
        shown = [one for item in items for one in self._shown(item)]
        from_tokens = self.spec.probability == "tokens"
        read = self._ask([self._pair(one) for one in shown], lambda answer, _: read_pair(answer, from_tokens))
        single = iter(zip(shown, read, strict=True))
        judged = {}
        for item in items:
            orders = []
            for _ in self._shown(item):
                one, known = next(single)
                judgement = _single(known)
                orders.append(judgement if one == item else judgement.swapped())
            judged[item] = orders[0] if len(orders) == 1 else combine(orders[0], orders[1], self.spec.flips)
        return judged

    def _by_ranking(self, items: Sequence[Comparison]) -> dict[Comparison, Judgement]:
        contexts = _contexts(items)
        orders = [(context, order) for context, texts in contexts.items() for order in self._orders(context, texts)]
        questions = [self._ranking(context, order) for context, order in orders]
        read = self._ask(questions, lambda answer, i: read_ranking(answer, len(orders[i][1])))
        ranks: dict[str, list[tuple[dict[str, int], Read]]] = defaultdict(list)
        for (context, order), known in zip(orders, read, strict=True):
            places = {} if known.value is None else {order[index]: place for place, index in enumerate(known.value[0])}
            ranks[context].append((places, known))
        judged = {}
        for item in items:
            share = sum(1 for other in items if other.context == item.context)
            both = [_from_ranking(item, places, known, share) for places, known in ranks[item.context]]
            judged[item] = combine(both[0], both[1], self.spec.flips)
        return judged

    def _shown(self, item: Comparison) -> list[Comparison]:
        return [item, item.swapped()] if self.spec.orders == "both" else [item]

    def _orders(self, context: str, texts: Sequence[str]) -> list[list[str]]:
        """Two orders of the replies to one context: one that belongs to the texts, whatever order they came in, and its reverse."""
        order = sorted(texts, key=lambda text: (derive_seed(self.seed, "ranking-order", context, text), text))
        return [order, order[::-1]]

    def _pair(self, item: Comparison) -> Question:
        return Question(self.rubric.pair(item, self.seed), PAIR_SCHEMA)

    def _ranking(self, context: str, texts: Sequence[str]) -> Question:
        return Question(self.rubric.ranking(context, texts, self.seed), ranking_schema(len(texts)))

    def _body(self, question: Question, said: Sequence[dict[str, str]]) -> Body:
        return self.make_body(self.rubric.system, [{"role": "user", "content": question.text}, *said], question.schema)

    def _ask(self, questions: Sequence[Question], read: Callable[[Answer, int], Any]) -> list[Read]:
        """Ask, and ask again where an answer cannot be read, each time with the answer and what is wrong with it."""
        found: list[Read | None] = [None] * len(questions)
        said: list[list[dict[str, str]]] = [[] for _ in questions]
        cost = [0.0] * len(questions)
        left = list(range(len(questions)))
        for attempt in range(self.spec.repairs + 1):
            what = "ask the grader" if attempt == 0 else "ask again"
            answers = self.asker.ask([self._body(questions[i], said[i]) for i in left], what)
            again = []
            for i, answer in zip(left, answers, strict=True):
                if isinstance(answer, Missing):
                    found[i] = Read(None, answer.reason, "", cost[i])
                    continue
                cost[i] += answer.cost
                raw = answer.text[:SHOWN_RAW]
                try:
                    found[i] = Read(read(answer, i), "", raw, cost[i])
                except Unreadable as error:
                    found[i] = Read(None, str(error), raw, cost[i])
                    if answer.finish != "refusal":
                        said[i] += [
                            {"role": "assistant", "content": answer.text or "(nothing)"},
                            {"role": "user", "content": self.rubric.repair(str(error))},
                        ]
                        again.append(i)
            left = again
            if not left:
                break
        return [known for known in found if known is not None]


def combine(one: Judgement, other: Judgement, flips: str) -> Judgement:
    """Two judgements of one comparison, both told as of (a, b), as one. one: a was shown first; other: b was."""
    orders, cost = (one, other), one.cost + other.cost
    reason, raw = one.reason or other.reason, canonical_json([one.raw, other.raw])
    labels = {one.label, other.label}
    if "none" in labels or one.p_a is None or other.p_a is None:
        missing = "; ".join(dict.fromkeys(order.reason for order in orders if order.label == "none"))
        return Judgement(None, "none", missing, raw, "none", orders, cost)
    p = (one.p_a + other.p_a) / 2
    outcome: Outcome = "tie" if "tie" in labels else "consistent" if len(labels) == 1 else "flip"
    if outcome == "consistent":
        return Judgement(p, one.label, reason, raw, outcome, orders, cost)
    if flips == "soft":
        return Judgement(p, "tie" if p == 0.5 else "a" if p > 0.5 else "b", reason, raw, outcome, orders, cost)
    if outcome == "flip" and flips == "drop":
        return Judgement(None, "none", "the two orders name different replies", raw, outcome, orders, cost)
    return Judgement(0.5, "tie", reason, raw, outcome, orders, cost)


def _single(read: Read) -> Judgement:
    """One order's answer, told as of the texts in the order shown."""
    if read.value is None:
        return Judgement(None, "none", read.reason, read.raw, cost=read.cost)
    said: Said = read.value
    return Judgement(said.p_first, LABEL_OF[said.side], said.reasons, read.raw, cost=read.cost)


def _from_ranking(item: Comparison, places: dict[str, int], read: Read, share: int) -> Judgement:
    """What one ranking says of two of its replies; its cost is shared among the comparisons that it decides."""
    cost = read.cost / max(share, 1)
    if read.value is None:
        return Judgement(None, "none", read.reason, read.raw, cost=cost)
    a_wins = places[item.a] < places[item.b]
    return Judgement(1.0 if a_wins else 0.0, "a" if a_wins else "b", read.value[1], read.raw, cost=cost)


def _contexts(items: Sequence[Comparison]) -> dict[str, list[str]]:
    """Context -> the distinct replies that are compared in it."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for item in items:
        found[item.context].update({item.a: None, item.b: None})
    return {context: list(texts) for context, texts in found.items()}
