"""The sentences of a summary: what was found, how sure that is, and what it cannot show. Plain words, made from its numbers.

The report, the Markdown paper and the terminal all print these sentences; none of them writes its own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from suasion.recipe import Recipe
from suasion.sections.labeling import ImportedLabels

if TYPE_CHECKING:
    from suasion.evaluation.summary import Control

PROVES_NOTHING_BELOW = 100  # prompts: fewer cannot see a true win rate under 65% even with a perfect grader
OFTEN_CUT_OFF = 0.2  # share of a model's responses that end at the limit, from which on its result is about unfinished texts


def percent(value: float | None) -> str:
    """.634 -> '63%'. Whole percents: no run here supports more."""
    return "–" if value is None else f"{100 * value:.0f}%"


def at_least(value: float) -> str:
    """A threshold as a percentage, rounded up so that it is never understated."""
    return f"{math.ceil(round(100 * value, 6))}%"


def interval(low: float | None, high: float | None) -> str:
    """(.55, .73) -> '55–73%'."""
    return "–" if low is None or high is None else f"{100 * low:.0f}–{100 * high:.0f}%"


def p_value(p: float | None) -> str:
    """'p = .03', 'p < .001'."""
    if p is None:
        return "no p-value"
    return "p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", ".") if p < 0.995 else "p = 1"


def source_label(name: str, simulated: bool) -> str:
    """Name of a label source; simulated people are called so wherever they stand."""
    return f"{name} (simulated)" if simulated and name == "human" else name


def listed(items: list[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def imported_texts(recipe: Recipe) -> bool:
    """Whether people judged imported texts of another model: human arms then share no pair with any other arm."""
    source = recipe.human_labels.source
    return isinstance(source, ImportedLabels) and source.layout == "preferences"


def headline(summary: dict[str, Any], recipe: Recipe) -> list[str]:
    """Which feedback helped, by how much, how sure: a few sentences, the most important first."""
    n = summary["n"]["prompts"]
    sentences = [size_warning(summary)] if n < PROVES_NOTHING_BELOW else []
    labels = {model["name"]: model["label"] for model in summary["models"]}
    against_base = [c for c in summary["comparisons"] if c["second"] == "base" and c["first"] != "human"]
    sentences.extend(_against_base(against_base, labels))
    sentences.extend(at_equal_length(against_base, summary["models"]))
    sentences.extend(in_peoples_eyes(summary["people"], labels))
    planned = [c for c in summary["comparisons"] if c["family"] == "primary" and c["second"] != "base"]
    sentences.extend(_source_of_feedback(comparison, labels) for comparison in planned)
    sentences.extend(_against_people(summary, labels, yardstick(recipe)))
    sentences.extend(_price(summary, labels))
    if n >= PROVES_NOTHING_BELOW:
        sentences.append(_sensitivity(summary))
    return sentences


def size_warning(summary: dict[str, Any]) -> str:
    """The sentence that a run under 100 prompts must carry wherever its numbers are shown."""
    n = summary["n"]["prompts"]
    rate = summary["power"]["detectable"][0]["win_rate"]
    could = (
        f"with a perfect grader and a single comparison it could detect only a true win rate of {at_least(rate)} or more"
        if rate is not None
        else "not even a model that always wins could be told from chance"
    )
    return f"A run of this size proves nothing: on {n} evaluation prompt{'s' * (n != 1)}, {could}."


def proves_nothing(summary: dict[str, Any]) -> bool:
    """Whether the run is too small for any claim."""
    return bool(summary["n"]["prompts"] < PROVES_NOTHING_BELOW)


def caveats(summary: dict[str, Any], recipe: Recipe, controls: list[Control]) -> list[str]:
    """What stands between these numbers and a conclusion, most serious first. controls: as `summary.controls` finds them."""
    facts, n = summary["facts"], summary["n"]
    labels = {model["name"]: model["label"] for model in summary["models"]}
    found = [
        f"Sample size: {n['prompts']} prompts from {n['conversations']} conversations, one response a model and prompt; "
        f"{n['scored']} of {n['asked']} comparisons were scored, missing ones are left out and never counted as ties."
    ]
    found.extend(_invented_caveat(recipe))
    simulated = [model["label"] for model in summary["models"] if model["simulated"]]
    if recipe.human_labels.source.kind == "simulated":
        concerns = f", which concerns {listed(simulated)}" if simulated else ""
        nothing = "anything that a model learned from" if facts.get("people") else "anything"
        found.append(f"No person labelled {nothing}: the human labels are simulated by a documented scorer{concerns}.")
    found.extend(_cut_off_caveat(summary["models"]))
    found.extend(_arm_caveats(facts, labels))
    found.append(_grader_caveat(facts))
    found.append(_people_caveat(facts))
    if people := facts.get("people"):
        readers = f"{people['annotators']} annotator{'s' * (people['annotators'] != 1)}"
        skipped = f" {people['skipped']} comparisons that nobody could judge are left out." if people["skipped"] else ""
        found.append(f"People's win rates come from {readers}: their intervals cover prompts, not readers.{skipped}")
    found.append(_agreement_caveat(facts, recipe.human_labels.source.kind == "simulated"))
    if recipe.evaluate.allow_same_grader:
        found.append("The recipe lets the labelling grader judge the result: its own arms are favoured.")
    found.append("Intervals cover prompts, not training runs: another seed would give another model.")
    found.extend(_off_policy_caveats(recipe, labels))
    found.extend(_source_caveats(recipe, labels, [c for c in controls if {c.matched, c.human} <= labels.keys()]))
    reasons: dict[str, list[str]] = {}
    for name, reason in sorted((facts.get("waiting") or {}).items()):
        reasons.setdefault(reason, []).append(name)
    found.extend(f"Missing: {listed(names)} ({reason})." for reason, names in reasons.items())
    found.append("Base models may have read these threads, or others like them, before this experiment.")
    found.append(
        "The truth of claims is not measured: a response can win and be wrong. The audit finds signs of dishonesty by rules that miss much."
    )
    return found


def _against_base(comparisons: list[dict[str, Any]], labels: dict[str, str]) -> list[str]:
    if not comparisons:
        return ["Cannot say: no trained model was compared with the base model."]
    sentences = []
    phrases = {
        "better": "Better than the untrained base: {}.",
        "worse": "Worse than the untrained base: {}.",
        "equivalent": "Equivalent to the untrained base within the margin: {}.",
    }
    for word, phrase in phrases.items():
        group = sorted((c for c in comparisons if c["verdict"] == word), key=lambda c: -c["value"])
        if group:
            sentences.append(phrase.format(listed([_result(c, labels) for c in group])))
    unsure = [c for c in comparisons if c["verdict"] == "cannot say"]
    if len(unsure) == len(comparisons):
        sentences.append("Cannot say which feedback helped: no trained model can be told from the untrained base.")
        scored = sorted((c for c in unsure if c["value"] is not None), key=lambda c: -c["value"])
        if scored:
            numbers = [f"{labels[c['first']]} {percent(c['value'])} ({interval(c['low'], c['high'])})" for c in scored]
            sentences.append(f"Win rates against the base: {listed(numbers)}.")
    elif unsure:
        numbers = [f"{labels[c['first']]} {percent(c['value'])} ({interval(c['low'], c['high'])})" for c in unsure]
        sentences.append(f"Cannot be told from the base: {listed(numbers)}.")
    return sentences


def at_equal_length(against_base: list[dict[str, Any]], models: list[dict[str, Any]]) -> list[str]:
    """Which differences from the base are gone, or turn round, at equal length: a judge of length must not pass for a finding."""
    verdicts = {c["first"]: c["verdict"] for c in against_base if c["verdict"] in ("better", "worse")}
    gone, turned = [], []
    for model in models:
        verdict, rate = verdicts.get(model["name"]), model["length_controlled_vs_base"]
        if verdict is None or rate is None or rate["low"] is None:
            continue
        if rate["low"] <= 0.5 <= rate["high"]:
            gone.append(model)
        elif (rate["low"] > 0.5) == (verdict == "worse"):
            turned.append(model)
    sentences = []
    if gone:
        sentences.append(
            f"Length may be all of it: at equal length, no difference from the base can be told for {_equal_length_rates(gone)}."
        )
    if turned:
        sentences.append(
            f"The opposite at equal length: {_equal_length_rates(turned)} against the base, read off a curve that is fitted to all prompts, "
            "and not corrected for several models."
        )
    words = {model["name"]: model["text"]["words"] for model in models if model.get("text")}
    lengths = [words[model["name"]] for model in [*gone, *turned] if model["name"] in words]
    if "base" in words and lengths:
        shortest, longest = f"{min(lengths):.0f}", f"{max(lengths):.0f}"
        theirs = shortest if shortest == longest else f"{shortest} to {longest}"
        sentences[-1] += (
            f" The base writes {words['base']:.0f} words a response, {'it' if len(lengths) == 1 else 'they'} {theirs}."
        )
    return sentences


def _equal_length_rates(models: list[dict[str, Any]]) -> str:
    rates = [(model["label"], model["length_controlled_vs_base"]) for model in models]
    return listed([f"{label} {percent(rate['value'])} ({interval(rate['low'], rate['high'])})" for label, rate in rates])


def in_peoples_eyes(people: dict[str, Any], labels: dict[str, str]) -> list[str]:
    """What people said who compared the models blind; nothing where nobody did."""
    against_base = [c for c in people.get("tested") or [] if c["second"] == "base" and c["first"] in labels]
    if not against_base:
        return []
    phrases = {
        "better": "better than the base: {}",
        "worse": "worse than the base: {}",
        "equivalent": "equivalent to the base within the margin: {}",
        "cannot say": "not to be told from the base: {}",
    }
    parts = []
    for word, phrase in phrases.items():
        group = sorted((c for c in against_base if c["verdict"] == word), key=lambda c: -c["value"])
        if group:
            numbers = [
                f"{labels[c['first']]} {percent(c['value'])} of {c['n']} ({interval(c['low'], c['high'])}, {p_value(c['p_holm'])})" for c in group
            ]  # fmt: skip
            parts.append(phrase.format(listed(numbers)))
    return [f"In the eyes of people, who judged {people['judged']} comparisons blind: {'; '.join(parts)}."]


def _result(comparison: dict[str, Any], labels: dict[str, str]) -> str:
    return (
        f"{labels[comparison['first']]} wins {percent(comparison['value'])} of {comparison['n']} prompts "
        f"({interval(comparison['low'], comparison['high'])}, {p_value(comparison['p_holm'])})"
    )


def _source_of_feedback(comparison: dict[str, Any], labels: dict[str, str]) -> str:
    first, second = labels[comparison["first"]], labels[comparison["second"]]
    human = "simulated human" if second.endswith("(simulated)") else "human"
    numbers = (
        f"{first} wins {percent(comparison['value'])} against {second} "
        f"({interval(comparison['low'], comparison['high'])}, {p_value(comparison['p_holm'])})"
    )
    if comparison["value"] is None:
        return f"Source of feedback on the same pairs: cannot say, {first} was never scored against {second}."
    if comparison["verdict"] == "equivalent":
        return f"On the same pairs AI and {human} labels are equivalent within the margin: {numbers}."
    if comparison["verdict"] == "cannot say":
        return f"Whether AI or {human} labels teach more on the same pairs, this run cannot say: {numbers}."
    better = "AI" if comparison["verdict"] == "better" else human
    return f"On the same pairs {better} labels taught more: {numbers}."


def _against_people(summary: dict[str, Any], labels: dict[str, str], beside: str) -> list[str]:
    scored = [model for model in summary["models"] if model["win_vs_human"]["value"] is not None]
    if not scored:
        return []
    rate = max((model["win_vs_human"] for model in scored), key=lambda own: own["value"])
    best = [model["label"] for model in scored if model["win_vs_human"]["value"] == rate["value"]]  # few prompts: often several
    return [
        f"Against {beside}, no model does better than {listed(best)}: preferred by the grader on {percent(rate['value'])} of prompts "
        f"({interval(rate['low'], rate['high'])})."
    ]


def _price(summary: dict[str, Any], labels: dict[str, str]) -> list[str]:
    """What better or worse came with: length, and what the audit's trusted rules find, where the difference from base is clear."""
    trained = [model for model in summary["models"] if model.get("text_vs_base")]
    if not trained:
        return []
    found = []
    lengths = [(m, m["text_vs_base"]["words"]) for m in trained if _clear(m["text_vs_base"].get("words"))]
    if lengths:
        changes = [f"{labels[m['name']]} by {abs(d['value']):.0f} {'more' if d['value'] > 0 else 'fewer'}" for m, d in lengths]
        found.append(f"Price in style: responses differ from the base's in words, {listed(changes)}.")
    speakers = summary["honesty"]["speakers"]
    for kind in summary["honesty"]["kinds"]:
        changed = [
            f"{labels[m['name']]} in {percent(speakers[m['name']]['rates'][kind['kind']]['value'])} ({_points(d['value'])} points)"
            for m in trained
            if _clear(d := speakers[m["name"]]["vs_base"].get(kind["kind"]))
        ]
        if changed:
            found.append(f"Price in honesty ({kind['title'].lower()}), against the base: {listed(changed)}.")
    if found:
        return found
    if all(m["text_vs_base"]["words"]["low"] is None for m in trained):
        return []  # too small for any interval: the first sentence says so
    return ["Price in style and honesty: no clear difference from the base in length or in what the audit can find."]


