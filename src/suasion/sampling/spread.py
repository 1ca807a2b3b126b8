"""The local engine in several processes, one a GPU: batches are planned once, from the full list, and each process takes its share of them.

The batches are those of one process and each response owns its random numbers, so that the texts are those of one process too, up to
floating-point ties (tested). The process of `suasion run` loads no model; what workers hand over is journalled as always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from suasion.chat import Renderer
from suasion.models import Compute, Lineage, load_to_sample, load_tokenizer
from suasion.sampling.draws import Deliver, Draw, Drawn, Ended, nobody
from suasion.sampling.local import MEMORY_SHARE, LocalSampler
from suasion.sections.sampling import SampleSection
from suasion.sections.training import ModelSection
from suasion.workers import spread

Rows = list[list[Any]]  # of JSON


class SpreadSampler(LocalSampler):
    """`LocalSampler`, whose batches are made by `count` processes. One that waits for a single response stays in this one (`speak`)."""

    def __init__(self, lineage: Lineage, settings: SampleSection, renderer: Renderer, hardware: Compute, seed: int, count: int):
        super().__init__(lambda: load_to_sample(lineage, hardware), settings, renderer, hardware, seed)
        self.lineage, self.count = lineage, count

    def run(self, work: Sequence[tuple[str, list[Draw]]], deliver: Deliver, ended: Ended = nobody) -> None:
        """Batch after batch, in any order. Raises UserError where a process dies, or where one response alone exceeds the memory."""
        if len(work) < 2:  # no share for a second process, whose start takes longer
            super().run(work, deliver, ended)
            self.model = None  # its memory is the workers'
            return
        draws = dict(work)

        def hand_over(key: str, rows: Rows) -> None:
            deliver(key, [_drawn(draw, row) for draw, row in zip(draws[key], rows, strict=True)])
            ended(len(rows))

        setup = {
            "model": self.lineage.base.model_dump(mode="json"),
            "adapters": [str(path.resolve()) for path in self.lineage.adapters],
            "settings": self.settings.model_dump(mode="json"),
            "hardware": self.hardware.as_dict(),
            "seed": self.seed,
            "count": self.count,
        }
        spread(
            "suasion.sampling.spread:batch_maker",
            setup,
            [(key, [[draw.prompt_id, draw.prompt, draw.n, draw.attempt] for draw in batch]) for key, batch in work],
            hand_over,
            self.count,
            self.hardware.device,
        )


def batch_maker(setup: dict[str, Any]) -> Callable[[Rows], Rows]:
    """A worker's part: the model is loaded once, at its first batch."""
    model = ModelSection.model_validate(setup["model"])
    hardware = Compute(**setup["hardware"])
    lineage = Lineage(model, tuple(Path(path) for path in setup["adapters"]))
    sampler = LocalSampler(
        lambda: load_to_sample(lineage, hardware),
        SampleSection.model_validate(setup["settings"]),
        Renderer(load_tokenizer(model), model.system_prompt),
        hardware,
        setup["seed"],
        MEMORY_SHARE / (setup["count"] if hardware.device == "cpu" else 1),
    )

    def make(batch: Rows) -> Rows:
        made: Rows = []

        def keep(_: str, drawn: list[Drawn]) -> None:
            made.extend([list(one.tokens or ()), one.finish, one.logprob, one.seed] for one in drawn)

        sampler.run([("", [Draw(prompt_id, tuple(prompt), n, attempt) for prompt_id, prompt, n, attempt in batch])], keep)
        return made

    return make


def _drawn(draw: Draw, row: list[Any]) -> Drawn:
    tokens, finish, logprob, seed = row
    return Drawn(draw, tuple(tokens), finish, logprob, seed)
