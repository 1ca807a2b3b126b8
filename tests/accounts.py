"""What was read of a corpus equals what was kept and what was dropped by reason, unit by unit, whatever the corpus holds."""

from __future__ import annotations

from typing import Any

from suasion.corpora.stats import CONVERSATIONS, PAIRS, PROMPTS, REPLIES, source_stats, unit


def assert_they_add_up(kind: str, counts: dict[str, Any]) -> None:
    """counts: one source's part of counts.json; kind: of the source, as in a recipe."""
    read, kept, dropped = counts["read"], counts["kept"], counts["dropped"]

    def lost(what: str, *without: str) -> int:
        return sum(count for reason, count in dropped.items() if unit(reason) == what and reason not in without)

    def of(*names: str) -> int:
        return sum(read.get(name, 0) for name in names)

    nowhere = "conversation without utterances"
    assert of("conversations") == kept.get(CONVERSATIONS, 0) + lost(CONVERSATIONS, nowhere)
    assert of("outcome pairs") == kept.get(PAIRS, 0) + lost(PAIRS)
    replies, prompts = kept.get("examples", 0) + lost(REPLIES), kept.get(PROMPTS, 0) + lost(PROMPTS)
    own = "rows" in read
    if kind == "cmv":
        labelled = {
            success: sum(count for reason, count in dropped.items() if f"comment with success {success}" in reason)
            for success in (0, 1)
        }
        assert replies == of("winning comments") + labelled[1]
        assert prompts == of("conversations") - sum(count for reason, count in dropped.items() if reason.startswith("post "))
        comments = of("winning comments", "losing comments", "comments without an outcome") + sum(labelled.values())
        assert of("utterances") == of("posts") + comments + lost("utterances")
    elif kind == "p4g":
        assert replies == of("persuader turns")
        assert prompts == 0
        assert of("utterances") == of("persuader turns", "persuadee turns") + lost("utterances")
    else:
        assert own
        assert of("rows") == of("examples", "outcome pairs", "prompts without reply")
        assert (replies, prompts) == (of("examples"), of("prompts without reply"))
    stats = source_stats(kind, counts)
    for funnel in stats.funnels:
        assert funnel.offered == funnel.kept + sum(each.count for each in funnel.dropped)
    shown = {each.reason: each.count for funnel in stats.funnels for each in funnel.dropped}
    assert shown == dropped  # nothing is left out of what `corpus stats` shows