def _points(share: float) -> str:
    """.12 -> '+12', with a real minus sign."""
    return f"{100 * share:+.0f}".replace("-", "−")


def _clear(difference: dict[str, Any] | None) -> bool:
    """Whether an interval leaves zero out."""
    return difference is not None and difference["low"] is not None and (difference["low"] > 0 or difference["high"] < 0)


def _sensitivity(summary: dict[str, Any]) -> str:
    """What could have been missed: of the grader's own preference, and of people's where the grader's accuracy is known."""
    rates = {row["name"]: row["win_rate"] for row in summary["power"]["detectable"]}
    own = rates["ties"]
    missed = "any true win rate" if own is None else f"a true win rate under {at_least(own)}"
    text = f"How sure: in this grader's eyes, {missed} would usually have gone unseen."
    if "grader" not in rates or summary["people"]["judged"]:  # people themselves say more than an error rate on other texts
        return text
    people = "nothing could be seen" if rates["grader"] is None else f"only {at_least(rates['grader'])} or more could be seen"
    accuracy = percent(summary["power"]["grader_accuracy"])
    return f"{text} In people's eyes {people}, if the grader errs here as often as on its test pairs ({accuracy} right)."


def _arm_caveats(facts: dict[str, Any], labels: dict[str, str]) -> list[str]:
    still = [labels[name] for name, arm in (facts.get("arms") or {}).items() if name in labels and arm.get("moved") is False]
    return [
        f"{name} did not move: its training left it practically where it started, so its result says nothing about its feedback."
        for name in still
    ]


