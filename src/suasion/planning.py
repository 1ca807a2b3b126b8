"""`suasion plan RECIPE`: what a recipe would take, measured on this machine and derived for this recipe, before anything runs.

The measurement times the model itself for about 20 seconds: reading (prefill), writing (decoding in the recipe's batch) and
training. The hours of a stage are its tokens divided by these rates; the token counts come from the corpus where it can be read.
Nothing here is used by a run.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from suasion.errors import UserError
from suasion.evaluation.power import detectable_win_rate
from suasion.progress import duration
from suasion.recipe import Recipe

FEW_STEPS = 20
DECODE_TOKENS = 24
EXPECTED_TIE_RATE = 0.1
MODEL_LOAD_SECONDS = 3.0
IMPORT_SECONDS = 12.0


@dataclass(frozen=True)
class Rates:
    """Tokens a second of one model on one machine."""

    prefill: float
    decode: float
    train: float
    weight_bytes: int


@dataclass(frozen=True)
class StagePlan:
    """Rows, optimiser steps (0 for stages that do not train) and seconds of one stage."""

    stage: str
    rows: int
    steps: int
    seconds: float
    note: str = ""


@dataclass
class Plan:
    """The whole plan."""

    recipe: str
    stages: list[StagePlan]
    rates: Rates
    disk_bytes: int
    free_bytes: int
    warnings: list[str] = field(default_factory=list)
    attainable: dict[str, int] = field(default_factory=dict)
    detectable: list[tuple[str, float | None]] = field(default_factory=list)


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a rendered context and of a reply."""

    context: float
    reply: float


def make_plan(recipe: Recipe, runs: Path) -> Plan:
    """Measure this machine and plan a recipe. Raises UserError where the model or the corpus cannot be read."""
    import tempfile

    from suasion.corpora.stage import run_stage as extract
    from suasion.pools import attainable
    from suasion.records import Example, OutcomePair, read_rows
    from suasion.rundir import StageContext, cache_dir

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        extract(StageContext(recipe=recipe, stage="corpus", folder=folder, inputs={}, cache=cache_dir()))
        examples = list(read_rows(folder / "examples.jsonl", Example))
        pairs = list(read_rows(folder / "outcome_pairs.jsonl", OutcomePair))
    if not examples:
        raise UserError("the corpus yields no examples; look at corpus.reply_tokens and at the corpus folder.")
    sizes = attainable(recipe.pools, examples, pairs, recipe.seed)
    lengths = mean_lengths(recipe, examples)
    rates = measure(recipe)
    plans = stage_plans(recipe, lengths, rates, sft_rows(recipe, len(examples)))
    judge = recipe.evaluate.grader.kind
    comparisons = len(recipe.dpo) + 1 + any(arm.matched for arm in recipe.dpo)
    plan = Plan(
        recipe=recipe.name,
        stages=plans,
        rates=rates,
        disk_bytes=disk_bytes(recipe, len(examples)),
        free_bytes=shutil.disk_usage(_existing(runs)).free,
        attainable=sizes,
        detectable=[
            ("one comparison, a perfect judge, no ties", detectable_win_rate(recipe.pools.eval)),
            (f"{comparisons} primary comparisons", detectable_win_rate(recipe.pools.eval, comparisons=comparisons)),
            (
                f"the same with a judge that is right 65% of the time ({judge}) and {EXPECTED_TIE_RATE:.0%} ties",
                detectable_win_rate(recipe.pools.eval, comparisons=comparisons, grader_accuracy=0.65, tie_rate=EXPECTED_TIE_RATE),
            ),
        ],
    )
    for item in plans:
        if 0 < item.steps < FEW_STEPS:
            plan.warnings.append(
                f"{item.stage} takes {item.steps} optimiser steps, fewer than {FEW_STEPS}: it may not move. Lower batch_size or raise epochs."
            )
    for pool in ("rlaif", "rlhf", "eval"):
        if getattr(recipe.pools, pool) > sizes.get(pool, 0):
            plan.warnings.append(
                f"pools.{pool} asks for {getattr(recipe.pools, pool)}, this corpus fills {sizes.get(pool, 0)} beside the other pools."
            )
    if plan.disk_bytes > plan.free_bytes:
        plan.warnings.append(f"needs {plan.disk_bytes / 1e9:.1f} GB of disk, {plan.free_bytes / 1e9:.1f} GB are free.")
    return plan


