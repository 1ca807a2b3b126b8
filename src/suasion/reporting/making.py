"""How a run was made, as a paper shows it: data, labels, preferences and the evaluation grader, each in one compact table.

Reads the corpus stage's counts.json and the facts that the stages left in evaluate's summary.json. Old or foreign runs may
lack any of them: a cell without its fact says "not recorded", a table without any says so in its place. `recorded` keeps
every fact, one a row, for the page's folded part and the CSV files.
"""

from __future__ import annotations

from typing import Any

from suasion.evaluation import wording
from suasion.evaluation.summary import simulated_models
from suasion.grading.canaries import THRESHOLDS, failing
from suasion.labeling.annotator import SOURCE
from suasion.pools import EVAL_PERSUADING, EVAL_SHARED
from suasion.recipe import Recipe
from suasion.reporting.canaries import canaries_table
from suasion.reporting.table import Column, Table, flat
from suasion.sections.grading import LlmGrader, learns_from
from suasion.sections.training import DpoArm

MISSING: Any = object()  # None is a fact of its own: a rate of nothing
NOT_RECORDED = "not recorded"
RECORDED = ("counts", "labels", "preference_facts", "grader")  # the tables of `recorded`
FLIPS = {"drop": "no label", "tie": "a tie", "soft": "what the mean probability says"}
LEFT_OUT_OTHERWISE = ("none", "identical", "unlabelled")


def making(corpus_counts: Any, facts: dict[str, Any], recipe: Recipe, names: dict[str, str]) -> tuple[Table, ...]:
    """The compact tables. names: model -> its label on the page."""
    corpora = {name: known for name, known in mapping(corpus_counts).items() if isinstance(known, dict)}
    return (
        _corpora(corpora),
        _dropped(corpora),
        _pools(corpora, mapping(facts, "counts", "pools"), recipe),
        _sources(facts, recipe.human_labels.source.kind == "simulated"),
        _orders(facts, recipe),
        _preferences(facts, recipe, names),
        _judge(mapping(facts, "grader")),
        canaries_table(mapping(facts, "labels", "ai"), mapping(facts, "grader"), recipe),
    )


def recorded(corpus_counts: Any, facts: dict[str, Any], simulated: bool, names: dict[str, str]) -> tuple[Table, ...]:
    """Every fact about data, labels, preferences and grader as (name, value) rows."""
    key_value = (Column("what", "What", "long"), Column("value", "Value", "long"))
    labels = {wording.source_label(source, simulated): known for source, known in sorted(mapping(facts, "labels").items())}
    preferences = mapping(facts, "preferences")
    arms = {names.get(arm, arm): known for arm, known in mapping(preferences, "arms").items()}

    def rows(value: Any) -> list[dict[str, Any]]:
        return [{"what": what, "value": fact} for what, fact in flat(value)]

    return (
        Table("counts", "Data", "", key_value, rows({"corpus": corpus_counts}) + rows(facts.get("counts") or {})),
        Table(
            "labels",
            "Labels",
            "",
            (Column("source", "Source"), *key_value),
            [{"source": source, **row} for source, known in labels.items() for row in rows(known)],
        ),
        Table("preference_facts", "Preferences", "", key_value, rows({**preferences, "arms": arms} if preferences else {})),
        Table("grader", "Evaluation grader", "", key_value, rows(facts.get("grader") or {})),
    )


def judge_sentence(facts: dict[str, Any]) -> str:
    """What the evaluation grader is and how far to trust it; '' where nothing is known of it."""
    known = mapping(facts, "grader")
    if not known:
        return ""
    name = f"The evaluation grader ({known['name']})" if known.get("name") else "The evaluation grader"
    accuracy = _estimate(known, "accuracy")
    if not isinstance(accuracy, dict):
        return f"{name}: its accuracy is {NOT_RECORDED}."
    pairs, groups = number(known, "n"), number(known, "groups")
    of = (f" of {pairs:,} held-out pairs" if _known(pairs) else " of held-out pairs") + (
        f" from {groups:,} groups" if _known(groups) else ""
    )
    text = f"{name} names the winner in {_with_interval(accuracy)}{of}"
    longer = _estimate(known, "longer", "longer_low", "longer_high")
    if isinstance(longer, dict):
        text += f"; “the longer text wins” is right in {_with_interval(longer)} of the same pairs"
    same = known.get("same_as_labelling_grader")
    other = {True: " It is also the grader that labelled.", False: " It is not the grader that labelled."}
    return f"{text}.{other[same] if isinstance(same, bool) else ''}"


