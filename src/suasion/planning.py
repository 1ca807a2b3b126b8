"""`suasion plan RECIPE`: what a recipe would take, measured on this machine and derived for this recipe, before anything runs.

The measurement times the model itself for about 20 seconds: reading (prefill), writing (decoding in the recipe's batch) and
training, and notes the memory that the longest rows take. The hours of a stage are its tokens divided by these rates; the token counts come
from the corpus where it can be read.
Nothing here is used by a run.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from suasion.errors import UserError
from suasion.evaluation.power import detectable_win_rate
from suasion.pipeline import refuse_missing_data, stages
from suasion.preferences import needs_human
from suasion.progress import duration
from suasion.recipe import Recipe
from suasion.records import Example, OutcomePair, RowFile
from suasion.sections.grading import families
from suasion.sections.labeling import ImportedLabels
from suasion.sections.sampling import EndpointEngine
from suasion.sections.training import DpoArm, TrainingSection, optimiser_steps

FEW_STEPS = 20
NOTHING_FITS = "this corpus cannot fill the pools, with smaller sizes neither: use a larger corpus, or widen corpus.reply_tokens."
DECODE_TOKENS = 24
ASSUMED_ACCURACY = 0.65  # of a judge; what a trained grader reaches is known once it is trained (`grade bench`)
ASSUMED_TIES = 0.1
MODEL_LOAD_SECONDS = 3.0
IMPORT_SECONDS = 12.0


@dataclass(frozen=True)
class Rates:
    """Tokens a second of one model on one machine; where it was measured the peak bytes of its memory too, inf where it did not suffice.

    prefill: of pairs that are read one a pass; prompts: of prompts that are read together before they are answered, None where that was not
    measured. On a GPU peaks are of what torch holds there, on a CPU of this process.
    """

    prefill: float
    decode: float
    train: float
    train_bytes: float | None = None
    write_bytes: float | None = None
    prompts: float | None = None


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
    memory_bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    attainable: dict[str, int] = field(default_factory=dict)
    detectable: list[tuple[str, float | None]] = field(default_factory=list)


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a rendered context and of a reply."""

    context: float
    reply: float


@dataclass(frozen=True)
class CorpusFacts:
    """What a recipe's corpus and labels amount to. imported: usable human preferences of a file, None where there is none."""

    examples: int
    attainable: dict[str, int]
    lengths: Lengths
    imported: int | None


def read_corpus(recipe: Recipe) -> CorpusFacts:
    """Read the corpus as a run would, keeping nothing. Raises UserError where corpus, tokenizer or labels cannot be read."""
    import tempfile

    from suasion.corpora.stage import run_stage as extract
    from suasion.linking import link
    from suasion.pools import attainable, conversation_hash, split
    from suasion.rundir import StageContext, cache_dir

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        extract(StageContext(recipe=recipe, stage="corpus", folder=folder, inputs={}, cache=cache_dir()))
        with (
            RowFile(folder / "examples.jsonl", Example) as examples,
            RowFile(folder / "outcome_pairs.jsonl", OutcomePair) as pairs,
        ):
            components = link(examples, pairs, recipe.pools.near_duplicate)
            count, lengths = len(examples), mean_lengths(recipe, examples)
    imported = None
    if (labels := imported_labels(recipe)) and Path(labels.path).is_file():
        held_out = split(components, recipe.pools, recipe.seed).held_out
        imported = usable_preferences(recipe, labels, frozenset(map(conversation_hash, held_out)))
    return CorpusFacts(count, attainable(components, recipe.pools, recipe.seed), lengths, imported)


