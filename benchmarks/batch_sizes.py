"""How many responses depend on how many are decoded together: those of a run's SFT model, drawn at several batch sizes.

    python benchmarks/batch_sizes.py runs/cmv-cpu --out results            # 100 prompts x 2, fp32, batches of 8 and of 32
    python benchmarks/batch_sizes.py runs/cmv-cpu --out results --dtype bfloat16

Every response owns its random numbers, so that only floating-point sums can make a difference: to be shown is that in fp32 at most 1
response in 200 differs. Prompts are those of the run's pools but evaluation's, which is sealed, the shortest first; the settings are its
recipe's, but nothing is drawn again. Interrupted, the same command goes on after the last whole batch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from suasion.records import Example, Prompt, Response, read_rows


def main() -> int:
    """Draw what is missing and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run with finished pools and SFT")
    parser.add_argument("--out", type=Path, required=True, help="folder for the responses; an earlier one is gone on with")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32], help="responses decoded together")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    said = {size: draw(options, size) for size in options.sizes}
    print("| type | batches of | responses | tokens | that differ | 1 in |", "|" + "---|" * 6, sep="\n")
    for one, other in combinations(options.sizes, 2):
        print(row(options.dtype, one, other, said[one], said[other]))
    return 0


def draw(options: argparse.Namespace, size: int) -> list[Response]:
    """Two responses to every prompt in batches of this size."""
    from suasion.chat import Renderer
    from suasion.models import Lineage, compute, load_tokenizer
    from suasion.sampling.respond import Journal, respond
    from suasion.status import load_run

    directory, recipe = load_run(options.run)
    pools = directory.folder("pools")
    asked = [prompt for pool in ("rlaif", "rlhf") for prompt in read_rows(pools / f"{pool}.jsonl", Prompt)]
    asked += [example.prompt() for example in read_rows(pools / "sft.jsonl", Example)]
    distinct = {prompt.id: prompt for prompt in asked}.values()
    chosen = sorted(distinct, key=lambda prompt: (sum(len(turn.text) for turn in prompt.turns), prompt.id))[: options.prompts]
    if len(chosen) < options.prompts:
        sys.exit(f"{options.run} has {len(chosen)} different prompts, {options.prompts} are asked for.")
    model = recipe.model.model_copy(update={"dtype": options.dtype})
    settings = recipe.sample.model_copy(
        update={"batch_size": size, "resample": 0, "max_new_tokens": min(options.new_tokens, recipe.sample.max_new_tokens)}
    )
    renderer = Renderer(load_tokenizer(model), model.system_prompt)
    journal = Journal(options.out / f"{options.dtype}-{settings.max_new_tokens}-{size}.jsonl")
    lineage = Lineage(model, (directory.folder("sft") / "adapter",))
    return respond(
        "sft", lineage, chosen, 2, settings, model, renderer, compute(model), recipe.seed, journal, f"batches of {size}"
    ).rows


def row(dtype: str, one: int, other: int, ours: Sequence[Response], theirs: Sequence[Response]) -> str:
    """One row of the table. Raises ValueError where the responses are not to the same prompts in the same order."""
    pairs = list(zip(ours, theirs, strict=True))
    if any((a.prompt_id, a.n, a.seed) != (b.prompt_id, b.n, b.seed) for a, b in pairs):
        raise ValueError("these are not the same draws")
    differ = sum(a.tokens != b.tokens for a, b in pairs)
    tokens = sum(len(a.tokens or ()) for a in ours)
    often = f"{len(pairs) / differ:.0f}" if differ else f"none in {len(pairs)}"
    return f"| {dtype} | {one}, {other} | {len(pairs)} | {tokens:,} | {differ} | {often} |"


if __name__ == "__main__":
    sys.exit(main())
