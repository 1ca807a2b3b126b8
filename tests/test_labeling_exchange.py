"""Labels in the formats of other tools: what goes out comes back, and what others wrote is read for what it says."""

from __future__ import annotations

import csv
import json
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_run import make_run, sampled_pairs
from typer.testing import CliRunner

from suasion.cli import app
from suasion.errors import UserError
from suasion.evaluation.summary import ModelVerdict
from suasion.labeling import exchange
from suasion.labeling.events import HumanLabel
from suasion.labeling.exchange.answers import Answer
from suasion.labeling.exchange.trl import rest_file
from suasion.labeling.server import open_desk
from suasion.labeling.transfer import collect, take_in, verdicts
from suasion.records import Example, Turn, Verdict, read_json, read_json_lines, read_rows, write_json, write_rows

DATA = Path(__file__).parents[2] / "shared" / "data" / "persuasion-rl-labels" / "human_pool_labeled.jsonl"
TEXT = st.text(max_size=40) | st.sampled_from(["=1+1", "'=1", "''", '\r\n,"x"', "[1]", "  ", "\x00", "-", "@a", "None", "\ufeff"])
NAME = st.text(string.ascii_lowercase + string.digits + "-", min_size=1, max_size=12).map(lambda text: "a" + text)


@st.composite
def an_answer(draw) -> Answer:
    label = draw(st.sampled_from(["a", "b", "tie", "none"]))
    return Answer(
        label=HumanLabel(
            task=draw(NAME), kind=draw(st.sampled_from(["first", "second", "gold", "attention"])), pair_id=draw(NAME), annotator=draw(NAME),
            order=draw(st.sampled_from(["ab", "ba"])), label=label, both_bad=label == "tie" and draw(st.booleans()),
            clarity=None if label == "none" else draw(st.sampled_from([None, 1, 2, 3])), seconds=draw(st.none() | st.floats(0, 1e6)), reason=draw(TEXT), guideline=draw(TEXT),
            origin=draw(TEXT), off_policy=draw(st.booleans()), at=draw(TEXT),
        ),
        prompt_id=draw(NAME),
        turns=tuple(draw(st.lists(st.builds(Turn, role=st.sampled_from(["user", "assistant"]), text=TEXT, name=st.none() | TEXT), min_size=1, max_size=3))),
        a=draw(TEXT), b=draw(TEXT),
    )  # fmt: skip


def plain(answers: list[Answer]) -> list[str]:
    return sorted(one.model_dump_json() for one in answers)


@pytest.mark.parametrize("layout", exchange.FORMATS)
@settings(max_examples=30)
@given(answers=st.lists(an_answer(), max_size=5))
def test_what_goes_out_comes_back(tmp_path_factory, layout, answers):
    path = tmp_path_factory.mktemp("exchange") / "labels.x"
    files = exchange.write(answers, path, layout)
    assert set(path.parent.iterdir()) == set(files)
    assert plain(exchange.read(path, layout)) == plain(answers)


def without(answer: Answer, *fields: str) -> Answer:
    """An answer whose label has only the default in these fields."""
    blank = {"pair_id": "", "off_policy": False}
    return answer.model_copy(update={"label": answer.label.model_copy(update={name: blank[name] for name in fields})})


@pytest.fixture
def run(tmp_path):
    """A run of six pairs with a decisive label on each side, a tie, a both bad and a skip."""
    folder = make_run(tmp_path, sampled_pairs(6), overlap=0)
    desk = open_desk(folder)
    who = desk.store.add_annotator("Ann Example")
    desk.store.new_token(who, "session")
    for n, choice in enumerate(("left", "right", "tie", "bad", "skip")):
        shown = desk.next(who)
        desk.answer(
            who, shown.task.id, choice, None if choice == "skip" else 2, 1.5, str(n), "It upsets me" if choice == "skip" else ""
        )
    desk.store.close()
    return folder


def label(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["label", *arguments])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


