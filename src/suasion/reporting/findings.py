"""The tables of what changed beside the win rates: text, honesty, likelihood, strategies, people's verdicts, and hours.

Each takes the summary (or the run's timings) and gives one `Table`; nothing is computed but sums of hours.
"""

from __future__ import annotations

from typing import Any

from suasion.evaluation import wording
from suasion.reporting.table import Column, Kind, Table

P4G_DIALOGUES = 300  # the labelled ones
MEASURES: dict[str, tuple[str, Kind]] = {  # key of the summary's text facts -> heading and how it is shown
    "words": ("Words", "number"),
    "tokens": ("Tokens", "number"),
    "cut_off": ("Cut off", "percent"),
    "repetition": ("Repeated", "percent"),
    "distinct_2": ("Distinct", "percent"),
    "mattr": ("Distinct in 50", "percent"),
    "reading_grade": ("Reading grade", "number"),
    "same_as_sft": ("Same as sft", "percent"),
    "hedging": ("Hedges", "number"),
    "second_person": ("You", "number"),
    "questions": ("Questions", "number"),
    "links": ("Links", "number"),
    "numbers": ("Numbers", "number"),
    "claims": ("Claims", "percent"),
    "context_overlap": ("Copied", "percent"),
    "human_similarity": ("Like the human reply", "number2"),
    "oracle_similarity": ("Like the oracle", "number2"),
}
FORM = ("words", "tokens", "cut_off", "repetition", "distinct_2", "mattr", "reading_grade", "same_as_sft")
MANNER = ("hedging", "second_person", "questions", "links", "numbers", "claims", "context_overlap", "human_similarity", "oracle_similarity")  # fmt: skip
SHARES = frozenset(key for key, (_, kind) in MEASURES.items() if kind == "percent")


def text_tables(summary: dict[str, Any]) -> tuple[Table, ...]:
    """How everybody writes, in two tables, and each model's difference from base."""
    speakers = [(m["label"], m["text"]) for m in summary["models"]] + [("human reply", summary["human"]["text"])]
    rows = [{"speaker": name, **text} for name, text in speakers]
    known = {key for _, text in speakers for key in text}
    columns = {key: Column(key, *MEASURES[key]) for key in (*FORM, *MANNER)}
    drifted = [m for m in summary["models"] if m.get("text_vs_base")]
    measures = [key for key in (*FORM, *MANNER) if any(key in m["text_vs_base"] for m in drifted)]
    return (
        Table(
            "text",
            "What changed in the text",
            "Means over responses. Repeated: share of 4-word runs seen before in the response. Distinct: distinct word pairs over all "
            "word pairs; falls as texts get longer. Distinct in 50: distinct words in every run of 50, which does not. Reading grade: "
            "Coleman–Liau index of all responses together, about the US school grade that reads them.",
            (Column("speaker", "Speaker"), *(columns[key] for key in FORM)),
            rows,
        ),
        Table(
            "manner",
            "How they speak",
            "Hedges, “you” and numbers per 100 words; questions and links per response. Claims: share of sentences with a number, a proper "
            "name, a source or a share, which could be looked up; whether they are true is not measured. Copied: share of 3-word runs that "
            "stand in the context."
            + (" Likeness: cosine of sentence embeddings." if known & {"human_similarity", "oracle_similarity"} else ""),
            (Column("speaker", "Speaker"), *(columns[key] for key in MANNER if key in known)),
            rows,
        ),
        Table(
            "drift",
            "Difference from base, prompt by prompt",
            f"Mean paired difference with {100 * summary['confidence']:.0f}% intervals by conversation; shares in points. Exploratory and not corrected for "
            "their number: one in twenty such intervals misses.",
            (Column("measure", "Measure"), *(Column(m["label"], m["label"], "difference") for m in drifted)),
            [
                {"measure": MEASURES[key][0]}
                | {m["label"]: _scaled(m["text_vs_base"].get(key), 100 if key in SHARES else 1) for m in drifted}
                for key in measures
            ]
            if drifted
            else [],
        ),
    )


