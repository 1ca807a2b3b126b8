"""The `panel` grader: several graders vote, each with the weight that its measured accuracy earns.

For votes that err independently the best weight is the log-odds of being right, w = ln(p / (1 - p)) (Nitzan & Paroush 1982); a member
no better than a coin has none, which is printed and stands in the facts. The accuracy is measured on the panel's own pairs, by group,
before anything is judged; where nobody is better than a coin the run stops. In a fold of the panel's own measurement it does not: a panel
without votes calls everything a tie there, which counts one half, as a coin does. A member's vote is 2 p_a - 1 where it gives a probability, else its label; members that give no answer are left out, and a
panel in which nobody answers gives none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from suasion.errors import UserError
from suasion.grading.base import Comparison, Grader, Judgement, Served, decide, rule
from suasion.records import canonical_json, content_id

SUREST = 0.99  # a finite number of pairs proves no accuracy of 1


@dataclass(frozen=True)
class Member:
    """A grader, its name in the panel, and the accuracy that was measured."""

    name: str
    grader: Grader
    accuracy: float

    @property
    def weight(self) -> float:
        """ln(p / (1 - p)), 0 for a member no better than a coin."""
        p = min(self.accuracy, SUREST)
        return math.log(p / (1 - p)) if p > 0.5 else 0.0


def members_line(members: Sequence[Member]) -> str:
    """Who has a vote, and how much of one, for the terminal."""
    return "panel: " + ", ".join(
        f"{member.name} {member.accuracy:.1%} "
        + (f"(weight {member.weight:.2f})" if member.weight else "(no better than a coin: no weight)")
        for member in members
    )


def members_facts(grader: Grader) -> dict[str, dict[str, dict[str, float]]]:
    """{"members": name -> accuracy and weight} of a panel, for a manifest; {} for every other grader."""
    if not isinstance(grader, PanelGrader):
        return {}
    told = {one.name: {"accuracy": round(one.accuracy, 4), "weight": round(one.weight, 4)} for one in grader.members}
    return {"members": told}


class NobodyVotes:
    """A panel in a fold in which no member is better than a coin: it knows nothing, and says so of everything that no rule decides."""

    kind = "panel"
    fingerprint = content_id("panel", "nobody votes")

    def grade(self, items: Sequence[Comparison]) -> list[Judgement]:
        """A tie each, but for identical and empty texts."""
        return [rule(item) or Judgement(0.5, "tie", "no member of the panel is better than a coin") for item in items]


class PanelGrader:
    """See the module's docstring. Raises UserError where no member is better than a coin."""

    kind = "panel"

    def __init__(self, members: Sequence[Member], tie_margin: float):
        if not any(member.weight > 0 for member in members):
            raise UserError(
                "no member of the panel is better than a coin on its pairs ("
                + ", ".join(f"{member.name} {member.accuracy:.1%}" for member in members)
                + "). Train them on other pairs, or choose other graders."
            )
        self.members, self.tie_margin = tuple(members), tie_margin

    @property
    def fingerprint(self) -> str:
        """Follows the members': it changes when length is taken out of one of them."""
        return content_id(
            "panel", self.tie_margin, *(f"{member.grader.fingerprint} {member.accuracy:.6f}" for member in self.members)
        )

    def estimate(self, *groups: Sequence[Comparison]) -> None:
        """Print what the voting members that may cost money would be asked."""
        for member in self.members:
            if member.weight > 0 and isinstance(member.grader, Served):
                member.grader.estimate(*groups)

    def grade(self, items: Sequence[Comparison]) -> list[Judgement]:
        """One judgement a comparison; the members' votes stand in `raw`."""
        voting = [member for member in self.members if member.weight > 0]
        said = [member.grader.grade(items) for member in voting]
        return [self._vote(item, voting, votes) for item, votes in zip(items, zip(*said, strict=True), strict=True)]

    def _vote(self, item: Comparison, voting: Sequence[Member], votes: Sequence[Judgement]) -> Judgement:
        cost = sum(vote.cost for vote in votes)
        answered = [(member, vote) for member, vote in zip(voting, votes, strict=True) if vote.label != "none"]
        raw = canonical_json(
            {
                member.name: {"label": vote.label, "p_a": vote.p_a, "weight": round(member.weight, 4)}
                | ({"outcome": vote.outcome} if vote.outcome else {})
                for member, vote in zip(voting, votes, strict=True)
            }
        )
        if not answered:
            return Judgement(None, "none", "no member answered", raw, cost=cost)
        score = sum(member.weight * _side(vote) for member, vote in answered)
        p = 1 / (1 + math.exp(-abs(score)))  # on the larger side, so that swapping gives exactly 1 - p
        judged = decide(item, p if score >= 0 else 1.0 - p, self.tie_margin, raw)
        return Judgement(judged.p_a, judged.label, judged.reason, raw, cost=cost)

    def largest_weights(self, count: int) -> dict[str, float]:
        """The members' weights."""
        ranked = sorted(self.members, key=lambda member: (-member.weight, member.name))
        return {member.name: round(member.weight, 4) for member in ranked[:count]}


def _side(vote: Judgement) -> float:
    """From -1 (b) to 1 (a)."""
    if vote.p_a is not None:
        return 2 * vote.p_a - 1
    return {"a": 1.0, "b": -1.0}.get(vote.label, 0.0)