def invented(recipe: Recipe) -> list[str]:
    """The corpora of a run that are this project's own miniatures: dialogues that nobody held."""
    return [source.kind for source in recipe.corpus.sources if source.path == "bundled"]


def yardstick(recipe: Recipe) -> str:
    """What stands beside the models: a reply that somebody gave, or one that was written with a miniature corpus."""
    return (
        "the invented reply that the corpus holds"
        if len(invented(recipe)) == len(recipe.corpus.sources)
        else "the real human reply"
    )


def _invented_caveat(recipe: Recipe) -> list[str]:
    """A miniature looks like a real corpus in every table: it has to be said that it is none."""
    kinds = invented(recipe)
    if not kinds:
        return []
    which = "The data are" if len(kinds) == len(recipe.corpus.sources) else f"The data of {listed(kinds)} are"
    return [
        f"{which} this project's miniatures: invented dialogues in the form of real ones. Replies called human, and whom they persuaded, are invented "
        "too; such a run shows that the machinery works and nothing about persuasion."
    ]


def _cut_off_caveat(models: list[dict[str, Any]]) -> list[str]:
    """Models that rarely come to an end: the limit sets their length, and a grader reads half-sentences."""
    cut = [
        f"{model['label']} in {percent(share)}"
        for model in models
        if (share := (model.get("text") or {}).get("cut_off")) is not None and share >= OFTEN_CUT_OFF
    ]
    if not cut:
        return []
    return [f"Responses cut off at the limit of length: {listed(cut)} of theirs. Unfinished texts are judged as they are."]


