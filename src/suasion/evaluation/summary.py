"""Rows in, one dictionary out: everything that the report shows, and every number behind its sentences.

Reads eval examples, one response a model and prompt, and the evaluation grader's verdicts on every pair of models and on each
model against the human reply. `summarise` is pure: equal rows give equal bytes in any order of rows. Numbers are rounded to
6 decimals; what cannot be said is None with a reason, never NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from suasion.evaluation import metrics, style, wording
from suasion.evaluation.power import detectable_win_rate, equivalence_power
from suasion.evaluation.ranking import rank_scores, strength_estimates
from suasion.evaluation.statistics import (
    Estimate,
    holm,
    is_equivalent,
    length_controlled_estimate,
    mean_estimate,
    prediction_powered,
    resample_weights,
    sign_flip_p,
)
from suasion.recipe import Recipe
from suasion.records import Example, Label, Response, Row, content_id
from suasion.sections.training import DpoArm
from suasion.seeding import generator

HUMAN = "human"
ALPHA = 0.05
POWER = 0.8
NOBODY: dict[str, Any] = {  # what a summary says of people who were not asked
    "judged": 0,
    "comparisons": [],
    "reason": "nobody judged evaluation comparisons: the win rates are the grader's and are not corrected towards people's",
}
NOT_TRAINING = {
    "name",
    "labels",
    "pool",
    "matched",
    "micro_batch_tokens",
    "checkpoints",
    "report_to",
    *DpoArm.TRANSPORT,
}  # no effect, or the point


class ModelVerdict(Row):
    """What the evaluation grader says of two models on one prompt, both orders combined into one observation.

    `second` may be "human": the real reply. label "none" is missing data. p_a: probability that `first` is better.
    """

    format: Literal["model-verdict/1"] = "model-verdict/1"
    prompt_id: str
    conversation_id: str
    first: str
    second: str
    label: Label
    p_a: float | None
    reason: str = ""


def summarise(
    recipe: Recipe,
    prompts: list[Example],
    responses: dict[str, dict[str, Response]],
    verdicts: list[ModelVerdict],
    facts: dict[str, Any],
    measured: style.Measured | None = None,
    people: list[ModelVerdict] | None = None,
    asked: dict[str, Any] | None = None,
    agreement: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The summary of one run.

    responses: model -> prompt id -> response, for the models that exist; a silent model has an empty dictionary.
    facts: what earlier stages found out, kept under "facts" for the report. Keys with a meaning here, all optional:
    "arms" {arm: {margin, kl, changed_share, steps, first_loss, moved}}, "grader" {name, accuracy, ...},
    "labels" {"ai" | "human": {...}}, "agreement" [{a, b, on, agree, n}], "counts", "waiting" {model: reason}.
    measured: what needs a model to measure. people, asked, agreement: as in `with_people`.
    Raises ValueError where a verdict is double or names an unknown prompt or model.
    """
    prompts = sorted(prompts, key=lambda example: example.prompt().id)
    board = Scoreboard(recipe, prompts, [name for name in recipe.model_names() if name in responses], verdicts)
    comparisons = _comparisons(board)
    power = _power(board, comparisons, facts)
    measured = measured or style.Measured()
    speeches = _speeches(board, responses)
    sample = board.sample()
    summary: dict[str, Any] = {
        "format": "summary/1",
        "run": recipe.name,
        "seed": recipe.seed,
        "n": {
            "prompts": len(prompts),
            "conversations": board.weights.shape[1],
            "asked": len(prompts) * len(board.asked_pairs()),
            "scored": sum(int(board.seen(a, b).sum()) for a, b in board.asked_pairs()),
        },
        "confidence": recipe.evaluate.confidence,
        "alpha": ALPHA,
        "equivalence_margin": recipe.evaluate.equivalence_margin,
        "models": _models(board, comparisons, responses, speeches, sample, measured),
        "human": {"name": HUMAN, "label": "human reply", "text": style.facts(speeches[HUMAN], sample, measured)},
        "honesty": style.honesty([*speeches.values()], sample),
        "likelihood": measured.likelihood,
        "strategies": measured.strategies,
        "people": dict(NOBODY),
        "comparisons": comparisons,
        "matrix": _matrix(board),
        "power": power,
        "facts": facts,
    }
    summary["headline"] = wording.headline(summary, recipe)
    summary["caveats"] = wording.caveats(summary, recipe, controls(recipe))
    rounded: dict[str, Any] = _rounded(summary)
    return with_people(rounded, recipe, prompts, verdicts, people, asked or {}, agreement) if people else rounded


