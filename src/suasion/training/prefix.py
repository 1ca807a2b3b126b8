"""Log-probabilities of several replies to one prompt in a single pass that reads the prompt once.

A pair is laid out as [prompt | chosen | rejected]; several pairs follow one another in one row. The attention mask lets a reply
see its own prompt and itself, never the other reply or another pair, and every reply's positions continue the prompt's. The
result equals that of separate sequences up to floating-point order, gradients through the shared prompt included (tested), at
the cost of reading each prompt once instead of twice and of no padding. Logits are computed only where a reply token is
predicted: the head is the largest matrix of a small model. (Idea: Franz et al. 2024, arXiv 2410.20305.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Packed:
    """One row of T tokens that holds S replies with K reply tokens in all.

    input_ids, position_ids: [1, T]. attention_mask: bool [1, 1, T, T], True where a query (row) may see a key (column).
    predict_at: [K] positions whose output predicts a reply token. targets: [K] these tokens. owner: [K] which of the S replies.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    predict_at: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor

    @property
    def replies(self) -> int:
        """S, the number of replies."""
        return int(self.owner[-1]) + 1

    def to(self, device: str | torch.device) -> Packed:
        """The same on another device."""
        return Packed(**{name: value.to(device) for name, value in vars(self).items()})


def pack(groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> Packed:
    """Lay out groups of (prompt ids, replies' ids) in one row. Raises ValueError for an empty prompt or reply."""
    ids: list[int] = []
    positions: list[int] = []
    group_of: list[int] = []
    branch_of: list[int] = []  # 0: prompt, r: the group's r-th reply
    predict_at: list[int] = []
    owner: list[int] = []
    targets: list[int] = []
    reply_number = 0
    for group, (prompt, replies) in enumerate(groups):
        if not prompt or not all(replies):
            raise ValueError("a prompt or reply without tokens cannot be scored")
        last_of_prompt = len(ids) + len(prompt) - 1
        for branch, part in enumerate([prompt, *replies]):
            start = len(ids)
            offset = 0 if branch == 0 else len(prompt)
            ids += part
            positions += range(offset, offset + len(part))
            group_of += [group] * len(part)
            branch_of += [branch] * len(part)
            if branch:
                predict_at += [last_of_prompt, *range(start, start + len(part) - 1)]
                targets += part
                owner += [reply_number] * len(part)
                reply_number += 1
    groups_, branches = torch.tensor(group_of), torch.tensor(branch_of)
    order = torch.arange(len(ids))
    mask = (
        (order[:, None] >= order[None, :])
        & (groups_[:, None] == groups_[None, :])
        & ((branches[None, :] == 0) | (branches[:, None] == branches[None, :]))
    )
    return Packed(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        attention_mask=mask[None, None],
        predict_at=torch.tensor(predict_at),
        targets=torch.tensor(targets),
        owner=torch.tensor(owner),
    )


def reply_logits(model: Any, packed: Packed) -> torch.Tensor:
    """Logits [K, V] in fp32 at the positions that predict reply tokens (a low-precision log-softmax loses whole nats)."""
    output = model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        attention_mask=packed.attention_mask,
        logits_to_keep=packed.predict_at,
        use_cache=False,
    )
    logits: torch.Tensor = output.logits[0].float()
    return logits


def sum_logprobs(logits: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Summed log-probability of each reply. logits: [K, V]; returns [S], in nats. A sum, never a mean: the loss is defined on sums."""
    token = logits.gather(1, packed.targets[:, None])[:, 0] - logits.logsumexp(dim=1)
    return torch.zeros(packed.replies, dtype=token.dtype, device=token.device).index_add(0, packed.owner, token)


def token_kl(policy_logits: torch.Tensor, start_logits: torch.Tensor) -> torch.Tensor:
    """KL(policy || start) over the whole vocabulary at each position. [K, V], [K, V] -> [K], in nats."""
    policy = policy_logits.log_softmax(dim=1)
    return (policy.exp() * (policy - start_logits.log_softmax(dim=1))).sum(dim=1)