def source_name(source: str, simulated: bool) -> str:
    """A label source as the page calls it: verdicts of the simulated annotator carry the source "simulated"."""
    return wording.source_label("human" if simulated and source == SOURCE else source, simulated)


def at(facts: Any, *path: str) -> Any:
    """The value under nested keys, MISSING where a key is absent or leads into something that has no keys."""
    for key in path:
        if not isinstance(facts, dict) or key not in facts:
            return MISSING
        facts = facts[key]
    return facts


def mapping(facts: Any, *path: str) -> dict[str, Any]:
    """The dictionary under nested keys, empty where there is none."""
    value = at(facts, *path)
    return value if isinstance(value, dict) else {}


def number(facts: Any, *path: str) -> Any:
    """The number or None under nested keys, MISSING where there is something else or nothing."""
    value = at(facts, *path)
    return value if value is None or (isinstance(value, int | float) and not isinstance(value, bool)) else MISSING


def _known(value: Any) -> bool:
    return value is not MISSING and value is not None


def _row(**cells: Any) -> dict[str, Any]:
    """A row without the cells of which nothing is recorded."""
    return {key: value for key, value in cells.items() if value is not MISSING}


def _estimate(facts: Any, value: str = "value", low: str = "low", high: str = "high") -> Any:
    """An estimate of three keys; None or MISSING where its value is."""
    rate, low, high = number(facts, value), number(facts, low), number(facts, high)
    if not _known(rate):
        return rate
    return (
        {"value": rate, "low": low, "high": high} if _known(low) and _known(high) else {"value": rate, "low": None, "high": None}
    )


def _with_interval(estimate: dict[str, Any]) -> str:
    bounds = "" if estimate["low"] is None else f" ({wording.interval(estimate['low'], estimate['high'])})"
    return wording.percent(estimate["value"]) + bounds


def _corpora(corpora: dict[str, Any]) -> Table:
    rows = []
    for name, known in corpora.items():
        utterances, own = number(known, "read", "utterances"), number(known, "read", "rows")
        kept = at(known, "kept")
        kept = {"examples": 0, "outcome pairs": 0, **kept} if isinstance(kept, dict) else {}  # a counter leaves zeros out
        spread = {key: number(known, "tokens", "reply", key) for key in ("p50", "p05", "p95")}
        rows.append(
            _row(
                corpus=name,
                utterances=own if utterances is MISSING else utterances,
                conversations=number(known, "read", "conversations"),
                examples=number(kept, "examples"),
                pairs=number(kept, "outcome pairs"),
                tokens=spread if all(map(_known, spread.values())) else MISSING,
                longer=number(known, "longer_wins_rate"),
            )
        )
    own_rows = (
        " The project's own rows count as utterances." if any("rows" in mapping(k, "read") for k in corpora.values()) else ""
    )
    return Table(
        "corpora",
        "What was read and kept",
        "Example: a context and the human reply to it. Outcome pair: two replies to one context, of which one persuaded. Reply "
        "tokens: of the kept examples, median and 5th to 95th percentile. Longer side wins: share of the kept pairs whose winner "
        f"has more tokens.{own_rows}",
        (
            Column("corpus", "Corpus"),
            Column("utterances", "Utterances read", "count"),
            Column("conversations", "Conversations read", "count"),
            Column("examples", "Examples kept", "count"),
            Column("pairs", "Outcome pairs kept", "count"),
            Column("tokens", "Reply tokens", "spread"),
            Column("longer", "Longer side wins", "percent"),
        ),
        rows,
        NOT_RECORDED,
    )


def _dropped(corpora: dict[str, Any]) -> Table:
    rows: list[dict[str, Any]] = []
    for name, known in corpora.items():
        reasons = at(known, "dropped")
        if not isinstance(reasons, dict):
            rows.append({"corpus": name})
        elif not reasons:
            rows.append({"corpus": name, "reason": "nothing", "rows": 0})
        else:
            counts = {reason: number(reasons, reason) for reason in reasons}
            ranked = sorted(counts, key=lambda reason: (-counts[reason] if _known(counts[reason]) else 0, reason))
            rows += [_row(corpus=name, reason=reason, rows=counts[reason]) for reason in ranked]
    return Table(
        "dropped",
        "What was dropped, and why",
        "",
        (Column("corpus", "Corpus"), Column("reason", "Reason", "long"), Column("rows", "Rows", "count")),
        rows,
        NOT_RECORDED,
    )