def with_people(
    summary: dict[str, Any],
    recipe: Recipe,
    prompts: list[Example],
    verdicts: list[ModelVerdict],
    people: list[ModelVerdict],
    asked: dict[str, Any],
    agreement: dict[str, Any] | None,
) -> dict[str, Any]:
    """A finished summary with what people said of the same comparisons, instead of what they may have said before.

    people: at most one verdict a comparison; they stand in tables of their own and never enter the grader's rates. asked: how people were
    asked, kept as facts["people"]; its "random" says whether the comparisons were drawn at random. agreement: of people with the
    evaluation grader, as a row of facts["agreement"]. verdicts: the grader's. The summary that comes in is left as it was.
    """
    prompts = sorted(prompts, key=lambda example: example.prompt().id)
    facts = {key: value for key, value in summary["facts"].items() if key != "people"} | ({"people": asked} if people else {})
    others = [row for row in facts.get("agreement") or [] if not row.get("evaluation")]
    if "agreement" in facts or agreement:
        facts["agreement"] = [*others, *([{**agreement, "evaluation": True}] if agreement else [])]
    board = Scoreboard(recipe, prompts, [model["name"] for model in summary["models"]], verdicts)
    changed = _rounded({**summary, "facts": facts, "people": _people(board, people, asked)})
    changed["headline"] = wording.headline(changed, recipe)
    changed["caveats"] = wording.caveats(changed, recipe, controls(recipe))
    return dict(changed)


class Scoreboard:
    """Verdicts as arrays over sorted prompts, with everything that intervals need."""

    def __init__(self, recipe: Recipe, prompts: list[Example], models: list[str], verdicts: list[ModelVerdict]):
        self.recipe, self.prompts, self.models = recipe, prompts, models
        self.names = [*models, HUMAN]
        row = {example.prompt().id: index for index, example in enumerate(prompts)}
        conversations = sorted({_conversation(example) for example in prompts})
        self.clusters = np.array([conversations.index(_conversation(example)) for example in prompts], dtype=int)
        rng = generator(recipe.seed, "evaluation-bootstrap")
        self.weights = resample_weights(len(conversations), recipe.evaluate.bootstrap, rng)
        position = {name: index for index, name in enumerate(self.names)}
        self.scores = np.full((len(self.names), len(self.names), len(prompts)), np.nan)
        met: set[tuple[str, frozenset[str]]] = set()
        for verdict in verdicts:
            key = (verdict.prompt_id, frozenset((verdict.first, verdict.second)))
            if key in met or len(key[1]) != 2 or verdict.prompt_id not in row or not key[1] <= set(position):
                raise ValueError(
                    f"verdict on {verdict.first} against {verdict.second}, prompt {verdict.prompt_id}: double, or unknown names"
                )
            met.add(key)
            if verdict.label == "none":
                continue
            score = {"a": 1.0, "tie": 0.5, "b": 0.0}[verdict.label]
            i, j, k = position[verdict.first], position[verdict.second], row[verdict.prompt_id]
            self.scores[i, j, k], self.scores[j, i, k] = score, 1 - score

    def score(self, first: str, second: str) -> np.ndarray:
        """Scores of `first` against `second`, (n,)."""
        return np.asarray(self.scores[self.names.index(first), self.names.index(second)])

    def seen(self, first: str, second: str) -> np.ndarray:
        """Which prompts have a scored verdict, (n,)."""
        return np.asarray(~np.isnan(self.score(first, second)))

    def asked_pairs(self) -> list[tuple[str, str]]:
        """Every comparison that was asked for on every prompt."""
        return [*combinations(self.models, 2), *((model, HUMAN) for model in self.models)]

    def sample(self) -> style.Sample:
        """The prompts as the text measures need them."""
        return style.Sample(
            tuple(example.prompt().id for example in self.prompts),
            tuple(" ".join(turn.text for turn in example.turns) for example in self.prompts),
            self.clusters,
            self.weights,
            self.recipe.evaluate.confidence,
        )

    def estimate(self, scores: np.ndarray, confidence: float | None = None) -> Estimate:
        """Mean score with its interval."""
        return mean_estimate(scores, self.clusters, self.weights, confidence or self.recipe.evaluate.confidence)


