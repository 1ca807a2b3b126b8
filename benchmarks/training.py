"""Speed of training: DPO and SFT of this package beside TRL's trainers, on the same ids, dtype and machine.

    python benchmarks/training.py --out FOLDER [--corpus CMV] [--model bundled] [--only dpo,sft,cost,profile]
    python benchmarks/training.py --out FOLDER --report

Every measurement is a process of its own (so that peak memory is its own), takes one to a few minutes, and leaves one JSON file in
FOLDER; those that are there are not made again, so that an interrupted benchmark goes on. Lengths come from a corpus, ids are
random: speed depends on lengths alone, and `lengths.json`, which holds no text, can be carried to another machine.

DPO: the reference pass counts on both sides. TRL runs without gradient checkpointing at several batch sizes, the best of which
counts, and once at its defaults. The arithmetic limit is the ratio of multiplications in linear layers and head (PITFALLS of such
ratios: attention and everything else is left out): tokens TRL reads, padding included, over tokens we read.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BUNDLED_CORPUS = "bundled"
TRL_BATCHES = (1, 2, 4, 8)
SFT_PAD = 1024
STEP_PAIRS, STEP_ROWS = 16, 16
COST = {"context": (128, 256, 512, 768), "reply": (64, 128, 256)}
SIZES = {"9M": (256, 6), "40M": (512, 10), "130M": (768, 15)}  # hidden size, layers; 2,000-token vocabulary


def corpus_lengths(corpus: str, base: str) -> dict[str, list[list[int]]]:
    """Token counts, no text: DPO [context, chosen, rejected] of outcome pairs, SFT [context, reply] of examples."""
    from suasion.chat import Renderer
    from suasion.corpora.stage import fitted, labels, token_counter
    from suasion.corpora.stats import Report
    from suasion.models import load_tokenizer
    from suasion.recipe import load_recipe

    recipe = load_recipe(
        Path(__file__).parents[1] / "recipes" / "demo.yaml",
        (f"model.base={base}", "model.max_length=1024", "corpus.context_tokens=512", "corpus.reply_tokens=[20, 256]", "sample.max_new_tokens=256"),
    )  # fmt: skip
    source = recipe.corpus.sources[0].model_copy(update={"path": corpus})
    renderer = Renderer(load_tokenizer(recipe.model), recipe.model.system_prompt)
    found: dict[str, list[list[int]]] = {"dpo": [], "sft": []}
    for examples, pairs in fitted(labels([source])[0], source, recipe, token_counter(recipe), Report()):
        for example in examples:
            if example.reply:
                rendered = renderer.render(example.turns, example.reply)
                found["sft"].append([len(rendered.prompt_ids), len(rendered.reply_ids)])
        for pair in pairs:
            sides = [renderer.render(pair.turns, text) for text in (pair.winner, pair.loser)]
            if max(len(side.reply_ids) for side in sides) <= 257:
                found["dpo"].append([len(sides[0].prompt_ids), *(len(side.reply_ids) for side in sides)])
    return found


def sample(rows: list[list[int]], count: int) -> list[list[int]]:
    """`count` rows, drawn once and for all."""
    order = random.Random(0).sample(range(len(rows)), min(count, len(rows)))
    return [rows[row] for row in order]


def pairs_of(lengths: list[list[int]], vocabulary: int) -> list[Any]:
    """Preferences of random ids with these lengths."""
    from suasion.training.pairs import PairIds

    draw = random.Random(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(10, vocabulary) for _ in range(count))

    return [PairIds(f"p{n:05}", ids(c), ids(a), ids(b), 1.0) for n, (c, a, b) in enumerate(lengths)]


def section_of(model: str, out: Path) -> Any:
    """The model section of a name: bundled, tiny, or a shape with random weights that is written to the output folder."""
    from suasion.sections.training import ModelSection

    if model in ("bundled", "tiny"):
        return ModelSection(base="bundled:smollm2-135m-instruct" if model == "bundled" else "random:tiny")
    folder = out / "models" / model
    if not (folder / "config.json").is_file():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

        from suasion.models import load_tokenizer

        torch.manual_seed(0)
        if model == "qwen-shape":  # Qwen2.5-0.5B
            net: Any = Qwen2ForCausalLM(
                Qwen2Config(
                    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                    num_key_value_heads=2, tie_word_embeddings=True,
                )
            )  # fmt: skip
        else:
            hidden, layers = SIZES[model]
            net = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=2000, hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=layers,
                    num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, tie_word_embeddings=True,
                )
            )  # fmt: skip
        net.save_pretrained(folder)
        load_tokenizer(ModelSection(base="random:tiny")).save_pretrained(folder)
    return ModelSection(base=str(folder))


class Job:
    """What a measurement needs: model, hardware, and a folder that is thrown away."""

    def __init__(self, model: str, out: Path, packed: bool = True):
        """packed: as our trainings get it, attention and rounded frozen layers; else the library's default, which TRL gets."""
        import torch

        from suasion.models import Lineage, compute, load_policy, load_tokenizer
        from suasion.sections.training import LoraSection
        from suasion.training.loop import policy_of

        self.section = section_of(model, out)
        if not packed:
            self.section = self.section.model_copy(update={"attention": "sdpa"})
        self.hardware = compute(self.section)
        self.lora = LoraSection()
        self.tokenizer = load_tokenizer(self.section)
        start = Lineage(self.section)
        if packed:
            self.policy = policy_of(start, self.lora, 0, self.hardware)
        else:
            self.policy = load_policy(start, self.lora, 0, self.hardware.device)
        self.vocabulary = min(len(self.tokenizer), 40000)
        self.folder = Path(tempfile.mkdtemp())
        self.torch = torch

    def timed(self, action: Callable[[], None]) -> float:
        """Seconds that an action takes, queued work included."""
        began = time.perf_counter()
        action()
        if self.hardware.device == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter() - began

    def sizes(self) -> dict[str, int]:
        """Multiplications a token: in the body's linear layers, and in the head."""
        body = sum(
            module.weight.numel()
            for name, module in self.policy.named_modules()
            if isinstance(module, self.torch.nn.Linear) and "lora" not in name and "lm_head" not in name
        )
        return {"body": body, "head": self.policy.get_output_embeddings().weight.numel()}


