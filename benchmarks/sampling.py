"""How fast responses are drawn: our local engine beside the library's `generate`, and the limit that the machine sets.

    python benchmarks/sampling.py --out results                         # 64 real prompts x 2 responses, bundled model, 2 threads
    python benchmarks/sampling.py --out quick --prompts 8 --new-tokens 8    # a quick look at all of it
    python benchmarks/sampling.py --out gpu --model random-0.5b --device cuda --prompts 2350 --sides static-16 ours ours-continuous continuous

Interrupted, the same command goes on where it was: each batch is written to OUT as it is done. Two claims are measured with it: our engine is
at least 4 times as fast as one prompt at a time, and at least 1.3 times as fast as plain static batches of 16 in prompt order.

Sides, each in a process of its own, one after the other, with the same prompts, type, threads, sampling settings and stop token:

    one         `generate`, one prompt at a time, its two responses as a batch of two
    static-16   `generate`, batches of 16 responses (8 prompts x 2), left-padded, in prompt order
    static      the same with as many responses as ours decodes together: what is left is our engine, not the batch size
    ours        the engine of stage `sample` at the recipe's default batch size
    continuous  the library's continuous batching (`generate_batch`); for GPUs, where it is at home
    ours-continuous  the same with our random numbers and types (`sample.engine.kind: continuous`), with as many places as ours has rows

Prompts come from a folder with the Winning Arguments corpus in ConvoKit's format, cut and cleaned as stage `corpus` does, one of each
conversation, in the order of their ids; their token ids stand in the user's cache folder, and OUT holds lengths and times only. A response
is drawn, so that sides say different things: they are compared by response tokens a second. With bf16 the library's sides get the model in
bf16, which is how it is used; ours computes under autocast, as training does. random-0.5b has the shape of Qwen2.5-0.5B and random weights;
its prompts are random and all of one length, and so are its responses.

The limit: no step can be faster than its arithmetic at the machine's matrix rate, nor than reading weights and cache once at its memory
bandwidth. Both rates are measured here; the limit is summed over the very batches and lengths that our engine decoded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SIDES = ("one", "static-16", "static", "ours")
FOR_GPUS = ("ours-continuous", "continuous")
CORPUS = Path(__file__).parents[2] / "shared" / "data" / "winning-args-corpus"


def main() -> int:
    """Measure what is missing and print the tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the measurements; an earlier one is gone on with")
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="folder with the Winning Arguments corpus")
    parser.add_argument("--model", choices=["bundled", "random-0.5b", "tiny"], default="bundled")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--context", type=int, default=512, help="longest prompt in tokens; the length of all for a random model")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32, help="responses that ours and `static` decode together")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=[*SIDES, *FOR_GPUS], default=SIDES)
    parser.add_argument("--child", choices=[*SIDES, *FOR_GPUS, "prompts", "limit"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        CHILDREN[options.child](options)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    check_settings(options)
    for part in ("prompts", *options.sides, *(["limit"] if "ours" in options.sides else [])):
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
        print(f"{part} ...", file=sys.stderr)
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--child", part], env=environment, check=True)
    print(*tables(options), sep="\n\n")
    return 0


def check_settings(options: argparse.Namespace) -> None:
    """Measurements of other settings must not be mixed: the folder remembers its own."""
    own = {key: str(value) for key, value in vars(options).items() if key not in ("out", "sides", "child", "corpus")}
    path = options.out / "settings.json"
    if path.is_file() and json.loads(path.read_text()) != own:
        sys.exit(f"{options.out} holds measurements with other settings ({path.read_text().strip()}). Give another --out.")
    path.write_text(json.dumps(own) + "\n")


# ---- what is decoded ---------------------------------------------------------------------------------------------------------------


def prompts_path(options: argparse.Namespace) -> Path:
    """Where the prompts' token ids stand: in the cache, because they are corpus text."""
    from suasion.rundir import cache_dir

    key = hashlib.sha256(f"{options.corpus.resolve()} {options.model} {options.prompts} {options.context}".encode()).hexdigest()[
        :12
    ]
    return cache_dir() / "benchmarks" / f"sampling-{key}.json"


def make_prompts(options: argparse.Namespace) -> None:
    """Cut, clean and tokenise the prompts once."""
    path = prompts_path(options)
    if path.is_file():
        return
    if options.model != "bundled":
        import numpy as np

        vocabulary = 1900 if options.model == "tiny" else 150_000
        ids = np.random.default_rng(0).integers(10, vocabulary, size=(options.prompts, options.context)).tolist()
    else:
        ids = real_prompts(options)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(ids))
    temporary.replace(path)


def real_prompts(options: argparse.Namespace) -> list[tuple[int, ...]]:
    """Prompts as stage `corpus` makes them, one a conversation, by id."""
    from suasion.chat import Renderer
    from suasion.corpora import stage as corpus
    from suasion.corpora.stats import Report
    from suasion.models import load_tokenizer
    from suasion.recipe import Recipe

    recipe = Recipe.model_validate(
        {
            "name": "benchmark",
            "model": {"max_length": options.context + 1024},
            "corpus": {"sources": [{"kind": "cmv", "path": str(options.corpus)}], "context_tokens": options.context},
            "ai_labels": {"grader": {"kind": "embedding", "train": {"kind": "grader_pairs"}}},
            "human_labels": {"source": {"kind": "simulated"}},
            "dpo": [{"name": "rlaif", "labels": "ai", "pool": "rlaif"}],
            "evaluate": {"grader": {"kind": "ngram", "train": {"kind": "judge_pairs"}}},
        }
    )
    renderer = Renderer(load_tokenizer(recipe.model), recipe.model.system_prompt)
    first: dict[str, Any] = {}
    for examples, _ in corpus.fitted("cmv", recipe.corpus.sources[0], recipe, corpus.token_counter(recipe), Report()):
        for example in examples:
            prompt = example.prompt()
            ids = renderer.render(prompt.turns).ids
            if len(ids) <= options.context:
                first[prompt.conversation_id] = min(first.get(prompt.conversation_id, (prompt.id, ids)), (prompt.id, ids))
    chosen = [ids for _, ids in sorted(first.values())[: options.prompts]]
    if len(chosen) < options.prompts:
        sys.exit(
            f"{options.corpus} gives {len(chosen)} prompts of at most {options.context} tokens, {options.prompts} are asked for."
        )
    return chosen


def load(options: argparse.Namespace, library: bool) -> tuple[Any, Any, int, int]:
    """(model, hardware, stop token, padding token). library: the whole model in the type, as `generate` is used."""
    import torch

    from suasion.bases import BUNDLED, TINY
    from suasion.chat import Renderer
    from suasion.models import Lineage, compute, load_merged, load_tokenizer
    from suasion.sections.training import ModelSection

    torch.set_num_threads(options.threads)
    section = ModelSection(base=TINY if options.model == "tiny" else BUNDLED, device=options.device, dtype=options.dtype)
    hardware = compute(section)
    if options.model == "random-0.5b":
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        shape = {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        }
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=151_936, tie_word_embeddings=True, **shape)).to(hardware.device).eval()
        stop, pad = -1, 0  # no stop token: fixed lengths
    else:
        tokenizer = load_tokenizer(section)
        stop, pad = Renderer(tokenizer, section.system_prompt).stop_id, tokenizer.pad_token_id
        model = load_merged(Lineage(section), hardware.device)
        stop = -1 if options.model == "tiny" else stop
    if library and hardware.dtype == "bfloat16":
        model = model.to(torch.bfloat16)
    return model, hardware, stop, pad


