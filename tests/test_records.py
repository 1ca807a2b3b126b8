"""Rows at stage borders: strict, exact, and clear about what is broken and where."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suasion.errors import UserError
from suasion.records import Example, Response, RowFile, Turn, Verdict, content_id, read_json, read_rows, write_json, write_rows

labels = st.sampled_from(["a", "b", "tie", "none"])


def example(**changes) -> Example:
    values = {
        "id": "x",
        "corpus": "cmv",
        "conversation_id": "c",
        "author": "p",
        "turns": (Turn(role="user", text="hé\u2028llo"),),
        "reply": "r",
        "outcome": 1.0,
    }
    return Example(**{**values, **changes})


def test_rows_survive_the_disk(tmp_path):
    rows = [example(), example(id="y", reply=None, outcome=None)]
    assert write_rows(tmp_path / "rows.jsonl", rows) == 2
    assert list(read_rows(tmp_path / "rows.jsonl", Example)) == rows


def test_a_row_file_is_the_sequence_of_its_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [example(id=str(n), reply="é\u2028" * n) for n in range(5)]
    write_rows(path, rows)
    path.write_bytes(b"\n" + path.read_bytes().replace(b"\n", b"\n \n\n", 2))  # blank lines are no rows
    with RowFile(path, Example) as there:
        assert list(there) == [there[n] for n in range(len(there))] == rows
        assert (there[-1], there[1:3]) == (rows[-1], rows[1:3])
        with pytest.raises(IndexError):
            there[5]
    with pytest.raises(UserError, match="does not exist"):
        RowFile(tmp_path / "none.jsonl", Example)
    with RowFile(path, Response) as others, pytest.raises(UserError, match=r"rows\.jsonl, row 2: not a valid Response row"):
        others[1]


@pytest.mark.parametrize(
    "line", [b"{not json", b"[1]", b'{"id": 1}', b"\xff\xfe", b'{"a":' * 5000, b'{"x": ' + b"9" * 5000 + b"}"], ids=range(6)
)
def test_a_corrupt_line_is_named_with_file_and_number(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [example()])
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2"):
        list(read_rows(path, Example))


def test_a_row_of_another_format_version_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [example()])
    path.write_text(path.read_text().replace("example/1", "example/9"))
    with pytest.raises(UserError, match="made by another version"):
        list(read_rows(path, Example))


def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        list(read_rows(tmp_path / "none.jsonl", Example))


def test_no_half_file_is_left_when_rows_fail(tmp_path):
    def rows():
        yield example()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_rows(tmp_path / "rows.jsonl", rows())
    assert not (tmp_path / "rows.jsonl").exists()


def test_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    with pytest.raises(UserError):
        read_json(tmp_path / "x.json")


@given(label=labels, p=st.none() | st.floats(0, 1), order=st.sampled_from(["ab", "ba", "both"]))
def test_a_swap_moves_label_and_probability_together(label, p, order):
    verdict = Verdict(pair_id="p", source="s", order=order, label=label, p_a=p)
    swapped = verdict.swapped()
    assert {"a": "b", "b": "a"}.get(label, label) == swapped.label
    assert swapped.swapped().label == label
    if p is not None:
        assert swapped.p_a == 1 - p


@given(st.lists(st.text(), min_size=1, max_size=3), st.lists(st.text(), min_size=1, max_size=3))
def test_ids_come_from_content_and_separate_parts(first, second):
    if [part.replace("\x1f", "") for part in first] == first and [part.replace("\x1f", "") for part in second] == second:
        assert (content_id("k", *first) == content_id("k", *second)) == (first == second)


def test_the_prompt_does_not_depend_on_the_reply():
    assert example().prompt() == example(id="other", reply="else", outcome=0.0).prompt()
    assert example().prompt().id != example(conversation_id="d").prompt().id


def test_rows_are_immutable_and_strict():
    row = example()
    with pytest.raises(ValueError, match="frozen"):
        row.reply = "x"  # type: ignore[misc]
    with pytest.raises(ValueError, match="extra"):
        Response(id="a", prompt_id="b", n=0, text="t", finish="stop", tokens=None, logprob=None, lineage="l", seed=0, more=1)  # type: ignore[call-arg]