def run_dpo(name: str, model: str, lengths: list[list[int]], out: Path) -> dict[str, Any]:
    """One DPO epoch with its reference pass. name: suasion, trl-bN, or trl-default."""
    from suasion.sections.training import DpoArm
    from suasion.training.dpo import DpoTrainer, with_reference
    from suasion.training.loop import arguments, train
    from suasion.training.reference import reference_logprobs

    job = Job(model, out, packed=name == "suasion")
    pairs = pairs_of(lengths, job.vocabulary)
    arm = DpoArm(name="b", labels="ai", pool="rlaif", batch_size=STEP_PAIRS, checkpoints=0, learning_rate=1e-6, lora=job.lora)
    parts: dict[str, float] = {}
    if name == "suasion":
        from transformers import TrainingArguments

        known: dict[str, Any] = {}
        parts["reference"] = job.timed(
            lambda: known.update(reference_logprobs(job.policy, pairs, job.hardware, job.folder / "reference.jsonl"))
        )
        rows = [with_reference(pair, known[pair.id], known[pair.id], arm) for pair in pairs]
        args = arguments(TrainingArguments, arm, job.folder, job.hardware, len(rows), 0, "b")
        trainer: Any = DpoTrainer(model=job.policy, arm=arm, hardware=job.hardware, train_dataset=rows, args=args)
        parts["train"] = job.timed(lambda: train(trainer, job.folder, "b") and None)
    else:
        parts.update(_trl_dpo(name, job, pairs, arm))
    return {"seconds": sum(parts.values()), "parts": parts, "pairs": len(pairs), **job.sizes()}


