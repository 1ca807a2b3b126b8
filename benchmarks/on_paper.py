"""Plans past one machine, on paper: 7B with QLoRA on one A10G, 70B on eight GPUs, ten million ChangeMyView comments.

    python benchmarks/on_paper.py

Prints the tables of docs/scale.md's planning chapter. Rates are `suasion.prediction`'s (peak of the machine times an assumed share of it), the
models' sizes those of their published configs, the corpus's sizes those of ChangeMyView as measured (docs/data.md).
"""

from __future__ import annotations

from suasion.machines import load_machines
from suasion.planning import Lengths
from suasion.prediction import FOUR_BITS, GIB, Shape, Shares, flops_a_token, four_bit_bytes, rates_of
from suasion.progress import duration

# (parameters, layers, width, inner width, vocabulary, key and value numbers a layer): config.json of each model on the hub
SHAPES = {
    "Qwen2.5-0.5B": Shape(494_032_768, 24, 896, 4864, 151_936, 2 * 2 * 64),
    "Qwen2.5-7B": Shape(7_615_616_512, 28, 3584, 18_944, 152_064, 2 * 4 * 128, tables=2),
    "Llama-3.1-70B": Shape(70_553_706_496, 80, 8192, 28_672, 128_256, 2 * 8 * 128, tables=2),
}
LENGTHS = Lengths(context=520.0, reply=175.0)  # ChangeMyView: 695 tokens a row
FULL = {"sft": 9_400 * 3, "pairs": 2_150 + 3 * 200 * 3, "responses": 2 * 2_350 + 115 * 6}  # rows seen in the full-size recipe
QLORA_SHARE = 0.6  # of the speed of bf16 weights; de-quantising each matrix for every pass costs the rest. Assumed.
SECONDS_A_READ_ROW = (
    8e-6  # the reader alone: a third of the 24 us an utterance measured before (commit 9acfcc5); stages: benchmarks/corpus.py
)
EXAMPLES_A_ROW = 790 / 5_431  # ChangeMyView subset, docs/data.md


def memory(shape: Shape, weight: float, rows: int, longest: int, gpus: int) -> float:
    """GiB on one GPU while training adapters with recomputed activations: weights (of several GPUs a share), one row of the
    width a layer and token, one layer's activations whole."""
    kept = rows * longest * shape.layers * shape.width * 2
    one_layer = rows * longest * (12 * shape.width + 4 * shape.inner) * 2
    adapters = 16 * shape.layers * 4 * 8 * 2 * shape.width
    gathered = 2 * weight * shape.parameters / shape.layers if gpus > 1 else 0.0  # the layer at work and the next, whole
    head = min(rows * longest, 2_048) * shape.vocabulary * 4 * 2  # scored in pieces
    return (weight * shape.parameters / gpus + gathered + kept + one_layer + adapters + head) / GIB


def training(shape: Shape, machine: str, share: float = 1.0, gpus: int = 1) -> tuple[float, float, float]:
    """Seconds of SFT, of the DPO arms, and of sampling and evaluation, at the full-size recipe's row counts."""
    table = load_machines()
    shares = Shares()
    rates = rates_of(shape, LENGTHS, 32, table.machines[machine], shares)
    row, pair = LENGTHS.context + LENGTHS.reply, LENGTHS.context + 2 * LENGTHS.reply
    sft = FULL["sft"] * row / (rates.train * share * gpus)
    dpo = FULL["pairs"] * pair * (1 / rates.train + 1 / rates.prefill) / (share * gpus)
    gpu = table.machines[machine].gpu
    # a server holds bf16 weights (or 4 bits where only they fit), split over its GPUs, and writes for 64 responses at once
    weight = 2.0 if 2 * shape.parameters < gpus * gpu.gib * GIB * 0.8 else FOUR_BITS
    cache = (LENGTHS.context + LENGTHS.reply / 2) * shape.layers * shape.cache_width * 2
    step = (weight * shape.parameters + 64 * cache) / (gpus * gpu.gbps * 1e9 * shares.decode)
    read = (
        FULL["responses"]
        * LENGTHS.context
        * flops_a_token(shape, LENGTHS.context / 2, trained=False)
        / (gpus * gpu.tflops * 1e12 * shares.prefill)
    )
    return sft, dpo, FULL["responses"] * LENGTHS.reply * step / 64 + read


def main() -> None:
    """Print the tables."""
    print("| model | machine | SFT | arms | sampling, evaluation | GiB a GPU of | how |")
    print("|---|---|---|---|---|---|---|")
    for name, machine, share, gpus, weight, rows, how in (  # weight: bytes of one; None: 4 bits
        ("Qwen2.5-0.5B", "g5.xlarge", 1.0, 1, 4.0, 8, "LoRA, fp32 weights"),
        ("Qwen2.5-7B", "g5.xlarge", QLORA_SHARE, 1, None, 1, "QLoRA"),
        ("Qwen2.5-7B", "p5.4xlarge", 1.0, 1, 4.0, 2, "LoRA, fp32 weights"),
        ("Llama-3.1-70B", "p5.48xlarge", 1.0, 8, 4.0, 1, "LoRA, FSDP2, fp32 weights sharded"),
        ("Llama-3.1-70B", "p5.48xlarge", QLORA_SHARE, 8, None, 4, "QLoRA, FSDP2"),
    ):
        shape = SHAPES[name]
        gpu = load_machines().machines[machine].gpu
        sft, dpo, sampling = training(shape, machine, share, gpus)
        weight = weight or four_bit_bytes(shape) / shape.parameters
        needed = memory(shape, weight, rows, 1024, gpus)
        print(
            f"| {name} | {machine} | {duration(sft)} | {duration(dpo)} | {duration(sampling)} | {needed:.1f} of {gpu.gib:g} | {how} |"
        )
    comments = 10_000_000
    print()
    print(f"ten million comments: the reader alone {duration(comments * SECONDS_A_READ_ROW)} on one CPU core;")
    for machine, gpus in (("g5.xlarge", 1), ("p5.48xlarge", 8)):
        rates = rates_of(SHAPES["Qwen2.5-0.5B"], LENGTHS, 64, load_machines().machines[machine], Shares())
        kept = EXAMPLES_A_ROW * comments
        print(
            f"SFT of 0.5B on {kept:,.0f} examples, one epoch, {machine}: {duration(kept * (LENGTHS.context + LENGTHS.reply) / rates.train / gpus)}"
        )


if __name__ == "__main__":
    main()