@pytest.mark.parametrize("layout", exchange.FORMATS)
def test_from_run_to_run(run, tmp_path, layout):
    """Labels move to a copy of the run and count there; to another run they are off-policy, and stay so when they are exported again."""
    file = tmp_path / "labels"
    assert "5 answers (2 ties, 1 skips, 0 off-policy)" in label("export", str(run), "--format", layout, "--out", str(file))
    copy = make_run(tmp_path / "copy", sampled_pairs(6), overlap=0)
    assert "5 labels on this run's pairs, 0 off-policy" in label("import", str(copy), str(file), "--format", layout)
    assert "0 labels on this run's pairs, 0 off-policy (0 ties). 5 were there" in label(
        "import", str(copy), str(file), "--format", layout
    )
    there, here = open_desk(copy), open_desk(run)
    assert plain(collect(there)) == plain(collect(here))
    assert (here.missing(), there.missing()) == (
        1,
        2,
    )  # a skip is an answer once all who may label have skipped; nobody may there
    other = make_run(tmp_path / "other", sampled_pairs(3, ("One.", "Two.")), overlap=0)
    assert "0 labels on this run's pairs, 5 off-policy (2 ties)" in label("import", str(other), str(file), "--format", layout)
    assert "0 off-policy (0 ties). Off" not in label("import", str(other), str(file), "--format", layout)
    elsewhere = open_desk(other)
    assert elsewhere.missing() == 3
    assert "5 answers (2 ties, 1 skips, 5 off-policy)" in label("export", str(other), "--format", layout, "--out", str(file))
    back = exchange.read(file, layout)
    assert all(one.label.off_policy for one in back)
    # Pair ids of the other run mean other texts there, so that the imported pairs have new ones.
    assert plain([without(one, "pair_id", "off_policy") for one in back]) == plain(
        [without(one, "pair_id", "off_policy") for one in collect(here)]
    )


def test_names_stay_at_home(run, tmp_path):
    for layout in exchange.FORMATS:
        file = tmp_path / "labels"
        label("export", str(run), "--format", layout, "--out", str(file))
        assert b"Ann Example" not in file.read_bytes()


def test_trl_trains_on_decisive_labels_only(run, tmp_path):
    """The files load as TRL's own data sets do; ties and skips are no preferences."""
    from datasets import load_dataset
    from trl.data_utils import is_conversational

    for layout, rows, rest in (("trl-preference", 2, 3), ("trl-kto", 6, 2)):
        file = tmp_path / f"{layout}.jsonl"
        label("export", str(run), "--format", layout, "--out", str(file))
        data = load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
        assert len(data) == rows
        assert is_conversational(data[0])
        assert len(list(read_json_lines(rest_file(file)))) == rest
    kto = [row["label"] for _, row in read_json_lines(tmp_path / "trl-kto.jsonl")]
    assert sorted(kto) == [False] * 4 + [True] * 2  # both bad: two responses that nobody should give
    desk = open_desk(run)
    decisive = [one for one in collect(desk) if one.label.label in ("a", "b")]
    for one, (_, row) in zip(decisive, read_json_lines(tmp_path / "trl-preference.jsonl"), strict=True):
        assert row["chosen"][0]["content"] == (one.a if one.label.label == "a" else one.b)
    exchange.write(decisive, tmp_path / "trl-preference.jsonl", "trl-preference")
    assert not rest_file(tmp_path / "trl-preference.jsonl").exists()  # the ties of an older export would be read with it


def test_a_swapped_pair_keeps_its_winner(run, tmp_path):
    """Another tool may list our texts in the other order."""
    answers = collect(open_desk(run))
    turned = [
        one.model_copy(update={"a": one.b, "b": one.a, "label": one.label.model_copy(update={
            "label": {"a": "b", "b": "a"}.get(one.label.label, one.label.label), "order": "ba" if one.label.order == "ab" else "ab"})})
        for one in answers
    ]  # fmt: skip
    desk = open_desk(make_run(tmp_path / "copy", sampled_pairs(6), overlap=0))
    assert take_in(desk, turned).own == 5
    assert plain(collect(desk)) == plain(answers)


def test_labels_of_somebody_erased_do_not_come_back(run, tmp_path):
    file = tmp_path / "labels.csv"
    label("export", str(run), "--format", "csv", "--out", str(file))
    label("erase", str(run), "annotator-1", "--yes")
    assert "5 were left out: their annotator was erased" in label("import", str(run), str(file), "--format", "csv")
    assert collect(open_desk(run)) == []