def _trl_dpo(name: str, job: Job, pairs: list[Any], arm: Any) -> dict[str, float]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from suasion.training.loop import arguments

    class OnIds(DPOTrainer):  # its tokenising is not what is measured
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            holder: list[Any] = []
            took["reference"] = job.timed(
                lambda: holder.append(super(OnIds, self)._precompute_ref_logps(dataset, *args, **kwargs))
            )
            return holder[0]

    took: dict[str, float] = {}
    default = name == "trl-default"
    size = 8 if default else int(name.removeprefix("trl-b"))
    args = arguments(
        DPOConfig, arm, job.folder, job.hardware, len(pairs), 0, "b",
        max_length=None, precompute_ref_log_probs=True, activation_checkpointing=default,
    )  # fmt: skip
    args.per_device_train_batch_size, args.gradient_accumulation_steps = size, max(1, STEP_PAIRS // size)
    rows = [{"prompt_ids": list(p.prompt), "chosen_ids": list(p.chosen), "rejected_ids": list(p.rejected)} for p in pairs]
    trainer = OnIds(model=job.policy, args=args, train_dataset=Dataset.from_list(rows), processing_class=job.tokenizer)
    took["train"] = job.timed(lambda: trainer.train() and None)
    return took


def run_sft(name: str, model: str, lengths: list[list[int]], out: Path) -> dict[str, Any]:
    """One SFT epoch. name: suasion, trl-bN (padded to the longest of the batch), or trl-padded (to 1,024, in batches of 4)."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from suasion.sections.training import SftSection
    from suasion.training.loop import arguments, train
    from suasion.training.sft import IGNORED, PackedSftTrainer

    job = Job(model, out, packed=name == "suasion")
    draw = random.Random(2)
    rows = []
    for number, (context, reply) in enumerate(lengths):
        ids = [draw.randrange(10, job.vocabulary) for _ in range(context + reply)]
        rows.append({"id": f"r{number:05}", "input_ids": ids, "labels": [IGNORED] * context + ids[context:]})
    section = SftSection(batch_size=STEP_ROWS, epochs=1, checkpoints=0, learning_rate=1e-6, lora=job.lora)
    args = arguments(
        SFTConfig, section, job.folder, job.hardware, len(rows), 0, "b",
        max_length=None, packing=False, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    data = Dataset.from_list(rows)
    if name == "suasion":
        trainer: Any = PackedSftTrainer(
            model=job.policy,
            section=section,
            hardware=job.hardware,
            args=args,
            train_dataset=data,
            processing_class=job.tokenizer,
        )
        seconds = job.timed(lambda: train(trainer, job.folder, "b") and None)
    else:
        size = 4 if name == "trl-padded" else int(name.removeprefix("trl-b"))
        args.pad_to_multiple_of = SFT_PAD if name == "trl-padded" else None
        args.per_device_train_batch_size, args.gradient_accumulation_steps = size, STEP_ROWS // size
        trainer = SFTTrainer(model=job.policy, args=args, train_dataset=data.remove_columns("id"), processing_class=job.tokenizer)
        seconds = job.timed(lambda: trainer.train() and None)
    return {"seconds": seconds, "rows": len(rows), "mean_length": sum(map(sum, lengths)) / len(lengths), **job.sizes()}


def run_cost(name: str, model: str, lengths: list[list[int]], out: Path) -> dict[str, Any]:
    """Seconds a pair of one kind: context-N, reply-N (the other held at 256 and 128), or size-NAME."""
    kind, _, value = name.partition("-")
    context, reply = (int(value) if kind == "context" else 256), (int(value) if kind == "reply" else 128)
    result = run_dpo("suasion", value if kind == "size" else model, [[context, reply, reply]] * STEP_PAIRS, out)
    return {**result, "context": context, "reply": reply, "seconds_a_pair": result["seconds"] / STEP_PAIRS}


def run_profile(name: str, model: str, lengths: list[list[int]], out: Path) -> dict[str, Any]:
    """Where the time of a step goes, by operator, and the share of the machine's matrix rate that is reached."""
    from torch.profiler import ProfilerActivity, profile

    from suasion.training.pairs import score

    job = Job(model, out)
    torch = job.torch
    pairs = pairs_of(lengths, job.vocabulary)[:4]
    dtype = torch.bfloat16 if job.hardware.dtype == "bfloat16" else torch.float32
    a, b = (torch.randn(2048, 2048, device=job.hardware.device, dtype=dtype) for _ in range(2))
    rate = max(2 * 2048**3 / job.timed(lambda: torch.mm(a, b).sum().item()) for _ in range(8))

    def step() -> None:
        for pair in pairs:
            (-score(job.policy, [pair], job.hardware)[0].sum()).backward()
        job.policy.zero_grad()

    step()
    seconds = min(job.timed(step) for _ in range(3))
    sizes = job.sizes()
    # forward, and the gradient of activations; the frozen weights have none of their own
    work = sum(4 * (pair.tokens * sizes["body"] + (len(pair.chosen) + len(pair.rejected)) * sizes["head"]) for pair in pairs)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if job.hardware.device == "cuda" else [])]
    with profile(activities=activities) as traced:
        step()
    key = "self_device_time_total" if job.hardware.device == "cuda" else "self_cpu_time_total"
    events = sorted(traced.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    return {
        "seconds": seconds, "matrix_rate": rate, "rate_reached": work / seconds, "share_of_rate": work / seconds / rate,
        "operators": {event.key: round(getattr(event, key) / total, 4) for event in events[:12]},
    }  # fmt: skip


RUNNERS: dict[str, Callable[[str, str, list[list[int]], Path], dict[str, Any]]] = {
    "dpo": run_dpo, "sft": run_sft, "cost": run_cost, "profile": run_profile,
}  # fmt: skip


def pieces(only: list[str], rounds: int, batches: tuple[int, ...]) -> list[str]:
    """The measurements in order, as kind/name/round; opponents follow each other, so that a slow hour hits both."""
    names = []
    for number in range(1, rounds + 1):
        if "dpo" in only:
            names += [f"dpo/{name}/{number}" for name in ("suasion", *(f"trl-b{size}" for size in batches), "trl-default")]
        if "sft" in only:
            names += [f"sft/{name}/{number}" for name in ("suasion", "trl-padded", "trl-b1", "trl-b4")]
    if "cost" in only:
        names += [f"cost/{kind}-{value}/1" for kind, values in COST.items() for value in values]
        names += [f"cost/size-{name}/1" for name in SIZES]
    return names + (["profile/step/1"] if "profile" in only else [])


def tokens_read(name: str, lengths: list[list[int]]) -> tuple[int, int]:
    """(tokens the body reads, positions the head scores) in one pass over all pairs. TRL's head scores every position off the GPU."""
    if name == "suasion":
        return sum(map(sum, lengths)), sum(a + b for _, a, b in lengths)
    size = 8 if name == "trl-default" else int(name.removeprefix("trl-b"))
    read = 0
    for start in range(0, len(lengths), size):
        batch = lengths[start : start + size]
        read += 2 * len(batch) * max(c + max(a, b) for c, a, b in batch)
    return read, read


def report(out: Path) -> str:
    """Markdown of all that is there. Exits with a sentence where nothing is."""
    results: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(out.glob("*.result.json")):
        row = json.loads(file.read_text())
        results.setdefault(row["piece"].rpartition("/")[0], []).append(row)
    if not results:
        sys.exit(
            f"{out} holds no finished measurement. Make some without --report; where every one fails, what it said stands above."
        )
    lengths = json.loads((out / "lengths.json").read_text())
    first = next(iter(results.values()))[0]
    lines = [
        f"Machine: {first['machine']}. Model {first['model']}, {first['dtype']}, {first['threads']} threads. Best of {max(map(len, results.values()))} rounds.",
        "",
    ]
    best = {name: min(rows, key=lambda row: row["seconds"]) for name, rows in results.items()}
    if "dpo/suasion" in best:
        ours = best["dpo/suasion"]
        used = lengths["dpo"]
        mine = tokens_read("suasion", used)
        work = mine[0] * ours["body"] + mine[1] * ours["head"]
        lines += [
            f"DPO, {ours['pairs']} pairs (mean context {sum(r[0] for r in used) / len(used):.0f}, replies {sum(r[1] + r[2] for r in used) / 2 / len(used):.0f}), reference pass counted:", "",
            "| | seconds | of which reference | peak memory, MB | times ours | arithmetic limit | share of it |", "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for name, row in best.items():
            if name.startswith("dpo/"):
                read, scored = tokens_read(name.partition("/")[2], used)
                limit = (read * row["body"] + scored * row["head"]) / work
                ratio = row["seconds"] / ours["seconds"]
                lines.append(
                    f"| {name[4:]} | {row['seconds']:.1f} | {row['parts'].get('reference', 0):.1f} | {row['memory_mb']:.0f} | {ratio:.2f} | {limit:.2f} | {ratio / limit:.0%} |"
                )
        lines.append("")
    if "sft/suasion" in best:
        ours = best["sft/suasion"]
        lines += [f"SFT, {ours['rows']} rows of {ours['mean_length']:.0f} tokens on average (1,024 / mean = {SFT_PAD / ours['mean_length']:.2f}):", "", "| | seconds | peak memory, MB | times ours |", "|---|---|---|---|"]  # fmt: skip
        lines += [f"| {name[4:]} | {row['seconds']:.1f} | {row['memory_mb']:.0f} | {row['seconds'] / ours['seconds']:.2f} |" for name, row in best.items() if name.startswith("sft/")]  # fmt: skip
        lines.append("")
    cost = {name[5:]: row for name, row in best.items() if name.startswith("cost/")}
    if cost:
        lines += ["Cost of DPO (context 256 and replies 128 where not said otherwise):", "", "| | seconds a pair |", "|---|---|"]
        lines += [f"| {name} | {row['seconds_a_pair']:.2f} |" for name, row in cost.items()] + [""]
    if "profile/step" in best:
        row = best["profile/step"]
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row["operators"].items() if share >= 0.01)
        lines += [f"A step reaches {row['rate_reached'] / 1e9:.0f} of {row['matrix_rate'] / 1e9:.0f} GFLOP/s ({row['share_of_rate']:.0%}). By operator: {shares}.", ""]  # fmt: skip
    return "\n".join(lines)


def child(piece: str, model: str, out: Path) -> None:
    """Make one measurement and write it, by rename."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import torch

    from suasion.memory import peak_memory_mb

    kind, name, _ = piece.split("/")
    lengths = json.loads((out / "lengths.json").read_text())
    result = RUNNERS[kind](name, model, lengths["sft" if kind == "sft" else "dpo"], out)
    from suasion.models import compute

    hardware = compute(section_of(model, out))
    device = torch.cuda.get_device_name() if hardware.device == "cuda" else platform.processor() or platform.machine()
    row = {
        "piece": piece,
        "model": model,
        "machine": f"{device}, {os.cpu_count()} cores",
        **hardware.as_dict(),
        "memory_mb": peak_memory_mb(hardware.device),
        **result,
    }
    file = out / (piece.replace("/", "-") + ".result.json")
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(row, indent=1))
    temporary.replace(file)


def check_settings(out: Path, **own: Any) -> None:
    """Measurements of other settings must not be mixed: the folder remembers its own."""
    path = out / "settings.json"
    if path.is_file() and json.loads(path.read_text()) != own:
        sys.exit(f"{out} holds measurements with other settings ({path.read_text().strip()}). Give another --out.")
    path.write_text(json.dumps(own) + "\n")


def main() -> None:
    """Parse, make what is missing, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--corpus", default=BUNDLED_CORPUS, help="ConvoKit folder of ChangeMyView; default: the bundled miniature"
    )
    parser.add_argument("--model", default="bundled", choices=["bundled", "tiny", "qwen-shape"])
    parser.add_argument("--only", default="dpo,sft,cost,profile")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batches", default=",".join(map(str, TRL_BATCHES)), help="TRL's batch sizes")
    parser.add_argument("--report", action="store_true", help="print what is there and measure nothing")
    parser.add_argument("--child")
    given = parser.parse_args()
    if not given.report:
        given.out.mkdir(parents=True, exist_ok=True)
    if given.child:
        child(given.child, given.model, given.out)
        return
    if not given.report:
        check_settings(given.out, model=given.model, corpus=Path(given.corpus).name, pairs=given.pairs, rows=given.rows)
        file = given.out / "lengths.json"
        if not file.is_file():
            base = "random:tiny" if given.model == "tiny" else "bundled:smollm2-135m-instruct"
            corpus = given.corpus if given.corpus == BUNDLED_CORPUS else str(Path(given.corpus).resolve())
            lengths = corpus_lengths(corpus, base)
            file.write_text(json.dumps({"dpo": sample(lengths["dpo"], given.pairs), "sft": sample(lengths["sft"], given.rows)}))
        for piece in pieces(given.only.split(","), given.rounds, tuple(map(int, given.batches.split(",")))):
            if (given.out / (piece.replace("/", "-") + ".result.json")).is_file():
                continue
            print(piece, flush=True)
            command = [sys.executable, __file__, "--out", str(given.out), "--model", given.model, "--child", piece]
            if subprocess.run(command, check=False).returncode:
                print(f"{piece} failed; the others go on", file=sys.stderr)
    print(report(given.out))


if __name__ == "__main__":
    main()
