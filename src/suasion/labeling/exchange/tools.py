"""Argilla's records, Label Studio's tasks with annotations, and Potato's annotated instances."""

from __future__ import annotations

import json
import uuid
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from suasion.errors import UserError
from suasion.labeling.exchange.answers import Answer, Parts, messages, part, rest_of, temporary, turns_of, write_lines
from suasion.records import content_id, read_json, read_json_lines

LABEL_STUDIO_CONFIG = """<View>
  <Paragraphs name="prompt" value="$prompt" layout="dialogue" nameKey="role" textKey="content"/>
  <Pairwise name="preference" toName="left,right"/>
  <Text name="left" value="$left"/>
  <Text name="right" value="$right"/>
  <Choices name="neither" toName="prompt"><Choice value="tie"/><Choice value="both bad"/></Choices>
  <Rating name="clarity" toName="prompt" maxRating="3"/>
</View>"""


def _write_list(path: Path, rows: list[Any]) -> list[Path]:
    temporary(path).write_text(json.dumps(rows, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return [path]


def _read_list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} must hold a list of objects.")
    for number, row in enumerate(rows, start=1):
        yield f"{path}, record {number}", row


def write_argilla(answers: list[Answer], path: Path) -> list[Path]:
    records = []
    for one in answers:
        user = str(uuid.uuid5(uuid.NAMESPACE_URL, "suasion:" + one.label.annotator))  # Argilla's users are UUIDs
        responses: dict[str, str | int] = {"preference": one.side} if one.side != "none" else {}
        if one.label.clarity is not None:
            responses["clarity"] = one.label.clarity
        records.append(
            {
                "id": content_id("argilla", one.label.task, one.label.annotator),
                "fields": {"prompt": messages(one.turns), "left": one.left, "right": one.right},
                "metadata": rest_of(one),
                "suggestions": {},
                "responses": {name: [{"value": value, "user_id": user}] for name, value in responses.items()},
                "vectors": {},
                "_server_id": None,
            }
        )
    return _write_list(path, records)


def read_argilla(path: Path) -> list[Answer]:
    """One answer for each user who answered `preference`; a record that nobody answered is a skip if we wrote it as one."""
    found = []
    for where, record in _read_list(path):
        fields, metadata, responses = (part(record, name, where) for name in ("fields", "metadata", "responses"))
        turns, left, right = turns_of(fields.get("prompt", ""), where), fields.get("left"), fields.get("right")
        if not isinstance(left, str) or not isinstance(right, str):
            raise UserError(f"{where}: fields.left and fields.right must be texts.")
        given: dict[str, dict[str, Any]] = defaultdict(dict)
        for question in ("preference", "clarity"):
            for response in responses.get(question, []):
                given[str(response.get("user_id"))][question] = response.get("value")
        ours = str(metadata.get("annotator", ""))
        writer = str(uuid.uuid5(uuid.NAMESPACE_URL, "suasion:" + ours))
        if metadata.get("label") == "none" and not given:
            found.append(Parts(turns, left, right, "none", ours, metadata).answer(where))
        for user, values in given.items():
            if "preference" in values:
                rest = metadata if user == writer else _of_somebody_else(metadata)
                rest = {**rest, "clarity": values.get("clarity")}
                found.append(
                    Parts(turns, left, right, str(values["preference"]), ours if user == writer else user, rest).answer(where)
                )
    return found


def _of_somebody_else(rest: dict[str, Any]) -> dict[str, Any]:
    """What another person's answer on the same texts shares with ours: the pair and the order, not the time it took."""
    return {name: rest[name] for name in ("task", "kind", "pair_id", "order", "prompt_id", "off_policy") if name in rest}


def write_label_studio(answers: list[Answer], path: Path) -> list[Path]:
    tasks = []
    for number, one in enumerate(answers, start=1):
        result: list[dict[str, Any]] = []
        if one.side in ("left", "right"):
            result.append({"from_name": "preference", "to_name": "left", "type": "pairwise", "value": {"selected": one.side}})
        elif one.side != "none":
            result.append({"from_name": "neither", "to_name": "prompt", "type": "choices", "value": {"choices": [one.side]}})
        if one.label.clarity is not None:
            result.append({"from_name": "clarity", "to_name": "prompt", "type": "rating", "value": {"rating": one.label.clarity}})
        annotation = {
            "result": [{"id": f"{number}-{i}"} | region for i, region in enumerate(result)],
            "was_cancelled": one.side == "none",
            "ground_truth": False,
            "lead_time": one.label.seconds,
            "completed_by": {"email": one.label.annotator},
        }
        tasks.append(
            {
                "id": number,
                "data": {"prompt": messages(one.turns), "left": one.left, "right": one.right},
                "annotations": [annotation],
                "predictions": [],
                "meta": rest_of(one),
            }
        )
    return _write_list(path, tasks)


def read_label_studio(path: Path) -> list[Answer]:
    found = []
    for where, task in _read_list(path):
        data, meta = part(task, "data", where), part(task, "meta", where)
        left, right = data.get("left", data.get("text1")), data.get("right", data.get("text2"))
        if not isinstance(left, str) or not isinstance(right, str):
            raise UserError(f"{where}: data.left and data.right (or text1 and text2) must be texts.")
        turns = turns_of(data.get("prompt", ""), where)
        for annotation in task.get("annotations", []):
            side, clarity = "none", None
            for region in annotation.get("result", []) if not annotation.get("was_cancelled") else []:
                value = part(region, "value", where)
                if region.get("type") == "pairwise":
                    side = str(value.get("selected"))
                elif region.get("type") == "choices":
                    side = str(next(iter(value.get("choices", [])), "none"))
                elif region.get("type") == "rating":
                    clarity = value.get("rating")
            by = annotation.get("completed_by")
            who = str(by.get("email", by.get("id")) if isinstance(by, dict) else by)
            rest = meta if who == meta.get("annotator") else _of_somebody_else(meta)
            rest = {**rest, "clarity": clarity, "seconds": annotation.get("lead_time")}
            found.append(Parts(turns, left, right, side, who, rest).answer(where))
    return found


_POTATO = {"left": "A", "right": "B", "tie": "tie", "both bad": "tie"}


def write_potato(answers: list[Answer], path: Path) -> list[Path]:
    rows = []
    for one in answers:
        said: dict[str, dict[str, str]] = {} if one.side == "none" else {"preference": {"selection": _POTATO[one.side]}}
        if one.label.both_bad:
            said["both_bad"] = {"yes": "true"}
        if one.label.clarity is not None:
            said["clarity"] = {str(one.label.clarity): "true"}
        rows.append(
            {
                "user_id": one.label.annotator,
                "instance_id": one.label.task,
                "displayed_text": "\n\n".join(turn.text for turn in one.turns),
                "responses": [one.left, one.right],
                "label_annotations": said,
                "span_annotations": {},
                "suasion": rest_of(one) | {"prompt": messages(one.turns)},
            }
        )
    return [write_lines(path, rows)]


def read_potato(path: Path) -> list[Answer]:
    found = []
    for number, row in read_json_lines(path):
        where = f"{path}, line {number}"
        rest, said = dict(part(row, "suasion", where)), part(row, "label_annotations", where)
        responses = row.get("responses")
        if not isinstance(responses, list) or len(responses) != 2 or not all(isinstance(one, str) for one in responses):
            raise UserError(
                f"{where}: 'responses' must hold the two texts; Potato writes them there when the input had them (items_key)."
            )
        turns = turns_of(rest.pop("prompt", row.get("displayed_text", "")), where)
        chosen = part(said, "preference", where).get("selection")
        side = {"A": "left", "B": "right", "tie": "tie", None: "none"}.get(chosen, str(chosen))
        if side == "tie" and part(said, "both_bad", where).get("yes"):
            side = "both bad"
        who = str(row.get("user_id", "imported"))
        rest = rest if who == rest.get("annotator") else _of_somebody_else(rest)
        clarity = str(next(iter(part(said, "clarity", where)), ""))
        rest["clarity"] = int(clarity) if clarity.isdigit() else None
        found.append(Parts(turns, responses[0], responses[1], side, who, rest).answer(where))
    return found
