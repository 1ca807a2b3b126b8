"""A finished run's models answer its sealed prompts one after another, and in shared batches: seconds, and whether the texts are equal.

    python benchmarks/joint.py runs/demo [--dtype bfloat16]

Loading is counted on both sides, as stage `evaluate` pays it. Nothing in the run is changed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Measure and print."""
    from suasion.chat import Renderer
    from suasion.evaluation.stage import label_of, settings_of
    from suasion.models import compute, lineage_of, load_tokenizer
    from suasion.records import Example, read_rows
    from suasion.sampling.joint import respond_jointly
    from suasion.sampling.respond import Journal, respond
    from suasion.status import load_run

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    options = parser.parse_args()
    directory, recipe = load_run(options.run)
    model = recipe.model.model_copy(update={"dtype": options.dtype})
    recipe = recipe.model_copy(update={"model": model})
    renderer, hardware, settings = Renderer(load_tokenizer(model), model.system_prompt), compute(model), settings_of(recipe)
    prompts = [example.prompt() for example in read_rows(directory.folder("pools") / "eval.jsonl", Example)]
    lineages = {label_of(name): lineage_of(directory, recipe, name) for name in recipe.model_names()}

    def answers(journal: Journal) -> dict[tuple[str, str], str]:
        return {
            (label, row.prompt_id): row.text
            for label, lineage in lineages.items()
            for row in respond(label, lineage, prompts, 1, settings, model, renderer, hardware, recipe.seed, journal, label).rows
        }

    with tempfile.TemporaryDirectory() as folder:
        apart, shared = Journal(Path(folder) / "apart.jsonl"), Journal(Path(folder) / "shared.jsonl")
        began = time.perf_counter()
        one_by_one = answers(apart)
        alone = time.perf_counter() - began
        began = time.perf_counter()
        respond_jointly(lineages, prompts, settings, renderer, hardware, recipe.seed, shared)
        together = answers(shared)
        joint = time.perf_counter() - began
    equal = sum(one_by_one[key] == text for key, text in together.items())
    print(f"{hardware.dtype}, {len(lineages)} models, {len(prompts)} prompts, batches of at most {settings.batch_size}")
    print(
        f"one after another {alone:.1f} s, shared batches {joint:.1f} s ({alone / joint:.2f} times as fast), {equal} of {len(together)} texts equal"
    )


if __name__ == "__main__":
    main()