def _pools(corpora: dict[str, Any], known: dict[str, Any], recipe: Recipe) -> Table:
    """One row a pool, and one for each set of outcome pairs that graders learn from."""
    by_corpus = mapping(known, "corpora")
    names = sorted({name for counts in by_corpus.values() for name in mapping(counts)}) or list(corpora)
    uses = {
        "sft": "trains sft",
        "rlaif": "pairs for AI labels",
        "rlhf": "pairs for AI labels" if wording.imported_texts(recipe) else "pairs for human and AI labels",
        "eval": "sealed, for the comparison",
    }
    rows = [
        _row(
            pool=pool,
            rows=number(known, "sizes", pool),
            use=use,
            **{f"{name}_rows": number(dict.fromkeys(names, 0) | counts, name) for name in names if counts},
        )
        for pool, use in uses.items()
        for counts in [mapping(by_corpus, pool)]
    ]
    with_pairs = [name for name, known in corpora.items() if _known(n := number(known, "kept", "outcome pairs")) and n > 0]
    graders = {"labelling": recipe.ai_labels.grader, "evaluation": recipe.evaluate.grader}
    learners = {name: data.kind for name, grader in graders.items() if (data := learns_from(grader)) is not None}
    for kind in ("grader_pairs", "judge_pairs"):
        count = number(known, kind)
        taught = [name for name, taught_on in learners.items() if taught_on == kind]
        sure = len(with_pairs) == 1 and with_pairs[0] in names  # else the facts do not say which corpus the pairs are from
        only = {f"{name}_rows": count if name in with_pairs else 0 for name in names} if sure else {}
        use = f"outcome pairs, train the {' and the '.join(taught)} grader" if taught else "outcome pairs, not used"
        rows.append(_row(pool=kind, rows=count, use=use, **only))
    notes = []
    if _known(groups := number(known, "components")):
        notes.append(f"Conversations that share an author or a near-duplicate text stay in one pool ({groups:,} groups).")
    if _known(left := number(known, "leftover_conversations")):
        notes.append(f"{left:,} conversation{'s are' if left != 1 else ' is'} in none.")
    won, asked = number(known, "eval_replies_that_persuaded"), number(known, "sizes", "eval")
    if _known(won) and _known(asked) and won < asked:
        notes.append(f"Of the {asked:,} human replies in eval {won:,} are known to have persuaded; there were no more.")
    people = mapping(known, "persuadees")
    several, of, other = (number(people, *path) for path in ((EVAL_SHARED,), ("in", "eval"), (EVAL_PERSUADING,)))
    if all(map(_known, (several, of, other))):
        notes.append(
            f"Pools are apart by persuader only: of the {of:,} persuadees of eval, {several:,} are persuaded in another pool as well "
            f"and {other:,} persuade in one."
        )
    return Table(
        "pools",
        "The pools",
        " ".join(notes),
        (
            Column("pool", "Pool"),
            Column("rows", "Rows", "count"),
            *(Column(f"{name}_rows", name, "count") for name in names),
            Column("use", "Used as", "long"),
        ),
        rows if known else [],
        NOT_RECORDED,
    )


