"""What every grader is: the interface, the rules that bind all of them, and the baselines beside them.

A grader looks at comparisons (a context and two replies) and gives judgements. `decide` is the only place where a probability
becomes a label, and the rules that need no model stand there: an identical pair is a tie, an empty reply loses. The trained
graders are Bradley-Terry models: each reply gets one strength in its context, P(a beats b) = sigmoid(strength a - strength b),
so that the two orders cannot disagree. Nothing is read or written here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from suasion.errors import UserError
from suasion.grading.features import word_count
from suasion.records import Label, Verdict, canonical_json, content_id
from suasion.seeding import uniforms

if TYPE_CHECKING:
    from suasion.grading.pairs import TrainingPair
    from suasion.sections import grading as sections

STRENGTH_DECIMALS = 6  # absorbs rounding that depends on how texts were batched, so that equal texts have equal strengths
FEWEST_TRAINING_PAIRS = 8
UNREADABLE = "the texts do not fit into the model's context"
MIRROR: dict[Label, Label] = {"a": "b", "b": "a", "tie": "tie", "none": "none"}

Outcome = Literal["", "consistent", "flip", "tie", "none"]


@dataclass(frozen=True)
class Comparison:
    """Two replies to one context. `context` is the dialogue as plain text (`suasion.chat.as_text`)."""

    context: str
    a: str
    b: str

    def swapped(self) -> Comparison:
        """The same comparison in the other order."""
        return Comparison(self.context, self.b, self.a)


@dataclass(frozen=True)
class Judgement:
    """What a grader says of one comparison. p_a: probability that a is better; None where the grader gives none.

    label "none": the grader gave no answer. outcome: how its two orders relate, '' for a grader that cannot tell positions apart.
    orders: the answers to (a, b) and to (b, a), both told as of (a, b). cost: US dollars, 0 for a grader on this machine.
    """

    p_a: float | None
    label: Label
    reason: str = ""
    raw: str = ""
    outcome: Outcome = ""
    orders: tuple[Judgement, ...] = ()
    cost: float = 0.0

    def swapped(self) -> Judgement:
        """The judgement of (b, a): label, probability and orders move together."""
        return replace(
            self,
            p_a=None if self.p_a is None else 1.0 - self.p_a,
            label=MIRROR[self.label],
            orders=tuple(one.swapped() for one in reversed(self.orders)),
        )


class Grader(Protocol):
    """Anything that compares replies. `kind` names the family, `fingerprint` changes with everything that can change a judgement."""

    @property
    def kind(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...

    def grade(self, items: Sequence[Comparison]) -> list[Judgement]:
        """One judgement a comparison, in order."""
        ...


@runtime_checkable
class Served(Protocol):
    """A grader whose judgements may cost money."""

    def estimate(self, *groups: Sequence[Comparison]) -> None:
        """Print what judging these would take. A group is what `grade` gets at once: a ranking asks for all replies of a group together."""
        ...


def rule(item: Comparison) -> Judgement | None:
    """What needs no model: identical texts (up to surrounding space) are a tie at exactly .5; of an empty and a non-empty reply the
    empty one loses with certainty. None where a model has to judge. The rule stands in `reason`."""
    a, b = item.a.strip(), item.b.strip()
    if a == b:
        return Judgement(0.5, "tie", "rule: identical texts")
    if not a or not b:
        return Judgement(1.0 if a else 0.0, "a" if a else "b", "rule: an empty reply loses")
    return None


def decide(item: Comparison, p_a: float, tie_margin: float, raw: str = "") -> Judgement:
    """A probability becomes a label: rules come before the model, and p_a within `tie_margin` of .5 is a tie."""
    ruled = rule(item)
    if ruled is not None:
        return replace(ruled, raw=raw)
    if abs(p_a - 0.5) <= tie_margin:
        return Judgement(p_a, "tie", "", raw)
    return Judgement(p_a, "a" if p_a > 0.5 else "b", "", raw)


def bradley_terry(strength_a: np.ndarray, strength_b: np.ndarray) -> np.ndarray:
    """P(a beats b) from strengths, [n] each (Bradley & Terry 1952): sigmoid(a - b).

    Computed on the larger side, so that swapping a and b gives exactly 1 - p in floating point.
    """
    margin = strength_a - strength_b
    upper: np.ndarray = 1.0 / (1.0 + np.exp(-np.abs(margin)))
    return np.where(margin >= 0, upper, 1.0 - upper)


class BradleyTerryGrader:
    """Base of the trained graders: subclasses give `strengths`, one number for each (context, reply)."""

    kind = ""

    def __init__(self, tie_margin: float, fingerprint: str):
        self.tie_margin = tie_margin
        self.fingerprint = fingerprint
        self.length_slope = 0.0

    def strengths(self, contexts: Sequence[str], replies: Sequence[str]) -> np.ndarray:
        """[n] float64: how strong each reply is in its context; NaN where the grader cannot read it."""
        raise NotImplementedError

    def largest_weights(self, count: int) -> dict[str, float]:
        """The readable features that move a judgement most, with their weights on standardised features."""
        raise NotImplementedError

    def neutralise_length(self, items: Sequence[Comparison]) -> None:
        """From now on subtract what log length predicts of a margin on these comparisons (least squares, without intercept).

        It needs no labels, only the texts that will be judged. Slopes learned on other texts do not carry over: trained on
        UKPConvArg1 with length removed there, margins on ChangeMyView still went with length at r = -.49 (docs/grading.md).
        """
        judged = [item for item in items if item.a.strip() and item.b.strip()]
        strength = self._each([(item.context, reply) for item in judged for reply in (item.a, item.b)])
        margins = np.array([strength[item.context, item.a] - strength[item.context, item.b] for item in judged])
        lengths = np.array([_log_words(item.a) - _log_words(item.b) for item in judged])
        margins, lengths = margins[~np.isnan(margins)], lengths[~np.isnan(margins)]
        power = float(lengths @ lengths)
        self.length_slope += round(float(lengths @ margins) / power, STRENGTH_DECIMALS) if power > 0 else 0.0
        self.fingerprint = content_id("grader", self.fingerprint, self.length_slope)

    def grade(self, items: Sequence[Comparison]) -> list[Judgement]:
        """Each distinct (context, reply) is scored once, so that the judgement of a swapped pair is exactly the swapped judgement."""
        strength = self._each([(item.context, reply) for item in items for reply in (item.a, item.b)])
        a = np.array([strength[item.context, item.a] for item in items])
        b = np.array([strength[item.context, item.b] for item in items])
        return [
            self._judgement(item, float(p), float(x), float(y))
            for item, p, x, y in zip(items, bradley_terry(a, b), a, b, strict=True)
        ]

    def _judgement(self, item: Comparison, p: float, a: float, b: float) -> Judgement:
        raw = canonical_json({"strength_a": None if math.isnan(a) else a, "strength_b": None if math.isnan(b) else b})
        if math.isnan(p) and rule(item) is None:
            return Judgement(None, "none", UNREADABLE, raw)
        return decide(item, p, self.tie_margin, raw)

    def _each(self, replies: Iterable[tuple[str, str]]) -> dict[tuple[str, str], float]:
        keys = sorted(set(replies))
        if not keys:
            return {}
        values = self.strengths([context for context, _ in keys], [reply for _, reply in keys])
        values = values - self.length_slope * np.array([_log_words(reply) for _, reply in keys])
        return dict(zip(keys, np.round(values, STRENGTH_DECIMALS).tolist(), strict=True))


def fit_bradley_terry(differences: Any, ridge: float) -> np.ndarray:
    """Weights w minimising sum log(1 + exp(-w.d)) + ridge/2 |w|^2 over rows d = features(winner) - features(loser).

    differences: [n, k], numpy or scipy sparse. There is no intercept, so the first position has no advantage. scikit-learn
    wants two classes: every second row is mirrored, which leaves this loss as it is.
    """
    from scipy import sparse
    from sklearn.linear_model import LogisticRegression

    count = differences.shape[0]
    signs = np.where(np.arange(count) % 2 == 0, 1.0, -1.0)
    mirrored = sparse.diags(signs) @ differences if sparse.issparse(differences) else differences * signs[:, None]
    model = LogisticRegression(C=1.0 / ridge, fit_intercept=False, solver="lbfgs", tol=1e-7, max_iter=5000)
    model.fit(mirrored, signs > 0)
    return np.asarray(model.coef_[0], dtype=np.float64)


def train_grader(spec: sections.TrainedGrader, pairs: Sequence[TrainingPair], seed: int) -> BradleyTerryGrader:
    """Train the grader of a recipe. `seed` enters its fingerprint; only a reward model draws from it, the other fits are convex.

    Raises UserError where there is too little to learn from.
    """
    if len(pairs) < FEWEST_TRAINING_PAIRS:
        raise UserError(
            f"a grader cannot learn from {len(pairs)} outcome pairs (at least {FEWEST_TRAINING_PAIRS}). Give the corpus more "
            "conversations, or train the grader on a corpus of its own (train: {kind: cmv or ukp, path: ...})."
        )
    if spec.kind == "reward":
        from suasion.grading.reward import RewardBradleyTerry

        return RewardBradleyTerry(spec, pairs, seed)
    fingerprint = content_id("grader", canonical_json(spec.model_dump(mode="json", exclude={"train"})), seed, pairs_hash(pairs))
    if spec.kind == "embedding":
        from suasion.grading.embedding import EmbeddingBradleyTerry

        return EmbeddingBradleyTerry(spec, pairs, fingerprint)
    if spec.kind == "readable":
        from suasion.grading.readable import ReadableBradleyTerry

        return ReadableBradleyTerry(spec, pairs, fingerprint)
    from suasion.grading.ngram import NgramBradleyTerry

    return NgramBradleyTerry(spec, pairs, fingerprint)


def pairs_hash(pairs: Sequence[TrainingPair]) -> str:
    """SHA-256 over the content of training pairs, in their order."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(canonical_json([pair.context, pair.winner, pair.loser, pair.group]).encode())
    return digest.hexdigest()


