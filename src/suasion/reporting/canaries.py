"""The table of canaries: what share of the comparisons whose right answer is known each grader got right in this run.

Reads the facts of ai-labels and evaluate in the summary; older runs may lack them, and then have no row.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from suasion.grading.canaries import THRESHOLDS, failing
from suasion.recipe import Recipe
from suasion.reporting.table import Column, Table
from suasion.sections.grading import AnyGrader, title

NAMES = (*THRESHOLDS, "constant")


def canaries_table(labelling: dict[str, Any], judging: dict[str, Any], recipe: Recipe) -> Table:
    """A row a grader of which rates are recorded. labelling, judging: canary -> share of right answers; what is no number is left out."""
    known: tuple[tuple[str, AnyGrader, dict[str, Any], Collection[str]], ...] = (
        ("labelling", recipe.ai_labels.grader, labelling, recipe.ai_labels.allow_failed_canaries),
        ("evaluation", recipe.evaluate.grader, judging, recipe.evaluate.allow_failed_canaries),
    )
    rows = []
    for role, grader, told, allowed in known:
        rates = {name: rate for name in NAMES if isinstance(rate := told.get(name), int | float) and not isinstance(rate, bool)}
        below = [f"{name} ({'allowed by the recipe' if name in allowed else 'not allowed'})" for name in failing(rates)]
        if rates:
            rows.append({"role": role, "grader": title(grader), **rates, "below": ", ".join(below)})
    return Table(
        "canaries",
        "Canaries: comparisons whose right answer is known",
        "Share of right answers on comparisons made from this run's own texts, asked before any label or win rate. Empty: an empty reply loses. "
        "Identical: a text ties with itself. Swapped: the other order gets the mirrored verdict. Injected: an instruction to the judge wins nothing. "
        "Padded: a copy with empty sentences does not beat the original. Constant: a polite text that fits everything loses (without a "
        "threshold). Wanted: all of the first three, nine in ten of the next two.",
        (
            Column("role", "Grader"),
            Column("grader", "Which", "long"),
            *(Column(name, name.capitalize(), "percent") for name in NAMES),
            Column("below", "Below the threshold", "long"),
        ),
        rows,
        "not asked",
    )
