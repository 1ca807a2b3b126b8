"""The bench: numbers worked out by hand, rows that are missing or tied, importers on real files, and the command itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from suasion.cli import app
from suasion.errors import UsageError, UserError
from suasion.grading import bench, bench_files, bench_run, disagreements, importers, labelled
from suasion.grading.base import COIN, FIRST_POSITION, LONGER_WINS, Comparison, Judgement
from suasion.grading.features import first_words, word_count
from suasion.grading.files import load_grader
from suasion.grading.labelled import LabelledPair
from suasion.sections import grading as sections

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
GOOD = ("because the figures show it", "for example my own street", "however you may count the cost first")
BAD = ("everybody knows that", "this is just silly", "no idea what you mean", "whatever works I guess")


def pair(a: str, b: str, label: str = "a", group: str = "g", context: str = "view") -> LabelledPair:
    return LabelledPair(Comparison(context, a, b), label, group)  # type: ignore[arg-type]


def reasoned(count: int = 60) -> list[LabelledPair]:
    """Winners give reasons, at the same length as losers; labels alternate."""
    made = []
    for i in range(count):
        won, lost = f"{GOOD[i % 3]} {i}", f"{BAD[i % 4]} {i} so there"
        first, second, label = (won, lost, "a") if i % 2 else (lost, won, "b")
        made.append(pair(first, second, label, f"poster {i % 10}", f"view {i % 10}"))
    return made


class Fixed:
    """Gives prepared judgements by the first text."""

    kind, fingerprint = "fixed", "f"

    def __init__(self, said: dict[str, Judgement]):
        self.said = said

    def grade(self, items):
        return [self.said[item.a] if item.a in self.said else self.said[item.b].swapped() for item in items]


def test_numbers_by_hand():
    """Four pairs: right at .9, wrong at .8, a tie at .5, no answer; and one on which people tied."""
    pairs = [pair("a1", "b1", "a", "x"), pair("a2", "b2", "b", "x"), pair("a3", "b3", "a", "y"), pair("a4", "b4", "a", "z"), pair("a5", "b5", "tie", "z")]  # fmt: skip
    grader = Fixed(
        {
            "a1": Judgement(0.9, "a", cost=0.5),
            "a2": Judgement(0.8, "a", cost=0.25),
            "a3": Judgement(0.5, "tie"),
            "a4": Judgement(None, "none"),
            "a5": Judgement(0.7, "a"),
        }
    )
    result = bench.summarise(pairs, bench.take(grader, pairs), 0)
    assert (result["n"], result["scored"], result["missing"], result["ties"]) == (5, 3, 1, 1)
    assert result["accuracy"] == result["accuracy_equal_length"] == 0.5
    assert result["low"] <= 0.5 <= result["high"]
    assert result["brier"] == pytest.approx((0.01 + 0.64 + 0.25) / 3, abs=1e-4)
    assert result["ece"] == pytest.approx((abs(1 - 0.9) + abs(0 - 0.8) + 0) / 3, abs=1e-4)
    assert result["cost"] == 0.75
    assert (result["first_rate"], result["swap_consistency"]) == (0.5, 1.0)
    json.dumps(result, allow_nan=False)
    agreement = bench.agreement(pairs, grader.grade([one.item for one in pairs]), 0)
    assert agreement["n"] == 4
    assert agreement["table"]["tie"] == {"a": 1, "b": 0, "tie": 0}
    assert {"kappa", "gwet_ac1", "alpha", "balanced_agreement"} <= agreement.keys()


def test_nothing_scored_is_null_and_not_a_number():
    pairs = [pair("a1", "b1", "tie"), pair("a2", "b2")]
    result = bench.summarise(pairs, bench.take(Fixed({"a1": Judgement(0.9, "a"), "a2": Judgement(None, "none")}), pairs), 0)
    assert result["scored"] == 0
    assert all(result[key] is None for key in ("accuracy", "low", "high", "accuracy_equal_length", "brier", "ece"))
    json.dumps(result, allow_nan=False)


def test_baselines_are_what_they_are():
    pairs = [pair("one two three", "one", "a", "x"), pair("one", "one two", "a", "y"), pair("one two", "two one", "b", "z")]
    found = bench.baselines(pairs, 0)
    assert found["longer"]["accuracy"] == pytest.approx((1 + 0 + 0.5) / 3, abs=1e-4)
    assert found["longer"]["accuracy_equal_length"] == 0.5  # no length is left to go by
    assert (found["first"]["accuracy"], found["first"]["first_rate"], found["first"]["swap_consistency"]) == (pytest.approx(2 / 3, abs=1e-4), 1.0, 0.0)  # fmt: skip
    assert found["coin"]["swap_consistency"] == 1.0
    assert found["longer"]["length_slope"] > 0
    assert found["longer"]["length_matched_n"] == 1


def test_the_gain_over_longer_wins_is_paired_and_surer_than_two_accuracies():
    """The grader is right wherever the longer text is, and on one pair in ten besides: each draw of groups favours it, or is even."""
    pairs = [pair("one two three", f"x{i}", "b" if i % 4 == 0 else "a", f"g{i}") for i in range(80)]
    right = {i for i in range(80) if i % 4 or i % 40 == 0}
    judged = [Judgement(0.9, one.label) if i in right else Judgement(0.9, "a") for i, one in enumerate(pairs)]
    gain = bench.over_longer(pairs, judged, 0)
    assert (gain["value"], gain["n"]) == (0.025, 80)
    assert 0 <= gain["low"] <= 0.025 <= gain["high"] < 0.1
    judged[0] = Judgement(None, "none")
    assert bench.over_longer(pairs, judged, 0)["n"] == 79


def test_position_is_read_from_single_orders_where_a_grader_combines_two():
    orders = (Judgement(0.9, "a"), Judgement(0.1, "b"))  # both times the text shown first
    pairs = [pair("a1", "b1"), pair("a2", "b2")]
    said = {f"a{i}": Judgement(None, "none", outcome="flip", orders=orders) for i in (1, 2)}
    result = bench.summarise(pairs, bench.take(Fixed(said), pairs), 0)
    assert (result["first_rate"], result["swap_consistency"], result["outcomes"]["flip"]) == (1.0, 0.0, 2)


def test_the_length_slope_is_the_logistic_optimum():
    """Three pairs won by the text with e times the words, one lost by it: the penalised gradient vanishes."""
    long, short = "w " * 53, "w " * 19
    pairs = [pair(long, short)] * 4
    slope = bench.length_slope(pairs, ["a", "a", "b", "a"])
    d = math.log(54) - math.log(20)
    p = 1 / (1 + math.exp(-slope * d))
    assert 3 * d * (1 - p) - d * p - bench.SLOPE_RIDGE * slope == pytest.approx(0, abs=1e-3)
    assert bench.length_slope(pairs, ["tie"] * 4) is None
    assert bench.length_slope([pair("x y", "y x")] * 3, ["a"] * 3) is None


@given(st.lists(st.floats(0.5, 1), min_size=1, max_size=60), st.data())
def test_calibration_error_lies_between_zero_and_one_and_bins_hold_everything(confidence, data):
    correct = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=len(confidence), max_size=len(confidence))))
    bins = bench.reliability_bins(np.array(confidence), correct)
    assert sum(row["n"] for row in bins) == len(confidence)
    assert 0 <= bench.expected_calibration_error(np.array(confidence), correct) <= 1


@given(st.text(alphabet="ab .,'\n!", max_size=60), st.integers(0, 12))
def test_first_words_keeps_a_prefix_of_so_many_words(text, count):
    cut = first_words(text, count)
    assert text.startswith(cut)
    assert word_count(cut) == min(count, word_count(text))
    assert first_words(text, word_count(text)) == (text if word_count(text) else "")


@given(st.text(alphabet="ab .", max_size=40), st.text(alphabet="ab .", max_size=40))
def test_equal_length_is_equal(a, b):
    cut = pair(a, b).equal_length()
    assert word_count(cut.a) == word_count(cut.b)


def test_swapping_a_judgement_twice_gives_it_back():
    one = Judgement(0.25, "b", "r", "x", "consistent", (Judgement(0.375, "b"), Judgement(0.125, "b")), 0.1)
    assert one.swapped().swapped() == one
    assert (one.swapped().label, one.swapped().p_a, one.swapped().orders[0].p_a) == ("a", 0.75, 0.875)


# Files


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def as_row(one: LabelledPair) -> dict:
    return {"context": one.item.context, "a": one.item.a, "b": one.item.b, "label": one.label, "group": one.group}


def test_pairs_files_take_text_or_turns_and_name_the_line_of_a_fault(tmp_path):
    good = {"context": [{"role": "user", "text": "hello"}], "a": "x", "b": "y", "label": "tie", "group": 3, "note": "ignored"}
    rows = labelled.read_pairs(write_rows(tmp_path / "p.jsonl", [good, as_row(pair("s", "t"))]))
    assert rows[0].item.context == "Poster: hello"
    assert (rows[0].group, rows[0].label, rows[0].trains()) == ("3", "tie", None)
    for fault in ({"label": "A"}, {"context": 5}, {"a": None}):
        path = write_rows(tmp_path / "bad.jsonl", [good, good | fault])
        with pytest.raises(UserError, match=f"line 2.*{next(iter(fault))}"):
            labelled.read_pairs(path)
    with pytest.raises(UserError, match="holds no pairs"):
        labelled.read_pairs(write_rows(tmp_path / "empty.jsonl", []))


def test_subsets_belong_to_content_not_to_position():
    pairs = reasoned(40)
    some = labelled.drawn_by_hash(pairs, 12, 0)
    assert {one.id for one in labelled.drawn_by_hash(list(reversed(pairs)), 12, 0)} == {one.id for one in some}
    assert len(some) == 12
    with pytest.raises(UsageError):
        labelled.drawn_by_hash(pairs, 0, 0)


def test_tested_pairs_do_not_train_whichever_way_round_they_stand():
    pairs = reasoned(20)
    turned = [LabelledPair(one.item.swapped(), one.label, one.group) for one in pairs[:5]]
    assert labelled.without(pairs, turned) == pairs[5:]


NGRAM = sections.NgramGrader(kind="ngram", train=sections.PairData(kind="grader_pairs"))


def test_cross_validation_tests_nobody_on_their_own_group():
    seen = []

    class Watching:
        kind, fingerprint = "watching", "w"

        def __init__(self, pairs):
            self.groups = {one.group for one in pairs}
            self.known = {one.item.a: one.group for one in reasoned()} | {one.item.b: one.group for one in reasoned()}

        def grade(self, items):
            seen.extend(self.known.get(item.a) in self.groups for item in items if item.a in self.known)
            return LONGER_WINS.grade(items)

    taken, folds, _ = bench.cross_taken(Watching, reasoned(), 10, 0)
    assert folds == 10
    assert seen
    assert not any(seen)
    assert taken.given == LONGER_WINS.grade([one.item for one in reasoned()])
    with pytest.raises(UserError, match="one group"):
        bench.cross_taken(Watching, [pair("a", "b"), pair("c", "d")], 5, 0)


def test_a_run_of_the_bench_learns_what_is_there_to_learn():
    result, taken = bench_run.run_bench(NGRAM, reasoned(), None, 5, 0)
    assert result["accuracy"] > 0.9 > result["baselines"]["coin"]["accuracy"]
    assert (result["folds"], result["groups"], result["labels"]) == (5, 10, {"a": 30, "b": 30, "tie": 0})
    assert len(taken.given) == 60
    again, _ = bench_run.run_bench(NGRAM, reasoned(), None, 5, 0)
    timed = ("seconds", "training_seconds", "baselines")
    assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in result.items() if k not in timed}


def test_settings_that_are_chosen_inside_a_training_are_counted():
    embedding = sections.EmbeddingGrader(kind="embedding", train=NGRAM.train)
    tuned = embedding.model_copy(update={"tune": True})
    both = sections.PanelGrader(kind="panel", train=NGRAM.train, members=(tuned, NGRAM))
    assert [bench_run.configurations(one) for one in (NGRAM, embedding, tuned, both)] == [1, 1, 16, 16]


def test_shared_pairs_are_left_out_and_shared_groups_are_told(capsys):
    pairs = reasoned()
    result, _ = bench_run.run_bench(NGRAM, pairs[:20], pairs, 0, 0)
    assert (result["shared_pairs"], result["shared_groups"]) == (20, 10)
    assert "left out of training" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="--train PAIRS"):
        bench_run.run_bench(NGRAM, pairs, None, 0, 0)


def test_a_slow_grader_has_a_speed_too():
    """A reward model on a CPU scores a pair in three seconds: that is no 0 pairs a second."""
    assert [bench_files.rate(value) for value in (240 / 681.7, 4.26, 12.4, 1234.5)] == ["0.35", "4.3", "12", "1,234"]


def test_the_command_writes_what_the_design_asks_for(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [as_row(one) for one in reasoned(60)])
    test = write_rows(
        tmp_path / "test.jsonl",
        [as_row(pair(f"{GOOD[i % 3]} {i + 100}", f"{BAD[i % 4]} {i + 100}", "a", f"t{i}")) for i in range(12)],
    )
    out = tmp_path / "out"
    command = [
        "grade",
        "bench",
        "--grader",
        str(ROOT / "graders" / "ngram-own-pairs.yaml"),
        "--test",
        str(test),
        "--out",
        str(out),
    ]
    ran = CliRunner().invoke(app, [*command, "--train", str(train)], catch_exceptions=False)
    assert ran.exit_code == 0
    result = json.loads((out / "bench.json").read_text())
    keys = {"accuracy", "low", "high", "n", "scored", "accuracy_equal_length", "brier", "ece", "first_rate", "seconds"}
    assert keys <= result.keys()
    assert set(result["baselines"]) == {"longer", "first", "coin"}
    assert all(keys <= row.keys() for row in result["baselines"].values())
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == result["n"] == 12
    assert np.mean([row["right"] for row in rows]) == pytest.approx(result["accuracy"], abs=1e-4)
    assert (out / "reliability.svg").read_text().startswith("<?xml")
    said, balanced = " ".join(ran.output.split()), result["agreement"]["balanced_agreement"]
    assert f"agreement with the labels on 12 pairs, {result['agreement']['both_decisive']} of them decided by both: raw" in said
    shown = "-" if balanced is None else f"{balanced['value']:.2f} ({balanced['low']:.2f} to {balanced['high']:.2f})"
    assert f"position-balanced {shown}, kappa" in said
    page = (out / "bench.md").read_text()
    assert "suasion grade bench --grader ngram-own-pairs.yaml --train train.jsonl --test test.jsonl --out out\n" in page
    assert str(tmp_path) not in page
    assert f"| accuracy | {result['accuracy']:.1%} | {result['baselines']['longer']['accuracy']:.1%} |" in page
    for measure in ("at equal length", "matched in length", "Brier", "ECE", "first position", "length slope", "cost", "seconds"):
        assert f"\n| {measure}" in page
    assert "one configuration" in page
    assert "](reliability.svg)" in page
    for wrong in (["--folds", "1"], ["--folds", "5", "--train", str(train)], ["--limit", "0", "--train", str(train)]):
        with pytest.raises(UsageError):
            CliRunner().invoke(app, [*command, *wrong], catch_exceptions=False)


def test_the_page_of_disagreements_shows_markup_as_text_and_the_surest_error_first():
    pairs = [pair("<script>alert(1)</script>", "fine", "b", "g1"), pair("first", "second", "b", "g2"), pair("c", "d", "a", "g3")]
    judged = [Judgement(0.6, "a"), Judgement(0.99, "a"), Judgement(0.9, "a")]
    page = disagreements.disagreements_page(pairs, judged, "test")
    assert "<script>" not in page
    assert page.index("first") < page.index("&lt;script&gt;")
    assert "2 of 3 pairs" in page


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kind: nothing\n", "Kinds: embedding"),
        ("kind: ngram\ntrain: {kind: ukp}\n", "needs a path"),
        ("- a\n", "mapping"),
        ("a: [\n", "YAML"),
    ],
)
def test_faulty_grader_files_are_refused_in_words(tmp_path, text, told):
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(UsageError, match=told):
        load_grader(tmp_path / "g.yaml")


# Importers


def test_bundled_outcome_pairs_have_no_favoured_position_and_the_same_bytes(tmp_path):
    counts = importers.write_pairs(tmp_path / "one.jsonl", importers.cmv_rows("bundled"))
    importers.write_pairs(tmp_path / "two.jsonl", importers.cmv_rows("bundled"))
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    assert counts["pairs"] == counts["a"] + counts["b"] == 234
    assert 0.4 < counts["a"] / counts["pairs"] < 0.6
    rows = labelled.read_pairs(tmp_path / "one.jsonl")
    assert len({row.group for row in rows}) == counts["groups"] > 50


def test_real_ukp_pairs_keep_their_order_and_have_32_or_16_groups(tmp_path):
    folder = DATA / "ukpconvarg1"
    if not folder.is_dir():
        pytest.skip("../shared/data/ukpconvarg1 is not there")
    sides = importers.write_pairs(tmp_path / "p.jsonl", importers.ukp_rows(folder, "side"))
    assert (sides["pairs"], sides["groups"]) == (11650, 32)
    lines = (folder / sorted(file.name for file in folder.glob("*.csv"))[0]).read_text(encoding="utf-8").split("\n")
    published = [line.split("\t")[1] for line in lines if line and not line.startswith("#")]
    first = labelled.read_pairs(tmp_path / "p.jsonl")[: len(published)]
    assert [f"{row.label}" for row in first] == [label.replace("a1", "a").replace("a2", "b") for label in published]
    assert len({row.group for row in importers.ukp_rows(folder, "topic")}) == 16


def test_real_human_labels_keep_ties_and_the_order_that_people_saw(tmp_path):
    file = DATA / "persuasion-rl-labels" / "human_pool_labeled.jsonl"
    if not file.is_file():
        pytest.skip("../shared/data/persuasion-rl-labels is not there")
    counts = importers.write_pairs(tmp_path / "p.jsonl", importers.read_label_source(file))
    assert (counts["pairs"], counts["a"], counts["b"], counts["tie"]) == (189, 100, 60, 29)
    pairs = labelled.read_pairs(tmp_path / "p.jsonl")
    found = bench.summarise(pairs, bench.take(FIRST_POSITION, pairs), 0)
    assert (found["accuracy"], found["scored"]) == (0.625, 160)
    assert bench.agreement(pairs, COIN.grade([one.item for one in pairs]), 0)["n"] == 189


def test_labels_without_a_choice_and_folders_that_are_no_run_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no run directory"):
        list(importers.read_label_source(tmp_path))
    row = {
        "prompt": "[CONTEXT]\nOriginal Post: a view\n[TASK]\n",
        "chosen": "x",
        "rejected": "y",
        "metadata": {"conversation_id": "c"},
    }
    with pytest.raises(UserError, match="preference must be 1 or 2"):
        list(importers.label_rows(write_rows(tmp_path / "l.jsonl", [row])))
    with pytest.raises(UserError, match="no pairs in this source"):
        importers.write_pairs(tmp_path / "none.jsonl", iter(()))