def _sources(facts: dict[str, Any], simulated: bool) -> Table:
    """One row a source and pool where the pools are told apart, else one row a source."""
    rows, notes = [], []
    for side, known in sorted(mapping(facts, "labels").items()):
        by_pool = mapping(known, "pools") or {"": known}
        for pool, counts in by_pool.items():
            rows.append(
                _row(
                    source=source_name(at(known, "source") if isinstance(at(known, "source"), str) else side, simulated),
                    pool=f"{pool} pool" if pool else _labelled_texts(side, known),
                    n=number(counts, "n"),
                    ties=number(counts, "ties"),
                    none=number(counts, "none"),
                    first=_rate(counts, "first_rate"),
                    longer=_rate(counts, "longer_rate"),
                    length=_rate(counts, "length_predicts"),
                    accuracy=None if side == "human" else _estimate(mapping(known, "cross_validation"), "accuracy"),
                    trained_on=None if side == "human" else _trained_on(known),
                )
            )
        measured = _estimate(mapping(known, "cross_validation"), "longer", "longer_low", "longer_high")
        if isinstance(measured, dict):
            notes.append(f"“The longer text wins” is right in {_with_interval(measured)} of the same pairs.")
    written, flags = number(facts, "counts", "sample", "responses"), mapping(facts, "counts", "sample", "flags")
    if _known(written):
        flagged = [f"{count} {flag}" for flag, count in sorted(flags.items())]
        of_them = f"; flagged: {', '.join(flagged)}" if flagged else ""
        notes.append(f"sft wrote {written:,} responses to the prompts of the two pools{of_them}.")
    return Table(
        "sources",
        "Where the labels come from",
        "First position, longer: share of decisive labels for the text shown first, and for the longer one. Length predicts: "
        "share that a rule on length alone would get right, whichever way it points. Accuracy: cross-validated by group on pairs "
        "that people decided, 95% bootstrap interval. " + " ".join(notes),
        (
            Column("source", "Source"),
            Column("pool", "On"),
            Column("n", "Labels", "count"),
            Column("ties", "Ties", "count"),
            Column("none", "No verdict", "count"),
            Column("first", "First position", "estimate"),
            Column("longer", "Longer", "estimate"),
            Column("length", "Length predicts", "estimate"),
            Column("trained_on", "Grader trained on"),
            Column("accuracy", "Its accuracy", "estimate"),
        ),
        rows,
        NOT_RECORDED,
    )


def _orders(facts: dict[str, Any], recipe: Recipe) -> Table:
    """What graders that read one order at a time said in both; no rows where none was one."""
    labels = mapping(facts, "labels", "ai")
    by_pool = mapping(labels, "pools") or {"": labels}
    known = [
        ("labelling", recipe.ai_labels.grader, f"{pool} pool" if pool else MISSING, counts, "outcomes")
        for pool, counts in by_pool.items()
    ]
    known.append(("evaluation", recipe.evaluate.grader, "the comparison of models", mapping(facts, "grader"), "orders"))
    rows = []
    for role, grader, on, counts, key in known:
        found = {name: number(counts, key, name) for name in ("consistent", "flip", "tie", "none")}
        if any(map(_known, found.values())):
            flips = FLIPS[grader.flips] if isinstance(grader, LlmGrader) else MISSING
            rows.append(_row(role=role, on=on, **found, first=number(counts, "first_shown_rate"), flips=flips))
    return Table(
        "orders",
        "What graders said when the order was swapped",
        "Each pair was shown in both orders. Consistent: both name the same text. Flip: they name different ones, so that position decided. "
        "Tie: one or both call a tie. No verdict: an answer is missing. Shown first: share of decisive answers, over both orders, for the text "
        "that was shown first; 50% is right.",
        (
            Column("role", "Grader"),
            Column("on", "On"),
            Column("consistent", "Consistent", "count"),
            Column("flip", "Flips", "count"),
            Column("tie", "Ties", "count"),
            Column("none", "No verdict", "count"),
            Column("first", "Shown first", "percent"),
            Column("flips", "A flip becomes", "long"),
        ),
        rows,
        NOT_RECORDED,
    )


def _labelled_texts(side: str, known: Any) -> Any:
    """Where labels are not told apart by pool: people label the rlhf pairs, or their labels came with other texts."""
    layouts = {"verdicts": "rlhf pool", "preferences": "imported texts"}
    layout = at(known, "layout")
    return layouts.get(layout, MISSING) if side == "human" and isinstance(layout, str) else MISSING


def _rate(facts: Any, key: str) -> Any:
    """A rate that stands as a plain number or with its interval."""
    return _estimate(at(facts, key)) if isinstance(at(facts, key), dict) else _estimate(facts, key)


def _trained_on(known: Any) -> Any:
    data = at(known, "trained_on")
    if not isinstance(data, str):
        return MISSING
    pairs = number(known, "cross_validation", "n")
    return f"{pairs:,} {data}" if _known(pairs) else data


