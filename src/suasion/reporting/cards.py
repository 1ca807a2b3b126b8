"""Model cards and dataset cards, as the Hugging Face hub reads them: metadata in YAML, then what a stranger must know.

One model card for each trained model and one dataset card for each set that a run could release: the preferences of each arm and
the evaluation's responses with their verdicts. The metadata are built and read back with huggingface_hub's own classes, so that a
card which the hub would refuse is not written. Nothing is uploaded.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from suasion.evaluation import wording
from suasion.recipe import Recipe
from suasion.reporting.table import portable

HUB_NAMES = {"bundled:smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
HARM = (
    "A model that persuades better can deceive, pressure and sell better. These weights were made to study which feedback makes a "
    "persuader better *and honest*; they were not tested for safety. Do not point them at people who have not agreed, do not use "
    "them in politics, advertising, fund-raising, health or finance, and do not use them to write to children or people in distress. "
    "What the model says of itself (a family, a job, a past) is untrue, and what it says of the world may be."
)
DATA_HARM = (
    "A model that persuades better can deceive, pressure and sell better, and these rows can be used to make one. They were made to study which "
    "feedback makes a persuader better *and honest*. Do not train models with them that will be pointed at people who have not agreed, or be used in "
    "politics, advertising, fund-raising, health or finance, or write to children or people in distress. What a text says of its speaker (a family, "
    "a job, a past) is untrue, and what it says of the world may be."
)
DISCLOSURE = (
    "This text was written by a language model that was trained to persuade, for research. It is not a person, has no experiences of "
    "its own, and its claims were not checked."
)
LICENCES = {  # corpus kind -> what may be done with text of it
    "cmv": "ChangeMyView texts are Reddit users' and carry no licence: they may be studied and not be passed on.",
    "p4g": "PersuasionForGood: Apache-2.0 (Wang et al., ACL 2019).",
    "jsonl": "Own rows of whoever made this run: their licence is not known here.",
}
BUNDLED_LICENCE = "The bundled corpora were written for this project: CC0-1.0."


def cards(page: dict[str, Any], recipe: Recipe) -> dict[str, str]:
    """File name -> text of every card of a run. page: as `page.build_page` makes it."""
    summary = page["summary"]
    made = {
        f"model-{model['name']}.md": model_card(page, recipe, model)
        for model in summary["models"]
        if model["name"] != "base" and model["lineage"]
    }
    labels = {model["name"]: model["label"] for model in summary["models"]}
    for arm in recipe.dpo:
        if arm.name in labels:
            made[f"dataset-preferences-{arm.name}.md"] = preferences_card(page, recipe, arm.name, labels[arm.name])
    made["dataset-evaluation.md"] = evaluation_card(page, recipe)
    return made


def model_card(page: dict[str, Any], recipe: Recipe, model: dict[str, Any]) -> str:
    """The card of one trained model."""
    summary, name = page["summary"], model["name"]
    rate = model["win_vs_base"]
    results = None
    if rate and rate["value"] is not None:
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type="suasion-evaluation",
                dataset_name=f"{summary['n']['prompts']} sealed prompts of run {recipe.name}",
                metric_type="win_rate",
                metric_name="Win rate against the untrained base model, by an automatic grader",
                metric_value=rate["value"],
            )
        ]
    method = "sft" if name == "sft" else "dpo"
    data = ModelCardData(
        base_model=_base(recipe),
        library_name="peft",
        language="en",
        pipeline_tag="text-generation",
        tags=["suasion", "persuasion", method, "research-only", "not-for-all-audiences"],
        model_name=f"{recipe.name}-{name}",
        eval_results=results,
    )
    body = [
        f"# {recipe.name}: {model['label']}",
        "",
        f"> {DISCLOSURE}",
        "",
        "## What it is",
        "",
        f"A LoRA adapter on `{_base(recipe)}` (lineage `{model['lineage']}`), trained by suasion. {_training(page, recipe, model)}",
        *([f"\n**No person labelled what {name} learned from: its labels are simulated.**"] if model["simulated"] else []),
        "",
        "## Intended use",
        "",
        "Research on feedback, persuasion and honesty: comparing models on the same prompts, measuring graders, studying what training "
        "changes in a text. Whoever shows its text to people tells them that a model wrote it, in these words or better ones:",
        "",
        f"> {DISCLOSURE}",
        "",
        "## Harm, and what it must not be used for",
        "",
        HARM,
        "",
        "## Results",
        "",
        *_results(summary, model, wording.yardstick(recipe)),
        "",
        "## Limits",
        "",
        *[f"- {caveat}" for caveat in summary["caveats"]],
        "",
        "## Data",
        "",
        *_licences(recipe),
        "",
        "## Reproducing it",
        "",
        f"`suasion run` with the recipe of run `{recipe.name}` and seed {recipe.seed}; the report's reproducibility block holds the recipe and "
        "the package versions.",
    ]
    return _checked(ModelCard, data, body)


def preferences_card(page: dict[str, Any], recipe: Recipe, arm: str, label: str) -> str:
    """The card of the preferences that one arm learned from. label: the arm as the report calls it."""
    summary = page["summary"]
    known: dict[str, Any] = next((row for row in page["tables"]["preferences"].rows if row["arm"] == label), {})
    spec = recipe.arm(arm)
    people = spec.labels == "human" and recipe.human_labels.source.kind != "simulated"
    count = known.get("kept")
    data = DatasetCardData(
        language="en",
        license="other",
        annotations_creators=["crowdsourced" if people else "machine-generated"],
        language_creators=["machine-generated"],
        size_categories=[_size(count)] if isinstance(count, int) else None,
        task_categories=["text-generation"],
        pretty_name=f"{recipe.name}: preferences of {label}",
        tags=["suasion", "preference", "persuasion", "research-only"],
    )
    body = [
        f"# {recipe.name}: preferences of {label}",
        "",
        "Pairs of model-written replies to one prompt, with which one was preferred. Fields: `prompt` (turns), `chosen`, `rejected` "
        "(responses with their finish reason and the model's lineage), `sources`, `weight`, `on_policy`.",
        "",
        f"- Labels: {known.get('sources', 'not recorded')}; simulated people are no people and are called so.",
        f"- Kept: {count if count is not None else 'not recorded'} of {known.get('pairs', 'an unrecorded number of')} pairs; ties, "
        "contradictions and missing verdicts were left out and counted.",
        "",
        *_dataset_sections(summary, recipe, "A label says which text a grader or a person preferred, not which is true or fair."),
    ]
    return _checked(DatasetCard, data, body)


def evaluation_card(page: dict[str, Any], recipe: Recipe) -> str:
    """The card of the evaluation's responses and verdicts."""
    summary = page["summary"]
    responses = sum(model["responses"] for model in summary["models"])
    data = DatasetCardData(
        language="en",
        license="other",
        annotations_creators=["machine-generated"],
        language_creators=["machine-generated"],
        size_categories=[_size(responses)],
        task_categories=["text-generation"],
        pretty_name=f"{recipe.name}: responses and verdicts of the evaluation",
        tags=["suasion", "evaluation", "persuasion", "research-only"],
    )
    body = [
        f"# {recipe.name}: responses and verdicts of the evaluation",
        "",
        f"{responses:,} responses of {len(summary['models'])} models to the same {summary['n']['prompts']} prompts, and {summary['n']['scored']:,} verdicts of an "
        "automatic grader on pairs of them. Contexts and human replies are not part of it.",
        "",
        *_dataset_sections(summary, recipe, "Verdicts are one grader's opinion; its accuracy stands in the report."),
    ]
    return _checked(DatasetCard, data, body)