def to_verdict(pair_id: str, judgement: Judgement, source: str, template_hash: str = "") -> Verdict:
    """A judgement that stands for both orders, as the verdict on a pair."""
    return Verdict(
        pair_id=pair_id,
        source=source,
        order="both",
        label=judgement.label,
        p_a=judgement.p_a,
        outcome=judgement.outcome,
        reason=judgement.reason,
        raw=judgement.raw,
        template_hash=template_hash,
    )


def source_name(kind: str) -> str:
    """The name of an AI label source in verdicts and tables."""
    return f"ai:{kind}"


# Baselines: what no grader may be worse than.


@dataclass(frozen=True)
class Baseline:
    """A judge without any knowledge of persuasion."""

    kind: str
    probability: Callable[[Comparison], float]

    @property
    def fingerprint(self) -> str:
        """A baseline has no weights: its name says everything."""
        return content_id("grader", self.kind)

    def grade(self, items: Sequence[Comparison]) -> list[Judgement]:
        """One judgement a comparison; baselines obey the same rules."""
        return [decide(item, self.probability(item), 0.0) for item in items]


def longer(a: str, b: str) -> Label:
    """Which text has more words."""
    left, right = word_count(a), word_count(b)
    return "tie" if left == right else "a" if left > right else "b"


def _log_words(text: str) -> float:
    return math.log1p(word_count(text))


def _coin(item: Comparison) -> float:
    # The coin belongs to the unordered pair: swapping swaps its side, as it would for a person who tosses it for one of the texts.
    first, second = sorted((item.a, item.b))
    side = 1.0 if uniforms(1, 0, "coin", item.context, first, second)[0] < 0.5 else 0.0
    return side if item.a == first else 1.0 - side


LONGER_WINS = Baseline("longer", lambda item: {"a": 1.0, "b": 0.0}.get(longer(item.a, item.b), 0.5))
FIRST_POSITION = Baseline("first", lambda item: 1.0)
COIN = Baseline("coin", _coin)
BASELINES = (LONGER_WINS, FIRST_POSITION, COIN)