def make_plan(
    recipe: Recipe, runs: Path, seconds: float = 20.0, accuracy: float | None = None, ties: float | None = None
) -> Plan:
    """Measure this machine for about so many seconds and plan a recipe. accuracy, ties: of the judge; assumed where nobody knows.

    Raises UserError where the model, the corpus or imported labels cannot be read.
    """
    from suasion.memory import total_memory
    from suasion.models import compute

    corpus = read_corpus(recipe)
    sizes = corpus.attainable
    rates = measure(recipe, seconds)
    plan = Plan(
        recipe=recipe.name,
        stages=stage_plans(recipe, corpus.lengths, rates, sft_rows(recipe, sizes), corpus.imported),
        rates=rates,
        disk_bytes=disk_bytes(recipe, corpus.examples),
        free_bytes=shutil.disk_usage(_existing(runs)).free,
        memory_bytes=total_memory(compute(recipe.model).device),
        attainable=sizes,
        detectable=detectable(recipe, ASSUMED_ACCURACY if accuracy is None else accuracy, ASSUMED_TIES if ties is None else ties),
    )
    if (labels := imported_labels(recipe)) and corpus.imported is None:
        plan.warnings.append(f"no human labels at {labels.path} yet: planned as if there were one for each of the rlhf prompts.")
    try:
        refuse_missing_data(recipe, [stage.name for stage in stages(recipe)])
    except UserError as error:
        plan.warnings.append(str(error))
    plan.warnings += warnings(recipe, plan)
    return plan


def warnings(recipe: Recipe, plan: Plan) -> list[str]:
    """What would go wrong, or be of little use, if this plan were run."""
    found = [
        f"{item.stage} takes {item.steps} optimiser steps, fewer than {FEW_STEPS}: it may not move. Lower batch_size or raise epochs."
        for item in plan.stages
        if (item.stage == "sft" or item.stage.startswith("dpo-")) and item.steps < FEW_STEPS
    ]
    if not any(plan.attainable.values()):
        found.append(NOTHING_FITS)
    for pool, size in plan.attainable.items() if any(plan.attainable.values()) else ():
        if (asked := getattr(recipe.pools, pool)) != "rest" and asked > size:
            found.append(f"pools.{pool} asks for {asked}, this corpus fills {size} beside the other pools.")
    found += uncounted(recipe)
    if recipe.processes.count * recipe.processes.machines > 1:
        found.append("these hours and this memory are of one process; `processes` spreads the work over several.")
    for what, peak, change in (
        ("training", plan.rates.train_bytes, "recompute_activations: true in sft and the arms, then a lower micro_batch_tokens"),
        ("sampling", plan.rates.write_bytes, "a lower sample.batch_size"),
    ):
        if peak is not None and peak > plan.memory_bytes:
            needed = "more memory than there is" if peak == math.inf else f"{peak / 1e9:.1f} GB of memory"
            found.append(
                f"{what} needs {needed}, this machine has {plan.memory_bytes / 1e9:.1f} GB. Set {change}, or take another machine."
            )
    if plan.disk_bytes > plan.free_bytes:
        found.append(f"needs {plan.disk_bytes / 1e9:.1f} GB of disk, {plan.free_bytes / 1e9:.1f} GB are free.")
    return found


def uncounted(recipe: Recipe) -> list[str]:
    """What no plan of hours knows: language models as judges, and servers."""
    found = []
    for name, grader in (("ai-labels", recipe.ai_labels.grader), ("evaluate", recipe.evaluate.grader)):
        if any(family.startswith("llm ") for family in families(grader)):
            found.append(
                f"{name} asks a language model: its time and price are not in these hours. `suasion grade bench` measures both."
            )
    if isinstance(recipe.sample.engine, EndpointEngine):
        found.append("sample and evaluate draw from servers, whose speed is not known here: these hours are of the local engine.")
    return found


def detectable(recipe: Recipe, accuracy: float, ties: float) -> list[tuple[str, float | None]]:
    """Under which assumption -> the smallest true win rate that the evaluation can see. accuracy, ties: shares of the judge's verdicts."""
    from suasion.evaluation.summary import primary_pairs

    prompts, comparisons = recipe.pools.eval, len(primary_pairs(recipe))
    return [
        ("one comparison, a perfect judge, no ties", detectable_win_rate(prompts)),
        (f"{comparisons} primary comparisons, a perfect judge, no ties", detectable_win_rate(prompts, comparisons=comparisons)),
        (
            f"{comparisons} primary comparisons, if the judge is right {accuracy:.0%} of the time and {ties:.0%} are ties",
            detectable_win_rate(prompts, comparisons=comparisons, grader_accuracy=accuracy, tie_rate=ties),
        ),
    ]


