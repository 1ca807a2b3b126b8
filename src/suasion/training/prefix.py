"""Log-probabilities of several replies to one prompt in a single pass that reads the prompt once.

A pair is laid out as [prompt | chosen | rejected]; several pairs follow one another in one row. The attention mask lets a reply
see its own prompt and itself, never the other reply or another pair, and every reply's positions continue the prompt's. The
result equals that of separate sequences up to floating-point order, gradients through the shared prompt included (tested), at
the cost of reading each prompt once instead of twice and of no padding. Logits are computed only where a reply token is
predicted: the head is the largest matrix of a small model. (Idea: Wang and Hegde 2024, arXiv 2410.20305.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from suasion.errors import UserError

FLEX = ("flex_attention", "suasion_flex")  # the library's, and attention.py's
BY_GROUP = "suasion_by_group"  # attention.py's for processors


@dataclass(frozen=True)
class Packed:
    """One row of T tokens that holds S replies with K reply tokens in all.

    input_ids, position_ids: [1, T]. group: [T] which (prompt, replies) a token belongs to; branch: [T] 0 in the prompt, r in its r-th reply.
    predict_at: [K] positions whose output predicts a reply token. targets: [K] these tokens. owner: [K] which of the S replies.
    ends: [S] positions of the replies' last tokens.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    group: torch.Tensor
    branch: torch.Tensor
    predict_at: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    ends: torch.Tensor

    @property
    def attention_mask(self) -> torch.Tensor:
        """bool [1, 1, T, T], True where a query (row) may see a key (column): its own prompt and its own reply, up to itself."""
        return self._dense(None)

    @property
    def groups(self) -> list[tuple[int, int]]:
        """[start, stop) of every group: what lies in different groups never sees one another."""
        stops = torch.unique_consecutive(self.group, return_counts=True)[1].cumsum(0).tolist()
        return list(zip([0, *stops[:-1]], stops, strict=True))

    def inputs_for(self, model: Any) -> dict[str, Any]:
        """What a model is called with."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": self.mask_for(model),
            "use_cache": False,
            **({"groups": self.groups} if attention_name(model) == BY_GROUP else {}),
        }

    def mask_for(self, model: Any) -> Any:
        """What a model takes: a mask for its kind of attention; for layers that see a window only, one of their own.

        A mask that is given whole is taken as it is, so that the window must be in it. It counts positions within a sequence, as in training
        without packing and in sampling.
        """
        config, name = _config(model), attention_name(model)
        make = self.block_mask if name in FLEX else self._added if name == "eager" else self._dense
        window = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ())
        if others := kinds - {"full_attention", "sliding_attention"}:
            raise UserError(
                f"this base model has layers of kind {', '.join(sorted(others))}, for which packed rows have no mask. Choose a model whose layers "
                "are full or sliding attention."
            )
        windowed = "sliding_attention" in kinds if kinds else True
        if window is None or not windowed or int(self.position_ids.max()) < window:
            return make(None)
        return {"full_attention": make(None), "sliding_attention": make(window)} if len(kinds) > 1 else make(window)

    def _dense(self, window: int | None) -> torch.Tensor:
        place = torch.arange(len(self.group), device=self.group.device)
        return self._rule(window)(None, None, place[:, None], place[None, :])[None, None]

    def _added(self, window: int | None) -> torch.Tensor:
        """The same as numbers that are added to scores, which eager attention wants: it would add True as 1."""
        return torch.where(self._dense(window), 0.0, torch.finfo(torch.float32).min)

    def block_mask(self, window: int | None = None) -> Any:
        """The same for FlexAttention, which skips blocks that nobody sees: the cost of packing does not grow with its square."""
        from torch.nn.attention.flex_attention import create_block_mask

        size = len(self.group)
        return create_block_mask(self._rule(window), B=1, H=None, Q_LEN=size, KV_LEN=size, device=self.group.device)

    def _rule(self, window: int | None) -> Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]:
        """(batch, head, query, key) -> whether the query may see the key. Closes over plain tensors, which compilers can follow."""
        group, branch, position = self.group, self.branch, self.position_ids[0]

        def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return (query >= key) & (group[query] == group[key]) & ((branch[key] == 0) | (branch[key] == branch[query]))

        if window is None:
            return sees
        reach = window

        def sees_near(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return sees(batch, head, query, key) & (position[query] - position[key] < reach)

        return sees_near

    @property
    def replies(self) -> int:
        """S, the number of replies."""
        return len(self.ends)

    def to(self, device: str | torch.device) -> Packed:
        """The same on another device."""
        return Packed(**{name: value.to(device) for name, value in vars(self).items()})


def _config(model: Any) -> Any:
    return getattr(model, "module", model).config.get_text_config()  # a model wrapped for several processes has none itself


def attention_name(model: Any) -> str:
    """The attention that a model computes with, by its name in transformers' table."""
    return str(_config(model)._attn_implementation)


def pack(groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> Packed:
    """Lay out groups of (prompt ids, replies' ids) in one row. Raises ValueError for an empty prompt or reply."""
    ids: list[int] = []
    positions: list[int] = []
    group_of: list[int] = []
    branch_of: list[int] = []  # 0: prompt, r: the group's r-th reply
    predict_at: list[int] = []
    owner: list[int] = []
    targets: list[int] = []
    ends: list[int] = []
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
                ends.append(len(ids) - 1)
                reply_number += 1
    return Packed(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        group=torch.tensor(group_of),
        branch=torch.tensor(branch_of),
        predict_at=torch.tensor(predict_at),
        targets=torch.tensor(targets),
        owner=torch.tensor(owner),
        ends=torch.tensor(ends),
    )


def reply_logits(model: Any, packed: Packed) -> torch.Tensor:
    """Logits [K, V] in fp32 at the positions that predict reply tokens (a low-precision log-softmax loses whole nats)."""
    output = model(**packed.inputs_for(model), logits_to_keep=packed.predict_at)
    logits: torch.Tensor = output.logits[0].float()
    return logits


def token_logprobs(logits: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Log-probability of each reply token. logits: [K, V]; returns [K], in nats."""
    return logits.gather(1, packed.targets[:, None])[:, 0] - logits.logsumexp(dim=1)


def sum_by_reply(values: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Sum of values over each reply's tokens. values: [K]; returns [S]."""
    return torch.zeros(packed.replies, dtype=values.dtype, device=values.device).index_add(0, packed.owner, values)


def sum_logprobs(logits: torch.Tensor, packed: Packed) -> torch.Tensor:
    """Summed log-probability of each reply. logits: [K, V]; returns [S], in nats. A sum, never a mean: the loss is defined on sums."""
    return sum_by_reply(token_logprobs(logits, packed), packed)


def within(packed: Packed, limits: torch.Tensor) -> torch.Tensor:
    """Which reply tokens stand among the first limits[s] of their reply. limits: [S]; returns bool [K]."""
    counts = torch.bincount(packed.owner, minlength=packed.replies)
    place = torch.arange(len(packed.owner), device=packed.owner.device) - (counts.cumsum(0) - counts)[packed.owner]
    return place < limits.to(packed.owner.device)[packed.owner]


def token_kl(policy_logits: torch.Tensor, start_logits: torch.Tensor) -> torch.Tensor:
    """KL(policy || start) over the whole vocabulary at each position. [K, V], [K, V] -> [K], in nats."""
    policy = policy_logits.log_softmax(dim=1)
    return (policy.exp() * (policy - start_logits.log_softmax(dim=1))).sum(dim=1)
