"""Preference losses as pure functions of margins.

The margin h of a pair is  (log p(chosen) - log ref(chosen)) - (log p(rejected) - log ref(rejected)),  with log-probabilities
summed over the response's tokens, stop token included. beta * h is the reward margin.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from suasion.sections.sampling import EndpointEngine, SampleSection

FIRST_LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
LOGPROB_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}  # nats a token, stored while sampling against the reference pass


def logprob_tolerance(dtype: str, sampling: SampleSection) -> float:
    """Nats a token by which a stored log-probability may differ from a later pass; servers compute in types of their own."""
    own = LOGPROB_TOLERANCE[dtype]
    return max(own, sampling.engine.parity_tolerance) if isinstance(sampling.engine, EndpointEngine) else own


def preference_loss(margins: torch.Tensor, loss: str, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """Loss of each pair. margins: [n] in nats; returns [n].

    sigmoid: -log s(beta h), Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.
    ipo: (h - 1/(2 beta))^2, Azar et al. 2023 (arXiv 2310.12036), eq. 17.
    robust: unbiased under labels flipped with probability e, Chowdhury et al. 2024 (arXiv 2403.00409), eq. 10:
        (-(1-e) log s(beta h) + e log s(-beta h)) / (1 - 2e).
    """
    if loss == "sigmoid":
        return -F.logsigmoid(beta * margins)
    if loss == "ipo":
        return (margins - 1 / (2 * beta)) ** 2
    if loss == "robust":
        e = label_smoothing
        return (-(1 - e) * F.logsigmoid(beta * margins) + e * F.logsigmoid(-beta * margins)) / (1 - 2 * e)
    raise ValueError(f"unknown loss {loss}")


def zero_margin_loss(loss: str, beta: float) -> float:
    """The loss while policy = reference: ln 2, or 1/(4 beta^2) for IPO. (robust: (1-2e) ln 2 / (1-2e) = ln 2.)"""
    return 1 / (4 * beta**2) if loss == "ipo" else math.log(2)
