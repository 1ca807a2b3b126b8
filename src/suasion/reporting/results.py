"""The tables of the result itself: who won, how sure that is, what could have been seen, and what each training did.

Each takes the summary and gives one `Table`; nothing is computed here.
"""

from __future__ import annotations

from typing import Any

from suasion.evaluation import wording
from suasion.recipe import Recipe
from suasion.reporting.making import source_name
from suasion.reporting.table import Column, Table

Curves = dict[str, list[dict[str, Any]]]  # model -> rows of its training's metrics.jsonl
CURVE_COLUMNS = ("loss", "margin", "accuracy", "kl", "chosen_logp", "rejected_logp")


def models_table(summary: dict[str, Any]) -> Table:
    """Every model against base, sft and the human reply, and on the two scales of all models together."""
    level = f"{100 * summary['confidence']:.0f}%"
    return Table(
        "models",
        "The models",
        f"Win rates with {level} intervals by conversation, ties as half; the verdict is the Holm-corrected sign test against base. "
        "Strength: Bradley–Terry, natural log, base at 0. Rank score: mean normalised rank among the models.",
        (
            Column("model", "Model"),
            Column("vs_base", "Against base", "estimate"),
            Column("verdict", "Verdict"),
            Column("vs_sft", "Against sft", "estimate"),
            Column("vs_human", "Against human reply", "estimate"),
            Column("length_controlled", "Against base, equal length", "estimate"),
            Column("rank_score", "Rank score", "estimate"),
            Column("strength", "Strength", "log"),
        ),
        [
            {
                "model": m["label"],
                "vs_base": m["win_vs_base"],
                "vs_sft": m["win_vs_sft"],
                "vs_human": m["win_vs_human"],
                "length_controlled": m["length_controlled_vs_base"],
                "rank_score": m["rank_score"],
                "strength": m["strength"],
                "verdict": m["verdict_vs_base"],
            }
            for m in summary["models"]
        ],
    )


def comparisons_table(summary: dict[str, Any], labels: dict[str, str]) -> Table:
    """Every comparison in the grader's eyes."""
    return _comparisons(
        "comparisons",
        "Every comparison",
        "Primary comparisons were decided on beforehand and are corrected together (Holm). All others are exploratory: their "
        f"p-values and verdicts are not corrected. Near even: equivalent within {100 * summary['equivalence_margin']:.0f} points of one "
        "half (two one-sided tests).",
        summary["comparisons"],
        labels,
    )


def people_comparisons_table(summary: dict[str, Any], labels: dict[str, str]) -> Table:
    """The comparisons that people judged, apart from the grader's."""
    return _comparisons(
        "people_comparisons",
        "The same in people’s eyes",
        "Verdicts of people who saw neither names nor lengths, apart from the grader’s and tested in the same way. Equal texts are ties that "
        "nobody was asked about.",
        (summary.get("people") or {}).get("tested") or [],
        labels,
    )


def _comparisons(name: str, title: str, note: str, comparisons: list[dict[str, Any]], labels: dict[str, str]) -> Table:
    """Comparisons of a summary, the grader's or people's, as one table."""
    return Table(
        name,
        title,
        note,
        (
            Column("first", "Model"),
            Column("second", "Against"),
            Column("family", "Family"),
            Column("win_rate", "Win rate", "estimate"),
            Column("verdict", "Verdict"),
            Column("wins", "Wins", "count"),
            Column("ties", "Ties", "count"),
            Column("losses", "Losses", "count"),
            Column("scored", "Scored", "of"),
            Column("p", "p", "p"),
            Column("p_holm", "p, Holm", "p"),
            Column("equivalent", "Near even"),
        ),
        [
            {
                "first": labels[c["first"]],
                "second": labels[c["second"]],
                "family": c["family"],
                "win_rate": c,
                "scored": c,
                **{key: c[key] for key in ("wins", "ties", "losses", "p", "p_holm", "equivalent", "verdict")},
            }
            for c in comparisons
        ],
    )


def arms_table(summary: dict[str, Any], recipe: Recipe, lineages: dict[str, str], labels: dict[str, str]) -> Table:
    """What each arm learned from, and what its training did."""
    simulated = recipe.human_labels.source.kind == "simulated"
    rows = []
    for arm in recipe.dpo:
        if arm.name not in lineages:
            continue
        known = (summary["facts"].get("arms") or {}).get(arm.name) or {}
        source = "human (simulated)" if arm.labels == "human" and simulated else arm.labels
        texts = "imported texts" if arm.labels == "human" and wording.imported_texts(recipe) else f"{arm.pool} pool"
        moved = None if known.get("moved") is None else "yes" if known["moved"] else "did not move"
        own = {"arm": labels.get(arm.name, arm.name), "labels": f"{source}, {texts}", "start": arm.start}
        rows.append({**own, **known, "moved": moved})
    return Table(
        "arms",
        "The trainings",
        "Margin: mean implicit reward of chosen minus rejected at the end. KL: to the model the arm started from. Changed: share of "
        "responses that differ from sft's; in bf16 rounding alone changes some.",
        (
            Column("arm", "Arm"),
            Column("labels", "Labels"),
            Column("start", "Starts from"),
            Column("steps", "Steps", "count"),
            Column("first_loss", "First loss", "small"),
            Column("margin", "Margin", "small"),
            Column("kl", "KL", "small"),
            Column("changed_share", "Changed", "percent"),
            Column("moved", "Moved"),
        ),
        rows,
    )