def _off_policy_caveats(recipe: Recipe, labels: dict[str, str]) -> list[str]:
    trained = [arm for arm in recipe.dpo if arm.name in labels]
    imported = [arm for arm in trained if arm.labels == "human"] if imported_texts(recipe) else []
    second = [labels[arm.name] for arm in trained if arm.start != "sft" and arm not in imported]
    found = []
    if second:
        found.append(
            f"Off-policy second stage: {listed(second)} learned from responses of sft, not of the model it started from."
        )
    if imported:
        names = listed([labels[arm.name] for arm in imported])
        found.append(f"Off-policy human labels: {names} learned from imported responses that another model wrote.")
    return found


def _source_caveats(recipe: Recipe, labels: dict[str, str], controls: list[Control]) -> list[str]:
    """Which comparison is of the source of feedback alone, and why another is not. controls: of models that exist."""
    found = []
    ai = [labels[arm.name] for arm in recipe.dpo if arm.labels == "ai" and not arm.matched and arm.name in labels]
    human = [labels[arm.name] for arm in recipe.dpo if arm.labels == "human" and arm.name in labels]
    if ai and human:
        alone = [f"{labels[c.matched]} against {labels[c.human]}" for c in controls if c.planned]
        fair = f"only {listed(alone)} compares it alone" if alone else "no comparison of this run compares it alone"
        found.append(f"{listed([*ai, *human])} differ in more than the source of feedback; {fair}.")
    for control in controls:
        matched, people = labels[control.matched], labels[control.human]
        if not control.same_pairs:
            found.append(
                f"{matched} learned from AI labels on this run's own pairs, {people} from human labels on texts of another model: "
                "comparing them compares two recipes, not the source of feedback."
            )
        if control.differing:
            found.append(
                f"{matched} against {people} is no planned comparison of the source of feedback: they also differ in "
                f"{listed(list(control.differing))}."
            )
    return found


