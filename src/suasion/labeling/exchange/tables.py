"""CSV and Parquet: a column for each field of a label, and context, a and b."""

from __future__ import annotations

import contextlib
import csv
import json
from pathlib import Path
from typing import Any

from suasion.errors import UserError
from suasion.labeling.exchange.answers import FIELDS, Answer, Parts, messages, rest_of, temporary, turns_of
from suasion.records import canonical_json

COLUMNS = (*FIELDS, "context", "a", "b")
_FORMULA = tuple("=+-@\t\r'")  # what a spreadsheet would run, and the quote that stops it


def write_csv(answers: list[Answer], path: Path) -> list[Path]:
    """Texts that a spreadsheet would take for a formula begin with a quote, which `read_csv` takes away again."""
    with temporary(path).open("w", encoding="utf-8", newline="") as handle:
        table = csv.writer(handle)
        table.writerow(COLUMNS)
        for one in answers:
            rest = rest_of(one) | {"context": canonical_json(messages(one.turns)), "a": one.a, "b": one.b}
            cells = [rest.get(name) for name in COLUMNS]
            table.writerow("'" + cell if isinstance(cell, str) and cell.startswith(_FORMULA) else cell for cell in cells)
    return [path]


def read_csv(path: Path) -> list[Answer]:
    csv.field_size_limit(2**24)
    found: list[Answer] = []
    with path.open(encoding="utf-8-sig", newline="") as handle:
        try:
            for row in csv.DictReader(handle, strict=True):
                cells = {
                    name: cell[1:] if cell.startswith("'") and cell[1:2] in _FORMULA else cell
                    for name, cell in row.items()
                    if isinstance(name, str) and isinstance(cell, str)
                }
                found.append(_table_row(cells, f"{path}, row {len(found) + 1}"))
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a CSV file in UTF-8 ({error}).") from error
    return found


def _table_row(cells: dict[str, Any], where: str) -> Answer:
    """An answer from a table with COLUMNS, of which context, a, b and label are needed. Empty numbers are null."""
    missing = {"context", "a", "b", "label"} - set(cells)
    if missing:
        raise UserError(f"{where}: columns {', '.join(sorted(missing))} are missing.")
    rest = {name: cells[name] for name in FIELDS if cells.get(name) is not None}
    for name in ("clarity", "seconds", "task", "kind", "pair_id", "annotator", "order", "prompt_id"):
        if rest.get(name) == "":
            del rest[name]  # an empty cell says nothing
    context = cells["context"]
    if isinstance(context, str) and context.startswith("["):
        with contextlib.suppress(ValueError):  # a text that begins with a bracket stays a text
            context = json.loads(context)
    for name in ("both_bad", "off_policy"):
        if isinstance(rest.get(name), str):
            rest[name] = rest[name].lower() in ("true", "1", "yes")
    upright = rest.get("order", "ab") == "ab"
    side = {"a": "left" if upright else "right", "b": "right" if upright else "left"}.get(
        str(rest.get("label")), str(rest.get("label"))
    )
    side = "both bad" if side == "tie" and rest.get("both_bad") else side
    left, right = (cells["a"], cells["b"]) if upright else (cells["b"], cells["a"])
    return Parts(turns_of(context, where), left, right, side, str(rest.get("annotator", "imported")), rest).answer(where)


def write_parquet(answers: list[Answer], path: Path) -> list[Path]:
    import pyarrow as pa
    from pyarrow import parquet

    kinds = {"both_bad": pa.bool_(), "off_policy": pa.bool_(), "clarity": pa.int8(), "seconds": pa.float64()}
    turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
    schema = pa.schema([(name, pa.list_(turn) if name == "context" else kinds.get(name, pa.string())) for name in COLUMNS])
    rows = [rest_of(one) | {"context": messages(one.turns), "a": one.a, "b": one.b} for one in answers]
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), temporary(path))
    return [path]


def read_parquet(path: Path) -> list[Answer]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a Parquet file ({error}).") from error
    return [_table_row(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]