def sft_rows(recipe: Recipe, examples: int) -> int:
    """Rows of the SFT pool; 'rest' is what the other pools leave."""
    pools = recipe.pools
    if pools.sft != "rest":
        return int(pools.sft)
    return max(1, examples - pools.rlaif - pools.rlhf - pools.eval)


def mean_lengths(recipe: Recipe, examples: list[Any]) -> Lengths:
    """Mean rendered lengths over up to 100 examples."""
    from suasion.chat import Renderer
    from suasion.models import load_tokenizer

    renderer = Renderer(load_tokenizer(recipe.model), recipe.model.system_prompt)
    rendered = [
        renderer.render(example.turns, example.reply) for example in examples[:: max(1, len(examples) // 100)] if example.reply
    ]
    return Lengths(
        context=sum(len(row.prompt_ids) for row in rendered) / len(rendered),
        reply=sum(len(row.reply_ids) for row in rendered) / len(rendered),
    )


def stage_plans(recipe: Recipe, lengths: Lengths, rates: Rates, rows: int) -> list[StagePlan]:
    """Pure: seconds of every stage from token counts and rates.

    A trained token costs rates.train; a reference pass or a KL pass reads at rates.prefill; sampling reads each prompt once and
    writes at rates.decode. Responses are assumed as long as the corpus's replies, and a tenth of them to be drawn again.
    """
    from suasion.training.dpo import KL_PAIRS
    from suasion.training.loop import optimiser_steps

    prompts = recipe.pools.rlaif + recipe.pools.rlhf
    response = min(lengths.reply, recipe.sample.max_new_tokens)

    def sampling(count: int, each: int) -> float:
        return count * lengths.context / rates.prefill + 1.1 * count * each * response / rates.decode + MODEL_LOAD_SECONDS

    plans = [
        StagePlan("corpus", 0, 0, IMPORT_SECONDS, "with imports"),
        StagePlan("pools", 0, 0, 2),
        StagePlan(
            "sft", rows, optimiser_steps(rows, recipe.sft),
            recipe.sft.epochs * rows * (lengths.context + lengths.reply) / rates.train + MODEL_LOAD_SECONDS,
        ),
        StagePlan("sample", 2 * prompts, 0, sampling(prompts, 2), "responses"),
        StagePlan("ai-labels", prompts, 0, 15 + prompts * 0.1),
        StagePlan("human-labels", recipe.pools.rlhf, 0, 1, "simulated or imported; people need about a minute a pair"),
        StagePlan("preferences", prompts, 0, 1),
    ]  # fmt: skip
    for arm in recipe.dpo:
        pairs = getattr(recipe.pools, arm.pool)
        tokens = lengths.context + 2 * response
        seconds = (
            pairs * tokens / rates.prefill
            + arm.epochs * pairs * tokens / rates.train
            + 2 * min(KL_PAIRS, pairs) * tokens / rates.prefill
        )
        plans.append(StagePlan(f"dpo-{arm.name}", pairs, optimiser_steps(pairs, arm), seconds + MODEL_LOAD_SECONDS))
    models = len(recipe.model_names())
    plans.append(StagePlan("evaluate", recipe.pools.eval * models, 0, models * sampling(recipe.pools.eval, 1) + 20, "responses"))
    plans.append(StagePlan("report", 0, 0, 12))
    return plans


def measure(recipe: Recipe, seconds: float = 20.0) -> Rates:
    """Time the recipe's model on this machine."""
    import torch

    from suasion.models import Lineage, compute, load_policy, load_tokenizer
    from suasion.sampling.local import Draw, decode
    from suasion.training.prefix import pack, reply_logits, sum_logprobs

    hardware = compute(recipe.model)
    policy = load_policy(Lineage(recipe.model), recipe.sft.lora, recipe.seed, hardware.device)
    tokenizer = load_tokenizer(recipe.model)
    context = min(recipe.corpus.context_tokens, recipe.model.max_length - 96)
    reply = 64
    ids = torch.arange(10, 10 + context) % 1000 + 10
    packed = pack([(ids.tolist(), [ids[:reply].tolist(), ids[reply : 2 * reply].tolist()])]).to(hardware.device)
    tokens = packed.input_ids.shape[1]

    def forward() -> None:
        with torch.no_grad(), hardware.autocast():
            reply_logits(policy, packed)

    def step() -> None:
        with hardware.autocast():
            logits = reply_logits(policy, packed)
        sum_logprobs(logits, packed).sum().backward()  # type: ignore[no-untyped-call]
        policy.zero_grad()

    policy.eval()
    prefill = tokens / _seconds_each(forward, seconds * 0.25)
    policy.train()
    train = tokens / _seconds_each(step, seconds * 0.35)
    model = policy.merge_and_unload().eval()  # sampling runs on merged weights
    batch = [Draw(str(number), tuple(ids.tolist()), 0) for number in range(recipe.sample.batch_size)]
    settings = recipe.sample.model_copy(update={"max_new_tokens": DECODE_TOKENS, "temperature": 1.0, "top_p": 1.0})
    began = time.perf_counter()
    decode(model, batch, settings, recipe.seed, -1, tokenizer.pad_token_id, hardware)
    spent = time.perf_counter() - began - len(batch) * context / prefill
    decode_rate = len(batch) * DECODE_TOKENS / max(spent, 1e-3)
    return Rates(
        prefill=prefill,
        decode=decode_rate,
        train=train,
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
    )


def disk_bytes(recipe: Recipe, examples: int) -> int:
    """Adapters with their optimiser states while training, rows, figures and labels; the cached model is not counted."""
    return (
        60_000_000 * (1 + len(recipe.dpo))
        + 12_000 * examples
        + 20_000 * (recipe.pools.rlaif + recipe.pools.rlhf + recipe.pools.eval)
    )


def print_plan(plan: Plan, console: Console) -> None:
    """The plan as tables."""
    table = Table(title=f"plan of {plan.recipe} on this machine", box=None, title_justify="left", pad_edge=False)
    for column in ("stage", "rows", "optimiser steps", "time"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    table.add_column("")
    for item in plan.stages:
        table.add_row(item.stage, str(item.rows or ""), str(item.steps or ""), duration(item.seconds), f"[dim]{item.note}[/]")
    table.add_row("[bold]together[/]", "", "", f"[bold]{duration(sum(item.seconds for item in plan.stages))}[/]", "")
    console.print(table)
    rates = plan.rates
    console.print(f"measured: {rates.prefill:.0f} tokens/s read, {rates.decode:.0f} written, {rates.train:.0f} trained")
    console.print(f"disk: {plan.disk_bytes / 1e6:.0f} MB of {plan.free_bytes / 1e9:.0f} GB free")
    console.print("pools this corpus can fill: " + ", ".join(f"{name} {size}" for name, size in plan.attainable.items()))
    console.print("smallest true win rate that this evaluation detects with 80% power:")
    for what, rate in plan.detectable:
        console.print(f"  {what}: {'none below 100%' if rate is None else f'{rate:.0%}'}")
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/] {warning}")


def _seconds_each(action: Callable[[], None], budget: float) -> float:
    action()  # warm up
    began = time.perf_counter()
    count = 0
    while count < 2 or time.perf_counter() - began < budget:
        action()
        count += 1
    return (time.perf_counter() - began) / count


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.absolute().parent
    return path
