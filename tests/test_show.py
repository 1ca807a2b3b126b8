"""`suasion show`: what is trained is what is printed as trained, for every kind of row, with and without a chat template."""

import copy
import io
import itertools
from pathlib import Path

import pytest
from rich.console import Console

from suasion.chat import Renderer
from suasion.errors import UsageError
from suasion.pipeline import open_run
from suasion.recipe import load_recipe
from suasion.records import Example, OutcomePair, Preference, Response, Turn, write_rows
from suasion.show import STOP, coloured, find_row, pieces, print_views, show, views

REPOSITORY = Path(__file__).parents[1]
TURNS = (Turn(role="user", text="Cats are better. 🐈"),)


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(REPOSITORY / "recipes" / "tiny.yaml")


def printed(action, **options) -> str:
    console = Console(file=io.StringIO(), width=200, highlight=False, **options)
    action(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_an_example_of_the_corpora_is_found_without_a_run(recipe, renderer, tmp_path):
    from suasion.corpora.stage import fitted, labels, token_counter
    from suasion.corpora.stats import Report

    source = recipe.corpus.sources[0]
    examples, _ = next(iter(fitted(labels([source])[0], source, recipe, token_counter(recipe), Report())))
    example = next(row for row in examples if row.reply)
    assert find_row(recipe, tmp_path, example.id) == example
    assert find_row(recipe, tmp_path, example.id[:10]) == example
    text = printed(lambda console: show(recipe, tmp_path, example.id, console))
    trained = text.split("-- trained; the last is the stop token --")[1].split("prompt  trained")[0]
    assert trained.strip() == example.reply.strip() + "<|im_end|>"
    assert recipe.model.system_prompt in text.split("-- trained")[0]


def test_colours_follow_the_mask(renderer):
    rendered = renderer.render(TURNS, "Dogs listen 🐕 always.")
    text = coloured(rendered.reply_ids, renderer, trained=True)
    assert text.plain == "Dogs listen 🐕 always.<|im_end|>"
    styles = [str(span.style) for span in text.spans]
    assert styles[-1] == STOP
    assert styles.count(STOP) == 1
    assert all(one != other for one, other in itertools.pairwise(styles))  # borders of tokens show
    assert {str(span.style) for span in coloured(rendered.prompt_ids, renderer, trained=False).spans} == {"dim"}


def test_pieces_are_whole_characters_and_lose_no_token(renderer):
    rendered = renderer.render(TURNS, "naïve 🐕🐈 façade")
    found = list(pieces(rendered.ids, renderer.tokenizer))
    assert "".join(piece for _, piece in found) == renderer.tokenizer.decode(rendered.ids)
    assert not any("\ufffd" in piece for _, piece in found)


def test_colour_reaches_a_terminal(recipe, renderer, tmp_path):
    row = Example(id="abcdef", corpus="c", conversation_id="c", author="a", turns=TURNS, reply="Dogs.", outcome=1.0)
    text = printed(
        lambda console: print_views(views(row, renderer, recipe, tmp_path), renderer, console), force_terminal=True, color_system="standard"
    )  # fmt: skip
    assert "\x1b[1;37;41m<|im_end|>" in text


def test_every_kind_of_row(recipe, renderer, tmp_path):
    example = Example(id="e" * 16, corpus="c", conversation_id="c", author="a", turns=TURNS, reply=None, outcome=None)
    prompt = example.prompt()
    whole = Response(
        id="r1" * 8, prompt_id=prompt.id, n=0, text="ab", finish="stop", tokens=(300, 301, renderer.stop_id), logprob=-1.0, lineage="L", seed=0
    )  # fmt: skip
    cut = whole.model_copy(update={"id": "r2" * 8, "finish": "length", "tokens": (300, 301, 302)})
    pair = OutcomePair(id="o" * 16, corpus="c", conversation_id="c", group="g", turns=TURNS, winner="Yes.", loser="No.")
    liked = Preference(id="p" * 16, prompt=prompt, chosen=whole, rejected=cut, sources=("ai",))
    directory = open_run(recipe, tmp_path)
    for stage, file, rows in (
        ("corpus", "examples.jsonl", [example]),
        ("corpus", "outcome_pairs.jsonl", [pair]),
        ("sample", "responses.jsonl", [whole, cut]),
        ("preferences", "rlaif.jsonl", [liked]),
    ):
        directory.folder(stage).mkdir(parents=True, exist_ok=True)
        write_rows(directory.folder(stage) / file, rows)
        (directory.folder(stage) / "manifest.json").write_text("{}")
    titles = {
        row.id: [(view.title, view.rendered.reply_ids) for view in views(find_row(recipe, tmp_path, row.id), renderer, recipe, tmp_path)]
        for row in (example, pair, whole, cut, liked)
    }  # fmt: skip
    assert titles[example.id] == [("prompt, nobody replied", ())]
    assert [title for title, _ in titles[pair.id]] == ["winner", "loser"]
    assert titles[whole.id] == [("response", whole.tokens)]
    assert titles[liked.id] == [("chosen", whole.tokens), ("rejected", cut.tokens)]
    text = printed(lambda console: show(recipe, tmp_path, cut.id, console))
    assert "no stop token: it was cut off" in text
    other = whole.model_copy(update={"id": whole.id[:8] + "z" * 8})
    write_rows(directory.folder("sample") / "responses.jsonl", [whole, other])
    with pytest.raises(UsageError, match="begins several ids"):
        find_row(recipe, tmp_path, whole.id[:8])


def test_what_is_not_there_is_said(recipe, tmp_path):
    with pytest.raises(UsageError, match="no row ffffffff"):
        find_row(recipe, tmp_path, "ffffffff")
    with pytest.raises(UsageError, match="at least 4 characters"):
        find_row(recipe, tmp_path, "ab")


def test_the_plain_template_is_shown_as_it_is_trained(recipe, renderer, tmp_path):
    tokenizer = copy.deepcopy(renderer.tokenizer)
    tokenizer.chat_template = None
    plain = Renderer(tokenizer, "Be honest.")
    row = Example(id="abcdef", corpus="c", conversation_id="c", author="a", turns=TURNS, reply="Dogs.", outcome=1.0)
    text = printed(lambda console: print_views(views(row, plain, recipe, tmp_path), plain, console))
    places = [text.index(part) for part in ("[SYSTEM] Be honest.", "[CONTEXT]", "[TASK]", "[RESPONSE]", "Dogs.<|im_end|>")]
    assert places == sorted(places)
