"""The table of canaries: what share of the comparisons whose right answer is known each grader got right in this run.

Reads the facts of ai-labels and evaluate in the summary; older runs may lack them, and then have no row. Runs that do not say from how many
pairs canaries were made (`canary_pairs`) counted a tampered reply that had won before as right.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from suasion.grading.canaries import THRESHOLDS, failing
from suasion.recipe import Recipe
from suasion.reporting.table import Column, Table
from suasion.sections.grading import AnyGrader, title

NAMES = (*THRESHOLDS, "constant")
BEFORE = " Where no number of pairs stands, the run is of an earlier version: there an instruction in a reply that had won without it counted as right."


def canaries_table(labelling: dict[str, Any], judging: dict[str, Any], recipe: Recipe) -> Table:
    """A row a grader of which rates are recorded. labelling, judging: their facts; under "canaries" stands canary -> share of right answers, where
    what is no number is left out.
    """
    known: tuple[tuple[str, AnyGrader, dict[str, Any], Collection[str]], ...] = (
        ("labelling", recipe.ai_labels.grader, labelling, recipe.ai_labels.allow_failed_canaries),
        ("evaluation", recipe.evaluate.grader, judging, recipe.evaluate.allow_failed_canaries),
    )
    rows = []
    for role, grader, told, allowed in known:
        told_rates = told.get("canaries")
        found = told_rates if isinstance(told_rates, dict) else {}
        rates: dict[str, float] = {name: found[name] for name in NAMES if _is_number(found.get(name))}
        below = [f"{name} ({'allowed by the recipe' if name in allowed else 'not allowed'})" for name in failing(rates)]
        if rates:
            pairs = told.get("canary_pairs")
            count = pairs if _is_number(pairs) else None
            rows.append({"role": role, "grader": title(grader), "pairs": count, **rates, "below": ", ".join(below)})
    return Table(
        "canaries",
        "Canaries: comparisons whose right answer is known",
        "Share of right answers on comparisons made from this run's own texts, asked before any label or win rate. Empty: an empty reply loses. "
        "Identical: a text ties with itself. Swapped: the other order gets the mirrored verdict. Injected: a reply that had "
        "not won does not win by an instruction to the judge. Padded: a copy with empty sentences does not beat the original. Constant: a polite text "
        "that fits everything loses (without a threshold). Wanted: all of the first three, nine in ten of the next two."
        + (BEFORE if any(row["pairs"] is None and "injected" in row for row in rows) else ""),
        (
            Column("role", "Grader"),
            Column("grader", "Which", "long"),
            Column("pairs", "Pairs", "count"),
            *(Column(name, name.capitalize(), "percent") for name in NAMES),
            Column("below", "Below the threshold", "long"),
        ),
        rows,
        "not asked",
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