# ---- measuring, each side in a process of its own ----------------------------------------------------------------------------------


def measured(options: argparse.Namespace, side: str) -> list[dict[str, Any]]:
    """The batches of a side that are on disk; a torn last line is dropped."""
    path = options.out / f"{side}.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def run_batches(
    options: argparse.Namespace, side: str, batches: Sequence[Any], work: Callable[[Any], list[tuple[int, int]]], warm_up: Any
) -> None:
    """Time what is missing. work: a batch -> (prompt tokens, response tokens) of each response."""
    done = measured(options, side)
    (options.out / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in done))
    if len(done) == len(batches):
        return
    work(warm_up)
    with (options.out / f"{side}.jsonl").open("a") as output:
        for number, batch in enumerate(batches[len(done) :], len(done)):
            began, cpu = time.perf_counter(), time.process_time()
            rows = work(batch)
            row = {
                "seconds": time.perf_counter() - began,
                "cpu": time.process_time() - cpu,
                "rows": rows,
                "peak_mb": peak_mb(options),
            }
            output.write(json.dumps(row) + "\n")
            output.flush()
            print(f"  {side} {number + 1}/{len(batches)}: {row['seconds']:.1f} s", file=sys.stderr)


def peak_mb(options: argparse.Namespace) -> float:
    """Most memory that this process ever held: the GPU's where there is one, else the resident set."""
    if options.device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def generation_config(options: argparse.Namespace, stop: int, pad: int, **more: Any) -> Any:
    """Recipe defaults as the library's own settings, none of the model's."""
    from transformers import GenerationConfig

    from suasion.sections.sampling import SampleSection

    defaults = SampleSection()
    return GenerationConfig(
        do_sample=True, temperature=defaults.temperature, top_p=defaults.top_p, top_k=0, max_new_tokens=options.new_tokens,
        eos_token_id=None if stop < 0 else stop, pad_token_id=pad, num_return_sequences=2, **more,
    )  # fmt: skip


