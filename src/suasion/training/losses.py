"""Preference losses as pure functions of margins.

The margin h of a pair is  (log p(chosen) - log ref(chosen)) - (log p(rejected) - log ref(rejected)),  with log-probabilities
summed over the response's tokens, stop token included, or weighted as `effective_logprobs` says. beta * h is the reward margin.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from suasion.sections.sampling import EndpointEngine, SampleSection

# Standard deviation of log p(one token) between two passes that pack differently, in nats. bf16: .0405 over 32 responses of the bundled
# model after SFT (docs/LOG.md), where another model is .2 nats a token away. Tokens err independently: a reply's sum by sqrt(n) of it.
PASS_ROUNDING = {"float32": 1e-4, "bfloat16": 0.04}
SIGMAS = 5
LOGPROB_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}  # nats a token, stored while sampling against the reference pass


def logprob_tolerance(tokens: int, dtype: str, sampling: SampleSection) -> float:
    """Nats by which the stored log-probability of a response may differ from a later pass; servers compute in types of their own.

    Per token for long responses. Of a few tokens the mean is no quieter than one of them: there it is what rounding may do.
    """
    own = LOGPROB_TOLERANCE[dtype]
    a_token = max(own, sampling.engine.parity_tolerance) if isinstance(sampling.engine, EndpointEngine) else own
    return max(a_token * tokens, float(logprob_rounding(torch.tensor(float(tokens)), dtype)))


def logprob_rounding(lengths: torch.Tensor, dtype: str) -> torch.Tensor:
    """Nats by which the log-probability of a reply of so many tokens may differ between two passes of one model."""
    return SIGMAS * PASS_ROUNDING[dtype] * lengths.sqrt()


def loss_rounding(
    lengths: torch.Tensor, dtype: str, loss: str, beta: float, expected: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """By how much a pair's first loss may differ from what the stored log-probabilities give. lengths: [n, 2] tokens; expected: [n] losses.

    Returns [n]: the margin's rounding d times the steepest slope that the loss can have. That is beta for sigmoid-type losses, and
    (1-e)/(1-2e) beta for robust. IPO, (h - c)^2 or a mean of two such, moves by at most d (2 sqrt(loss) + d): d/beta + d^2 at zero margin.
    """
    terms = 1 / lengths if loss == "length-normalised" else lengths
    rounding = logprob_rounding(terms.sum(1), dtype)
    if loss == "ipo":
        return rounding * (2 * expected.sqrt() + rounding)
    return rounding * beta * (1 - label_smoothing) / (1 - 2 * label_smoothing)


def effective_logprobs(
    sums: torch.Tensor, heads: torch.Tensor, lengths: torch.Tensor, loss: str, length_alpha: float = 1.0
) -> torch.Tensor:
    """What a loss takes for the log-probability of a response. sums, heads, lengths: [n, 2] of (chosen, rejected); returns [n, 2].

    sigmoid, ipo, robust: the sum over the tokens.
    length-normalised: the sum divided by the number of tokens, Lambert et al. 2024 (Tulu 3, arXiv 2411.15124), where it is called
        length-normalised DPO; beta is then per token, and larger by the length of a response.
    length-desensitised: tokens beyond the shorter response's length count length_alpha, Liu et al. 2024 (LD-DPO, arXiv 2409.06411):
        head + alpha (sum - head). 1 is the sigmoid loss.
    """
    if loss == "length-normalised":
        return sums / lengths
    if loss == "length-desensitised":
        return heads + length_alpha * (sums - heads)
    return sums


def soft_loss(margins: torch.Tensor, targets: torch.Tensor, loss: str, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """Expected loss where the chosen response is the better one with probability `targets`. margins, targets: [n]; returns [n].

    p L(h) + (1-p) L(-h). For sigmoid this is the cross-entropy of the Bradley-Terry model with a soft label (cDPO, Mitchell 2023).
    """
    right = preference_loss(margins, loss, beta, label_smoothing)
    if bool((targets == 1).all()):
        return right
    return targets * right + (1 - targets) * preference_loss(-margins, loss, beta, label_smoothing)


def preference_loss(margins: torch.Tensor, loss: str, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """Loss of each pair. margins: [n], of effective log-probabilities; returns [n].

    sigmoid, length-normalised, length-desensitised: -log s(beta h), Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.
    ipo: (h - 1/(2 beta))^2, Azar et al. 2023 (arXiv 2310.12036), eq. 17.
    robust: unbiased under labels flipped with probability e, Chowdhury et al. 2024 (arXiv 2403.00409):
        (-(1-e) log s(beta h) + e log s(-beta h)) / (1 - 2e).
    """
    if loss in ("sigmoid", "length-normalised", "length-desensitised"):
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
