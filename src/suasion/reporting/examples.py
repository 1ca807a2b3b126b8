"""Which responses the report shows in full: prompts that the seed draws, and each trained model's best and worst against base.

Best and worst are by the evaluation grader's probability, so that they show what this grader likes, not what is good.
"""

from __future__ import annotations

from typing import Any

from suasion.evaluation.summary import ModelVerdict
from suasion.recipe import Recipe
from suasion.records import Example, Response
from suasion.seeding import derive_seed

ROLES = {"user": "to be persuaded", "assistant": "persuader"}
SETS = {"drawn": "drawn by the seed", "best": "best against base", "worst": "worst against base"}
WON, LOST = "preferred to base", "base preferred"


def shown_examples(
    summary: dict[str, Any],
    recipe: Recipe,
    examples: list[Example],
    responses: list[Response],
    verdicts: list[ModelVerdict],
    lineages: dict[str, str],
) -> list[dict[str, Any]]:
    """All models' responses to the chosen prompts: drawn ones first, then the best, then the worst.

    An example says why it is shown: `sets` (keys of SETS) and `why`, a phrase. None where recipe.report.examples is 0.
    """
    if not recipe.report.examples:
        return []
    labels = {model["name"]: model["label"] for model in summary["models"]}
    chance = _against_base(verdicts)
    drawn = sorted(examples, key=lambda example: derive_seed(recipe.seed, "report-examples", example.prompt().id))
    chosen: dict[str, list[tuple[str, str]]] = {
        example.prompt().id: [("drawn", "drawn by the seed")] for example in drawn[: recipe.report.examples]
    }
    for word, sign, wanted in (("best", -1, WON), ("worst", 1, LOST)):
        for name in lineages:
            scored = sorted((sign * p, key) for (model, key), (p, said) in chance.items() if model == name and said == wanted)
            if scored:
                chosen.setdefault(scored[0][1], []).append((word, f"{word} of {labels.get(name, name)}"))
    by_id = {example.prompt().id: example for example in examples}
    speaker = {value: name for name, value in lineages.items()}
    said = {(speaker[r.lineage], r.prompt_id): r for r in responses if r.lineage in speaker}
    order = list(SETS)
    ranked = sorted(chosen, key=lambda prompt_id: min(order.index(word) for word, _ in chosen[prompt_id]))
    return [
        {
            "prompt_id": prompt_id,
            "corpus": example.corpus,
            "sets": sorted({word for word, _ in chosen[prompt_id]}, key=order.index),
            "why": ", ".join(why for _, why in chosen[prompt_id]),
            "turns": [{"who": turn.name or ROLES[turn.role], "text": turn.text} for turn in example.turns],
            "reply": example.reply,
            "responses": [
                {
                    "model": name,
                    "label": labels.get(name, name),
                    "text": said[name, prompt_id].text,
                    "finish": said[name, prompt_id].finish,
                    "verdict": chance.get((name, prompt_id), (0.0, ""))[1],
                }
                for name in lineages
                if (name, prompt_id) in said
            ],
        }
        for prompt_id in ranked
        if (example := by_id.get(prompt_id)) is not None
    ]


def _against_base(verdicts: list[ModelVerdict]) -> dict[tuple[str, str], tuple[float, str]]:
    """(model, prompt) -> probability of beating base, and the verdict in words. A label without a probability counts 1, .5 or 0."""
    found = {}
    for verdict in verdicts:
        for model, other, won in ((verdict.first, verdict.second, "a"), (verdict.second, verdict.first, "b")):
            if other != "base":
                continue
            word = {won: WON, "tie": "tie with base", "none": "not scored against base"}.get(verdict.label, LOST)
            if verdict.p_a is not None:
                chance = verdict.p_a if won == "a" else 1 - verdict.p_a
            else:
                chance = {WON: 1.0, LOST: 0.0}.get(word, 0.5)
            found[model, verdict.prompt_id] = (0.5 if verdict.label == "none" else chance, word)
    return {key: value for key, value in found.items() if key[0] != "human"}