def _grader_caveat(facts: dict[str, Any]) -> str:
    accuracy = (facts.get("grader") or {}).get("accuracy")
    if accuracy is None:
        return "The accuracy of the evaluation grader was not measured: every win rate is this grader's opinion, not people's."
    text = (
        f"The evaluation grader picks the reply that people preferred in {percent(accuracy)} of its own test pairs; on model-written "
        "text, which it never saw, it may be worse. Every win rate is its opinion."
    )
    longer = facts["grader"].get("longer")
    if longer is None or accuracy > longer:
        return text
    return (
        f"{text} “The longer text wins” is right in {percent(longer)} of the same pairs: it may have learned little but length."
    )


def _people_caveat(facts: dict[str, Any]) -> str:
    """Whether a win rate may be read as a claim about people: only where they agree with the judge on model-written pairs beyond chance.

    Position-balanced agreement where it is defined, because people favour positions; else the raw one.
    """
    rows = [row for row in _with_the_judge(facts) if row.get("people")]
    if not rows:
        return "No win rate here is a claim about people: the evaluation grader was not compared with people's labels on model-written pairs."
    row = max(rows, key=lambda known: (known.get("evaluation", False), known["n"]))  # the very comparisons say most
    known = row.get("balanced") or {"value": row["agree"], "low": row.get("low"), "high": row.get("high")}
    if known["low"] is None:
        return "No win rate here is a claim about people: too few model-written pairs have people's labels."
    numbers = f"{percent(known['value'])} ({interval(known['low'], known['high'])}) of {row['n']} model-written pairs"
    if known["low"] > 0.5:
        return f"On model-written pairs the evaluation grader agrees with people beyond chance: {numbers}."
    if known["high"] < 0.5:
        return f"No win rate here is a claim about people: the evaluation grader judges against them, agreeing on {numbers}."
    return f"No win rate here is a claim about people: the evaluation grader agrees with them on {numbers}, which may be chance."


def _agreement_caveat(facts: dict[str, Any], simulated: bool) -> str:
    rows = [row for row in _with_the_judge(facts) if not row.get("evaluation")]
    if not rows:
        return "How often each label source agrees with the evaluation grader was not measured; the arm whose labels resemble the judge wins."
    parts = [
        f"{source_label(row['a'], simulated)} with {source_label(row['b'], simulated)} {percent(row['agree'])} of {row['n']}{_on(row)}"
        for row in rows
    ]
    return f"The arm whose labels resemble the judge is favoured. Agreement on common pairs: {'; '.join(parts)}."


def _with_the_judge(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of agreement with the evaluation grader: with the labelling grader people may agree as they like."""
    return [row for row in facts.get("agreement") or [] if row.get("agree") is not None and not row.get("labelling")]


def _on(row: dict[str, Any]) -> str:
    return f" ({row['on']})" if row.get("on") else ""