def honesty_tables(summary: dict[str, Any]) -> tuple[Table, ...]:
    """Findings of the audit (trusted rules only), and every rule with its measured quality and its counts."""
    known = summary.get("honesty") or {}
    labels = _labels(summary)
    speakers = _ordered(known.get("speakers") or {}, labels)
    trusted = {rule["kind"] for rule in known.get("rules", []) if rule["trusted"]}
    kinds = [kind for kind in known.get("kinds", []) if kind["kind"] in trusted]
    unseen = [kind["title"].lower() for kind in known.get("kinds", []) if kind["kind"] not in trusted]
    titles = {kind["kind"]: kind["title"] for kind in known.get("kinds", [])}
    note = (
        f"Share of responses in which a trusted rule fires: one that was right in {wording.percent(known.get('threshold'))} or more of at least "
        f"{known.get('fewest_hits')} hits among {known.get('labelled')} responses read and labelled blind. {known.get('readers', '')} Rules miss "
        "much: rates are lower bounds. What a human reply says of its writer may be true; what a model says of its life cannot."
        + (f" No trusted rule for: {', '.join(unseen)}; the table below only counts." if unseen else "")
    )
    findings = Table(
        "honesty",
        "Signs of dishonesty and pressure",
        note,
        (
            Column("speaker", "Speaker"),
            *(column for kind in kinds for column in (Column(kind["kind"], kind["title"], "estimate"), Column(f"{kind['kind']}_vs_base", "Against base, points", "difference"))),
        ),
        [
            {"speaker": labels.get(name, name)}
            | {kind["kind"]: entry["rates"].get(kind["kind"]) for kind in kinds}
            | {f"{kind['kind']}_vs_base": _scaled(entry["vs_base"].get(kind["kind"]), 100) for kind in kinds}
            for name, entry in speakers.items()
        ]
        if kinds
        else [],
    )  # fmt: skip
    counts = Table(
        "honesty_rules",
        "Every rule of the audit, and how often it fired",
        "Precision and recall with exact 95% intervals, by the first reading of the labelled responses; a rule must be as precise by the second. "
        f"A rule that is not trusted is a count and no finding.{_readings(known, titles)}",
        (
            Column("kind", "Looks for"),
            Column("rule", "Rule"),
            Column("precision", "Precision", "estimate"),
            Column("fired", "Of hits", "count"),
            Column("recall", "Recall", "estimate"),
            Column("labelled", "Of labelled", "count"),
            Column("trusted", "Trusted"),
            *(Column(labels.get(name, name), labels.get(name, name), "count") for name in speakers),
        ),
        [
            {"kind": titles[rule["kind"]], **{key: rule[key] for key in ("rule", "fired", "labelled", "trusted")}}
            | {key: rule[key] | {"reason": ""} for key in ("precision", "recall")}
            | {labels.get(name, name): entry["counts"][rule["rule"]] for name, entry in speakers.items()}
            for rule in known.get("rules", [])
        ],
    )
    return findings, counts


def _readings(known: dict[str, Any], titles: dict[str, str]) -> str:
    """How the two readings of the labelled responses agree, for the kinds that either reader saw."""
    said = [
        f"{titles[row['kind']].lower()} {row['both']}, {row['first']} and {row['second']}"
        + ("" if row["kappa"] is None else f" (kappa {row['kappa']:.2f})")
        for row in known.get("readings") or []
        if row["both"] or row["first"] or row["second"]
    ]
    return f" Responses labelled by both readers, by the first alone and by the second alone: {'; '.join(said)}." if said else ""


def likelihood_table(summary: dict[str, Any]) -> Table:
    """Which models find real winning replies more likely than the losing ones."""
    known = summary.get("likelihood") or {}
    labels = _labels(summary)
    return Table(
        "likelihood",
        "Real winning replies against losing ones",
        "Share of pairs of human replies to one post whose winner has the higher mean log-probability per token under the model, and the "
        f"mean difference in nats a token. {known.get('note', '')}".strip(),
        (
            Column("model", "Model"),
            Column("rate", "Winner likelier", "estimate"),
            Column("gap", "Winner minus loser", "log"),
            Column("pairs", "Pairs", "count"),
        ),
        [
            {"model": labels.get(name, name), **{key: entry[key] for key in ("rate", "gap", "pairs")}}
            for name, entry in _ordered(known.get("models") or {}, labels).items()
        ],
    )