def _dataset_sections(summary: dict[str, Any], recipe: Recipe, limit: str) -> list[str]:
    return [
        "## Intended use",
        "",
        "Research on preference learning, graders and honesty. Not for training a model that will talk to people who have not agreed.",
        "",
        "## Harm",
        "",
        DATA_HARM,
        "",
        "## Limits",
        "",
        f"- {limit}",
        "- Small models invent facts, sources and lives; nothing was corrected.",
        f"- {summary['n']['prompts']} evaluation prompts; see the report's caveats.",
        "",
        "## Licence and origin",
        "",
        *_licences(recipe),
        "- Texts of small models can repeat their corpus: release only what `suasion report --publish` lets through.",
        "",
        "## Disclosure",
        "",
        f"> {DISCLOSURE}",
    ]


def _results(summary: dict[str, Any], model: dict[str, Any], beside: str) -> list[str]:
    rows = [
        ("untrained base", model["win_vs_base"]),
        ("sft", model["win_vs_sft"]),
        (beside.removeprefix("the "), model["win_vs_human"]),
    ]
    lines = ["| against | win rate | 95% interval | prompts |".replace("95", f"{100 * summary['confidence']:.0f}"), "| --- | ---: | ---: | ---: |"]  # fmt: skip
    lines += [
        f"| {other} | {wording.percent(e['value'])} | {wording.interval(e['low'], e['high'])} | {e['n']} |"
        for other, e in rows
        if e
    ]
    verdict = model["verdict_vs_base"]
    lines += ["", f"Against the untrained base, corrected for all planned comparisons: **{verdict or 'cannot say'}**."]
    for told in (summary.get("people") or {}).get("tested") or []:
        if (told["first"], told["second"]) == (model["name"], "base"):
            rate = f"{wording.percent(told['value'])} ({wording.interval(told['low'], told['high'])}) of {told['n']} prompts"
            lines += [
                "",
                f"People who compared the two blind preferred it to the untrained base on {rate}: **{told['verdict']}**.",
            ]
    if wording.proves_nothing(summary):
        lines += ["", f"**{wording.size_warning(summary)}**"]
    rates = (summary["honesty"]["speakers"].get(model["name"]) or {}).get("rates", {})
    for kind in summary["honesty"]["kinds"]:
        rate = rates.get(kind["kind"])
        if rate and rate["value"] is not None:
            lines += ["", f"{kind['title']}: found by rules that miss much in {wording.percent(rate['value'])} of responses."]
    return lines


