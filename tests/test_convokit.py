"""The reader: whatever a corpus looks like, it gives the same conversations, a counted drop, or an error with file and line."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from suasion.corpora.convokit import Tally, ancestors, conversations, gone, in_order, read_utterances, tidy
from suasion.errors import UserError


def utterance(
    identity: str, conversation: str, speaker: str = "a", text: str | None = "words", reply_to: str | None = None, **meta: Any
) -> dict[str, Any]:
    return {"id": identity, "conversation_id": conversation, "speaker": speaker, "text": text, "reply_to": reply_to, "meta": meta}


def write(folder: Path, rows: list[dict[str, Any]], metas: dict[str, Any] | None = None, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "utterances.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    metas = {row["conversation_id"]: {"meta": {}} for row in rows if "conversation_id" in row} if metas is None else metas
    for name, value in {"conversations": metas, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def read(folder: Path, **options: Any) -> tuple[list[tuple[str, list[str]]], Tally]:
    tally = Tally()
    return [(c.id, sorted(c.utterances)) for c in conversations(folder, tally, **options)], tally


def dropped(tally: Tally) -> dict[str, int]:
    return {reason: count for reason, count in tally.dropped.items() if count}


def test_conversations_are_whole_and_sorted(tmp_path: Path) -> None:
    rows = [utterance("b1", "b"), utterance("a1", "a"), utterance("b2", "b", reply_to="b1"), utterance("a2", "a", reply_to="a1")]
    found, tally = read(write(tmp_path, rows, speakers={"a": {}, "b": {}, "c": {}}))
    assert found == [("a", ["a1", "a2"]), ("b", ["b1", "b2"])]
    assert tally.read["utterances"] == 4
    assert tally.read["conversations"] == 2
    assert tally.read["speakers"] == 3
    assert dropped(tally) == {}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(30)), bucket_bytes=st.sampled_from([200, 1000, 10**9]))
def test_neither_row_order_nor_buckets_change_what_is_read(tmp_path: Path, order: list[int], bucket_bytes: int) -> None:
    rows = [utterance(f"u{i}", f"c{i % 7}", text=f"text {i}", role=i % 2, nested={"list": [1, None, 2.5]}) for i in range(30)]
    folder = write(tmp_path, [rows[i] for i in order])
    tally = Tally()
    found = {c.id: {u.id: (u.text, u.meta) for u in c.utterances.values()} for c in conversations(folder, tally, bucket_bytes)}
    assert found == {f"c{k}": {f"u{i}": (f"text {i}", rows[i]["meta"]) for i in range(k, 30, 7)} for k in range(7)}


def test_old_versions_name_things_otherwise(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "root": 7, "user": "ann", "text": "hello"},
        {"id": 8, "root": 7, "user": "ben", "text": "hi", "reply-to": 7},
    ]
    folder = write(tmp_path, rows, metas={"7": {"op-title": "a title"}}, users={"ann": {}, "ben": {}})
    tally = Tally()
    (conversation,) = conversations(folder, tally)
    assert conversation.id == "7"
    assert conversation.meta == {"op-title": "a title"}
    assert [(u.id, u.speaker, u.reply_to) for u in conversation.utterances.values()] == [("7", "ann", None), ("8", "ben", "7")]
    assert tally.read["speakers"] == 2


def test_odd_rows_are_counted(tmp_path: Path) -> None:
    rows = [
        utterance("1", "c"),
        utterance("1", "c", text="the same id again"),
        {"text": "no id", "conversation_id": "c"},
        {"id": "lost", "text": "no conversation", "reply_to": "1"},
        utterance("2", "c", text=None),
        utterance("3", "c", reply_to="3"),
        {"id": "4", "conversation_id": "c", "speaker": None, "text": "x", "reply_to": "1", "meta": "not an object"},
    ]
    found, tally = read(write(tmp_path, rows, metas={"c": {"meta": {}}, "empty": {"meta": {}}}))
    assert found == [("c", ["1", "2", "3", "4"])]
    assert dropped(tally) == {
        "utterance id used twice": 1,
        "utterance without id": 1,
        "utterance without conversation": 1,
        "conversation without utterances": 1,
    }
    assert tally.read["utterances without text"] == 1
    assert tally.read["utterances that reply to themselves"] == 1


def test_pickled_metadata_is_reported_and_never_opened(tmp_path: Path) -> None:
    index = {"utterances-index": {"parsed": ["bin"], "role": ["<class 'int'>"]}, "conversations-index": {"blob": "bin"}}
    folder = write(tmp_path, [utterance("1", "c", parsed="<##bin{0}&&@**>", role=0)], index=index)
    (folder / "parsed-utterance-bin.p").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    tally = Tally()
    (conversation,) = conversations(folder, tally)
    assert tally.binary_fields == ("conversations.blob", "utterances.parsed")
    assert conversation.utterances["1"].meta == {"role": 0}


def test_paths_of_replies(tmp_path: Path) -> None:
    rows = [utterance("r", "c"), utterance("a", "c", reply_to="r"), utterance("b", "c", reply_to="a")]
    rows += [utterance("x", "c", reply_to="y"), utterance("y", "c", reply_to="x"), utterance("o", "c", reply_to="gone")]
    (conversation,) = conversations(write(tmp_path, rows), Tally())
    paths = {identity: ancestors(conversation.utterances, identity) for identity in conversation.utterances}
    assert ([u.id for u in paths["b"][0]], paths["b"][1]) == (["r", "a"], "")
    assert paths["r"] == ([], "")
    assert paths["x"][1] == paths["y"][1] == "cycle of replies"
    assert paths["o"] == ([], "missing parent")


def test_dialogues_follow_their_replies_and_else_the_file(tmp_path: Path) -> None:
    rows = [utterance("3", "c", reply_to="2"), utterance("1", "c"), utterance("2", "c", reply_to="1")]
    (conversation,) = conversations(write(tmp_path / "chain", rows), Tally())
    assert [u.id for u in in_order(conversation.utterances)] == ["1", "2", "3"]
    rows[0]["reply_to"] = "1"  # a fork
    (conversation,) = conversations(write(tmp_path / "fork", rows), Tally())
    assert [u.id for u in in_order(conversation.utterances)] == ["3", "1", "2"]


def test_tidy() -> None:
    assert tidy("caf\u0065\u0301\r\nx\u00a0y\u200b\ufeff \x00\ud800z ") == "caf\u00e9\nx y ?z"
    assert all(map(gone, ["", "  ", "[deleted]", "[Removed]", "[missing]"]))
    assert not gone("deleted")


@pytest.mark.parametrize("line", ['{"id": "1"', "[1, 2]", "nonsense", '"text"'])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    folder = write(tmp_path, [utterance("1", "c")])
    with (folder / "utterances.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=r"utterances\.jsonl, line 2"):
        list(conversations(folder, Tally()))


def test_a_folder_that_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        list(conversations(tmp_path / "nowhere", Tally()))
    with pytest.raises(UserError, match=r"utterances\.jsonl is missing"):
        list(conversations(tmp_path, Tally()))
    (tmp_path / "utterances.jsonl").write_text("")
    (tmp_path / "conversations.json").write_text("[]")
    with pytest.raises(UserError, match="must hold an object"):
        list(conversations(tmp_path, Tally()))
    (tmp_path / "conversations.json").write_text("{")
    with pytest.raises(UserError, match=r"conversations\.json is not valid JSON"):
        list(conversations(tmp_path, Tally()))


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        folder = tmp_path / str(count)
        folder.mkdir()
        with (folder / "utterances.jsonl").open("w") as file:
            for i in range(count):
                file.write(json.dumps(utterance(str(i), f"c{i // 10}", text=f"{i} " + "word " * 40)) + "\n")
        (folder / "conversations.json").write_text("{}")
        tracemalloc.start()
        total = sum(len(c.utterances) for c in conversations(folder, Tally(), bucket_bytes=200_000))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert total == count
        return size

    assert peak(12_000) < 1.5 * peak(3_000)


def test_reading_is_lazy(tmp_path: Path) -> None:
    folder = write(tmp_path, [utterance("1", "c")])
    with (folder / "utterances.jsonl").open("a") as file:
        file.write("broken\n")
    assert next(read_utterances(folder, Tally())).id == "1"
