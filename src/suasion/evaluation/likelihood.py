"""Whether a model finds the replies that really persuaded likelier than those that did not.

Reads outcome pairs (two human replies to one post, of which one won) of conversations that are in no pool, so that no model has
learned from them. Each pair is one pass: the prompt is read once for both replies. Log-probabilities are means per token, because
a sum would say which reply is shorter. A model's pairs are journalled as one line when done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from suasion.chat import Renderer
from suasion.evaluation.statistics import mean_estimate, real_mean_estimate, resample_weights
from suasion.models import Compute, Lineage, load_to_score
from suasion.progress import progress
from suasion.records import OutcomePair
from suasion.sampling.respond import Journal
from suasion.seeding import derive_seed, generator
from suasion.training.prefix import pack, reply_logits, sum_logprobs


def chosen_pairs(pairs: Sequence[OutcomePair], limit: int, renderer: Renderer, max_length: int, seed: int) -> list[OutcomePair]:
    """At most `limit` pairs that fit into the model, drawn by the seed, in the order of their ids."""
    fitting = [
        pair
        for pair in pairs
        if max(len(renderer.render(pair.turns, reply=reply).ids) for reply in (pair.winner, pair.loser)) <= max_length
    ]
    drawn = sorted(fitting, key=lambda pair: derive_seed(seed, "likelihood-pairs", pair.id))[:limit]
    return sorted(drawn, key=lambda pair: pair.id)


@torch.no_grad()
def mean_logprobs(model: Any, pair: OutcomePair, renderer: Renderer, hardware: Compute) -> tuple[float, float]:
    """Mean log-probability per token of (winner, loser), stop token included, in nats."""
    sides = [renderer.render(pair.turns, reply=reply) for reply in (pair.winner, pair.loser)]
    packed = pack([(sides[0].prompt_ids, tuple(side.reply_ids for side in sides))]).to(model.device)
    with hardware.autocast():
        logits = reply_logits(model, packed)
    sums = sum_logprobs(logits, packed)
    return float(sums[0]) / len(sides[0].reply_ids), float(sums[1]) / len(sides[1].reply_ids)


def compare(
    lineages: dict[str, Lineage],
    pairs: Sequence[OutcomePair],
    renderer: Renderer,
    hardware: Compute,
    journal: Journal,
    seed: int,
    bootstrap: int,
    confidence: float,
) -> dict[str, Any]:
    """For each model the share of pairs whose winner is likelier, and the mean difference; intervals by poster. {} without pairs."""
    if not pairs:
        return {}
    groups = sorted({pair.group for pair in pairs})
    clusters = np.array([groups.index(pair.group) for pair in pairs])
    weights = resample_weights(len(groups), bootstrap, generator(seed, "likelihood-bootstrap"))
    models = {}
    for name, lineage in lineages.items():
        key = f"likelihood/{lineage.hash}"
        if key not in journal.done:
            model = load_to_score(lineage, hardware.device)
            rows = []
            with progress(f"likelihood under {name}", len(pairs), "pairs") as advance:
                for pair in pairs:
                    winner, loser = mean_logprobs(model, pair, renderer, hardware)
                    rows.append({"pair": pair.id, "winner": winner, "loser": loser})
                    advance(1)
            journal.add(key, rows)
        gaps = np.array([row["winner"] - row["loser"] for row in journal.done[key]])
        models[name] = {
            "pairs": len(gaps),
            "rate": mean_estimate((np.sign(gaps) + 1) / 2, clusters, weights, confidence).as_json(),
            "gap": real_mean_estimate(gaps, clusters, weights, confidence).as_json(),
        }
    return {"models": models, "note": f"{len(pairs)} pairs of {len(groups)} posters, from conversations that are in no pool."}