def sft_rows(recipe: Recipe, sizes: dict[str, int]) -> int:
    """Rows of the SFT pool; 'rest' is what the other pools leave, from the sizes that the corpus can fill."""
    return sizes["sft"] if recipe.pools.sft == "rest" else int(recipe.pools.sft)


def imported_labels(recipe: Recipe) -> ImportedLabels | None:
    """Where human preferences on another model's texts are to come from; None where people label the run's own pairs."""
    source = recipe.human_labels.source
    return source if source.kind == "file" and source.layout == "preferences" else None


def usable_preferences(recipe: Recipe, labels: ImportedLabels, held_out: frozenset[str]) -> int:
    """Rows of a file of imported preferences that the run would train on; held_out: hashes of conversations it would not."""
    from suasion.labeling.imports import import_preferences
    from suasion.labeling.stage import fit_contexts

    return len(fit_contexts(import_preferences(Path(labels.path), labels.source, held_out).preferences, recipe))


def mean_lengths(recipe: Recipe, examples: Sequence[Example]) -> Lengths:
    """Mean rendered lengths over about 100 examples with a reply. Raises UserError where there is none."""
    from suasion.chat import Renderer
    from suasion.models import load_tokenizer

    renderer = Renderer(load_tokenizer(recipe.model), recipe.model.system_prompt)
    replied = [number for number, example in enumerate(examples) if example.reply]
    if not replied:
        raise UserError("the corpus yields no human reply; look at corpus.reply_tokens and at the corpus folder.")
    drawn = (examples[number] for number in replied[:: max(1, len(replied) // 100)])
    rendered = [renderer.render(example.turns, example.reply) for example in drawn]
    return Lengths(
        context=sum(len(row.prompt_ids) for row in rendered) / len(rendered),
        reply=sum(len(row.reply_ids) for row in rendered) / len(rendered),
    )


def stage_plans(recipe: Recipe, lengths: Lengths, rates: Rates, rows: int, imported: int | None = None) -> list[StagePlan]:
    """Pure: seconds of every stage from token counts and rates.

    rows: of the SFT pool. imported: usable human preferences of a file, on which arms with human labels then train instead of on
    the rlhf pool; None where there is no such file.
    A trained token costs rates.train; a reference pass or a KL pass reads at rates.prefill; sampling reads each prompt once and
    writes at rates.decode. Responses are assumed as long as the corpus's replies, and a tenth of them to be drawn again.
    """
    from suasion.training.dpo import KL_PAIRS

    prompts = recipe.pools.rlaif + recipe.pools.rlhf
    response = min(lengths.reply, recipe.sample.max_new_tokens)

    def sampling(count: int, each: int) -> float:
        return (
            count * lengths.context / (rates.prompts or rates.prefill)
            + 1.1 * count * each * response / rates.decode
            + MODEL_LOAD_SECONDS
        )

    def trained(section: TrainingSection, tokens: float) -> float:
        """Seconds; recomputed activations are one more reading."""
        return tokens / rates.train + (tokens / rates.prefill if section.recompute_activations else 0.0)

    plans = [
        StagePlan("corpus", 0, 0, IMPORT_SECONDS, "with imports"),
        StagePlan("pools", 0, 0, 2),
        StagePlan(
            "sft", rows, optimiser_steps(rows, recipe.sft),
            recipe.sft.epochs * rows * trained(recipe.sft, lengths.context + lengths.reply) + MODEL_LOAD_SECONDS,
        ),
        StagePlan("sample", 2 * prompts, 0, sampling(prompts, 2), "responses"),
        StagePlan("ai-labels", prompts, 0, 15 + prompts * 0.1),
        StagePlan(
            "human-labels", recipe.pools.rlhf if imported is None else imported, 0, 1,
            "simulated or imported; people need about a minute a pair" if imported is None else "usable rows of the imported file",
        ),
        StagePlan("preferences", prompts, 0, 1),
    ]  # fmt: skip
    for arm in recipe.dpo:
        pairs = imported if arm.labels == "human" and imported is not None else decided_pairs(recipe, arm)
        tokens = lengths.context + 2 * response
        seconds = (
            pairs * tokens / rates.prefill
            + arm.epochs * pairs * trained(arm, tokens)
            + 2 * min(KL_PAIRS, pairs) * tokens / rates.prefill
        )
        plans.append(StagePlan(f"dpo-{arm.name}", pairs, optimiser_steps(pairs, arm), seconds + MODEL_LOAD_SECONDS))
    models = len(recipe.model_names())
    # PersuasionForGood has no outcome pairs; of the other corpora as many as asked for are supposed to be left over.
    likelihoods = recipe.evaluate.likelihood_pairs if any(source.kind != "p4g" for source in recipe.corpus.sources) else 0
    scoring = likelihoods * (lengths.context + 2 * lengths.reply) / rates.prefill
    plans.append(
        StagePlan(
            "evaluate", recipe.pools.eval * models, 0, models * (sampling(recipe.pools.eval, 1) + scoring) + 20, "responses"
        )
    )
    plans.append(StagePlan("report", 0, 0, 12))
    return plans


def decided_pairs(recipe: Recipe, arm: DpoArm) -> int:
    """Pairs of its pool that an arm can learn from: where it waits for simulated labels, those that the annotator calls no tie."""
    pool: int = getattr(recipe.pools, arm.pool)
    source = recipe.human_labels.source
    return pool - source.ties(pool) if source.kind == "simulated" and needs_human(arm) else pool


def measure(recipe: Recipe, seconds: float) -> Rates:
    """Time the recipe's model on this machine. Reading and training take most of the seconds; writing takes what it takes."""
    import torch

    from suasion.models import Lineage, as_it_samples, compute, load_tokenizer
    from suasion.sampling.draws import Draw
    from suasion.sampling.local import decode, memory_needed
    from suasion.training.loop import policy_of
    from suasion.training.prefix import pack, reply_logits, sum_logprobs
    from suasion.training.steps import token_budget

    hardware = compute(recipe.model)
    policy = policy_of(Lineage(recipe.model), recipe.sft.lora, recipe.seed, hardware)
    tokenizer = load_tokenizer(recipe.model)
    context = min(recipe.corpus.context_tokens, recipe.model.max_length - 96)
    ids = torch.arange(10, 10 + context) % 1000 + 10

    def rows(count: int, prompt: int, reply: int) -> Any:
        """So many rows of a prompt and two replies, of these lengths."""
        words = (torch.arange(10, 10 + prompt + 2 * reply) % 1000 + 10).tolist()
        row = (words[:prompt], [words[prompt : prompt + reply], words[prompt + reply :]])
        return pack([row] * count).to(hardware.device)

    def forward(packed: Any) -> None:
        with torch.no_grad(), hardware.autocast():
            reply_logits(policy, packed).sum().item()

    def step(packed: Any) -> None:
        with hardware.autocast():
            logits = reply_logits(policy, packed)
        sum_logprobs(logits, packed).sum().backward()  # type: ignore[no-untyped-call]
        next(p.grad for p in policy.parameters() if p.grad is not None).sum().item()
        policy.zero_grad()

    usual = rows(1, context, 64)
    tokens = usual.input_ids.shape[1]
    policy.eval()
    prefill = tokens / _seconds_each(lambda: forward(usual), seconds * 0.25)  # references read a pair a pass
    policy.train()
    together = max(1, min(recipe.sft.batch_size, token_budget(recipe.sft, hardware) // tokens))
    several = rows(together, context, 64)  # trainings as many as fit into a micro-batch
    train = together * tokens / _seconds_each(lambda: step(several), seconds * 0.35)
    train_bytes = _peak(lambda: step(rows(*longest_rows(recipe, hardware))), hardware.device)
    policy.zero_grad()
    model = as_it_samples(policy, hardware)
    batch = [Draw("plan", tuple(ids.tolist()), number) for number in range(recipe.sample.batch_size)]  # one prompt: read once

    def write(new_tokens: int) -> float:
        settings = recipe.sample.model_copy(update={"max_new_tokens": new_tokens})
        began = time.perf_counter()
        decode(model, batch, settings, recipe.seed, -1, tokenizer.pad_token_id, hardware)
        return time.perf_counter() - began

    write(2)  # warm up
    first = write(1)  # reading, and the first token of every response
    last = 0.0

    def write_on() -> None:
        nonlocal last
        last = write(DECODE_TOKENS + 1)

    measured = _peak(write_on, hardware.device)
    # Not written here: the rest of each response, and prompts of their own.
    whole = replace(batch[0], prompt=tuple(range(recipe.corpus.context_tokens)))
    apart = [replace(whole, prompt_id=str(number)) for number in range(len(batch))]
    short = recipe.sample.model_copy(update={"max_new_tokens": DECODE_TOKENS + 1})
    rest = memory_needed(model, apart, recipe.sample, hardware.dtype) - memory_needed(model, batch, short, hardware.dtype)
    return Rates(
        prefill=prefill,
        decode=len(batch) * DECODE_TOKENS / max(last - first, 1e-6),
        train=train,
        train_bytes=train_bytes,
        write_bytes=measured + rest,
    )


def longest_rows(recipe: Recipe, hardware: Any) -> tuple[int, int, int]:
    """The micro-batch that takes the most memory: how many rows, their prompt's tokens and those of each of two replies."""
    from suasion.training.steps import token_budget

    prompt, reply = recipe.corpus.context_tokens, recipe.sample.max_new_tokens
    if not recipe.dpo or prompt + 2 * reply < recipe.model.max_length:
        reply = recipe.corpus.reply_tokens[1] // 2
        prompt = recipe.model.max_length - 2 * reply
    budget = max(token_budget(section, hardware) for section in (recipe.sft, *recipe.dpo))
    return max(1, budget // (prompt + 2 * reply)), prompt, reply


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
    for column in ("stage", "rows", "optimiser steps", "time", "memory"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    table.add_column("")
    for item in plan.stages:
        peak = stage_memory(item, plan.rates)
        memory = "" if peak is None else "too much" if peak == math.inf else f"{peak / 1e9:.1f} GB"
        table.add_row(
            item.stage, str(item.rows or ""), str(item.steps or ""), duration(item.seconds), memory, f"[dim]{item.note}[/]"
        )
    table.add_row("[bold]together[/]", "", "", f"[bold]{duration(sum(item.seconds for item in plan.stages))}[/]", "", "")
    console.print(table)
    rates = plan.rates
    console.print(f"measured: {rates.prefill:.0f} tokens/s read, {rates.decode:.0f} written, {rates.train:.0f} trained")
    console.print(
        f"memory: peaks on the longest rows, of {plan.memory_bytes / 1e9:.1f} GB here; a CPU's allocator takes more as lengths vary"
    )
    console.print(f"disk: {plan.disk_bytes / 1e6:.0f} MB of {plan.free_bytes / 1e9:.0f} GB free")
    sizes = ", ".join(f"{name} {size}" for name, size in plan.attainable.items()) if any(plan.attainable.values()) else "none"
    console.print(f"pools this corpus can fill: {sizes}")
    console.print("smallest true win rate that this evaluation detects with 80% power:")
    for what, rate in plan.detectable:
        console.print(f"  {what}: {'none below 100%' if rate is None else f'{rate:.0%}'}")
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/] {warning}")


def stage_memory(stage: StagePlan, rates: Rates) -> float | None:
    """Peak bytes of a stage that trains or writes, where they were measured."""
    if stage.stage in ("sample", "evaluate"):
        return rates.write_bytes
    return rates.train_bytes if stage.stage == "sft" or stage.stage.startswith("dpo-") else None


def _seconds_each(action: Callable[[], None], budget: float) -> float:
    """Seconds a call, after one to warm up. The actions end in a number read from the device, so that queued work is counted."""
    action()
    began = time.perf_counter()
    count = 0
    while count < 2 or time.perf_counter() - began < budget:
        action()
        count += 1
    return (time.perf_counter() - began) / count


def _peak(action: Callable[[], None], device: str) -> float:
    """Peak bytes of memory while something is done, inf where they do not suffice."""
    from suasion.memory import OUT_OF_MEMORY, forget_peak, is_out_of_memory, peak_memory_mb

    forget_peak(device)
    try:
        action()
    except OUT_OF_MEMORY as error:
        if not is_out_of_memory(error):
            raise
        return math.inf
    return peak_memory_mb(device) * 1e6


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.absolute().parent
    return path
