"""Prediction beside reality: the full-size recipe's lengths and batch on models of random weights, on the GPU at hand.

    python benchmarks/prediction.py --machine p5.4xlarge [--models Qwen2.5-0.5B,Qwen2.5-7B] [--seconds 20] [--set KEY=VALUE]

`--machine` names this machine's kind in machines.yaml, or with `--machines FILE` in a table of your own. Speed and memory depend on shapes alone, so
that no weights are fetched. Prints a table of tokens a second and of peak GPU memory: what `suasion plan --on` says with its assumed shares,
what `suasion plan` measures here, and their ratio. Needs a CUDA GPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from on_paper import SHAPES

from suasion.machines import TABLE, Machine, load_machines
from suasion.models import load_tokenizer
from suasion.planning import Lengths, Rates, measure
from suasion.prediction import GIB, Shape, Shares, gpu_memory, rates_of
from suasion.recipe import Recipe, load_recipe
from suasion.sections.training import ModelSection

RECIPE = Path(__file__).parents[1] / "recipes" / "persuasion-rl.yaml"
LENGTHS = Lengths(context=704.0, reply=64.0)  # what `measure` reads and writes with the full-size recipe
HEADER = "| model | machine | what | predicted | measured | measured / predicted |\n|---|---|---|---|---|---|"


def make_model(shape: Shape, folder: Path) -> None:
    """A model of this shape in Qwen2's architecture, of random weights, with a tokenizer of 2,000 tokens."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    head = 128 if shape.width > 1024 else min(64, shape.cache_width // 2)  # Qwen2.5: 64 in 0.5B, 128 in 7B
    config = Qwen2Config(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // head, num_key_value_heads=shape.cache_width // (2 * head), tie_word_embeddings=shape.tables == 1,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder, safe_serialization=True)
    load_tokenizer(ModelSection(base="random:tiny")).save_pretrained(folder)


def measured(shape: Shape, seconds: float, options: Sequence[str] = ()) -> tuple[Recipe, Rates]:
    """The recipe on a model of this shape, and what this machine does with it."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(shape, Path(folder))
        recipe = load_recipe(RECIPE, (f"model.base={folder}", *options))
        return recipe, measure(recipe, seconds)


def rows(name: str, machine_name: str, machine: Machine, shape: Shape, recipe: Recipe, found: Rates) -> list[str]:
    """Lines of the table. Memory is the greatest of the trainings, and that of a batch of responses."""
    told = rates_of(shape, LENGTHS, recipe.sample.batch_size, machine, Shares())
    memory = gpu_memory(recipe, shape, 1)
    trained = max(needed for stage, needed in memory.items() if stage == "sft" or stage.startswith("dpo-"))
    lines = [
        (f"{what}, tokens/s", predicted, real)
        for what, predicted, real in (
            ("reading", told.prefill, found.prefill),
            ("training", told.train, found.train),
            ("writing", told.decode, found.decode),
        )
    ]
    for what, bytes_, real in (("training", trained, found.train_bytes), ("writing", memory["sample"], found.write_bytes)):
        assert real is not None
        lines.append((f"{what}, GiB", bytes_ / GIB, real / GIB))
    return [
        f"| {name} | {machine_name} | {what} | {predicted:.4g} | {real:.4g} | {real / predicted:.2f} |"
        for what, predicted, real in lines
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True)
    parser.add_argument("--machines", type=Path, default=TABLE)
    parser.add_argument("--models", default="Qwen2.5-0.5B")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--set", action="append", default=[])
    given: Any = parser.parse_args(argv)
    table = load_machines(given.machines)
    names = given.models.split(",")
    for name, known in ((given.machine, table.machines), *((name, SHAPES) for name in names)):
        if name not in known:
            print(f"{name} is none of {', '.join(known)}.", file=sys.stderr)
            return 2
    if not torch.cuda.is_available():
        print("torch sees no CUDA GPU: a CPU beside a GPU's prediction says nothing.", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n{HEADER}")
    for name in names:
        recipe, found = measured(SHAPES[name], given.seconds, given.set)
        print("\n".join(rows(name, given.machine, table.machines[given.machine], SHAPES[name], recipe, found)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