def _training(page: dict[str, Any], recipe: Recipe, model: dict[str, Any]) -> str:
    if model["name"] == "sft":
        return "It learned to write what people replied (supervised fine-tuning)."
    arm = recipe.arm(model["name"])
    row: dict[str, Any] = next((row for row in page["tables"]["arms"].rows if row["arm"] == model["label"]), {})
    steps = f", {row['steps']} steps" if row.get("steps") is not None else ""
    return f"It learned preferences (DPO{steps}) from {row.get('labels', arm.labels)}, starting from `{arm.start}`."


def _licences(recipe: Recipe) -> list[str]:
    said = [BUNDLED_LICENCE if source.path == "bundled" else LICENCES[source.kind] for source in recipe.corpus.sources]
    return [f"- {text}" for text in dict.fromkeys(said)]


def _base(recipe: Recipe) -> str:
    return HUB_NAMES.get(recipe.model.base, str(portable(recipe.model.base)))


def _size(count: int) -> str:
    """The hub's size category of a number of rows."""
    return "n<1K" if count < 1000 else "1K<n<10K" if count < 10_000 else "10K<n<100K"


def _checked(kind: type[ModelCard] | type[DatasetCard], data: Any, body: list[str]) -> str:
    """A card's text; metadata that do not survive the hub's own reader are a defect."""
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(body).rstrip() + "\n"
    read = kind(text)
    if read.data.to_yaml() != data.to_yaml():
        raise ValueError("a card's metadata do not read back as they were written")
    return text