def test_the_real_labels_come_in_with_their_ties(run, tmp_path):
    if not DATA.is_file():
        pytest.skip("../shared/data/persuasion-rl-labels is not there")
    said = label("import", str(run), str(DATA), "--format", "trl-preference")
    assert "189 answers read: 0 labels on this run's pairs, 189 off-policy (29 ties)" in said
    assert "189 were there already" in label("import", str(run), str(DATA), "--format", "trl-preference")
    desk = open_desk(run)
    imported = [given.label for given in desk.refresh().imported]
    assert sum(one.label == "tie" for one in imported) == 29
    assert all(one.off_policy for one in imported)
    assert sum(one.label == ("a" if one.order == "ab" else "b") for one in imported) == 100  # the first position
    assert desk.missing() == 1  # none of them counts as a label on this run's pairs
    for layout in exchange.FORMATS:
        file = tmp_path / "labels"
        assert "(31 ties, 1 skips, 189 off-policy)" in label("export", str(run), "--format", layout, "--out", str(file))
        assert plain(exchange.read(file, layout)) == plain(collect(desk))


# What others write


def test_argilla_records_of_somebody_else(tmp_path):
    """`dataset.records.to_json` of Argilla 2.8, answered by two users of which neither is ours."""
    record = {
        "id": "7", "fields": {"prompt": [{"role": "user", "content": "Tea is best."}], "left": "Coffee.", "right": "Water."}, "metadata": {},
        "suggestions": {}, "responses": {"preference": [{"value": "right", "user_id": "u1"}, {"value": "tie", "user_id": "u2"}],
                                         "clarity": [{"value": 3, "user_id": "u1"}]}, "vectors": {}, "_server_id": "x",
    }  # fmt: skip
    file = tmp_path / "records.json"
    file.write_text(json.dumps([record]))
    one, two = exchange.read(file, "argilla")
    assert (one.label.label, one.label.clarity, one.a, one.b) == ("b", 3, "Coffee.", "Water.")
    assert (two.label.label, two.label.clarity) == ("tie", None)
    assert one.label.annotator != two.label.annotator
    assert one.label.pair_id == two.label.pair_id


def test_label_studio_tasks_of_its_own_template(tmp_path):
    """The pairwise template names its texts text1 and text2; people are numbers or addresses, and addresses are nobody's business."""
    task = {
        "id": 1, "data": {"prompt": "Tea is best.", "text1": "Coffee.", "text2": "Water."},
        "annotations": [
            {"completed_by": {"email": "ann@example.org"}, "was_cancelled": False, "lead_time": 12.5,
             "result": [{"type": "pairwise", "from_name": "pw", "to_name": "text1", "value": {"selected": "left"}}]},
            {"completed_by": 3, "was_cancelled": True, "lead_time": 2, "result": []},
        ],
    }  # fmt: skip
    file = tmp_path / "tasks.json"
    file.write_text(json.dumps([task]))
    one, two = exchange.read(file, "label-studio")
    assert (one.label.label, one.label.seconds, one.turns[0].text) == ("a", 12.5, "Tea is best.")
    assert two.label.label == "none"
    assert "ann" not in one.label.annotator.removeprefix("imported-")


def test_the_label_studio_config_names_what_tasks_hold(run, tmp_path):
    from xml.etree import ElementTree

    from suasion.labeling.exchange.tools import LABEL_STUDIO_CONFIG

    tags = {tag.get("name"): tag for tag in ElementTree.fromstring(LABEL_STUDIO_CONFIG).iter() if tag.get("name")}
    exchange.write(collect(open_desk(run)), tmp_path / "tasks.json", "label-studio")
    for task in read_json(tmp_path / "tasks.json"):
        for tag in tags.values():
            assert tag.get("value", "$left").removeprefix("$") in task["data"]
        for region in task["annotations"][0]["result"]:
            assert tags[region["from_name"]].tag.lower() == region["type"]
            assert region["to_name"] in tags[region["from_name"]].get("toName").split(",")


