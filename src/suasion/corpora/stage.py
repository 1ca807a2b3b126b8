"""Stage corpus: real conversations become examples and outcome pairs that fit the model.

Reads the recipe's corpora (ConvoKit folders, the bundled miniature ones, or own rows); writes `examples.jsonl`,
`outcome_pairs.jsonl` and `counts.json`, which says of each corpus what was read, kept and dropped, by reason (`stats.py`).

Lengths are tokens of the model's own tokenizer. A reply is never cut: one that is too short or too long is dropped. A context
that is too long loses its oldest turns, at turn borders, but never the post and never the turn that is answered; the cut is
marked with "[...]". Both sides of an outcome pair must have the length of a reply: with a limit on one side only, length itself
would tell winners from losers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from suasion.corpora import cmv, convokit, own, p4g
from suasion.corpora.convokit import Tally
from suasion.corpora.stats import Report
from suasion.errors import UserError
from suasion.recipe import Recipe
from suasion.records import Example, OutcomePair, Turn, example_id, outcome_pair_id, row_writer, sha256_file, write_json
from suasion.rundir import StageContext, StageResult
from suasion.sections.corpus import CorpusSection, CorpusSource
from suasion.seeding import derive_seed

CountTokens = Callable[[str], int]

BUNDLED = {"cmv": "changemyview", "p4g": "charity"}
CUT = "[...]"
TURN_TOKENS = 8  # what a chat template adds around a turn
FIXED_TURN_TOKENS = (
    16  # chat.py puts a fixed user turn before a dialogue that the persuader opens, or after a challenger's last word
)
LEAST_CLAIM = 48  # tokens of a post below which it is no longer a claim that one can argue with


def run_stage(stage: StageContext) -> StageResult:
    """Read every source, fit the rows to the model, and write them with their counts."""
    recipe = stage.recipe
    count_tokens = token_counter(recipe)
    reports = {label: Report() for label in labels(recipe.corpus.sources)}
    kept, kept_pairs = 0, 0
    with (
        row_writer(stage.folder / "examples.jsonl") as write_example,
        row_writer(stage.folder / "outcome_pairs.jsonl") as write_pair,
    ):
        for label, source in zip(reports, recipe.corpus.sources, strict=True):
            for examples, pairs in fitted(label, source, recipe, count_tokens, reports[label]):
                kept, kept_pairs = kept + len(examples), kept_pairs + len(pairs)
                for example in examples:
                    write_example(example)
                for pair in pairs:
                    write_pair(pair)
    if not kept:
        raise UserError(
            f"no example is left of {', '.join(reports)}: "
            + "; ".join(
                f"{count} {reason}" for report in reports.values() for reason, count in report.tally.dropped.most_common(3)
            )
            + ". Widen corpus.reply_tokens or corpus.context_tokens, or check the corpus."
        )
    write_json(stage.folder / "counts.json", {label: report.as_json() for label, report in reports.items()})
    dropped: Counter[str] = Counter()
    for report in reports.values():
        dropped.update(+report.tally.dropped)
    return StageResult(
        rows_in=sum(report.tally.read["utterances"] + report.tally.read["rows"] for report in reports.values()),
        rows_out=kept + kept_pairs,
        dropped=dict(sorted(dropped.items())),
        facts={"examples": kept, "outcome_pairs": kept_pairs},
    )


def survey(recipe: Recipe) -> dict[str, Report]:
    """Read every source as the stage does and keep the counts only."""
    count_tokens = token_counter(recipe)
    reports = {label: Report() for label in labels(recipe.corpus.sources)}
    for label, source in zip(reports, recipe.corpus.sources, strict=True):
        for _ in fitted(label, source, recipe, count_tokens, reports[label]):
            pass
    return reports


def token_counter(recipe: Recipe) -> CountTokens:
    """Counts tokens as the recipe's model does. Texts recur within a conversation (a reply here, a turn there), hence the cache."""
    from suasion.models import load_tokenizer

    tokenizer = load_tokenizer(recipe.model)

    @lru_cache(maxsize=2**12)
    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, truncation=False)["input_ids"])

    return count_tokens


def external_hashes(recipe: Recipe) -> dict[str, str]:
    """sha256 of every corpus file that the stage reads, as "cmv:utterances.jsonl"."""
    hashes = {}
    for label, source in zip(labels(recipe.corpus.sources), recipe.corpus.sources, strict=True):
        folder = source_folder(source)
        files = own.files(folder) if source.kind == "jsonl" else [folder / name for name in convokit.FILES]
        hashes.update({f"{label}:{file.name}": sha256_file(file) for file in files if file.is_file()})
    return hashes