def curves_table(curves: Curves, labels: dict[str, str]) -> Table:
    """Every point of the training curves; too long for a page, so that it stands in its CSV file alone."""
    return Table(
        "curves",
        "The training curves",
        "",
        (Column("model", "Model"), Column("step", "Step", "count"), *(Column(key, key, "small") for key in CURVE_COLUMNS)),
        [
            {"model": labels.get(model, model), "step": row["step"]}
            | {key: row[key] for key in CURVE_COLUMNS if row.get(key) is not None}
            for model, rows in curves.items()
            for row in rows
            if any(row.get(key) is not None for key in CURVE_COLUMNS)
        ],
    )


def power_table(summary: dict[str, Any]) -> Table:
    """The smallest true win rate that the run could have detected."""
    power = summary["power"]
    return Table(
        "power",
        "What this run could detect",
        f"Smallest true win rate found with {wording.percent(power['power'])} power by a two-sided sign test, exact binomial. "
        f"Each line adds to the one above. Two equal models would be shown equivalent with {wording.percent(power['equivalence'])} "
        f"power; below {wording.percent(power['power'])} “cannot say” stands for “equivalent”.",
        (Column("assuming", "Assuming"), Column("win_rate", "Smallest true win rate", "threshold")),
        power["detectable"],
    )


def agreement_table(facts: dict[str, Any], simulated: bool) -> Table:
    """How label sources agree with the evaluation grader, and people with the labelling grader."""
    known = facts.get("agreement") or []
    pages = sorted({row["page"] for row in known if row.get("page")})
    return Table(
        "agreement",
        "Agreement of label sources",
        "Agree: on pairs that both decided, with 95% intervals by prompt. Balanced: the mean of where the source took the first and where it took "
        "the second position; a favourite position alone gives 50%. Cohen's kappa, Gwet's AC1 and Krippendorff's alpha are corrected for chance and "
        "count ties, on all pairs that both labelled (last column); 0 is chance, but AC1's is a draw among all labels that occur: where ties are rare a coin "
        "reaches .3. For a grader without positions the first one is the pair's own."
        + "".join(
            f" The pairs on which people and the labelling grader differ can be read in {page} of the run." for page in pages
        ),
        (
            Column("a", "Source"),
            Column("b", "And", "long"),
            Column("on", "On", "long"),
            Column("agree", "Agree", "estimate"),
            Column("n", "Pairs", "count"),
            Column("balanced", "Balanced", "estimate"),
            Column("kappa", "Kappa", "coefficient"),
            Column("gwet_ac1", "AC1", "coefficient"),
            Column("alpha", "Alpha", "coefficient"),
            Column("labelled", "All", "count"),
        ),
        [_agreed(row, simulated) for row in known],
    )


def _agreed(row: dict[str, Any], simulated: bool) -> dict[str, Any]:
    """A row of facts["agreement"]; of older runs it holds the raw agreement only, perhaps without an interval."""
    raw = None if row["agree"] is None else {"value": row["agree"], "low": row.get("low"), "high": row.get("high")}
    return {**row, "agree": raw, "a": source_name(row["a"], simulated), "b": source_name(row["b"], simulated)}


def matrix_table(summary: dict[str, Any], labels: dict[str, str]) -> Table:
    """The win-rate matrix, a cell a row: the numbers of the heat map."""
    matrix = summary["matrix"]
    return Table(
        "matrix",
        "Win rate of the first against the second",
        "",
        (
            Column("first", "Model"),
            Column("second", "Against"),
            Column("rate", "Win rate", "number"),
            Column("scored", "Scored", "count"),
            Column("asked", "Asked", "count"),
        ),
        [
            {"first": labels[a], "second": labels[b], **{key: matrix[key][i][j] for key in ("rate", "scored", "asked")}}
            for i, a in enumerate(matrix["names"])
            for j, b in enumerate(matrix["names"])
            if i != j
        ],
    )


def lineage_table(lineages: dict[str, str], labels: dict[str, str]) -> Table:
    """The lineage hash of each model."""
    return Table(
        "lineage",
        "Lineages",
        "",
        (Column("model", "Model"), Column("lineage", "Hash")),
        [{"model": labels.get(name, name), "lineage": value} for name, value in lineages.items()],
    )


def packages_table(facts: dict[str, Any]) -> Table:
    """The package versions that the evaluation ran with."""
    return Table(
        "packages",
        "Package versions",
        "",
        (Column("package", "Package"), Column("version", "Version")),
        [{"package": k, "version": v} for k, v in sorted((facts.get("packages") or {}).items())],
    )