@dataclass(frozen=True)
class Control:
    """A matched arm, the human arm that it is the control of, and what besides the source of feedback sets them apart."""

    matched: str
    human: str
    same_pairs: bool
    differing: tuple[str, ...]

    @property
    def planned(self) -> bool:
        """Whether comparing the two compares the source of feedback alone."""
        return self.same_pairs and not self.differing


def controls(recipe: Recipe) -> list[Control]:
    """Each matched arm with the human arm most like it: the same start first, then the fewest differing training fields."""
    found = []
    for arm in (arm for arm in recipe.dpo if arm.matched):
        rivals = [(other.name, _differing(arm, other)) for other in recipe.dpo if other.labels == "human"]
        if rivals:
            human, differing = min(rivals, key=lambda rival: ("start" in rival[1], len(rival[1])))
            found.append(Control(arm.name, human, not wording.imported_texts(recipe), differing))
    return found


def primary_pairs(recipe: Recipe) -> list[tuple[str, str]]:
    """The comparisons decided on beforehand: each trained model against base, and the source of feedback alone."""
    pairs = [(name, "base") for name in recipe.model_names() if name != "base"]
    return [*pairs, *((control.matched, control.human) for control in controls(recipe) if control.planned)]


def _differing(one: DpoArm, other: DpoArm) -> tuple[str, ...]:
    """Fields in which two arms train differently. A reference "start" is the start model by another name."""

    def training(arm: DpoArm) -> dict[str, Any]:
        reference = arm.start if arm.reference == "start" else arm.reference
        return {**arm.model_dump(exclude=NOT_TRAINING), "reference": reference}

    ours, theirs = training(one), training(other)
    return tuple(field for field in ours if ours[field] != theirs[field])


def simulated_models(recipe: Recipe) -> set[str]:
    """Models with simulated human labels in them, or in a model that they start from."""
    found: set[str] = set()
    if recipe.human_labels.source.kind == "simulated":
        for arm in recipe.dpo:  # a recipe lets an arm start from earlier arms only
            if arm.labels == "human" or arm.start in found:
                found.add(arm.name)
    return found


def _comparisons(board: Scoreboard) -> list[dict[str, Any]]:
    """Every comparison of two models, primary ones first, with test, interval, equivalence and a verdict in one word."""
    recipe = board.recipe
    planned = primary_pairs(recipe)
    primary = [pair for pair in planned if set(pair) <= set(board.models)]
    others = [(b, a) for a, b in combinations(board.models, 2) if (a, b) not in primary and (b, a) not in primary]
    others += [(model, HUMAN) for model in board.models]
    p_values = [sign_flip_p(board.score(*pair), board.clusters) for pair in primary]
    adjusted = dict(zip(primary, holm(p_values, len(planned)), strict=True))
    found = []
    for first, second in [*primary, *others]:
        scores = board.score(first, second)
        estimate = board.estimate(scores)
        is_primary = (first, second) in adjusted
        p = sign_flip_p(scores, board.clusters)
        decisive = adjusted[first, second] if is_primary else p
        narrow = board.estimate(scores, 1 - 2 * ALPHA)
        margin = recipe.evaluate.equivalence_margin
        tie_rate = float(np.sum(scores == 0.5)) / estimate.n if estimate.n else 0.0
        could_show = equivalence_power(estimate.clusters, margin, ALPHA, tie_rate)
        equivalent = is_equivalent(narrow, margin)
        if estimate.value is None or decisive is None:
            word = "cannot say"
        elif decisive < ALPHA and estimate.value != 0.5:
            word = "better" if estimate.value > 0.5 else "worse"
        else:
            word = "equivalent" if equivalent and could_show >= POWER else "cannot say"
        found.append(
            {
                "first": first,
                "second": second,
                "family": "primary" if is_primary else "exploratory",
                **estimate.as_json(),
                "asked": len(board.prompts),
                "wins": int(np.sum(scores == 1)),
                "ties": int(np.sum(scores == 0.5)),
                "losses": int(np.sum(scores == 0)),
                "p": p,
                "p_holm": adjusted.get((first, second)),
                "equivalent": equivalent,
                "equivalence_power": could_show,
                "equivalence_interval": [narrow.low, narrow.high],
                "verdict": word,
            }
        )
    return found