def labels(sources: Sequence[CorpusSource]) -> list[str]:
    """A name for each source: its kind, numbered from the second of a kind on. It becomes `corpus` on the rows."""
    seen: Counter[str] = Counter()
    names = []
    for source in sources:
        seen[source.kind] += 1
        names.append(source.kind if seen[source.kind] == 1 else f"{source.kind}-{seen[source.kind]}")
    return names


def bundled_path(kind: str) -> Path:
    """The folder of a bundled miniature corpus. Raises UserError for a kind that has none."""
    if kind not in BUNDLED:
        raise UserError(f"there is no bundled corpus of kind {kind} (there are: {', '.join(BUNDLED)}). Give a path.")
    return Path(str(files("suasion.corpora") / "miniature" / BUNDLED[kind]))


def source_folder(source: CorpusSource) -> Path:
    """Where a source lies; for own rows it may be a file."""
    return bundled_path(source.kind) if source.path == "bundled" else Path(source.path)


def fitted(
    label: str, source: CorpusSource, recipe: Recipe, count_tokens: CountTokens, report: Report
) -> Iterator[tuple[list[Example], list[OutcomePair]]]:
    """Yield the examples and outcome pairs of each conversation that fit the recipe's lengths, and count them in `report`."""
    section = recipe.corpus
    budget = context_budget(recipe, count_tokens)
    for examples, pairs in _extract(label, source, report.tally):
        fitting: dict[str, Example] = {}
        cut = set()
        for example, was_cut in _fit_examples(examples, source, section, budget, count_tokens, report):
            if example.id in fitting:
                report.tally.dropped[f"{_kind(example)} that occurs twice once its context is cut"] += 1
            fitting[example.id] = example
            cut |= {example.id} if was_cut else set()
        chosen = choose(list(fitting.values()), source.max_per_conversation, recipe.seed)
        _count_unchosen(list(fitting.values()), chosen, report.tally)
        for example in chosen:
            context = sum(count_tokens(turn.text) for turn in example.turns)
            reply = None if example.reply is None else count_tokens(example.reply)
            report.keep_example(example, context, reply, example.id in cut)
        kept_pairs = list(_fit_pairs(pairs, section, budget, count_tokens, report))
        report.end_conversation(chosen, len(kept_pairs))
        yield chosen, kept_pairs


def choose(examples: Sequence[Example], most: int, seed: int) -> list[Example]:
    """At most `most` examples of a conversation, drawn by id and not by position; prompts without reply only where no reply is kept."""
    replied = [example for example in examples if example.reply is not None]
    ranked = sorted(replied or examples, key=lambda example: derive_seed(seed, "max-per-conversation", example.id))
    return sorted(ranked[:most], key=lambda example: example.id)


def context_budget(recipe: Recipe, count_tokens: CountTokens) -> int:
    """Tokens that are left for the turns of a context, beside the system prompt and its turn."""
    return recipe.corpus.context_tokens - count_tokens(recipe.model.system_prompt) - TURN_TOKENS


def fit_context(turns: Sequence[Turn], budget: int, keep_first: bool, count_tokens: CountTokens) -> tuple[Turn, ...] | None:
    """The turns in at most `budget` tokens, template included; None where the answered turn and the claim do not fit.

    Oldest turns go first, whole. The last turn stays as it is. keep_first: the first turn is the claim that all of this is about:
    it stays, and is shortened from its end where nothing else is left to drop, to no fewer than LEAST_CLAIM tokens.
    """

    def cost(turn: Turn) -> int:
        return TURN_TOKENS + count_tokens(turn.text) + (count_tokens(turn.name) if turn.name else 0)

    def room(turns: Sequence[Turn]) -> int:
        return budget - FIXED_TURN_TOKENS * ((turns[0].role == "assistant") + (turns[-1].role == "assistant"))

    kept = list(turns)
    if sum(map(cost, kept)) <= room(kept):
        return tuple(kept)
    mark = count_tokens(CUT) + 2  # and the blank or line break that joins it to the text
    if not keep_first:
        while kept and sum(map(cost, kept)) + mark > room(kept):
            kept = kept[1:]
        return (_with_text(kept[0], f"{CUT} {kept[0].text}"), *kept[1:]) if kept else None
    while len(kept) > 2 and sum(map(cost, kept)) + mark > room(kept):
        kept = [kept[0], *kept[2:]]
    claim, later = kept[0], kept[1:]
    left = room(kept) - sum(map(cost, later)) - (cost(claim) - count_tokens(claim.text))
    text = claim.text if count_tokens(claim.text) + mark <= left and len(kept) < len(turns) else None
    if text is None:
        if left < LEAST_CLAIM:
            return None
        text = shorten(claim.text, left - mark, count_tokens)
    return (_with_text(claim, f"{text}\n\n{CUT}"), *later)


