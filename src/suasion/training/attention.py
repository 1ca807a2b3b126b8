"""Which attention a training computes with: FlexAttention on a GPU, scaled dot-product attention (SDPA) elsewhere, on a CPU group by group.

A packed row hides most of its square from every token. SDPA computes the square all the same, FlexAttention skips the blocks that
nobody sees, but it is compiled for the machine, and not every model, GPU or torch build can do that. `model.attention: auto` therefore
tries it before a training, forward and backward, beside SDPA on the same row, and stays with SDPA where it fails or differs. On a
processor `auto` asks SDPA for the squares of the groups that were packed, one after the other, and leaves out what lies between them.
"""

from __future__ import annotations

from typing import Any

import torch

from suasion.errors import UserError
from suasion.models import Compute, compute
from suasion.progress import console
from suasion.sections.training import ModelSection
from suasion.training.prefix import BY_GROUP, attention_name, pack

FLEX = "suasion_flex"  # its name in transformers' table; prefix.py makes its masks
# Of a prompt: the second length is compiled otherwise than the first, and the shortest makes a row of 111 tokens, which are few to torch.
TRIED_LENGTHS = (25, 70, 150)
# Left to itself torch (2.13) takes a decoding kernel for rows under 128 tokens, which has no block for queries in groups of 2, 4 or 8 past
# 128 / group size.
ONE_KERNEL = {"BACKEND": "TRITON"}
DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.1}  # relative; a wrong mask differs by more than half


def flex_attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any) -> Any:
    """The library's FlexAttention, in autocast's type: autocast rounds what SDPA reads, but does not know FlexAttention, and queries and keys
    come in fp32 out of the rotation."""
    from transformers.integrations.flex_attention import flex_attention_forward

    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (part.to(torch.get_autocast_dtype(device)) for part in (query, key, value))
    return flex_attention_forward(module, query, key, value, mask, kernel_options=ONE_KERNEL, **kwargs)


def by_group_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    groups: list[tuple[int, int]] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The library's SDPA for each group [start, stop) of a packed row by itself; for the whole row where nobody named groups.

    query, key, value: [1, heads, T, width]; mask: [1, 1, T, T], which hides groups from one another. Returns [1, T, heads, width].
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if mask is None or groups is None or len(groups) == 1:
        output, _ = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        return output, None
    own = [slice(start, stop) for start, stop in groups]
    parts = [
        sdpa_attention_forward(module, query[:, :, at], key[:, :, at], value[:, :, at], mask[:, :, at, at], **kwargs)[0]
        for at in own
    ]
    return torch.cat(parts, dim=1), None


def set_attention(policy: Any, section: ModelSection, device: str, whole: bool = True) -> None:
    """Give a model that is about to be trained the recipe's attention. Raises UserError for flex where there is no GPU.

    whole: the weights are on the device, so that `auto` can try; a model that waits for being sharded stays with SDPA.
    """
    if section.attention == "flex" and device != "cuda":
        raise UserError(
            "model.attention is flex, which trains on a GPU only (torch has no backward for it elsewhere). Use auto or sdpa."
        )
    if section.attention not in (("auto", "flex") if whole else ("flex",)):
        return
    _register()
    if device != "cuda":
        if device == "cpu" and attention_name(policy) == "sdpa" and _takes_others(policy):
            _set(policy, BY_GROUP)
        return
    if section.attention == "flex":
        _set(policy, FLEX)
    elif reason := try_attention(policy, compute(section), FLEX):
        console.print(f"  FlexAttention does not do here ({reason}): training with sdpa, which is slower on packed rows.")


def attention_of(policy: Any) -> str:
    """flex, sdpa or eager: what a model computes with."""
    name = attention_name(policy)
    return {FLEX: "flex", BY_GROUP: "sdpa"}.get(name, name)


def try_attention(policy: Any, hardware: Compute, other: str) -> str:
    """Set `other` where it computes what SDPA computes, and has gradients; else SDPA, and returns why. Draws no random numbers."""
    trained = policy.training
    policy.train()  # some faults show in training only
    reason = ""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if hardware.device == "cuda" else []):
        try:
            for length in TRIED_LENGTHS:
                outputs = []
                for name in ("sdpa", other):
                    _set(policy, name)
                    torch.manual_seed(0)
                    output = _output(policy, length, hardware)
                    output.pow(2).mean().backward()  # type: ignore[no-untyped-call]
                    outputs.append(output.detach())
                difference = float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
                if not difference <= DIFFERENCE[hardware.dtype]:
                    reason = f"its result differs by {difference:.1%}"
                    break
        except (RuntimeError, ValueError, ImportError, AssertionError) as error:  # what torch's compiler and its kernels raise
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
    policy.zero_grad(set_to_none=True)
    policy.train(trained)
    if reason:
        _set(policy, "sdpa")
    return reason


def _output(policy: Any, length: int, hardware: Compute) -> torch.Tensor:
    """Logits, or hidden states of a model without a head, in fp32, of a packed row of two prompts with two replies each."""
    ids = [10 + (7 * place) % 400 for place in range(length)]
    packed = pack([(ids, (ids[:40], ids[5:30])), (ids[9:], (ids[3:50], ids[2:5]))]).to(hardware.device)
    with hardware.autocast():
        output = policy(**packed.inputs_for(policy))[0]
    return torch.as_tensor(output).float()


def use_sdpa(policy: Any) -> None:
    """For passes over padded batches instead of packed rows."""
    if attention_name(policy) in (FLEX, BY_GROUP):
        _set(policy, "sdpa")


def _without_adapter(policy: Any) -> Any:
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


def _takes_others(policy: Any) -> bool:
    return bool(getattr(_without_adapter(policy), "_supports_attention_backend", False))


def _set(policy: Any, name: str) -> None:
    _without_adapter(policy).set_attn_implementation(name)


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(FLEX, flex_attention)
    # Without an entry here a padded batch would be computed without any mask, silently.
    ALL_MASK_ATTENTION_FUNCTIONS.register(FLEX, ALL_MASK_ATTENTION_FUNCTIONS["flex_attention"])
    ALL_ATTENTION_FUNCTIONS.register(BY_GROUP, by_group_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(BY_GROUP, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
