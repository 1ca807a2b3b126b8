"""What people are asked about: the texts and tasks of one labelling, drawn from a run by its seed.

Reads the run's resolved recipe, sample's pairs.jsonl and responses.jsonl, pools' rlhf.jsonl, and the recipe's gold file. For the blind
final comparison (`evaluation`) it reads the sealed prompts and evaluate's responses instead: people then compare what the models said.
Nothing is written. Texts live on the server; the page only ever sends ids back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from suasion.errors import UsageError, UserError
from suasion.grading.pairs import SampledPair, read_sampled_pairs
from suasion.labeling.events import Task, plan_tasks
from suasion.labeling.store import EVALUATION_FILE, FILE
from suasion.records import Turn, content_id, read_json_lines
from suasion.sections.labeling import LabellingPage
from suasion.seeding import generator, uniforms

PAGES = Path(__file__).parent / "pages"
Purpose = Literal["labels", "evaluation"]
FILES: dict[Purpose, str] = {"labels": FILE, "evaluation": EVALUATION_FILE}


@dataclass(frozen=True)
class Item:
    """The texts of one pair, in the pair's own order. `group` is the prompt: the unit of intervals."""

    group: str
    turns: tuple[Turn, ...]
    a: str
    b: str


@dataclass(frozen=True)
class Work:
    """Everything that is asked. tasks: planned ones and checks; items: pair id -> texts; models: pair id -> who wrote a and b."""

    seed: int
    settings: LabellingPage
    tasks: tuple[Task, ...]
    items: dict[str, Item]
    models: dict[str, tuple[str, str]]

    @cached_property
    def planned(self) -> tuple[Task, ...]:
        """Tasks that want a label, without checks."""
        return tuple(task for task in self.tasks if not task.is_check)

    @cached_property
    def by_id(self) -> dict[str, Task]:
        """Task id -> task."""
        return {task.id: task for task in self.tasks}

    @cached_property
    def guidelines(self) -> str:
        """Markdown of the guidelines."""
        return _text(self.settings.guidelines, "guidelines.md")

    @cached_property
    def consent(self) -> str:
        """Markdown of the consent text."""
        return _text(self.settings.consent, "consent.md")

    @cached_property
    def version(self) -> str:
        """Version of the guidelines: stored with every label."""
        return text_version(self.guidelines)


def text_version(text: str) -> str:
    """A short hash that names one wording of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_work(run: Path, purpose: Purpose = "labels", prompts: int | None = None) -> Work:
    """The work that a run has for people. prompts: on how many of them finished models are compared; None stands for all.

    Raises UsageError where its recipe asks for none or the run has fewer prompts, UserError where it is not yet there.
    """
    from suasion.status import load_run

    directory, recipe = load_run(run)
    source = recipe.human_labels.source
    if purpose == "evaluation":
        from suasion.labeling import final

        held, said = final.evaluated(directory)
        if prompts is not None and not 0 < prompts <= len(held):
            raise UsageError(f"--prompts {prompts}: this run has {len(held)} evaluation prompts.")
        pairs = [item for item in final.final_pairs(recipe, held, said, prompts) if final.is_asked(item)]
        models = {item.pair.id: (item.a.lineage, item.b.lineage) for item in pairs}
        return make_work(pairs, final.settings_of(recipe), recipe.seed, models)
    if not isinstance(source, LabellingPage):
        raise UsageError(
            f"{run} takes its human labels from elsewhere (human_labels.source.kind: {source.kind}). Set human_labels.source to "
            "{kind: page} in the recipe and run it; or compare the finished models with: suasion label serve RUN --purpose evaluation"
        )
    if directory.state("sample") != "complete":
        raise UserError(
            f"{run} has no responses to label yet (stage sample is {directory.state('sample')}). Run it first: {directory.go_on()}"
        )
    sample, pools = directory.folder("sample"), directory.folder("pools")
    pairs = read_sampled_pairs(sample / "pairs.jsonl", sample / "responses.jsonl", [pools / "rlhf.jsonl"])
    return make_work(pairs, source, recipe.seed)


def make_work(
    pairs: Sequence[SampledPair], settings: LabellingPage, seed: int, models: dict[str, tuple[str, str]] | None = None
) -> Work:
    """The plan over these pairs: first and second tasks, then gold and attention tasks."""
    items = {one.pair.id: Item(one.prompt.id, one.prompt.turns, one.a.text, one.b.text) for one in pairs}
    tasks = plan_tasks([one.pair.id for one in pairs], settings.overlap, seed)
    for check, item in [*_gold(settings), *_attention(pairs, settings.attention, seed)]:
        tasks.append(check)
        items[check.pair_id] = item
    return Work(seed, settings, tuple(tasks), items, models or {})


def _attention(pairs: Sequence[SampledPair], count: int, seed: int) -> list[tuple[Task, Item]]:
    """Tasks in which one response answers another prompt; which side is right is drawn."""
    if count and len(pairs) < 2:
        raise UserError("attention tasks need at least two pairs. Set human_labels.source.attention to 0.")
    chosen = generator(seed, "label attention").permutation(len(pairs))[:count]
    found = []
    for i in map(int, chosen):
        right, strange = pairs[i], pairs[(i + 1 + int(uniforms(1, seed, "label stranger", i)[0] * (len(pairs) - 1))) % len(pairs)]
        key = content_id("attention", right.pair.id, strange.pair.id)
        first = uniforms(1, seed, "label attention side", key)[0] < 0.5
        a, b = (right.a.text, strange.a.text) if first else (strange.a.text, right.a.text)
        task = Task(content_id("task", key, "attention"), "attention", key, "a" if first else "b")
        found.append((task, Item(right.prompt.id, right.prompt.turns, a, b)))
    return found


def _gold(settings: LabellingPage) -> list[tuple[Task, Item]]:
    if settings.gold is None:
        return []
    path, found = Path(settings.gold), []
    for number, row in read_json_lines(path):
        context, a, b, label = (row.get(name) for name in ("context", "a", "b", "label"))
        if not isinstance(a, str) or not isinstance(b, str) or label not in ("a", "b", "tie"):
            raise UserError(f"{path}, line {number}: a gold task needs texts a and b and a label a, b or tie.")
        try:
            turns = (
                tuple(Turn.model_validate(turn) for turn in context)
                if isinstance(context, list)
                else (Turn(role="user", text=str(context or "")),)
            )
        except ValidationError as error:
            raise UserError(f"{path}, line {number}: context must be a text or a list of turns (role and text).") from error
        key = content_id("gold", *(turn.text for turn in turns), a, b)
        found.append((Task(content_id("task", key, "gold"), "gold", key, label), Item(key, turns, a, b)))
    return found


def _text(path: str | None, bundled: str) -> str:
    file = Path(path) if path else PAGES / bundled
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}). Check human_labels.source.{bundled.removesuffix('.md')}.") from error
