"""The benchmark of the reader: its corpora have the proportions they claim, its rows are the right ones, its command runs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from suasion.records import Response

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIZE = 6_000


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


synthetic, corpus, sampling, training = script("synthetic"), script("corpus"), script("sampling"), script("training")
batch_sizes = script("batch_sizes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "one"
    synthetic.make(folder, SIZE)
    return folder


def read(folder: Path) -> tuple[list[dict], dict[str, dict]]:
    rows = [json.loads(line) for line in (folder / "utterances.jsonl").read_text(encoding="utf-8").splitlines()]
    return rows, {key: value["meta"] for key, value in json.loads((folder / "conversations.json").read_text()).items()}


def test_a_size_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    assert not synthetic.is_made(tmp_path / "two", SIZE)
    synthetic.make(tmp_path / "two", SIZE)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert synthetic.is_made(folder, SIZE)
    assert not synthetic.is_made(folder, SIZE + 1)


def test_proportions_are_those_of_the_full_corpus(folder: Path) -> None:
    rows, metas = read(folder)
    full, share = synthetic.FULL, SIZE / synthetic.FULL["utterances"]
    assert len(rows) == len({row["id"] for row in rows}) == SIZE
    assert len(metas) == round(full["conversations"] * share)
    assert len(json.loads((folder / "speakers.json").read_text())) == round(full["speakers"] * share)
    own = Counter(
        (row["meta"]["success"], row["speaker"] == metas[row["conversation_id"]]["op-userID"])
        for row in rows
        if row["meta"]["success"] is not None
    )
    assert own == {
        (1, False): round(synthetic.WON["challenger"] * share),
        (1, True): round(synthetic.WON["poster"] * share),
        (0, False): round(synthetic.LOST["challenger"] * share),
        (0, True): round(synthetic.LOST["poster"] * share),
    }
    pairs = {pair for row in rows for pair in row["meta"]["pair_ids"]}
    assert len(pairs) == round(full["train pairs"] * share) + round(full["held-out pairs"] * share)
    missing = [row for row in rows if row["speaker"] == "[missing]"]
    assert [row["text"] for row in missing] == [None] * round(full["missing"] * share)
    lengths = sorted(len(row["text"]) for row in rows if row["reply_to"] and row["text"] and not row["text"].startswith("["))
    assert 0.9 < lengths[len(lengths) // 2] / synthetic.COMMENT[0] < 1.1
    assert synthetic.WON["challenger"] + synthetic.WON["poster"] == 12_420
    assert synthetic.LOST["challenger"] + synthetic.LOST["poster"] == 7_294
    assert synthetic.WON["poster"] + synthetic.LOST["poster"] == 8_694


def test_replies_stand_below_what_they_answer(folder: Path) -> None:
    rows, _ = read(folder)
    seen: dict[str, str] = {}
    for row in rows:
        parent = row["reply_to"]
        assert (parent is None) == (row["id"] == row["conversation_id"])
        assert parent is None or seen[parent] == row["conversation_id"]
        seen[row["id"]] = row["conversation_id"]


def test_our_side_gives_post_path_and_comment(folder: Path) -> None:
    rows, metas = read(folder)
    by_id = {row["id"]: row for row in rows}
    wanted = corpus.Rows()
    for row in rows:
        if row["meta"]["success"] is not None and row["speaker"] != metas[row["conversation_id"]]["op-userID"]:
            parts: list[str] = []
            at = row
            while at:
                parts = [at["id"], at["text"] or "", *parts]
                at = by_id.get(at["reply_to"])
            wanted.add(metas[row["conversation_id"]]["op-title"], *parts)
    found = corpus.read_ours(folder)
    assert found["rows"] == wanted.count > 200
    assert found["hash"] == wanted.report()["hash"]


def test_rows_are_compared_in_any_order_and_word_for_word() -> None:
    one, other, third = corpus.Rows(), corpus.Rows(), corpus.Rows()
    one.add("a", "b")
    one.add("c")
    other.add("c")
    other.add("a", "b")
    third.add("c")
    third.add("ab")
    assert one.report() == other.report() != third.report()
    assert not corpus.differ({"ours": one.report(), "convokit": other.report()})
    assert corpus.differ({"ours": one.report(), "convokit": third.report()})
    assert not corpus.differ({"ours": one.report(), "convokit": None})


def test_tables_show_ratios_and_a_loader_that_ran_out_of_memory() -> None:
    ours = {"rows": 5, "wall": 2.0, "cpu": 2.0, "peak_mb": 100.0}
    theirs = {"rows": 5, "wall": 12.0, "cpu": 12.0, "peak_mb": 800.0}
    (read,) = corpus.tables({"read": {1000: {"ours": ours, "convokit": theirs}, 9000: {"ours": ours, "convokit": None}}})
    assert "| 1,000 | ours | 5 | 2.0 | 2.0 | 500 | 100 | 6.0 | 0.12 |" in read
    assert "| 9,000 | convokit | out of memory |" in read
    (stages,) = corpus.tables({"stages": {10: {"corpus": ours, "pools": ours}, 100: {"corpus": theirs, "pools": ours}}})
    assert "| 100 | corpus | 5 | 12.0 | 8 | 800 | 6.00 | 8.00 |" in stages


def test_the_command(tmp_path: Path) -> None:
    """Both sizes of our side, each in its process; ConvoKit's environment is not there, and that is said."""
    environment = {**os.environ, "SUASION_CACHE": str(tmp_path)}
    done = subprocess.run(
        [
            sys.executable,
            str(BENCHMARKS / "corpus.py"),
            "--only",
            "read",
            "--sizes",
            "600",
            "1200",
            "--out",
            str(tmp_path / "x.json"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "no ConvoKit" in done.stderr
    assert re.search(r"\| 1,200 \| ours \| \d+ \|", done.stdout)
    assert (tmp_path / "x.md").read_text() == done.stdout
    measured = json.loads((tmp_path / "x.json").read_text())["read"]
    assert measured["1200"]["ours"]["rows"] > measured["600"]["ours"]["rows"] > 0
    assert measured["600"]["ours"]["imports_mb"] <= measured["600"]["ours"]["peak_mb"] < 300


def sampling_options(folder: Path, **more: object) -> argparse.Namespace:
    settings = {"prompts": 2, "context": 16, "new_tokens": 4, "batch_size": 4, "device": "cpu", "model": "tiny", "threads": 1}
    return argparse.Namespace(**{**settings, "out": folder, "sides": ["ours"], "child": None, "corpus": folder, **more})


def test_measurements_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    sampling.check_settings(sampling_options(tmp_path))
    sampling.check_settings(sampling_options(tmp_path, sides=["one"]))  # another side of the same comparison
    with pytest.raises(SystemExit, match="holds measurements with other settings"):
        sampling.check_settings(sampling_options(tmp_path, new_tokens=5))


def test_measurements_of_trainings_are_not_mixed_either(tmp_path: Path) -> None:
    training.check_settings(tmp_path, model="tiny", pairs=2)
    training.check_settings(tmp_path, model="tiny", pairs=2)
    with pytest.raises(SystemExit, match="holds measurements with other settings"):
        training.check_settings(tmp_path, model="bundled", pairs=2)


def test_a_report_on_trainings_that_are_not_measured_yet_says_so_and_makes_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["training.py", "--out", str(tmp_path / "none"), "--report"])
    with pytest.raises(SystemExit, match="none holds no finished measurement"):
        training.main()
    assert not (tmp_path / "none").exists()


def test_an_interrupted_side_goes_on_after_its_last_whole_batch(tmp_path: Path) -> None:
    options, worked = sampling_options(tmp_path), []

    def work(batch: int) -> list[tuple[int, int]]:
        worked.append(batch)
        return [(10, batch)]

    sampling.run_batches(options, "ours", [1, 2, 3], work, 0)
    path = tmp_path / "ours.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:20])
    worked.clear()
    sampling.run_batches(options, "ours", [1, 2, 3], work, 0)
    assert worked == [0, 2, 3]  # warmed up, then what was missing
    assert [row["rows"] for row in sampling.measured(options, "ours")] == [[[10, 1]], [[10, 2]], [[10, 3]]]
    worked.clear()
    sampling.run_batches(options, "ours", [1, 2, 3], work, 0)
    assert worked == []


def test_sides_are_compared_by_tokens_a_second(tmp_path: Path) -> None:
    for side, seconds, tokens in (("ours", 2.0, 4), ("one", 6.0, 3)):
        row = {"seconds": seconds, "cpu": 1.0, "peak_mb": 100.0, "rows": [[10, tokens], [10, 1]]}
        (tmp_path / f"{side}.jsonl").write_text(json.dumps(row) + "\n")
    table = sampling.tables(sampling_options(tmp_path))[1]
    ours, one = (next(line for line in table.splitlines() if line.startswith(f"| {side} |")) for side in ("ours", "one"))
    assert ours.split("|")[5:7] == [" 2.5 ", " 50% "]
    assert one.split("|")[5] == " 0.7 "
    assert one.split("|")[8] == " 3.75 "


def test_responses_of_two_batch_sizes_are_compared_draw_by_draw() -> None:
    def said(n: int, tokens: tuple[int, ...], seed: int = 1) -> Response:
        return Response(id=f"{n}", prompt_id="p", n=n, text="", finish="stop", tokens=tokens, logprob=0.0, lineage="l", seed=seed)

    ours = [said(n, (n, 7)) for n in range(4)]
    line = batch_sizes.row("float32", 8, 32, ours, [*ours[:3], said(3, (3, 8))])
    assert line == "| float32 | 8, 32 | 4 | 8 | 1 | 4 |"
    assert batch_sizes.row("float32", 8, 32, ours, ours).endswith("| 0 | none in 4 |")
    with pytest.raises(ValueError, match="not the same draws"):
        batch_sizes.row("float32", 8, 32, ours, [*ours[:3], said(3, (3, 7), seed=2)])


def test_predictions_stand_beside_what_a_machine_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model has the shape that was asked for, and the table both numbers; a machine without a GPU makes no table."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    prediction = script("prediction")
    from suasion.machines import load_machines
    from suasion.prediction import Shape

    shape = Shape(parameters=280_000, layers=2, width=32, inner=48, vocabulary=4_500, cache_width=32, tables=2)
    options = (
        "model.max_length=320",
        "corpus.context_tokens=96",
        "sample.max_new_tokens=32",
        "corpus.reply_tokens=[10,32]",
        "sample.batch_size=3",
        "model.device=cpu",
    )
    made = []
    original = prediction.make_model

    def keep(shape: object, folder: Path) -> None:
        original(shape, folder)
        made.append(json.loads((folder / "config.json").read_text()))

    monkeypatch.setattr(prediction, "make_model", keep)
    recipe, found = prediction.measured(shape, 0.2, options)
    assert {key: made[0][key] for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "tie_word_embeddings")} == {
        "hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 1, "tie_word_embeddings": False
    }  # fmt: skip
    lines = prediction.rows("x", "g5.xlarge", load_machines().machines["g5.xlarge"], shape, recipe, found)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[2] for row in cells] == [
        "reading, tokens/s",
        "training, tokens/s",
        "writing, tokens/s",
        "training, GiB",
        "writing, GiB",
    ]
    for row in cells:
        quotient = float(row[4]) / float(row[3])  # of numbers of four digits, beside two decimals of the real one
        assert float(row[5]) == pytest.approx(quotient, rel=0, abs=0.005 + 0.0011 * quotient)
    assert float(cells[1][4]) == pytest.approx(found.train, rel=1e-3)
    monkeypatch.setattr(prediction.torch.cuda, "is_available", lambda: False)
    assert prediction.main(["--machine", "p5.4xlarge"]) == 1
    assert prediction.main(["--machine", "none"]) == 2
    assert "|" not in capsys.readouterr().out


@pytest.mark.slow
def test_the_sampling_benchmark_runs_whole_on_the_tiny_model(tmp_path: Path) -> None:
    """Every side in a process of its own: half a minute on two idle cores."""
    command = [
        sys.executable,
        str(BENCHMARKS / "sampling.py"),
        "--out",
        str(tmp_path / "out"),
        "--model",
        "tiny",
        "--prompts",
        "4",
    ]
    command += ["--context", "24", "--new-tokens", "5", "--batch-size", "4", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for side in sampling.SIDES:
        rows = [row for batch in sampling.measured(sampling_options(tmp_path / "out"), side) for row in batch["rows"]]
        assert rows == [[24, 5]] * 8
        assert f"| {side} |" in done.stdout
    assert "of the limit is reached" in done.stdout
