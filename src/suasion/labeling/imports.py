"""Import of human preferences that were collected elsewhere, on the texts of another model.

Reads JSONL with `prompt` (the [SYSTEM] / [CONTEXT] / [TASK] template of such files), `chosen`, `rejected` and `metadata`
(conversation_id; is_equal for ties; preference "1" or "2": which response, in the order shown, was chosen). Gives Preference rows
that are off-policy and say so: no tokens, no log-probability, lineage "imported", finish "unknown".

What is kept out, and counted: ties (their chosen/rejected order means nothing), conversations that the run keeps for its final
comparison, identical texts, repeated rows. Comments in a thread carry no speaker, so they become named turns of the person to be
persuaded: a guess would put words into the persuader's mouth.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suasion.corpora.cmv import clean, clean_post
from suasion.errors import UserError
from suasion.pools import conversation_hash
from suasion.records import Preference, Prompt, Response, Turn, content_id, read_json_lines, turns_key

LINEAGE = "imported"
CUT = "[...context truncated...]"
_CONTEXT = re.compile(r"\[CONTEXT\]\n(.*?)\n*\[TASK\]", re.DOTALL)
_CUT_LINK = re.compile(r"\[([^\[\]\n]*)\]\([^()\n]*\n*" + re.escape(CUT))
_SPEAKER = re.compile(r"^(Original Post|Comment \d+): ?", re.MULTILINE)
_FINISHED = re.compile(r"[.!?…:][\"'”’)\]*_]*$|\]\([^)]*\)$")


@dataclass(frozen=True)
class Imported:
    """Decisive preferences, what was left out by reason, and how people chose: `first` of `decisive` labels took position 1."""

    preferences: list[Preference]
    dropped: dict[str, int]
    labelled: int
    ties: int
    decisive: int
    first: int
    unfinished: int


def import_preferences(path: Path, source: str, held_out: Collection[str]) -> Imported:
    """Read a labelled file. `held_out`: hashes (`suasion.pools`) of conversations that may not be trained on.

    Raises UserError with file and line for a row that does not fit.
    """
    kept: dict[str, Preference] = {}
    dropped: Counter[str] = Counter()
    labelled = ties = decisive = first = 0
    for number, row in read_json_lines(path):
        where = f"{path}, line {number}"
        prompt, chosen, rejected, metadata = read_fields(row, where)
        labelled += 1
        if metadata.get("is_equal") is True:
            ties += 1
            dropped["tie"] += 1
            continue
        choice = str(metadata.get("preference", ""))
        if choice not in ("1", "2"):
            raise UserError(
                f"{where}: metadata.preference must be 1 or 2 (it is {choice!r}), or metadata.is_equal true for a tie."
            )
        decisive += 1
        first += choice == "1"
        if conversation_hash(prompt.conversation_id) in held_out:
            dropped["held out for evaluation"] += 1
        elif not chosen or not rejected:
            dropped["empty"] += 1
        elif chosen == rejected:
            dropped["identical"] += 1
        else:
            responses = [
                _response(prompt, text, n) for n, text in enumerate((chosen, rejected) if choice == "1" else (rejected, chosen))
            ]
            won, lost = responses if choice == "1" else reversed(responses)
            preference = Preference(
                id=content_id("preference", prompt.id, won.id, lost.id),
                prompt=prompt,
                chosen=won,
                rejected=lost,
                sources=(source,),
                on_policy=False,
            )
            dropped["repeated"] += preference.id in kept
            kept.setdefault(preference.id, preference)
    rows = list(kept.values())
    unfinished = sum("unfinished" in response.flags for row in rows for response in (row.chosen, row.rejected))
    return Imported(
        rows, {key: count for key, count in sorted(dropped.items()) if count}, labelled, ties, decisive, first, unfinished
    )


def parse_context(text: str) -> tuple[Turn, ...]:
    """The thread inside a templated prompt, cleaned; empty where the template is not recognised.

    Cleaned like the corpus (`suasion.corpora.cmv`); a context that was cut at its end keeps a visible mark.
    """
    found = _CONTEXT.search(text)
    if found is None:
        return ()
    body = _CUT_LINK.sub(rf"\1\n{CUT}", found.group(1)).replace(CUT, "[...]")
    borders = list(_SPEAKER.finditer(body))
    turns = []
    for border, following in zip(borders, [*borders[1:], None], strict=True):
        post = border.group(1) == "Original Post"
        said = body[border.end() : following.start() if following else len(body)]
        said = clean_post(said) if post else clean(said)
        if said.strip("[.] "):
            turns.append(Turn(role="user", text=said, name=None if post else border.group(1)))
    return tuple(turns)


def read_fields(row: dict[str, Any], where: str) -> tuple[Prompt, str, str, dict[str, Any]]:
    """(prompt, chosen, rejected, metadata) of one row, cleaned. `where` begins the message of the UserError for a row that does not fit."""
    metadata = row.get("metadata")
    for name in ("prompt", "chosen", "rejected"):
        if not isinstance(row.get(name), str):
            raise UserError(f"{where}: '{name}' must be a text. Expected rows with prompt, chosen, rejected and metadata.")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("conversation_id"), str):
        raise UserError(f"{where}: metadata.conversation_id is missing; without it evaluation conversations cannot be kept out.")
    turns = parse_context(row["prompt"])
    if not turns:
        raise UserError(f"{where}: no '[CONTEXT] Original Post: ... [TASK]' in the prompt; other templates are not read.")
    corpus, conversation = str(metadata.get("source", "imported")), metadata["conversation_id"]
    prompt = Prompt(
        id=content_id("prompt", corpus, conversation, turns_key(turns)),
        corpus=corpus,
        conversation_id=conversation,
        author="",
        turns=turns,
    )
    return prompt, clean(row["chosen"]), clean(row["rejected"]), metadata


def _response(prompt: Prompt, text: str, n: int) -> Response:
    return Response(
        id=content_id("response", LINEAGE, prompt.id, n, text),
        prompt_id=prompt.id,
        n=n,
        text=text,
        finish="unknown",
        flags=("imported",) if _FINISHED.search(text) else ("imported", "unfinished"),
        tokens=None,
        logprob=None,
        lineage=LINEAGE,
        seed=0,
    )