def _speeches(board: Scoreboard, responses: dict[str, dict[str, Response]]) -> dict[str, style.Speech]:
    """Every model's responses and the human replies, in the order of the prompts."""
    found = {}
    for name in board.models:
        own = tuple(responses[name].get(example.prompt().id) for example in board.prompts)
        found[name] = style.Speech(name, tuple(None if r is None else r.text for r in own), own)
    return found | {HUMAN: style.Speech(HUMAN, tuple(example.reply or None for example in board.prompts))}


def _people(board: Scoreboard, verdicts: list[ModelVerdict], asked: dict[str, Any]) -> dict[str, Any]:
    """People's own win rates and tests, the grader's beside them, and the grader's corrected where people judged a random subset."""
    if not verdicts:
        return dict(NOBODY)
    recipe = board.recipe
    judged = Scoreboard(recipe, board.prompts, board.models, verdicts)
    random = asked.get("random") is True
    rows: list[dict[str, Any]] = []
    for one, other in board.asked_pairs():
        first, second = (one, other) if other == HUMAN else (other, one)
        scores, graded = judged.score(first, second), board.score(first, second)
        if np.isnan(scores).all():
            continue
        both = ~np.isnan(scores) & ~np.isnan(graded) & (scores != 0.5) & (graded != 0.5)
        if not random:
            corrected = Estimate(None, reason="people did not judge a random subset of the comparisons: no correction is valid")
        elif not (np.isnan(scores) & ~np.isnan(graded)).any():
            corrected = Estimate(None, reason="people judged every comparison: their own rate needs no correction")
        else:
            corrected = prediction_powered(graded, scores, board.clusters, board.weights, recipe.evaluate.confidence)
        rows.append(
            {
                "first": first,
                "second": second,
                "people": judged.estimate(scores).as_json(),
                "grader": board.estimate(graded).as_json(),
                "corrected": corrected.as_json(),
                "agree": board.estimate(np.where(both, scores == graded, np.nan)).as_json(),
            }
        )
    reasons = sorted({row["corrected"]["reason"] for row in rows if row["corrected"]["reason"]})
    seen = len({verdict.prompt_id for verdict in verdicts})
    return {
        "judged": sum(verdict.label != "none" for verdict in verdicts) - asked.get("identical", 0),
        "prompts": seen,
        "comparisons": rows,
        "tested": [{**comparison, "asked": seen} for comparison in _comparisons(judged) if comparison["n"]],
        "reason": f"win rates are not corrected towards people's where {'; '.join(reasons)}" if reasons else "",
    }


def _models(
    board: Scoreboard,
    comparisons: list[dict[str, Any]],
    responses: dict[str, dict[str, Response]],
    speeches: dict[str, style.Speech],
    sample: style.Sample,
    measured: style.Measured,
) -> list[dict[str, Any]]:
    """One entry a model, in the recipe's order. The human reply takes no part in strengths and rank scores."""
    recipe, confidence = board.recipe, board.recipe.evaluate.confidence
    simulated = simulated_models(recipe)
    inner = board.scores[:-1, :-1]
    strengths = strength_estimates(inner, board.clusters, board.weights, confidence) if board.models else []
    ranks = rank_scores(inner)
    verdict = {c["first"]: c["verdict"] for c in comparisons if c["second"] == "base"}
    lengths = {name: _lengths(board.prompts, responses[name]) for name in board.models}
    models = []
    for index, name in enumerate(board.models):
        own = [responses[name][e.prompt().id] for e in board.prompts if e.prompt().id in responses[name]]
        entry: dict[str, Any] = {
            "name": name,
            "label": f"{name} (simulated)" if name in simulated else name,
            "simulated": name in simulated,
            "responses": len(own),
            "lineage": own[0].lineage if own else None,
            "verdict_vs_base": verdict.get(name),
            "strength": strengths[index].as_json(),
            "rank_score": board.estimate(ranks[index]).as_json(),
            "win_vs_human": board.estimate(board.score(name, HUMAN)).as_json(),
            "text": style.facts(speeches[name], sample, measured),
            "text_vs_base": (
                style.drift(speeches[name], speeches["base"], sample, measured) if name != "base" and "base" in speeches else None
            ),
        }
        for other in ("base", "sft"):
            known = other in board.models and other != name
            entry[f"win_vs_{other}"] = board.estimate(board.score(name, other)).as_json() if known else None
        entry["length_controlled_vs_base"] = (
            length_controlled_estimate(
                board.score(name, "base"), lengths[name] - lengths["base"], board.clusters, board.weights, confidence
            ).as_json()
            if name != "base" and "base" in board.models
            else None
        )
        entry["text"]["same_as_sft"] = (
            _same_share(responses[name], responses["sft"]) if "sft" in responses and name != "sft" else None
        )
        models.append(entry)
    return models


