"""First answers of several models in the same batches: what they share is multiplied once, each row adds its own model's adapters.

Sealed prompts are few, and half-empty batches are slow, because all weights are read for each token (docs/benchmarks.md). So batches that a
model would not fill are filled with other models' rows; full ones are left to `respond`. What is made lands in the journal under the
names by which `respond` looks for it, so that nothing else has to know. Each response owns its random numbers, as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suasion.adapters import AdaptersByRow, is_plain
from suasion.chat import Renderer
from suasion.models import Compute, Lineage, check_adapter, is_whole_model, load_merged, prepare_to_decode
from suasion.progress import progress
from suasion.records import Prompt
from suasion.sampling.draws import Deliver, Draw, Drawn, Ended, nobody
from suasion.sampling.local import LocalSampler, plan_batches
from suasion.sampling.respond import Journal, add_drawn, batch_key, prompt_ids
from suasion.sections.sampling import LocalEngine, SampleSection


@dataclass(frozen=True)
class Piece:
    """A batch that `respond` would make of one model: its name in the journal, and the draws."""

    label: str
    key: str
    draws: list[Draw]


Groups = dict[str, list[Piece]]


class JointSampler(LocalSampler):
    """`LocalSampler` for draws of several models (`Draw.model`) that share a base and the adapters of a start."""

    def __init__(
        self,
        start: tuple[Path, ...],
        lineages: Mapping[str, Lineage],
        settings: SampleSection,
        renderer: Renderer,
        hardware: Compute,
        seed: int,
    ):
        super().__init__(self._load, settings, renderer, hardware, seed)
        self.start, self.lineages = start, lineages
        self._rows: AdaptersByRow

    def _load(self) -> Any:
        base = next(iter(self.lineages.values())).base
        model = load_merged(Lineage(base, self.start), self.hardware.device)
        beside = {label: lineage.adapters[len(self.start) :] for label, lineage in self.lineages.items()}
        for folder in {folder for own in beside.values() for folder in own}:
            check_adapter(folder, model, base.base)
        model = prepare_to_decode(model, self.hardware)
        self._rows = AdaptersByRow(model, beside)
        return model

    def run(self, work: Sequence[tuple[str, list[Draw]]], deliver: Deliver, ended: Ended = nobody) -> None:
        """As `LocalSampler`; then the model is let go, at once and not when the collector comes round: others are loaded next."""
        try:
            super().run(work, deliver, ended)
        finally:
            self.model = None

    def _decode(self, part: Sequence[Draw], **watchers: Any) -> list[Drawn]:
        return super()._decode(part, whose=self._rows.rows_are, **watchers)


def shared_start(lineage: Lineage, hardware: Compute) -> tuple[Path, ...]:
    """The adapters that lie in the weights, not beside them: none in fp32; in bf16 all but the newest, as it was trained (models.py);
    whole weights in any case."""
    beside_least = 1 if hardware.dtype == "bfloat16" else len(lineage.adapters)
    whole = max((place for place, adapter in enumerate(lineage.adapters, 1) if is_whole_model(adapter)), default=0)
    return lineage.adapters[: max(whole, len(lineage.adapters) - beside_least, 0)]


def joined(pieces: Sequence[Piece], most: int) -> list[list[Piece]]:
    """Each piece in the first group in which at most `most` draws come together; pieces that stay alone are left out."""
    groups: list[list[Piece]] = []
    for piece in pieces:
        with_room = (group for group in groups if sum(len(one.draws) for one in group) + len(piece.draws) <= most)
        if (group := next(with_room, None)) is None:
            groups.append([piece])
        else:
            group.append(piece)
    return [group for group in groups if len(group) > 1]


def respond_jointly(
    models: Mapping[str, Lineage],
    prompts: Sequence[Prompt],
    settings: SampleSection,
    renderer: Renderer,
    hardware: Compute,
    seed: int,
    journal: Journal,
    processes: int = 1,
) -> None:
    """Make one response of every model to every prompt as far as batches can be shared, and journal them. models: label -> lineage.

    Only the local engine in one process shares batches, and not over weights in 4 bits or with adapters that are no plain LoRA. A shared
    batch of which some models' part is missing is made again whole, so that it is made of the same sums.
    """
    if not isinstance(settings.engine, LocalEngine) or processes > 1:
        return
    ids = prompt_ids(prompts, settings, next(iter(models.values())).base, renderer)
    sharing: dict[tuple[Path, ...], dict[str, Lineage]] = {}
    for label, lineage in models.items():
        start = shared_start(lineage, hardware)
        if not lineage.base.quantization and all(map(is_plain, lineage.adapters[len(start) :])):
            sharing.setdefault(start, {})[label] = lineage
    for start, lineages in sharing.items():
        hashes = {label: lineage.hash for label, lineage in lineages.items()}
        pieces = [
            Piece(label, batch_key(label, hashes[label], 0, number), batch)
            for label in lineages
            for number, batch in enumerate(
                plan_batches([Draw(prompt.id, ids[prompt.id], 0, model=label) for prompt in prompts], settings.batch_size)
            )
        ]
        groups = {str(number): group for number, group in enumerate(joined(pieces, settings.batch_size))}
        missing = {key: group for key, group in groups.items() if any(piece.key not in journal.done for piece in group)}
        if not missing:
            continue

        def deliver(key: str, drawn: list[Drawn], groups: Groups = groups, hashes: dict[str, str] = hashes) -> None:
            for piece in groups[key]:
                if piece.key not in journal.done:
                    own = [one for one in drawn if one.draw in piece.draws]
                    add_drawn(journal, piece.key, own, prompts, renderer, hashes[piece.label])

        labels = {piece.label for group in groups.values() for piece in group}
        sharers = {label: lineage for label, lineage in lineages.items() if label in labels}
        sampler = JointSampler(start, sharers, settings, renderer, hardware, seed)
        total, left = (sum(len(piece.draws) for group in some.values() for piece in group) for some in (groups, missing))
        with progress(f"responses of {len(labels)} models", total, "responses", total - left) as advance:
            work = [(key, [draw for piece in group for draw in piece.draws]) for key, group in missing.items()]
            sampler.run(work, deliver, advance)
