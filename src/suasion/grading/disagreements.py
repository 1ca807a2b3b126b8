"""A page of the pairs on which a grader and people's labels differ, to be read before an agreement is believed.

`suasion grade bench` writes it for its pairs, stage preferences for the rlhf pairs of a run. It holds the texts themselves: it belongs to whoever may
read those, and into no repository.
"""

from __future__ import annotations

from collections.abc import Sequence

from suasion.grading.base import Judgement
from suasion.grading.labelled import LabelledPair

SHOWN_DISAGREEMENTS = 40


def disagreements_page(pairs: Sequence[LabelledPair], judged: Sequence[Judgement], name: str) -> str:
    """The pairs on which grader and label differ, the surest errors first, as one page that needs no network."""
    from jinja2 import Environment, PackageLoader

    wrong = [
        (one.p_a if one.p_a is not None else 1.0 if one.label == "a" else 0.0, pair, one)
        for pair, one in zip(pairs, judged, strict=True)
        if "none" != one.label != pair.label
    ]
    wrong.sort(key=lambda row: (-abs(row[0] - 0.5), row[1].id))
    environment = Environment(loader=PackageLoader("suasion.grading", "templates"), autoescape=True)
    return environment.get_template("disagreements.html").render(
        name=name, wrong=[(pair, one) for _, pair, one in wrong[:SHOWN_DISAGREEMENTS]], count=len(wrong), asked=len(pairs)
    )
