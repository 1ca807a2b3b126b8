"""TRL's preference and KTO formats (conversational). Answers that they cannot hold stand in NAME.rest.jsonl beside the file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from suasion.corpora.cmv import clean
from suasion.errors import UserError
from suasion.labeling.exchange.answers import Answer, Parts, completion, messages, part, rest_of, turns_of, write_lines
from suasion.records import Turn, canonical_json, read_json_lines


def rest_file(path: Path) -> Path:
    """Where the answers stand that a TRL file cannot hold."""
    return path.with_name(path.stem + ".rest.jsonl")


def _write_with_rest(path: Path, rows: Iterable[Any], rest: list[Answer]) -> list[Path]:
    files = [write_lines(path, rows)]
    if rest:
        files.append(write_lines(rest_file(path), (answer.model_dump(mode="json") for answer in rest)))
    else:
        rest_file(path).unlink(missing_ok=True)  # of an earlier export: it would be read together with this one
    return files


def _read_rest(path: Path) -> list[Answer]:
    found = []
    file = rest_file(path)
    for number, row in read_json_lines(file) if file.is_file() else ():
        try:
            found.append(Answer.model_validate(row))
        except ValidationError as error:
            raise UserError(f"{file}, line {number}: no answer that suasion wrote ({error.errors()[0]['msg']}).") from error
    return found


def write_preference(answers: list[Answer], path: Path) -> list[Path]:
    decisive = [one for one in answers if one.label.label in ("a", "b")]
    rows = []
    for one in decisive:
        chosen, rejected = (one.a, one.b) if one.label.label == "a" else (one.b, one.a)
        rows.append(
            {
                "prompt": messages(one.turns),
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "metadata": rest_of(one),
            }
        )
    return _write_with_rest(path, rows, [one for one in answers if one not in decisive])


def read_preference(path: Path) -> list[Answer]:
    found = []
    for number, row in read_json_lines(path):
        where = f"{path}, line {number}"
        metadata = part(row, "metadata", where)
        chosen, rejected = completion(row.get("chosen"), where), completion(row.get("rejected"), where)
        if "pair_id" in metadata:
            chosen_left = (metadata.get("label") == "a") == (metadata.get("order", "ab") == "ab")
            side = "left" if chosen_left else "right"
        else:  # another's file: metadata.preference may say which position was chosen, metadata.is_equal that it was a tie
            chosen, rejected = clean(chosen), clean(rejected)
            chosen_left = str(metadata.get("preference", "1")) != "2"
            side = "tie" if metadata.get("is_equal") is True else "left" if chosen_left else "right"
            source = str(metadata.get("grader", "imported"))
            metadata = {"annotator": source, "origin": "import"}
        left, right = (chosen, rejected) if chosen_left else (rejected, chosen)
        turns = turns_of(row.get("prompt"), where)
        found.append(Parts(turns, left, right, side, str(metadata.get("annotator", "imported")), metadata).answer(where))
    return found + _read_rest(path)


def write_kto(answers: list[Answer], path: Path) -> list[Path]:
    rows, rest = [], []
    for one in answers:
        if one.side in ("tie", "none"):
            rest.append(one)
            continue
        for letter, text in (("a", one.a), ("b", one.b)):
            rows.append(
                {
                    "prompt": messages(one.turns),
                    "completion": [{"role": "assistant", "content": text}],
                    "label": one.label.label == letter,
                    "metadata": rest_of(one) | {"response": letter},
                }
            )
    return _write_with_rest(path, rows, rest)


def read_kto(path: Path) -> list[Answer]:
    """Two rows of one answer belong together; a row alone says nothing of a pair."""
    halves: dict[str, dict[str, tuple[str, bool]]] = defaultdict(dict)
    parts: dict[str, tuple[str, tuple[Turn, ...], dict[str, Any]]] = {}
    for number, row in read_json_lines(path):
        where = f"{path}, line {number}"
        metadata = dict(part(row, "metadata", where))
        letter = metadata.pop("response", None)
        if letter not in ("a", "b") or not isinstance(row.get("label"), bool) or "pair_id" not in metadata:
            raise UserError(
                f"{where}: KTO rows judge one response each; only those that suasion exported (metadata.pair_id and metadata.response) say "
                "which two belong together."
            )
        key = canonical_json(metadata)
        while letter in halves[key]:  # the same answer twice in a file is two answers
            key += "'"
        halves[key][letter] = completion(row.get("completion"), where), row["label"]
        parts[key] = where, turns_of(row.get("prompt"), where), metadata
    found = []
    for key, (where, turns, metadata) in parts.items():
        if set(halves[key]) != {"a", "b"}:
            raise UserError(f"{where}: the other response of this pair is missing from the file.")
        (a, a_good), (b, b_good) = halves[key]["a"], halves[key]["b"]
        if a_good and b_good:
            raise UserError(f"{where}: both responses of this pair are labelled true; that is no preference.")
        upright = metadata.get("order", "ab") == "ab"
        side = "both bad" if not (a_good or b_good) else "left" if a_good == upright else "right"
        left, right = (a, b) if upright else (b, a)
        found.append(Parts(turns, left, right, side, str(metadata.get("annotator", "imported")), metadata).answer(where))
    return found + _read_rest(path)
