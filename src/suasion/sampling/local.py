"""The local engine: left-padded static batches of similar lengths, one prefill for all responses of a prompt.

Each response owns its random numbers, from (seed, prompt, number, attempt, position, token): batch size, order and restarts
change nothing but floating-point sums. Finished rows leave the batch. The log-probability stored with a response is of the
sampled tokens at temperature 1 under the untruncated distribution, so that it can be compared with any later scoring pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from suasion.models import Compute
from suasion.recipe import SampleSection
from suasion.seeding import derive_seed, gumbel

CANDIDATES = 256  # nucleus sampling looks at this many tokens first; the exact full sort follows where they are not enough


@dataclass(frozen=True)
class Draw:
    """One response to make: which prompt (by id and token ids), which number, which attempt."""

    prompt_id: str
    prompt: tuple[int, ...]
    n: int
    attempt: int = 0


@dataclass(frozen=True)
class Drawn:
    """What came out. logprob: sum over tokens, in nats, at temperature 1, untruncated."""

    draw: Draw
    tokens: tuple[int, ...]
    finish: str
    logprob: float
    seed: int


def plan_batches(draws: Sequence[Draw], batch_size: int) -> list[list[Draw]]:
    """Batches of at most batch_size responses, all draws of one prompt side by side, prompts of similar length together."""
    by_prompt: dict[tuple[str, int], list[Draw]] = {}
    for draw in draws:
        by_prompt.setdefault((draw.prompt_id, draw.attempt), []).append(draw)
    groups = sorted(by_prompt.values(), key=lambda group: (-len(group[0].prompt), group[0].prompt_id))
    batches: list[list[Draw]] = []
    for group in groups:
        if not batches or len(batches[-1]) + len(group) > batch_size:
            batches.append([])
        batches[-1] += group
    return batches


def draw_seed(seed: int, draw: Draw) -> int:
    """The seed that owns a response's random numbers; the same for every model, so that models differ by weights only."""
    return derive_seed(seed, "sample", draw.prompt_id, draw.n, draw.attempt)


@torch.no_grad()
def decode(
    model: Any, batch: Sequence[Draw], settings: SampleSection, seed: int, stop_id: int, pad_id: int, hardware: Compute
) -> list[Drawn]:
    """Decode one batch. Prompts are read once each, then their cache is repeated for every response."""
    from transformers import DynamicCache

    prompts = list({draw.prompt_id: draw.prompt for draw in batch}.items())
    number = {prompt_id: row for row, (prompt_id, _) in enumerate(prompts)}
    device = model.device
    longest = max(len(ids) for _, ids in prompts)
    ids = torch.full((len(prompts), longest), pad_id, device=device)
    mask = torch.zeros((len(prompts), longest), dtype=torch.long, device=device)
    for row, (_, prompt) in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, longest - len(prompt) :] = 1
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with hardware.autocast():
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1].float()  # fmt: skip
    source = torch.tensor([number[draw.prompt_id] for draw in batch], device=device)
    cache.batch_select_indices(source)
    mask, logits = mask[source], logits[source]
    next_position = mask.sum(1)
    seeds = np.array([draw_seed(seed, draw) for draw in batch], dtype=np.uint64)

    tokens: list[list[int]] = [[] for _ in batch]
    sums = [0.0] * len(batch)
    finish = ["length"] * len(batch)
    active = list(range(len(batch)))
    for position in range(settings.max_new_tokens):
        logprobs = logits.log_softmax(dim=1)
        penalised = penalise([tokens[row] for row in active], logits, settings.repetition_penalty)
        choice = choose(penalised, seeds[active], position, settings.temperature, settings.top_p, settings.top_k)
        picked = logprobs.gather(1, choice[:, None])[:, 0].double().tolist()
        keep = []
        for place, (row, token) in enumerate(zip(active, choice.tolist(), strict=True)):
            tokens[row].append(token)
            sums[row] += picked[place]
            if token == stop_id:
                finish[row] = "stop"
            else:
                keep.append(place)
        if not keep or position + 1 == settings.max_new_tokens:
            break
        if len(keep) < len(active):
            kept = torch.tensor(keep, device=device)
            cache.batch_select_indices(kept)
            mask, choice, next_position = mask[kept], choice[kept], next_position[kept]
            active = [active[place] for place in keep]
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        with hardware.autocast():
            logits = model(
                input_ids=choice[:, None], attention_mask=mask, position_ids=next_position[:, None], past_key_values=cache, use_cache=True
            ).logits[:, -1].float()  # fmt: skip
        next_position = next_position + 1
    return [Drawn(draw, tuple(tokens[i]), finish[i], sums[i], draw_seed(seed, draw)) for i, draw in enumerate(batch)]


def choose(
    logits: torch.Tensor, seeds: np.ndarray, position: int, temperature: float, top_p: float, top_k: int = 0
) -> torch.Tensor:
    """Sample one token a row from the truncated distribution with the row's own random numbers.

    logits: [B, V]; seeds: [B] uint64. Returns [B]. Gumbel-max: the token with the largest logit / temperature + noise, the noise
    belonging to (seed, position, token). Unlike inverting a cumulative sum, rounding differences between batch sizes can only
    matter where two tokens are within rounding of one another. The nucleus is the smallest set whose probability reaches top_p
    (Holtzman et al. 2020, arXiv 1904.09751), after top_k.
    """
    if temperature == 0:
        return logits.argmax(dim=1)
    scaled = logits / temperature
    vocabulary = logits.shape[1]
    total = scaled.logsumexp(dim=1, keepdim=True)
    size = top_k or (vocabulary if top_p >= 1 else CANDIDATES)
    values, tokens = scaled.topk(min(size, vocabulary), dim=1)
    if top_k:
        total = values.logsumexp(dim=1, keepdim=True)
    elif size < vocabulary and bool(((values - total).exp().sum(1) < top_p).any()):
        values, tokens = scaled.topk(vocabulary, dim=1)
    probabilities = (values - total).double().exp()
    outside = (
        (probabilities.cumsum(1) - probabilities >= top_p) if top_p < 1 else torch.zeros_like(probabilities, dtype=torch.bool)
    )
    noise = torch.from_numpy(gumbel(seeds, position, tokens.cpu().numpy())).to(logits.device)
    best = (values.double() + noise).masked_fill(outside, -torch.inf).argmax(dim=1)
    return tokens.gather(1, best[:, None])[:, 0]


def penalise(said: Sequence[Sequence[int]], logits: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divide positive logits of tokens already in the response by the penalty, multiply negative ones (Keskar et al. 2019)."""
    if penalty == 1.0:
        return logits
    logits = logits.clone()
    for row, tokens in enumerate(said):
        if tokens:
            seen = torch.tensor(sorted(set(tokens)), device=logits.device)
            values = logits[row, seen]
            logits[row, seen] = torch.where(values > 0, values / penalty, values * penalty)
    return logits