def run_library(options: argparse.Namespace, side: str) -> None:
    """`generate` in batches of so many prompts, in prompt order, two responses each."""
    import torch

    model, _, stop, pad = load(options, library=True)
    prompts = json.loads(prompts_path(options).read_text())
    each = {"one": 1, "static-16": 8, "static": options.batch_size // 2}[side]
    config = generation_config(options, stop, pad)
    torch.manual_seed(0)

    def work(batch: list[list[int]]) -> list[tuple[int, int]]:
        longest = max(map(len, batch))
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in batch], device=options.device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch], device=options.device)
        said = model.generate(ids, attention_mask=mask, generation_config=config)[:, longest:].tolist()
        return [
            (len(batch[row // 2]), tokens.index(stop) + 1 if stop in tokens else len(tokens)) for row, tokens in enumerate(said)
        ]

    batches = [prompts[start : start + each] for start in range(0, len(prompts), each)]
    run_batches(options, side, batches, work, [prompts[0][:16]])


def our_side(options: argparse.Namespace) -> tuple[Any, Any, int, int, Any, list[Any]]:
    """(model as it samples, hardware, stop token, padding token, settings, two draws of every prompt)."""
    from suasion.models import prepare_to_decode
    from suasion.sampling.draws import Draw
    from suasion.sections.sampling import SampleSection

    model, hardware, stop, pad = load(options, library=False)
    prompts = json.loads(prompts_path(options).read_text())
    settings = SampleSection(max_new_tokens=options.new_tokens, batch_size=options.batch_size)
    draws = [Draw(f"{number:05d}", tuple(ids), n) for number, ids in enumerate(prompts) for n in (0, 1)]
    return prepare_to_decode(model, hardware), hardware, stop, pad, settings, draws


def warm_up(draws: list[Any]) -> list[Any]:
    """One short draw."""
    from suasion.sampling.draws import Draw

    return [Draw("w", draws[0].prompt[:16], 0)]


def tokens_of(drawn: list[Any]) -> list[tuple[int, int]]:
    """(tokens of the prompt, tokens of the response) of each."""
    return [(len(one.draw.prompt), len(one.tokens or ())) for one in drawn]


def run_ours(options: argparse.Namespace) -> None:
    """Our engine, batch by batch as it plans them."""
    from suasion.sampling.local import decode, plan_batches

    model, hardware, stop, pad, settings, draws = our_side(options)

    def work(batch: list[Any]) -> list[tuple[int, int]]:
        return tokens_of(decode(model, batch, settings, 0, stop, pad, hardware))

    run_batches(options, "ours", plan_batches(draws, options.batch_size), work, warm_up(draws))


def run_our_continuous(options: argparse.Namespace) -> None:
    """Our engine with free places taken again, queue by queue as it plans them."""
    from suasion.sampling.continuous import decode
    from suasion.sampling.local import QUEUE, plan_batches

    model, hardware, stop, _, settings, draws = our_side(options)

    def work(queue: list[Any]) -> list[tuple[int, int]]:
        return tokens_of(decode(model, queue, settings, 0, stop, hardware, min(options.batch_size, len(queue))))

    queues = plan_batches(draws, QUEUE * options.batch_size)
    run_batches(options, "ours-continuous", queues, work, warm_up(draws))


def run_continuous(options: argparse.Namespace) -> None:
    """The library's continuous batching over everything at once."""
    model, _, stop, pad = load(options, library=True)
    prompts = json.loads(prompts_path(options).read_text())
    # Here the library wants a number where there is no stop token.
    config = generation_config(options, stop, pad)
    config.eos_token_id = stop

    def work(batch: list[list[int]]) -> list[tuple[int, int]]:
        results = list(model.generate_batch(inputs=batch, generation_config=config, progress_bar=False).values())
        if len(results) != 2 * len(batch) or any(result.error for result in results):
            sys.exit(
                f"continuous batching gave {len(results)} of {2 * len(batch)} responses: {[r.error for r in results if r.error][:1]}"
            )
        return [(len(result.prompt_ids), len(result.generated_tokens)) for result in results]

    run_batches(options, "continuous", [prompts], work, [prompts[0][:16]])


def measure_limit(options: argparse.Namespace) -> None:
    """The machine's rates in this type, and the least time in which the batches of `ours` could have been decoded."""
    import torch

    model, hardware, _, _ = load(options, library=False)
    config = model.config
    dtype = torch.bfloat16 if hardware.dtype == "bfloat16" else torch.float32
    wide = torch.randn(512, config.hidden_size, dtype=dtype, device=options.device)
    weight = torch.randn(config.intermediate_size, config.hidden_size, dtype=dtype, device=options.device)
    flops = 2 * 512 * weight.numel() / best(lambda: torch.nn.functional.linear(wide, weight), options)
    large = torch.ones(2**27, device=options.device)
    bandwidth = large.numel() * 4 / best(lambda: large.sum(), options)

    size = 2 if dtype == torch.bfloat16 else 4
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head = config.vocab_size * config.hidden_size
    layers = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear)) - head
    position_bytes = 2 * config.num_key_value_heads * width * config.num_hidden_layers * size
    pair = 4 * config.num_attention_heads * width * config.num_hidden_layers  # FLOPs where one position attends to another
    seconds = {"reading prompts": 0.0, "writing responses": 0.0}
    for batch in measured(options, "ours"):
        for length in [row[0] for row in batch["rows"]][::2]:  # both responses of a prompt stand side by side
            seconds["reading prompts"] += (2 * layers * length + pair * length * (length + 1) / 2) / flops
        for step in range(1, max(row[1] for row in batch["rows"])):
            cached = [length + step for length, tokens in batch["rows"] if tokens > step]
            arithmetic = (2 * (layers + head) * len(cached) + pair * sum(cached)) / flops
            traffic = ((layers + head) * size + position_bytes * sum(cached)) / bandwidth
            seconds["writing responses"] += max(arithmetic, traffic)
    found = {"gflops": flops / 1e9, "gb_a_second": bandwidth / 1e9, "dtype": hardware.dtype, "seconds": seconds}
    (options.out / "limit.json").write_text(json.dumps(found) + "\n")


def best(work: Callable[[], Any], options: argparse.Namespace, times: int = 30) -> float:
    """The shortest of several runs, in seconds: a rate that the machine can reach."""
    import torch

    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        if options.device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found)


