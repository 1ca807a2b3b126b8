"""From a grader's settings to a grader that can judge, and to how well it does.

The one place that knows all kinds. `training` gives the pairs that a grader learns from, or is measured on, by a section of its
settings; the bench gives one list for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from suasion.errors import UserError
from suasion.grading.base import BradleyTerryGrader, Comparison, Grader, Served, train_grader
from suasion.grading.measure import FOLDS, Measurement, as_comparisons, cross_validate, measure_on
from suasion.grading.pairs import TrainingPair, training_hashes
from suasion.progress import console
from suasion.records import content_id
from suasion.rundir import cache_dir
from suasion.sections import grading as sections
from suasion.seeding import derive_seed

Training = Callable[[sections.PairData], Sequence[TrainingPair]]


def build_grader(
    spec: sections.AnyGrader, training: Training, seed: int, scope: str = "", processes: int = 1, in_fold: bool = False
) -> Grader:
    """A grader ready to judge. scope: what a cost cap is counted for (a run, a bench folder). in_fold: only to be measured on what was held
    out, where a panel without votes counts as a coin.

    Raises UserError where data, a model, a package or a key is missing, and for a panel in which nobody is better than a coin.
    """
    if isinstance(spec, sections.LlmGrader):
        return _llm(spec, seed, scope, processes)
    if isinstance(spec, sections.PanelGrader):
        return _panel(spec, training(spec.train), seed, scope, processes, in_fold)
    return train_grader(spec, training(spec.train), seed)


def measure(
    spec: sections.AnyGrader, training: Training, seed: int, grader: Grader | None = None, scope: str = ""
) -> Measurement | None:
    """How often a grader names the winner of held-out pairs: cross-validated by group where it is trained on them.

    grader: one that is built already, so that an LLM grader is not set up twice. None for an LLM grader without pairs to be measured on.
    """
    if isinstance(spec, sections.LlmGrader):
        pairs = measured_pairs(spec, training, seed)
        return measure_on(grader or _llm(spec, seed, scope), pairs, seed) if pairs else None
    folds = spec.folds if isinstance(spec, sections.RewardGrader) else FOLDS
    return cross_validate(
        lambda pairs: build_grader(spec, lambda _: pairs, seed, scope, in_fold=True), training(spec.train), seed, folds
    )


def measured_pairs(spec: sections.AnyGrader, training: Training, seed: int) -> list[TrainingPair]:
    """The pairs on which `measure` asks a grader that is not trained here; none for one that is trained or not to be measured."""
    if not isinstance(spec, sections.LlmGrader) or spec.measure is None:
        return []
    return drawn(training(spec.measure), spec.measure_pairs, seed)


def announce(grader: Grader, spec: sections.AnyGrader, training: Training, seed: int, *groups: Sequence[Comparison]) -> None:
    """Print what a grader that may cost money is going to be asked, before its first request: its measurement and these comparisons.

    groups: what it will be asked at once, each.
    """
    if isinstance(grader, Served):
        grader.estimate(as_comparisons(measured_pairs(spec, training, seed), seed), *groups)


def neutralise_length(spec: sections.AnyGrader, grader: Grader, items: Sequence[Comparison]) -> dict[str, float]:
    """Take length out of every trained grader that asks for it, on the comparisons that it is going to judge; in a panel, of its members.

    Returns the slopes that were taken out, by the grader's kind or its name in the panel.
    """
    parts: list[tuple[str, sections.AnyGrader, Grader]] = [(spec.kind, spec, grader)]
    if isinstance(spec, sections.PanelGrader):
        from suasion.grading.panel import PanelGrader

        assert isinstance(grader, PanelGrader), "a panel's section builds a panel"
        parts = [(one.name, member, one.grader) for member, one in zip(spec.members, grader.members, strict=True)]
    slopes = {}
    for name, section, part in parts:
        if isinstance(section, sections.EmbeddingGrader | sections.ReadableGrader) and section.residualise_length:
            assert isinstance(part, BradleyTerryGrader), "both are Bradley-Terry graders"
            part.neutralise_length(items)
            slopes[name] = part.length_slope
    return slopes


def outside_hashes(spec: sections.AnyGrader) -> dict[str, str]:
    """name -> hash of what a grader reads from outside the run: training pairs, language models in this process, templates."""
    from suasion.grading.rubric import template_hashes

    hashes: dict[str, str] = {}
    for data in sections.read_pairs_of(spec):
        hashes |= training_hashes(data)
    for number, model in enumerate(sections.models_of(spec), start=1):
        from suasion.models import base_hash

        hashes[f"grader model {number}"] = base_hash(model)
    return hashes | template_hashes(spec)


def drawn(pairs: Sequence[TrainingPair], count: int, seed: int) -> list[TrainingPair]:
    """At most `count` pairs, drawn by the hash of their content: the same ones in every run, whatever order they stand in."""

    def key(pair: TrainingPair) -> tuple[int, str]:
        identity = content_id("training-pair", pair.context, pair.winner, pair.loser)
        return derive_seed(seed, "measured-pairs", identity), identity

    return sorted(pairs, key=key)[:count]


def _llm(spec: sections.LlmGrader, seed: int, scope: str, processes: int = 1) -> Grader:
    from suasion.grading.rubric import load_rubric

    rubric = load_rubric(spec.template)
    if spec.provider == "local":
        from suasion.grading.local_llm import LocalLlmGrader

        return LocalLlmGrader(spec, rubric, seed, processes, cache_dir() / "verdict-tokens")
    from suasion.grading.ledger import Ledger
    from suasion.grading.llm import ServedLlmGrader
    from suasion.grading.providers import make_providers, terms_lines
    from suasion.grading.runner import Runner

    for line in terms_lines(spec):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    providers = make_providers(spec)
    ledger = Ledger(requests_file(), content_id("scope", scope, spec.model))
    return ServedLlmGrader(spec, rubric, Runner(providers, spec, ledger, seed), providers[0].body, seed)


def requests_file() -> Path:
    """Where answers and bills of graders are kept."""
    return cache_dir() / "grader-requests.sqlite"


def _panel(
    spec: sections.PanelGrader, pairs: Sequence[TrainingPair], seed: int, scope: str, processes: int, in_fold: bool
) -> Grader:
    from suasion.grading.panel import Member, NobodyVotes, PanelGrader, members_line

    members = []
    for number, member in enumerate(spec.members, start=1):
        grader = build_grader(member, lambda _: pairs, seed, scope, processes)
        measurable = _measurable(member, spec.train)
        announce(grader, measurable, lambda _: pairs, seed)
        measured = measure(measurable, lambda _: pairs, seed, grader, scope)
        if measured is None:
            raise UserError(f"member {number} of the panel could not be measured, so that it has no weight.")
        members.append(Member(f"{number} {member.kind}", grader, measured.accuracy))
    silent = [member for member in members if not member.weight]
    if silent or not in_fold:
        console.print(f"  {'in one fold, ' if in_fold else ''}{members_line(members)}", markup=False, soft_wrap=True)
    return NobodyVotes() if in_fold and len(silent) == len(members) else PanelGrader(members, spec.tie_margin)


def _measurable(member: sections.AnyGrader, data: sections.PairData) -> sections.AnyGrader:
    """An LLM member is measured on the panel's pairs."""
    return member.model_copy(update={"measure": data}) if isinstance(member, sections.LlmGrader) else member
