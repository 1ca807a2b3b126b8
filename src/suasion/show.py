"""`suasion show RECIPE --row ID`: a row as the model sees it, token by token: prompt, trained tokens, stop token.

What is trained is the most expensive thing to get wrong and the cheapest to look at. The ids come from chat.py, as in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from suasion.chat import Rendered, Renderer
from suasion.errors import UsageError
from suasion.models import load_tokenizer
from suasion.pipeline import open_run
from suasion.recipe import Recipe
from suasion.records import Example, OutcomePair, Preference, Response, Row, read_rows
from suasion.training.pairs import is_whole

PROMPT, TRAINED, ALSO_TRAINED, STOP = "dim", "black on green", "black on bright_green", "bold white on red"
SHORTEST = 4  # characters of an id that its beginning must have


@dataclass(frozen=True)
class View:
    """One rendered sequence of a row, with what to call it."""

    title: str
    rendered: Rendered


def find_row(recipe: Recipe, runs: Path, row_id: str) -> Row:
    """The example, outcome pair, response or preference whose id begins with `row_id`: in the recipe's run, else in its corpora.

    Raises UsageError where none or several do.
    """
    if len(row_id) < SHORTEST:
        raise UsageError(f"--row {row_id}: give at least {SHORTEST} characters of the id.")
    found: dict[str, Row] = {}
    for row in _rows(recipe, runs):
        if str(getattr(row, "id", "")).startswith(row_id):
            found[f"{type(row).__name__} {row.id}"] = row  # type: ignore[attr-defined]
    exact = [row for row in found.values() if row.id == row_id]  # type: ignore[attr-defined]
    if len(found) > 1 and len(exact) != 1:
        raise UsageError(f"--row {row_id} begins several ids: {', '.join(sorted(found)[:5])}. Give more of it.")
    if not found:
        raise UsageError(
            f"no row {row_id} in the corpora of {recipe.name} or in its run. Ids stand in 01-corpus/examples.jsonl, 04-sample/responses.jsonl "
            "and 07-preferences/ of the run."
        )
    return exact[0] if exact else next(iter(found.values()))


def views(row: Row, renderer: Renderer, recipe: Recipe, runs: Path) -> list[View]:
    """The sequences of a row, rendered as training renders them."""
    if isinstance(row, Example):
        return [View("example" if row.reply else "prompt, nobody replied", renderer.render(row.turns, row.reply))]
    if isinstance(row, OutcomePair):
        return [View(name, renderer.render(row.turns, getattr(row, name))) for name in ("winner", "loser")]
    if isinstance(row, Preference):
        return [View(name, _response(row.prompt.turns, getattr(row, name), renderer)) for name in ("chosen", "rejected")]
    assert isinstance(row, Response)
    prompts = (other.prompt() for other in _rows(recipe, runs) if isinstance(other, Example))
    turns = next((prompt.turns for prompt in prompts if prompt.id == row.prompt_id), None)
    if turns is None:
        raise UsageError(f"response {row.id} answers prompt {row.prompt_id}, which is not in the corpora of {recipe.name}.")
    return [View("response", _response(turns, row, renderer))]


def print_views(shown: Sequence[View], renderer: Renderer, console: Console) -> None:
    """Print sequences in colour; headings tell the parts apart where there is no colour."""
    for view in shown:
        reply = view.rendered.reply_ids
        console.print(f"[bold]{view.title}[/]: {len(view.rendered.ids)} tokens, {len(reply)} of them trained")
        console.print(f"[{PROMPT}]-- prompt, read and not trained --[/]")
        console.print(coloured(view.rendered.prompt_ids, renderer, trained=False), soft_wrap=True)
        if reply:
            stops = reply[-1] == renderer.stop_id
            console.print(f"-- trained{'; the last is the stop token' if stops else '; no stop token: it was cut off'} --")
            console.print(coloured(reply, renderer, trained=True), soft_wrap=True)
        console.print()
    legend = Text.assemble(("prompt", PROMPT), "  ", ("trained", TRAINED), ("tokens", ALSO_TRAINED), "  ", ("stop token", STOP))
    console.print(legend)


def coloured(ids: Sequence[int], renderer: Renderer, trained: bool) -> Text:
    """Tokens as text: trained ones in two shades by turns, so that their borders show."""
    text = Text()
    for number, (last, piece) in enumerate(pieces(ids, renderer.tokenizer)):
        if trained and last == renderer.stop_id:
            style = STOP
        else:
            style = (TRAINED, ALSO_TRAINED)[number % 2] if trained else PROMPT
        text.append(piece, style)
    return text


def pieces(ids: Sequence[int], tokenizer: Any) -> Iterator[tuple[int, str]]:
    """(last token, text) of the shortest runs of tokens that are whole characters: a byte-level token may be half of one."""
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = str(tokenizer.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if "\ufffd" not in text or len(pending) > 8:
            yield token, text
            pending = []
    if pending:
        yield pending[-1], str(tokenizer.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def show(recipe: Recipe, runs: Path, row_id: str, console: Console) -> None:
    """Find a row and print it."""
    row = find_row(recipe, runs, row_id)
    renderer = Renderer(load_tokenizer(recipe.model), recipe.model.system_prompt)
    print_views(views(row, renderer, recipe, runs), renderer, console)


def _response(turns: Any, response: Response, renderer: Renderer) -> Rendered:
    return renderer.render(turns, reply=response.text, reply_ids=response.tokens, finished=is_whole(response))


def _rows(recipe: Recipe, runs: Path) -> Iterator[Row]:
    directory = open_run(recipe, runs)
    if directory.state("corpus") == "complete":
        for file, kind in (("examples.jsonl", Example), ("outcome_pairs.jsonl", OutcomePair)):
            yield from read_rows(directory.folder("corpus") / file, kind)
    else:
        from suasion.corpora.stage import fitted, labels, token_counter
        from suasion.corpora.stats import Report

        count_tokens = token_counter(recipe)
        for label, source in zip(labels(recipe.corpus.sources), recipe.corpus.sources, strict=True):
            for examples, pairs in fitted(label, source, recipe, count_tokens, Report()):
                yield from examples
                yield from pairs
    if directory.state("sample") == "complete":
        yield from read_rows(directory.folder("sample") / "responses.jsonl", Response)
    if directory.state("preferences") == "complete":
        for arm in recipe.dpo:
            preferences = directory.folder("preferences") / f"{arm.name}.jsonl"
            if preferences.is_file():
                yield from read_rows(preferences, Preference)