# ---- showing -----------------------------------------------------------------------------------------------------------------------


def tables(options: argparse.Namespace) -> list[str]:
    """Machine, sides and limit as Markdown."""
    lines = [
        "| side | seconds | CPU seconds | response tokens | tokens/s | at the limit | peak MB | ours is faster by |",
        "|" + "---|" * 8,
    ]
    rates, notes = {}, []
    for side in (*SIDES, *FOR_GPUS):
        batches = measured(options, side)
        if not batches:
            continue
        rows = [row for batch in batches for row in batch["rows"]]
        seconds, tokens = sum(batch["seconds"] for batch in batches), sum(row[1] for row in rows)
        rates[side] = tokens / seconds
        at_limit = sum(row[1] == options.new_tokens for row in rows) / len(rows)
        lines.append(
            f"| {side} | {seconds:.1f} | {sum(batch['cpu'] for batch in batches):.1f} | {tokens:,} | {rates[side]:.1f} | {at_limit:.0%} "
            f"| {max(batch['peak_mb'] for batch in batches):,.0f} | %{side}% |"
        )
    table = "\n".join(lines)
    for side, rate in rates.items():
        table = table.replace(f"%{side}%", f"{rates['ours'] / rate:.2f}" if "ours" in rates and side != "ours" else "")
    path = options.out / "limit.json"
    if path.is_file() and "ours" in rates:
        limit = json.loads(path.read_text())
        least, took = sum(limit["seconds"].values()), sum(batch["seconds"] for batch in measured(options, "ours"))
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in limit["seconds"].items())
        notes.append(
            f"Limit in {limit['dtype']}: {limit['gflops']:.0f} GFLOP/s and {limit['gb_a_second']:.1f} GB/s measured, hence at least {least:.1f} s "
            f"({parts}). Ours took {took:.1f} s: {least / took:.0%} of the limit is reached."
        )
    machine = f"{processor()}, {options.threads} threads, {options.device}, {time.strftime('%Y-%m-%d')}; {options.prompts} prompts x 2, contexts <= {options.context}, up to {options.new_tokens} new tokens, {options.model} model"
    (options.out / "summary.md").write_text("\n\n".join([machine, table, *notes]) + "\n")
    return [machine, table, *notes]


def processor() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in path.read_text().splitlines() if line.startswith("model name")]
        if path.is_file()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


CHILDREN: dict[str, Callable[[argparse.Namespace], None]] = {
    "prompts": make_prompts,
    **{side: (lambda options, side=side: run_library(options, side)) for side in ("one", "static-16", "static")},  # type: ignore[misc]
    "ours": run_ours,
    "ours-continuous": run_our_continuous,
    "continuous": run_continuous,
    "limit": measure_limit,
}

if __name__ == "__main__":
    sys.exit(main())