def _lengths(prompts: list[Example], responses: dict[str, Response]) -> np.ndarray:
    """Words of a model's response to each prompt, NaN where there is none."""
    found = [responses.get(example.prompt().id) for example in prompts]
    return np.array([np.nan if r is None else len(metrics.words(r.text)) for r in found], dtype=float)


def _same_share(first: dict[str, Response], second: dict[str, Response]) -> float | None:
    common = sorted(first.keys() & second.keys())
    return _mean([metrics.same_text(first[key].text, second[key].text) for key in common])


def _matrix(board: Scoreboard) -> dict[str, Any]:
    """Win rate of row against column, with counts; None on the diagonal and where nothing was scored."""
    cells = [[board.score(a, b)[board.seen(a, b)] for b in board.names] for a in board.names]
    return {
        "names": board.names,
        "rate": [[_mean(list(cell)) for cell in row] for row in cells],
        "scored": [[len(cell) for cell in row] for row in cells],
        "asked": [[0 if i == j else len(board.prompts) for j in range(len(cells))] for i in range(len(cells))],
    }


def _power(board: Scoreboard, comparisons: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """Smallest true win rate that this run could have detected, under better and worse assumptions about the grader."""
    primary = [c for c in comparisons if c["family"] == "primary"]
    scored, ties = sum(c["n"] for c in primary), sum(c["ties"] for c in primary)
    tie_rate = ties / scored if scored else 0.0
    accuracy = (facts.get("grader") or {}).get("accuracy")
    grader = facts.get("grader") or {}
    flips = grader.get("flip_rate")
    family = max(1, len(primary_pairs(board.recipe)))
    n = board.weights.shape[1]
    settings: list[tuple[str, str, dict[str, Any]]] = [
        ("single", "one comparison, perfect grader", {}),
        ("family", f"corrected for {family} comparisons", {"comparisons": family}),
        ("ties", f"{wording.percent(tie_rate)} of prompts are ties, as here", {"comparisons": family, "tie_rate": tie_rate}),
    ]
    known: dict[str, Any] = {"comparisons": family, "tie_rate": tie_rate}
    if flips and grader.get("flips", "drop") == "drop":  # as ties they are among those, and by their mean they tell something
        known["flip_rate"] = flips
        assuming = f"the grader contradicts itself in {wording.percent(flips)} when the order is swapped"
        settings.append(("flips", assuming, dict(known)))
    if accuracy is not None:
        known["grader_accuracy"] = accuracy
        settings.append(("grader", f"people's preference, grader right in {wording.percent(accuracy)}", known))
    return {
        "n": n,
        "power": POWER,
        "comparisons": family,
        "tie_rate": tie_rate,
        "grader_accuracy": accuracy,
        "flip_rate": flips,
        "equivalence": equivalence_power(n, board.recipe.evaluate.equivalence_margin, ALPHA, tie_rate),
        "detectable": [
            {"name": name, "assuming": assuming, "win_rate": detectable_win_rate(n, POWER, ALPHA, **values)}
            for name, assuming, values in settings
        ],
    }


def _conversation(example: Example) -> str:
    return content_id("conversation", example.corpus, example.conversation_id)


def _mean(values: list[Any]) -> float | None:
    return float(np.mean(values)) if values else None


def _rounded(value: Any) -> Any:
    """Floats to 6 decimals, all the way down. Raises ValueError on NaN and infinity: they are defects, not results."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a statistic is not finite")
        return float(round(value, 6)) + 0.0  # -0.0 becomes 0.0
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