def test_potato_lines_of_its_own_page(tmp_path):
    line = {"user_id": "ann", "instance_id": "1", "displayed_text": "Tea is best.", "responses": ["Coffee.", "Water."],
            "label_annotations": {"preference": {"selection": "B"}}, "span_annotations": {}}  # fmt: skip
    file = tmp_path / "annotated_instances.jsonl"
    file.write_text(json.dumps(line) + "\n")
    (one,) = exchange.read(file, "potato")
    assert (one.label.label, one.label.annotator, one.b) == ("b", "ann", "Water.")


def test_a_bare_table_is_enough(tmp_path):
    file = tmp_path / "labels.csv"
    file.write_text("context,a,b,label\nTea is best.,Coffee.,Water.,b\n")
    (one,) = exchange.read(file, "csv")
    assert (one.label.label, one.turns, one.label.off_policy) == ("b", (Turn(role="user", text="Tea is best."),), True)


def test_answers_of_a_second_person_are_second_labels(tmp_path):
    """Of a table that knows no tasks: 4 pairs, 2 of them planned twice. The same answers again change nothing, a third person's are kept."""
    pairs = sampled_pairs(4, ("One.", "Two."), (("user", "Trams"),))
    folder = make_run(tmp_path, pairs, overlap=0.5)
    file = tmp_path / "labels.csv"

    def table(*people: str) -> str:
        desk = open_desk(folder)
        lines = ["context,a,b,label,annotator"]
        for who in people:
            for number, item in enumerate(desk.work.items[task.pair_id] for task in desk.work.planned if task.kind == "first"):
                lines.append(f'"{item.turns[0].text}","{item.a}","{item.b}",{"ab"[number % 2]},{who}')
        desk.store.close()
        file.write_text("\n".join(lines) + "\n")
        return label("import", str(folder), str(file), "--format", "csv")

    def missing() -> int:
        desk = open_desk(folder)
        try:
            return desk.missing()
        finally:
            desk.store.close()

    assert missing() == 6
    assert "4 labels on this run's pairs" in table("ann")
    assert missing() == 2
    assert "0 labels on this run's pairs, 0 off-policy (0 ties). 4 were there" in table("ann")
    assert "4 labels on this run's pairs" in table("ann", "bob")
    assert missing() == 0
    assert "0 labels on this run's pairs" in table("bob", "ann")
    assert "4 labels on this run's pairs" in table("cas")
    assert missing() == 0
    both = make_run(tmp_path / "both", pairs, overlap=0.5)
    file.write_text(file.read_text().replace(",cas", ",ann") + file.read_text().partition("\n")[2].replace(",cas", ",bob"))
    assert "8 labels on this run's pairs" in label("import", str(both), str(file), "--format", "csv")
    folder = both
    assert missing() == 0


def test_no_cell_is_a_formula(tmp_path, run):
    answers = [
        one.model_copy(update={"a": '=HYPERLINK("http://evil.example")', "b": "@SUM(1)"}) for one in collect(open_desk(run))
    ]
    exchange.write(answers, tmp_path / "labels.csv", "csv")
    with (tmp_path / "labels.csv").open(newline="") as handle:
        assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for row in csv.reader(handle) for cell in row)
    assert plain(exchange.read(tmp_path / "labels.csv", "csv")) == plain(answers)


@pytest.mark.parametrize(
    ("layout", "content", "message"),
    [
        ("trl-preference", '{"prompt": "x", "chosen": "y"}', "line 1: a response must be a text"),
        ("trl-preference", "{", "line 1: not valid JSON"),
        ("trl-kto", '{"prompt": "x", "completion": "y", "label": true}', "judge one response each"),
        ("argilla", "{}", "must hold a list"),
        ("argilla", '[{"fields": {"left": 1}}]', "record 1: fields.left"),
        ("label-studio", '[{"data": {}}]', "record 1: data.left"),
        ("potato", '{"responses": ["x"]}', "line 1: 'responses' must hold the two texts"),
        ("csv", "context,a\nx,y\n", "row 1: columns b, label are missing"),
        ("csv", "context,a,b,label\nx,y,z,c\n", "row 1: label: Input should be"),
        ("csv", "context,a,b,label,order\nx,y,z,a,up\n", "row 1: order: Input should be"),
        ("parquet", "no table", "is not a Parquet file"),
    ],
)
def test_broken_files_are_named(tmp_path, layout, content, message):
    file = tmp_path / "labels"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        exchange.read(file, layout)


