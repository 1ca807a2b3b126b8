"""Human labels in the formats of other tools, in both directions and without loss.

One `Answer` is one person's answer with the texts it is about. `write` and `read` turn answers into a file and back:

| format | one row is | what the format has no place for |
|---|---|---|
| `trl-preference` | a decisive label: prompt, chosen, rejected (conversational) | ties and skips: in NAME.rest.jsonl beside the file |
| `trl-kto` | one response of a decisive label, or of a "both bad": prompt, completion, label | other ties and skips: likewise |
| `argilla` | a record (JSON list, as `dataset.records.to_json` writes it) | nothing: metadata |
| `label-studio` | a task with one annotation (JSON list), for LABEL_STUDIO_CONFIG | nothing: `meta` |
| `potato` | a line of annotated_instances.jsonl, pairwise scheme in binary mode | nothing: one more key |
| `csv`, `parquet` | a table with a column for each field | nothing |

Whatever the format's own fields say counts; what they cannot say stands beside them in metadata under the key or columns named in
FIELDS. So an exported file can be labelled further elsewhere, and a file that never was here can be read too. TRL drops the column
`metadata`. Ties never become a chosen and a rejected text, and labels on another model's texts carry off_policy true everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from suasion.errors import UserError
from suasion.labeling.exchange.answers import Answer, temporary
from suasion.labeling.exchange.tables import read_csv, read_parquet, write_csv, write_parquet
from suasion.labeling.exchange.tools import (
    read_argilla,
    read_label_studio,
    read_potato,
    write_argilla,
    write_label_studio,
    write_potato,
)
from suasion.labeling.exchange.trl import read_kto, read_preference, write_kto, write_preference


@dataclass(frozen=True)
class Format:
    write: Callable[[list[Answer], Path], list[Path]]
    read: Callable[[Path], list[Answer]]
    suffix: str


FORMATS = {
    "trl-preference": Format(write_preference, read_preference, ".jsonl"),
    "trl-kto": Format(write_kto, read_kto, ".jsonl"),
    "argilla": Format(write_argilla, read_argilla, ".json"),
    "label-studio": Format(write_label_studio, read_label_studio, ".json"),
    "potato": Format(write_potato, read_potato, ".jsonl"),
    "csv": Format(write_csv, read_csv, ".csv"),
    "parquet": Format(write_parquet, read_parquet, ".parquet"),
}


def write(answers: Iterable[Answer], path: Path, layout: str) -> list[Path]:
    """Write answers in one of FORMATS, each file by rename. Returns the files: a second one where the format cannot hold them all."""
    _known(layout)
    files = FORMATS[layout].write(list(answers), path)
    for file in files:
        temporary(file).replace(file)
    return files


def read(path: Path, layout: str) -> list[Answer]:
    """Read a file of one of FORMATS, with its NAME.rest.jsonl where there is one. Raises UserError with the place of a row that does not fit."""
    _known(layout)
    if not path.is_file():
        raise UserError(f"{path} does not exist. Check the path.")
    return FORMATS[layout].read(path)


def _known(layout: str) -> None:
    if layout not in FORMATS:
        raise UserError(f"there is no format {layout!r}. Choose one of: {', '.join(FORMATS)}.")
