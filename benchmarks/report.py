"""How long a report takes: 115 prompts and six models, made-up rows, rendered as the report stage does.

    python benchmarks/report.py [--prompts 115] [--repeat 3]

Prints the seconds of each repetition (page, paper, figures, tables, cards) and of the summary before it. The aim is under 20 s on two
cores. Rows come from tests/test_report.py, so that the benchmark shows what the tests test.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def main() -> None:
    """Parse, render, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=115)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    from test_report import make_run

    from suasion.reporting.stage import run_stage

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        stage = make_run(Path(folder), options.prompts)
        print(f"summary of {options.prompts} prompts x 6 models: {time.perf_counter() - start:.1f} s")
        for _ in range(options.repeat):
            start = time.perf_counter()
            run_stage(stage)
            print(f"report: {time.perf_counter() - start:.1f} s")
        size = sum(file.stat().st_size for file in stage.folder.rglob("*") if file.is_file())
        print(f"{size / 1e6:.1f} MB; {platform.processor() or platform.machine()}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