def shorten(text: str, budget: int, count_tokens: CountTokens) -> str:
    """The longest beginning of a text, in whole words, with at most `budget` tokens."""
    ends = ([match.start() for match in re.finditer(r"(?<=\S)\s", text)] + [len(text)])[
        : max(budget, 0)
    ]  # a word has a token at least
    low, high = 0, len(ends)
    while low < high:
        middle = (low + high) // 2
        if count_tokens(text[: ends[middle]]) <= budget:
            low = middle + 1
        else:
            high = middle
    return text[: ends[low - 1]].rstrip() if low else ""


def _extract(label: str, source: CorpusSource, tally: Tally) -> Iterator[tuple[list[Example], list[OutcomePair]]]:
    folder = source_folder(source)
    if source.kind == "cmv":
        return cmv.extract(folder, tally, label)
    if source.kind == "p4g":
        return p4g.extract(folder, tally, label, source.donating_only)
    return own.extract(folder, tally, label)


def _fit_examples(
    examples: Iterable[Example],
    source: CorpusSource,
    section: CorpusSection,
    budget: int,
    count_tokens: CountTokens,
    report: Report,
) -> Iterator[tuple[Example, bool]]:
    """The examples whose reply and context fit, and whether the context was cut for that."""
    low, high = section.reply_tokens
    for example in examples:
        if example.reply is not None:
            tokens = count_tokens(example.reply)
            report.offer_reply(tokens)
            if not low <= tokens <= high:
                report.tally.dropped["reply too short" if tokens < low else "reply too long"] += 1
                continue
        turns = fit_context(example.turns, budget, source.kind != "p4g", count_tokens)
        if turns is None:
            report.tally.dropped[f"{_kind(example)} with a context over budget"] += 1
            continue
        was_cut = turns != example.turns
        if was_cut:
            identity = example_id(example.corpus, example.conversation_id, turns, example.reply)
            example = example.model_copy(update={"id": identity, "turns": turns})
        yield example, was_cut


def _fit_pairs(
    pairs: Iterable[OutcomePair], section: CorpusSection, budget: int, count_tokens: CountTokens, report: Report
) -> Iterator[OutcomePair]:
    low, high = section.reply_tokens
    kept = set()
    for pair in pairs:
        winner, loser = count_tokens(pair.winner), count_tokens(pair.loser)
        report.offer_pair(winner, loser)
        if not (low <= winner <= high and low <= loser <= high):
            report.tally.dropped["pair with a side too short or too long"] += 1
            continue
        turns = fit_context(pair.turns, budget, True, count_tokens)
        if turns is None:
            report.tally.dropped["pair with a context over budget"] += 1
            continue
        if turns != pair.turns:
            identity = outcome_pair_id(pair.corpus, pair.conversation_id, turns, pair.winner, pair.loser)
            pair = pair.model_copy(update={"id": identity, "turns": turns})
        if pair.id in kept:
            report.tally.dropped["pair that occurs twice once its context is cut"] += 1
            continue
        kept.add(pair.id)
        report.keep_pair(winner, loser)
        yield pair


def _count_unchosen(fitting: Sequence[Example], chosen: Sequence[Example], tally: Tally) -> None:
    """Count the examples of a conversation that fit and are not among the chosen ones."""
    replied = sum(example.reply is not None for example in fitting)
    prompts = len(fitting) - replied
    if replied:
        tally.dropped["beyond max_per_conversation"] += replied - len(chosen)
        tally.dropped["prompt beside a kept reply"] += prompts
    else:
        tally.dropped["prompt beyond max_per_conversation"] += prompts - len(chosen)


def _kind(example: Example) -> str:
    return "prompt" if example.reply is None else "reply"


def _with_text(turn: Turn, text: str) -> Turn:
    return turn.model_copy(update={"text": text})