def _preferences(facts: dict[str, Any], recipe: Recipe, names: dict[str, str]) -> Table:
    arms, concerned = mapping(facts, "preferences", "arms"), simulated_models(recipe)
    simulated = recipe.human_labels.source.kind == "simulated"
    rows, notes = [], []
    for arm in recipe.dpo:
        known = mapping(arms, arm.name)
        if not known and arm.name not in names:
            continue  # waits for labels: the page names it among the missing models
        sources = at(known, "sources")
        if isinstance(note := at(known, "note"), str):
            notes.append(f" {arm.name}: {note}.")
        rows.append(
            _row(
                arm=names.get(arm.name, f"{arm.name} (simulated)" if arm.name in concerned else arm.name),
                sources=", ".join(source_name(str(source), simulated) for source in sources)
                if isinstance(sources, list)
                else MISSING,
                pairs=number(known, "pairs"),
                kept=number(known, "n"),
                ties=number(known, "tie"),
                conflicts=_total(known, "conflict", "flip"),
                unmatched=number(known, "unmatched"),
                other=_total(known, *LEFT_OUT_OTHERWISE),
                longer=number(known, "length_accuracy"),
                off_policy=_off_policy(arm, known, mapping(facts, "arms", arm.name), recipe),
            )
        )
    return Table(
        "preferences",
        "The preferences of each arm",
        "Kept and the four counts after it add up to the pairs. Conflicts: sources disagree, or one contradicts itself when the "
        "order is swapped. Unmatched: without a decisive human label. Other: no verdict, or two equal responses. Off-policy: "
        "not written by the model that the arm starts from." + "".join(notes),
        (
            Column("arm", "Arm"),
            Column("sources", "Labelled by", "long"),
            Column("pairs", "Pairs", "count"),
            Column("kept", "Kept", "count"),
            Column("ties", "Ties", "count"),
            Column("conflicts", "Conflicts", "count"),
            Column("unmatched", "Unmatched", "count"),
            Column("other", "Other", "count"),
            Column("longer", "Longer is chosen", "percent"),
            Column("off_policy", "Off-policy"),
        ),
        rows if arms else [],
        NOT_RECORDED,
    )


def _off_policy(arm: DpoArm, known: dict[str, Any], trained: dict[str, Any], recipe: Recipe) -> Any:
    """How many of an arm's preferences its start model did not write, and who did. Older runs count imported ones only."""
    count, of = number(trained, "off_policy"), number(trained, "preferences")
    on_policy = at(known, "on_policy")
    if not _known(count) and not isinstance(on_policy, bool):
        return MISSING
    imported = arm.labels == "human" and wording.imported_texts(recipe)
    writer = "imported" if imported else "written by sft" if arm.start != "sft" else ""
    none = count == 0 if _known(count) else on_policy is True
    if none and not writer:
        return "no"
    share = f"{count:,} of {of:,}" if _known(count) and _known(of) and 0 < count < of else "all"
    return f"{share}: {writer}" if writer else share


def _total(known: Any, *keys: str) -> Any:
    found = [value for key in keys if _known(value := number(known, key))]
    return sum(found) if found else MISSING


def _judge(known: dict[str, Any]) -> Table:
    canaries = mapping(known, "canaries")
    asked = {name: rate for name in canaries if name in THRESHOLDS and _known(rate := number(canaries, name))}
    passed = {"n": len(asked) - len(failing(asked)), "asked": len(asked)} if asked else MISSING
    row = _row(
        grader=known.get("name") or MISSING,
        accuracy=_estimate(known, "accuracy"),
        longer=_estimate(known, "longer", "longer_low", "longer_high"),
        pairs=number(known, "n"),
        groups=number(known, "groups"),
        folds=number(known, "folds"),
        canaries=passed,
    )
    columns: list[Column] = []
    note = ""
    if _known(flips := number(known, "flip_rate")):
        row |= {"flips": flips, "first_shown": at(known, "first_shown_rate")}
        columns = [Column("flips", "Flips", "percent"), Column("first_shown", "First shown", "percent")]
        note = " Flips: comparisons of this run on which it names another model when the order is swapped. First shown: how often it names the "
        note += "response shown first, over both orders; 50% is without favour."
    return Table(
        "judge",
        "The evaluation grader",
        "Accuracy and “longer wins” on held-out groups (posters or topics) of its training pairs, 95% bootstrap intervals by "
        "group. Canaries: an empty reply loses, a text ties with itself, a swapped pair gets the mirrored verdict (always); instructions "
        "to the judge and empty padding win nothing (nine times in ten)." + note,
        (
            Column("grader", "Grader"),
            Column("accuracy", "Accuracy", "estimate"),
            Column("longer", "Longer wins", "estimate"),
            Column("pairs", "Training pairs", "count"),
            Column("groups", "Groups", "count"),
            Column("folds", "Folds", "count"),
            *columns,
            Column("canaries", "Canaries passed", "of"),
        ),
        [row] if known else [],
        NOT_RECORDED,
    )
