"""x Wᵀ against W xᵀ in fp32, for all linear layers of the bundled model and as many rows as responses are written at once.

    python benchmarks/few_rows.py [--rows 2 4 8 ...] [--rounds 5]

Both products read the same weights; which one MKL is faster at depends on the processor. Prints GFLOP/s, the median of the rounds, the two forms
measured in turn. `suasion/few_rows.py` uses the second form for up to MOST_ROWS rows, copy of the turned result included, as here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from suasion.few_rows import MOST_ROWS, FewRowsLinear

LAYER = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
LAYERS, HEAD = 30, (49152, 576)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4, 8, 16, 24, 32, 48, 72, 96])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if max(options.rows) > MOST_ROWS:
        parser.error(f"FewRowsLinear goes to {MOST_ROWS} rows")
    layers = [torch.nn.Linear(width, out, bias=False) for out, width in [*LAYER * LAYERS, HEAD]]
    few = [FewRowsLinear(layer) for layer in layers]
    operations = sum(2 * layer.weight.numel() for layer in layers) / 1e9
    print(f"{torch.get_num_threads()} threads, MKL: {torch.backends.mkl.is_available()}")
    print(f"{'rows':>5} {'x Wᵀ':>8} {'W xᵀ':>8}")
    for rows in options.rows:
        inputs = {width: torch.randn(rows, 1, width) for width in (576, 1536)}
        ways: list[Callable[[], None]] = [
            lambda inputs=inputs: [F.linear(inputs[layer.in_features], layer.weight) for layer in layers],  # type: ignore[misc]
            lambda inputs=inputs: [layer(inputs[layer.in_features]) for layer in few],  # type: ignore[misc]
        ]
        seconds: list[list[float]] = [[], []]
        with torch.no_grad():
            for _ in range(options.rounds):
                for way, taken in zip(ways, seconds, strict=True):
                    began = time.perf_counter()
                    way()
                    taken.append(time.perf_counter() - began)
        first, second = (rows * operations / statistics.median(taken) for taken in seconds)
        print(f"{rows:>5} {first:>8.0f} {second:>8.0f}", flush=True)


if __name__ == "__main__":
    main()
