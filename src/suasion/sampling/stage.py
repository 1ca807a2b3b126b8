"""Stage `sample`: rlaif and rlhf prompts -> two responses each from the SFT model (`responses.jsonl`) and their pairs (`pairs.jsonl`)."""

from __future__ import annotations

from collections import Counter

from suasion.chat import Renderer
from suasion.models import Lineage, compute, load_tokenizer
from suasion.progress import console
from suasion.records import Pair, PoolName, Prompt, Response, content_id, read_rows, write_rows
from suasion.rundir import JOURNAL, StageContext, StageResult
from suasion.sampling.respond import Journal, at_limit, count_flags, is_degenerate, is_finished, respond
from suasion.sections.sampling import SampleSection

MOST_AT_LIMIT = 0.1  # share of responses that may end at the token limit; it must not be the usual end


def pairs_of(
    prompts: list[tuple[PoolName, Prompt]], responses: dict[tuple[str, int], Response], settings: SampleSection
) -> tuple[list[Pair], dict[str, int]]:
    """One pair a prompt, and what was dropped by reason: identical texts carry no preference, unfinished ones a false one."""
    pairs, dropped = [], Counter[str]()
    for pool, prompt in prompts:
        a, b = responses[prompt.id, 0], responses[prompt.id, 1]
        if a.text == b.text:
            dropped["identical responses"] += 1
        elif settings.unfinished == "drop" and not (is_finished(a) and is_finished(b)):
            dropped["cut-off or empty response"] += 1
        elif settings.degenerate == "drop" and (is_degenerate(a) or is_degenerate(b)):
            dropped["looping or copying response"] += 1
        else:
            pairs.append(Pair(id=content_id("pair", a.id, b.id), prompt_id=prompt.id, pool=pool, a=a.id, b=b.id))
    return pairs, dict(dropped)


def run_stage(stage: StageContext) -> StageResult:
    """Sample, flag and pair."""
    recipe = stage.recipe
    hardware = compute(recipe.model)
    renderer = Renderer(load_tokenizer(recipe.model), recipe.model.system_prompt)
    pools: tuple[PoolName, PoolName] = ("rlaif", "rlhf")
    prompts = [(pool, prompt) for pool in pools for prompt in read_rows(stage.input("pools", f"{pool}.jsonl"), Prompt)]
    lineage = Lineage(recipe.model, (stage.input("sft", "adapter"),))
    journal = Journal(stage.folder / JOURNAL)
    made = respond(
        "sft",
        lineage,
        [prompt for _, prompt in prompts],
        2,
        recipe.sample,
        recipe.model,
        renderer,
        hardware,
        recipe.seed,
        journal,
        "sample",
        recipe.processes.count,
    )
    responses = made.rows
    cut_off = at_limit(journal.first_draws("sample"))
    if cut_off > MOST_AT_LIMIT:
        console.print(
            f"  [yellow]{cut_off:.0%} of the responses ended at the limit of {recipe.sample.max_new_tokens} tokens when first drawn: sft has "
            "not learned to stop. Give it more or larger steps (sft.batch_size, sft.learning_rate), or shorter replies "
            "(corpus.reply_tokens).[/]"
        )
    pairs, dropped = pairs_of(prompts, {(row.prompt_id, row.n): row for row in responses}, recipe.sample)
    counted = [len(row.tokens) for row in responses if row.tokens is not None]
    write_rows(stage.folder / "responses.jsonl", responses)
    write_rows(stage.folder / "pairs.jsonl", pairs)
    return StageResult(
        rows_in=len(prompts),
        rows_out=len(pairs),
        dropped=dropped,
        facts={
            "lineage": lineage.hash,
            "template_hash": renderer.template_hash,
            "responses": len(responses),
            "engine": recipe.sample.engine.kind,
            "checked": made.checked,
            "flags": count_flags(responses),
            "drawn_again": made.drawn_again,
            "without_logprob": sum(row.logprob is None for row in responses),
            "at_limit": at_limit(responses),
            "at_limit_first_draw": cut_off,
            "mean_tokens": round(sum(counted) / len(counted), 1) if counted else None,
            "pairs": dict(Counter(pair.pool for pair in pairs)),
        },
    )
