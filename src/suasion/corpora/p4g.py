"""PersuasionForGood: what persuaders said to workers who could give to a charity (Wang et al., ACL 2019).

An example is a persuader's turn after the persuadee has spoken at least once; its context is the dialogue up to there. Roles come
from the utterances (0 persuader, 1 persuadee): a worker is the one in one dialogue and the other in the next. The author is the
persuader; the persuadee is carried along, so that pools can tell how many persuadees they share. The outcome is the persuadee's donation in dollars, capped at the two dollars that were there to give; larger figures are typing errors. No two
replies answer one context here, so there are no outcome pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from suasion.corpora.convokit import Conversation, Tally, Utterance, conversations, gone, in_order, tidy
from suasion.records import Example, OutcomePair, Turn, example_id

PAYMENT = 2.0
CHATTER = frozenset({"off-task", "greeting", "closing", "thank", "you-are-welcome"})


def extract(
    folder: Path, tally: Tally, corpus: str = "p4g", donating_only: bool = False
) -> Iterator[tuple[list[Example], list[OutcomePair]]]:
    """Yield the examples of each dialogue that is kept (its list of outcome pairs is always empty). Raises UserError for a broken corpus."""
    for conversation in conversations(folder, tally):
        examples = _examples(conversation, tally, corpus, donating_only)
        if examples is not None:
            yield examples, []


def donation(value: Any) -> float | None:
    """Dollars given, between 0 and the payment; None where the figure is missing or no number."""
    try:
        amount = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return min(max(amount, 0.0), PAYMENT) if math.isfinite(amount) else None


def is_chatter(strategies: tuple[str, ...]) -> bool:
    """Whether a turn was annotated, and every sentence of it as off-task, greeting, thanks or farewell."""
    return bool(strategies) and all(label in CHATTER for label in strategies)


def _examples(conversation: Conversation, tally: Tally, corpus: str, donating_only: bool) -> list[Example] | None:
    """The examples of a dialogue; None where the dialogue itself is dropped."""
    said = in_order(conversation.utterances)
    roles = [utterance.meta.get("role") for utterance in said]
    if any(role not in (0, 1) or isinstance(role, bool) for role in roles):
        tally.dropped["dialogue without roles"] += 1
        tally.dropped["utterance of a dialogue without roles"] += len(said)
        return None
    outcome = donation(conversation.meta.get("donation_ee"))
    tally.read["persuader turns"] += roles.count(0)
    tally.read["persuadee turns"] += roles.count(1)
    tally.read["dialogues with a donation"] += bool(outcome)
    tally.read["dialogues with strategy labels"] += any(_labels(utterance.meta) for utterance in said)
    if donating_only and not outcome:
        tally.dropped["dialogue without donation"] += 1
        tally.dropped["persuader turn in a dialogue without donation"] += roles.count(0)
        return None
    persuader = _speaker(conversation.meta.get("user_er"), said, roles, 0) or conversation.id
    persuadee = _speaker(conversation.meta.get("user_ee"), said, roles, 1)
    examples: dict[str, Example] = {}
    turns: list[Turn] = []
    for utterance, role in zip(said, roles, strict=True):
        if gone(utterance.text):
            tally.dropped["persuader turn without text" if role == 0 else "persuadee turn without text"] += 1
            continue
        if role == 0:
            strategies = _labels(utterance.meta)
            if not any(turn.role == "user" for turn in turns):
                tally.dropped["persuader turn before the persuadee has spoken"] += 1
            elif is_chatter(strategies):
                tally.dropped["off-task chatter"] += 1
            else:
                example = Example(
                    id=example_id(corpus, conversation.id, turns, utterance.text),
                    corpus=corpus,
                    conversation_id=conversation.id,
                    author=persuader,
                    persuadee=persuadee,
                    turns=tuple(turns),
                    reply=utterance.text,
                    outcome=outcome,
                    strategies=strategies,
                )
                examples[example.id] = example
        turns.append(Turn(role="assistant" if role == 0 else "user", text=utterance.text))
    return list(examples.values())


def _speaker(named: Any, said: Sequence[Utterance], roles: Sequence[Any], role: int) -> str | None:
    """Who speaks in a role: whom the dialogue's metadata name, else whoever says something in it; None if that is nobody known."""
    if isinstance(named, str) and not gone(tidy(named)):
        return tidy(named)
    return next((each.speaker for each, its in zip(said, roles, strict=True) if its == role and not gone(each.speaker)), None)


def _labels(meta: Any) -> tuple[str, ...]:
    labels = meta.get("label_1")
    return tuple(tidy(label) for label in labels if isinstance(label, str)) if isinstance(labels, list) else ()