def strategies_table(summary: dict[str, Any]) -> Table:
    """Share of each speaker's sentences that a classifier gives to each persuasion strategy."""
    known = summary.get("strategies") or {}
    labels, quality = _labels(summary), known.get("quality") or {}
    names = list(_ordered(known.get("speakers") or {}, labels))
    note = known.get("note", "")
    if quality:
        note = (
            f"Classifier trained on {quality['dialogues']} labelled dialogues ({quality['sentences']:,} sentences of persuaders), "
            f"{quality['folds']}-fold by dialogue: macro-F1 {quality['macro_f1']:.3f}, accuracy {quality['accuracy']:.3f}; TF-IDF alone "
            f"{quality['tfidf_macro_f1']:.3f} and {quality['tfidf_accuracy']:.3f}. {_published(quality['dialogues'])} {note}"
        )
    return Table(
        "strategies",
        "Persuasion strategies",
        note.strip(),
        (
            Column("strategy", "Strategy"),
            Column("f1", "F1 of the classifier", "number2"),
            *(Column(labels.get(name, name), labels.get(name, name), "percent") for name in names),
        ),
        [
            {"strategy": strategy, "f1": known["f1"].get(strategy)}
            | {labels.get(name, name): known["speakers"][name].get(strategy) for name in names}
            for strategy in known.get("classes") or []
        ],
    )


def _published(dialogues: int) -> str:
    """The published quality, and whether it is of the same dialogues."""
    text = f"Published for the {P4G_DIALOGUES} dialogues of PersuasionForGood: macro-F1 .596–.639 (arXiv 2310.10467)"
    return f"{text}." if dialogues == P4G_DIALOGUES else f"{text}, which are others than these: the two cannot be compared."


def people_table(summary: dict[str, Any]) -> Table:
    """What people said of the same comparisons, apart from the grader's verdicts."""
    known, labels = summary.get("people") or {}, _labels(summary)
    return Table(
        "people",
        "People's verdicts on the same comparisons",
        "People's own win rates, the grader's, and the grader's corrected by people's (prediction-powered inference).",
        (
            Column("first", "Model"),
            Column("second", "Against"),
            Column("people", "People", "estimate"),
            Column("grader", "Grader", "estimate"),
            Column("agree", "They agree", "estimate"),
            Column("corrected", "Corrected", "estimate"),
        ),
        [
            {**row, "first": labels.get(row["first"], row["first"]), "second": labels.get(row["second"], row["second"])}
            for row in known.get("comparisons") or []
        ],
    )


def hours_table(timings: dict[str, list[dict[str, Any]]], price: float | None, stages: list[str]) -> Table:
    """Hours of each finished stage, all its attempts together, what they cost at a price an hour, and what servers were paid.

    What an attempt was paid for counts for the last one: answers that were paid before are in it.
    """
    rows: list[dict[str, Any]] = []
    for stage in stages:
        attempts = timings.get(stage, [])
        if attempts:
            hours = sum(attempt["seconds"] for attempt in attempts) / 3600
            paid = [attempt["dollars"] for attempt in attempts if "dollars" in attempt][-1:]
            rows.append(
                {"stage": stage, "minutes": 60 * hours, "attempts": len(attempts), "cost": None if price is None else hours * price, "paid": sum(paid)}
            )  # fmt: skip
    if rows:
        total = {key: sum(row[key] for row in rows) for key in ("minutes", "attempts", "paid")}
        rows.append({"stage": "all", **total, "cost": None if price is None else total["minutes"] / 60 * price})
    served = any(row["paid"] for row in rows)
    note = "Every attempt counts, interrupted ones as far as they were recorded."
    if price is None:
        note += " No price an hour was given (report.price_per_hour), so no cost of hours is shown."
    if served:
        note += " Servers: what the verdicts of paid servers cost; the evaluation grader's agreement with label sources and canaries are not in it."
    return Table(
        "hours",
        "Time and cost of each stage",
        note,
        (
            Column("stage", "Stage"),
            Column("minutes", "Minutes", "number"),
            Column("attempts", "Attempts", "count"),
            *([Column("cost", "Cost", "money")] if price is not None else []),
            *([Column("paid", "Servers", "money")] if served else []),
        ),
        rows,
    )


def _labels(summary: dict[str, Any]) -> dict[str, str]:
    return {model["name"]: model["label"] for model in summary["models"]} | {"human": "human reply"}


def _ordered(entries: dict[str, Any], labels: dict[str, str]) -> dict[str, Any]:
    """Entries by speaker in the order of the tables: JSON files sort their keys."""
    return {name: entries[name] for name in labels if name in entries}


def _scaled(estimate: dict[str, Any] | None, factor: float) -> dict[str, Any] | None:
    """An estimate in other units."""
    if estimate is None:
        return None
    return estimate | {key: None if estimate[key] is None else factor * estimate[key] for key in ("value", "low", "high")}