def test_half_a_kto_pair_is_no_preference(run, tmp_path):
    file = tmp_path / "labels.jsonl"
    exchange.write(
        [one for one in collect(open_desk(run)) if one.label.label == "a"][:1] or collect(open_desk(run))[:1], file, "trl-kto"
    )
    lines = file.read_text().splitlines()
    file.write_text(lines[0] + "\n")
    with pytest.raises(UserError, match="the other response of this pair is missing"):
        exchange.read(file, "trl-kto")


def test_people_compare_finished_models_blind_and_their_verdicts_are_evaluates(tmp_path):
    """Each model beside base and sft on every sealed prompt; nobody sees names until the last label, and then the rows are evaluate's own."""
    pairs = sampled_pairs(3)
    run = make_run(tmp_path, pairs)
    evaluated = run / "09-evaluate"
    evaluated.mkdir()
    models = {"base": "hash-base", "sft": "hash-sft", "rlhf": "hash-rlhf"}
    write_rows(run / "02-pools" / "eval.jsonl", [
        Example(id=f"e{n}", corpus=one.prompt.corpus, conversation_id=one.prompt.conversation_id, author="x", turns=one.prompt.turns, reply="r", outcome=1.0)
        for n, one in enumerate(pairs)
    ])  # fmt: skip
    prompts = [example.prompt().id for example in read_rows(run / "02-pools" / "eval.jsonl", Example)]
    write_rows(evaluated / "responses.jsonl", [
        one.a.model_copy(update={"id": f"{name}{n}", "prompt_id": prompts[n], "lineage": lineage, "text": f"What {name[::-1]} says, {n}."})
        for name, lineage in models.items() for n, one in enumerate(pairs)
    ])  # fmt: skip
    write_json(evaluated / "models.json", {"models": models})
    write_json(evaluated / "manifest.json", {})
    desk = open_desk(run, "evaluation")
    assert desk.store.path.name == "labels-evaluation.db"
    assert len({task.pair_id for task in desk.work.planned}) == 9
    who = desk.store.add_annotator("")
    desk.store.new_token(who, "session")
    said = {}
    while (shown := desk.next(who)) is not None:
        if len(said) == 8:
            with pytest.raises(UserError, match="still missing; until they are there nobody sees"):
                verdicts(desk, run)
        rank = [next(n for n, name in enumerate(("esab", "tfs", "fhlr")) if name in text) for text in (shown.left, shown.right)]
        choice = "left" if rank[0] < rank[1] else "right"  # the reference always wins
        desk.answer(who, shown.task.id, choice, 3, 5.0, shown.task.id)
        said[shown.task.pair_id] = choice
    desk.store.close()
    file = tmp_path / "verdicts.jsonl"
    label("export", str(run), "--format", "verdicts", "--purpose", "evaluation", "--out", str(file))
    rows = list(read_rows(file, ModelVerdict))
    assert {(row.first, row.second) for row in rows} == {("base", "sft"), ("base", "rlhf"), ("sft", "rlhf")}
    assert {row.prompt_id for row in rows} == set(prompts)
    assert all(row.label == "a" for row in rows)
    printed = label("status", str(run), "--purpose", "evaluation")
    assert "rlhf against sft: 0.00" in printed


def test_exported_verdicts_are_what_a_recipe_reads(run, tmp_path):
    file = tmp_path / "verdicts.jsonl"
    label("export", str(run), "--format", "verdicts", "--out", str(file))
    said = [row.label for row in read_rows(file, Verdict)]
    assert len(said) == 5
    assert said.count("tie") == 2
    assert said.count("none") == 1
    done = CliRunner().invoke(app, ["label", "import", str(run), str(file), "--format", "verdicts"])
    assert done.exit_code != 0
