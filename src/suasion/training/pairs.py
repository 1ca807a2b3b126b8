"""Preferences as token ids, their log-probabilities under a model, and what predicts their labels without reading them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from suasion.chat import Renderer
from suasion.errors import UserError
from suasion.models import Compute
from suasion.records import Preference, Response
from suasion.sections.training import DpoArm
from suasion.training.losses import effective_logprobs, soft_loss
from suasion.training.prefix import Packed, pack, reply_logits, sum_by_reply, token_logprobs, within


@dataclass(frozen=True)
class Logprobs:
    """What a model gives one pair, in nats: sums over the responses, and over the heads of both, which are equally long.

    A head is the first min(len(chosen), len(rejected)) tokens; the length-desensitised loss weighs the rest less.
    """

    chosen: float
    rejected: float
    chosen_head: float
    rejected_head: float

    def sums(self) -> tuple[float, float]:
        """(chosen, rejected), whole responses."""
        return self.chosen, self.rejected

    def heads(self) -> tuple[float, float]:
        """(chosen, rejected), heads."""
        return self.chosen_head, self.rejected_head


@dataclass(frozen=True)
class PairIds:
    """One preference as token ids, with the reference's log-probabilities."""

    id: str
    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    weight: float
    target: float = 1.0  # probability that the chosen response is the better one; 1 unless the arm takes soft labels
    finishes: tuple[str, str] = ("stop", "stop")  # how chosen and rejected ended
    reference: Logprobs | None = None
    start: Logprobs | None = None  # the start model's, which is what the policy must give before its first update
    first_loss: float = 0.0  # what the loss must be while the fresh adapter changes nothing

    @property
    def tokens(self) -> int:
        """Tokens that a pass over the pair reads."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def longest(self) -> int:
        """Tokens of the longer of its two sequences."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def pair_ids(preference: Preference, renderer: Renderer) -> PairIds:
    """Token ids of a preference: sampled ids exactly as sampled; imported texts tokenised, with the stop token where they are finished.

    Raises UserError where both sides are equal or one is empty: such a pair teaches nothing, or to say nothing.
    """
    sides = []
    for response in (preference.chosen, preference.rejected):
        rendered = renderer.render(
            preference.prompt.turns, reply=response.text, reply_ids=response.tokens, finished=is_whole(response)
        )
        if not rendered.reply_ids:
            raise UserError(
                f"preference {preference.id}: response {response.id} is empty. Remove the row, or make preferences again."
            )
        sides.append(rendered)
    if sides[0].reply_ids == sides[1].reply_ids:
        raise UserError(
            f"preference {preference.id}: chosen and rejected are equal ({preference.chosen.text[:60]!r}). A tie is no preference: remove the "
            "row, or run again with --redo preferences."
        )
    return PairIds(
        preference.id, sides[0].prompt_ids, sides[0].reply_ids, sides[1].reply_ids, preference.weight,
        finishes=(ending(preference.chosen), ending(preference.rejected)),
    )  # fmt: skip


def is_whole(response: Response) -> bool:
    """Whether a text ended of itself, so that its stop token belongs to it; sampled ids hold theirs already."""
    return response.finish != "length" and "unfinished" not in response.flags


def ending(response: Response) -> str:
    """stop: ended of itself; cut: did not."""
    return "stop" if is_whole(response) else "cut"


def score(model: Any, batch: Sequence[PairIds], hardware: Compute) -> tuple[torch.Tensor, torch.Tensor, Packed, torch.Tensor]:
    """Log-probs [n, 2] of (chosen, rejected) and of their heads [n, 2], the packed row, and its logits [K, V]."""
    packed = pack([(pair.prompt, (pair.chosen, pair.rejected)) for pair in batch]).to(hardware.device)
    with hardware.autocast():
        logits = reply_logits(model, packed)
    tokens = token_logprobs(logits, packed)
    shorter = torch.tensor([min(len(pair.chosen), len(pair.rejected)) for pair in batch for _ in range(2)])
    heads = sum_by_reply(tokens * within(packed, shorter), packed)
    return sum_by_reply(tokens, packed).view(-1, 2), heads.view(-1, 2), packed, logits


def target(preference: Preference, arm: DpoArm) -> float:
    """Probability that the chosen response is the better one: the grader's where the arm takes soft labels, else 1.

    Raises UserError where soft labels are asked for and nobody gave a probability.
    """
    if not arm.soft_labels:
        return 1.0
    if preference.p is None:
        raise UserError(
            f"dpo {arm.name}: soft_labels is set, but preference {preference.id} has no probability ({', '.join(preference.sources)} gave none). "
            f"Set dpo.{arm.name}.soft_labels to false, or label with a grader that gives probabilities."
        )
    return preference.p


def first_loss(started: Logprobs, reference: Logprobs, lengths: tuple[int, int], target: float, arm: DpoArm) -> float:
    """The loss of a pair before any update, from what its start and reference models give it: at zero margin where both are one model.

    lengths: tokens of (chosen, rejected). target: probability that the chosen response is the better one.
    """
    sums, heads = (
        torch.tensor([[a - b for a, b in zip(one, other, strict=True)]], dtype=torch.float64)
        for one, other in ((started.sums(), reference.sums()), (started.heads(), reference.heads()))
    )
    ratios = effective_logprobs(sums, heads, torch.tensor([lengths]), arm.loss, arm.length_alpha)
    targets = torch.tensor([target], dtype=torch.float64)
    return float(soft_loss(ratios[:, 0] - ratios[:, 1], targets, arm.loss, arm.beta, arm.label_smoothing))


def baselines(pairs: Sequence[PairIds]) -> dict[str, float]:
    """How well rules that read nothing predict the labels: share of pairs whose chosen side they prefer, undecided pairs half.

    longer: more tokens. finished: ended of itself where the other did not. both: finished, else longer.
    """
    longer = [_half(len(p.chosen) - len(p.rejected)) for p in pairs]
    finished = [_half((p.finishes[0] == "stop") - (p.finishes[1] == "stop")) for p in pairs]
    both = [second if first == 0.5 else first for first, second in zip(finished, longer, strict=True)]
    return {name: sum(values) / len(pairs) for name, values in (("longer", longer), ("finished", finished), ("both", both))}


def _half(difference: int) -> float:
    return 0.5 if difference == 0 else float(difference > 0)
