"""The report: deterministic, self-contained, escaped, accessible, and free of the corpus where it is published."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard, ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console
from test_summary import FACTS, IMPORTED, MODELS, STRENGTH, make_prompts, make_recipe, make_responses, make_verdicts, variant

from suasion.errors import UserError
from suasion.evaluation.summary import HUMAN, summarise
from suasion.recipe import Recipe, dump_recipe
from suasion.records import content_id, write_json, write_rows
from suasion.reporting import figures
from suasion.reporting import page as pages
from suasion.reporting.cards import DISCLOSURE
from suasion.reporting.findings import hours_table, strategies_table
from suasion.reporting.making import judge_sentence, making, recorded
from suasion.reporting.publish import publish, shares_run, word_runs
from suasion.reporting.results import agreement_table
from suasion.reporting.stage import run_stage
from suasion.reporting.table import coefficient
from suasion.reporting.terminal import print_summary
from suasion.rundir import Input, StageContext
from suasion.sections.grading import LlmGrader, title

HOSTILE = "<script>alert('x')</script> | a pipe\n# and a heading {{ 7 * 7 }} & <b>bold</b>"
COUNTS = {  # as the corpus stage writes it
    "cmv": {
        "read": {"utterances": 5670, "conversations": 1260, "outcome pairs": 2340},
        "kept": {"conversations": 1260, "examples": 900, "outcome pairs": 234},
        "dropped": {"comment that occurs twice": 3, "reply too long": 12},
        "binary_fields": [],
        "tokens": {"reply": {"min": 12, "p05": 20, "p25": 57, "p50": 67, "p75": 105, "p95": 112, "max": 121}},
        "longer_wins_rate": 0.5299,
        "source": "/data/secret-machine/cmv",
    },
    "p4g": {"read": {"utterances": 557, "conversations": 42}, "kept": {"examples": 84}, "dropped": {}, "longer_wins_rate": None},
}
MEASURED = {
    "accuracy": 0.62,
    "low": 0.51,
    "high": 0.73,
    "longer": 0.57,
    "longer_low": 0.44,
    "longer_high": 0.7,
    "n": 310,
    "groups": 50,
}
LABELS = {"n": 20, "ties": 1, "none": 0, "first_rate": 0.5, "longer_rate": 0.45, "length_predicts": 0.55}
ARM = {"pairs": 8, "n": 3, "tie": 1, "conflict": 1, "flip": 1, "unmatched": 0, "none": 1, "identical": 1, "unlabelled": 0}
MADE = (
    FACTS
    | {  # as evaluate writes it, with what FACTS leaves out
        "grader": {
            "name": "ngram grader, trained on judge_pairs",
            **MEASURED,
            "folds": 5,
            "canaries": {"empty": 1.0, "identical": 1.0, "swapped": 0.5},
            "canary_pairs": 24,
            "same_as_labelling_grader": False,
        },
        "labels": {
            "ai": {"source": "ai:embedding", "trained_on": "grader_pairs", "cross_validation": MEASURED, **LABELS}
            | {"canaries": {"empty": 1.0, "injected": 0.875, "padded": 0.0, "constant": 0.5}}
            | {"pools": {"rlaif": LABELS, "rlhf": LABELS | {"n": 8}}},
            "human": {"source": "simulated", "simulated": True, "layout": "verdicts", "n": 8, "ties": 1, "none": 0}
            | {"first_rate": {"value": 0.57, "low": 0.18, "high": 0.9, "p_value": 1.0, "n": 7}},
        },
        "preferences": {
            "arms": {
                name: {
                    **ARM,
                    "length_accuracy": 0.36,
                    "on_policy": True,
                    "sources": ["simulated" if "rlhf" in name else "ai:embedding"],
                }
                for name in MODELS[2:]
            },
            "left_out": [],
        },
        "counts": {
            "pools": {
                "sizes": {"sft": 400, "rlaif": 190, "rlhf": 48, "eval": 115},
                "corpora": {
                    "sft": {"cmv": 300, "p4g": 100},
                    "rlaif": {"cmv": 150, "p4g": 40},
                    "rlhf": {"cmv": 48},
                    "eval": {"cmv": 90, "p4g": 25},
                },
                "grader_pairs": 93,
                "judge_pairs": 72,
                "components": 155,
                "leftover_conversations": 1,
                "persuadees": {
                    "in": {"sft": 90, "rlaif": 40, "rlhf": 0, "eval": 25},
                    "of eval in any other pool": 3,
                    "of eval persuading in any other pool": 2,
                },
            },
            "sample": {"responses": 476, "flags": {"cut-off": 10, "looping": 1}},
        },
    }
)
VOID = {"meta", "link", "br", "img", "hr", "input"}


def make_run(
    root: Path, n: int = 40, models: tuple[str, ...] = MODELS, facts: dict | None = None, hostile: bool = True
) -> StageContext:
    """A run directory as the stages leave it, from synthetic rows."""
    recipe, prompts = make_recipe(), make_prompts(n)
    responses = make_responses(prompts, models)
    if hostile:
        for key, response in responses["base"].items():
            responses["base"][key] = response.model_copy(update={"text": HOSTILE})
    verdicts = make_verdicts(prompts, {name: STRENGTH[name] for name in (*models, HUMAN)}, 0.1, 0.02)
    summary = summarise(recipe, prompts, responses, verdicts, MADE if facts is None else facts)
    folders = {"corpus": "01-corpus", "pools": "02-pools", "sft": "03-sft", "evaluate": "09-evaluate", "report": "10-report"}
    folders |= {f"dpo-{name}": f"08-dpo-{name}" for name in models if name not in ("base", "sft")}
    for folder in folders.values():
        (root / folder).mkdir(parents=True, exist_ok=True)
        write_json(root / folder / "manifest.json", {})
    evaluate = root / "09-evaluate"
    write_json(evaluate / "summary.json", summary)
    write_json(evaluate / "models.json", {"models": {name: content_id("lineage", name) for name in models}})
    write_rows(evaluate / "responses.jsonl", [r for by_prompt in responses.values() for r in by_prompt.values()])
    write_rows(evaluate / "verdicts.jsonl", verdicts)
    write_rows(root / "02-pools" / "eval.jsonl", prompts)
    write_json(root / "01-corpus" / "counts.json", COUNTS)
    write_json(root / "timings.json", {"sft": [{"seconds": 90.0}, {"seconds": 30.0}], "evaluate": [{"seconds": 60.0}]})
    steps = range(12)
    (root / "03-sft" / "metrics.jsonl").write_text("\n".join(json.dumps({"step": i, "loss": 3 - i / 10}) for i in steps) + "\n")
    for name in models[2:]:
        rows = [
            {"step": i, "loss": 0.69, "margin": i / 50, "accuracy": 0.6, "chosen_logp": -9 - i, "rejected_logp": -9 - 2 * i}
            for i in steps
        ]
        rows[3]["kl"] = 0.01
        (root / f"08-dpo-{name}" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (root / "recipe.yaml").write_text(dump_recipe(recipe))
    files = [("evaluate", f) for f in ("summary.json", "responses.jsonl", "verdicts.jsonl", "models.json")]
    files += [("pools", "eval.jsonl"), ("corpus", "counts.json")]
    files += [(stage, "metrics.jsonl") for stage in folders if stage == "sft" or stage.startswith("dpo-")]
    inputs = {Input(stage, file): root / folders[stage] / file for stage, file in files}
    return StageContext(recipe, "report", root / "10-report", inputs, root)


class Page(HTMLParser):
    """Collects what the tests ask of the page, and fails on unbalanced tags."""

    def __init__(self, text: str):
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[int] = []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("run")
    stage = make_run(root, 115)
    run_stage(stage)
    return root, (stage.folder / "index.html").read_text()


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_equal_bytes_every_time_and_elsewhere(run, tmp_path):
    first, stage = run[0] / "10-report", make_run(tmp_path, 115)
    run_stage(stage)
    assert files(stage.folder) == files(first)


def test_files_of_the_contract(run):
    written = files(run[0] / "10-report")
    assert written["summary.json"] == (run[0] / "09-evaluate" / "summary.json").read_bytes()
    for name in (
        "index.html",
        "report.md",
        "figures/forest.svg",
        "figures/forest.png",
        "figures/matrix.svg",
        "tables/models.csv",
    ):
        assert name in written
    assert {
        "figures/curve-sft-loss.svg",
        "figures/curve-margin.svg",
        "figures/curve-logp.svg",
        "figures/text-words.svg",
    } <= written.keys()
    for name, content in written.items():
        assert not re.search(rb"secret-machine|/tmp/", content), name
        assert not re.search(rb"\bnan\b|\bNone\b|Infinity", content) or name.endswith(".png"), name


def test_page_is_self_contained_and_escaped(run):
    text = run[1]
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "{{ 7 * 7 }}" in text
    assert "<b>bold" not in text
    for name, attributes in Page(text).tags:
        for key in ("src", "href", "xlink:href", "srcset", "action"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:,")), (name, value)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "prefers-color-scheme:dark" in text
    assert "@media print" in text


def test_page_is_accessible(run):
    parsed = Page(run[1])
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for name, attributes in parsed.tags:
        if name == "th":
            assert attributes.get("scope") in ("col", "row")
        if name == "svg":
            assert attributes["role"] == "img"
            assert set(attributes["aria-labelledby"].split()) <= set(ids)
        if name == "a":
            assert attributes["href"][1:] in ids
        if name == "section":
            assert attributes["aria-labelledby"] in ids
    assert parsed.headings[0] == 1
    assert parsed.headings.count(1) == 1
    assert all(later - earlier <= 2 for earlier, later in zip(parsed.headings, parsed.headings[1:], strict=False))
    assert ("html", {"lang": "en"}) in parsed.tags


def test_every_colour_of_an_inline_figure_is_a_variable(run):
    """Dark mode: an unmapped ink would be invisible; only heat map cells keep their own colours."""
    figures = re.findall(r'<figure class="figure" id="figure-(.+?)">(.*?)</figure>', run[1], re.DOTALL)
    assert len(figures) >= 10
    for name, svg in figures:
        if name != "matrix":
            assert not re.findall(r"#[0-9a-f]{6}", svg), name


def test_simulated_stands_in_every_table_and_figure_with_such_a_model(run):
    root, _ = run
    for path in [*(root / "10-report" / "tables").glob("*.csv"), *(root / "10-report" / "figures").glob("*.svg")]:
        text = path.read_text().replace("pools, rlhf", "")  # the pool, not the model
        for line in re.findall(r"[^\n<>,]*\brlhf\b[^\n<>,]*", text):
            bare = re.sub(r"rlhf (pool|pairs)", "", line)
            found = re.search(r"(?<![\w-])(rlaif-)?rlhf(?! \(simulated\))", bare)
            assert not found or path.name in ("counts.csv", "pools.csv"), (path.name, line)
    assert "Human labels are simulated" in run[1]


def test_markdown_renders_with_whole_tables_and_existing_figures(run):
    root, _ = run
    text = (root / "10-report" / "report.md").read_text()
    html = MarkdownIt("commonmark").enable("table").render(text)
    summary = json.loads((root / "10-report" / "summary.json").read_text())
    assert html.count("<table>") >= 8
    assert "| ---" not in html
    assert html.count("<tr>") >= len(summary["comparisons"]) + len(summary["models"])
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (root / "10-report" / target).is_file()
    for sentence in summary["headline"] + summary["caveats"]:
        assert sentence in text


def test_the_markdown_reads_like_a_short_paper(run):
    """Question, answer, data, method, results, limits, references, in this order; what is measured stands under Results."""
    text = (run[0] / "10-report" / "report.md").read_text()
    sections = re.findall(r"^## (.+)$", text, re.MULTILINE)
    order = ["Question", "Answer", "Data", "Method", "Results", "Limits", "Reproducing this run", "References"]
    assert [name for name in sections if name in order] == order
    of = dict(zip(sections, re.split(r"^## .+$", text, flags=re.MULTILINE)[1:], strict=True))
    assert "examples alone (sft), AI preferences (rlaif), simulated human preferences (rlhf)" in of["Question"]
    assert "simulated human preferences after rlaif (rlaif-rlhf)" in of["Question"]
    assert "AI preferences on the pairs with human labels (rlaif-matched)" in of["Question"]
    for name, section in (("What was dropped, and why", "Data"), ("The preferences of each arm", "Method"), ("Every comparison", "Results"), ("Honesty and manipulation", "Results")):  # fmt: skip
        assert f"### {name}" in of[section], name
    assert "Base models may have read these threads" in of["Limits"]


def test_every_point_of_the_training_curves_is_in_a_file(run):
    root, _ = run
    rows = list(csv.DictReader(io.StringIO((root / "10-report" / "tables" / "curves.csv").read_text())))
    assert [(row["step"], row["loss"]) for row in rows if row["model"] == "sft"] == [(str(i), str(3 - i / 10)) for i in range(12)]
    own = [row for row in rows if row["model"] == "rlhf (simulated)"]
    assert [float(row["chosen_logp"]) for row in own] == [-9 - i for i in range(12)]
    assert [row["kl"] for row in own] == ["", "", "", "0.01", *[""] * 8]


def test_people_have_a_forest_of_their_own(run):
    """Their rates and intervals as they stand in the summary; no such figure where nobody judged."""
    summary = json.loads((run[0] / "10-report" / "summary.json").read_text())
    assert figures.people_forest(summary) is None
    assert "forest-people" not in run[1]
    told = [
        {**c, "value": 0.7, "low": 0.6, "high": 0.8}
        for c in summary["comparisons"]
        if c["second"] == "base" and c["first"] != "human"
    ]
    rows = [{"first": c["first"], "second": "base", "corrected": {"value": 0.66 if c["first"] == "rlhf" else None}} for c in told]
    drawn = figures.people_forest({**summary, "people": {"judged": 9, "tested": told, "comparisons": rows}})
    assert drawn.name == "forest-people"
    assert "rlhf (simulated) 70%, interval 60–80%" in drawn.alt
    assert drawn.svg.count(b"70%  (60") == len(told)
    plain = figures.people_forest({**summary, "people": {"judged": 9, "tested": told, "comparisons": []}})
    assert plain.svg != drawn.svg  # the corrected rate is a diamond of its own


def test_tables_hold_the_numbers_of_the_summary(run):
    root, _ = run
    summary = json.loads((root / "10-report" / "summary.json").read_text())
    rows = list(csv.DictReader(io.StringIO((root / "10-report" / "tables" / "comparisons.csv").read_text())))
    assert len(rows) == len(summary["comparisons"])
    for row, comparison in zip(rows, summary["comparisons"], strict=True):
        assert float(row["win_rate"]) == comparison["value"]
        assert float(row["win_rate_low"]) == comparison["low"]
        assert (int(row["scored"]), int(row["scored_of"])) == (comparison["n"], comparison["asked"])
        assert row["verdict"] == comparison["verdict"]


def test_hours_add_up_and_cost_only_where_a_price_is_known():
    timings = {"sft": [{"seconds": 3600.0}, {"seconds": 1800.0}], "evaluate": [{"seconds": 1800.0}]}
    priced = hours_table(timings, 3.0, ["sft", "sample", "evaluate"])
    assert [(row["stage"], row["minutes"], row["attempts"], row["cost"]) for row in priced.rows] == [
        ("sft", 90.0, 2, 4.5),
        ("evaluate", 30.0, 1, 1.5),
        ("all", 120.0, 3, 6.0),
    ]
    free = hours_table(timings, None, ["sft"])
    assert "cost" not in [column.key for column in free.columns]
    assert "no cost of hours is shown" in free.note
    assert "paid" not in [column.key for column in free.columns]
    timings["ai-labels"] = [
        {"seconds": 60.0, "dollars": 1.0},
        {"seconds": 60.0, "dollars": 1.5},
    ]  # the second holds what was paid before
    served = hours_table(timings, None, ["sft", "ai-labels", "evaluate"])
    assert [row["paid"] for row in served.rows] == [0, 1.5, 0, 1.5]
    assert "paid" in [column.key for column in served.columns]
    assert hours_table({}, 3.0, ["sft"]).rows == []


def test_best_and_worst_are_the_graders(run):
    root, text = run
    found = [json.loads(line) for line in (root / "09-evaluate" / "verdicts.jsonl").read_text().splitlines()]
    chances = {
        row["prompt_id"]: 1 - row["p_a"] for row in found if (row["first"], row["second"], row["label"]) == ("base", "sft", "b")
    }
    best = max(chances.values())
    shown = re.findall(r'class="example([^"]*)".*?<span class="id">cmv (\w+) · ([^<]*)</span>', text, re.DOTALL)
    titles = {prompt: why for _, prompt, why in shown}
    assert any("best of sft" in why and chances[prompt] == best for prompt, why in titles.items() if prompt in chances)
    assert all(("is-best" in css) == ("best of" in why) for css, _, why in shown)
    assert sum("is-drawn" in css for css, _, _ in shown) == make_recipe().report.examples


def test_cards_are_read_back_by_the_hubs_own_classes(run):
    folder = run[0] / "10-report" / "cards"
    assert {path.name for path in folder.iterdir()} == {
        *(f"model-{name}.md" for name in MODELS[1:]),
        *(f"dataset-preferences-{name}.md" for name in MODELS[2:]),
        "dataset-evaluation.md",
    }
    for path in folder.iterdir():
        text = path.read_text()
        card = (ModelCard if path.name.startswith("model-") else DatasetCard)(text)
        for needed in ("## Intended use", "## Limits", "persuades better can deceive", DISCLOSURE):
            assert needed in text, (path.name, needed)
        assert "research-only" in card.data.tags
        assert "secret-machine" not in text
        if path.name.startswith("model-"):
            assert card.data.eval_results[0].metric_type == "win_rate"
            assert 0 <= card.data.eval_results[0].metric_value <= 1
            assert ("No person labelled" in text.split("## Intended use")[0]) == ("rlhf" in path.name)


def test_published_strategy_numbers_are_of_the_same_dialogues_or_said_not_to_be():
    def note(dialogues: int) -> str:
        quality = {
            "dialogues": dialogues,
            "sentences": 635,
            "folds": 5,
            "macro_f1": 0.5,
            "accuracy": 0.7,
            "tfidf_macro_f1": 0.3,
            "tfidf_accuracy": 0.5,
        }
        return strategies_table({"models": [], "strategies": {"quality": quality}}).note

    assert "the two cannot be compared" in note(42)
    assert "cannot be compared" not in note(300)
    assert ".596–.639" in note(300)


def test_missing_arms_and_facts_are_named_not_drawn(tmp_path):
    stage = make_run(tmp_path, 12, ("base", "sft", "rlaif"), {"waiting": {"rlhf": "48 human labels are missing"}})
    run_stage(stage)
    text = (stage.folder / "index.html").read_text()
    Page(text)
    assert "48 human labels are missing" in text
    assert "proves nothing" in text
    assert "<strong>rlaif-matched</strong>: not trained in this run" in text
    assert "The evaluation grader: not recorded in this run" in text
    assert not (stage.folder / "tables" / "agreement.csv").exists()


def made(counts: object = COUNTS, facts: dict = MADE, recipe: Recipe | None = None) -> dict[str, list[list[str]]]:
    """The cells of the tables of 'How it was made', as the page shows them."""
    recipe = recipe or make_recipe()
    names = {name: f"{name} (simulated)" if "rlhf" in name else name for name in MODELS}
    tables = [*making(counts, facts, recipe, names), *recorded(counts, facts, True, names)]
    for table in tables:
        table.to_csv()
    return {
        table.name: [[f"{text} {bounds}".strip() for _, text, bounds in table.cells(row)] for row in table.rows]
        for table in tables
    }


def test_shared_persuadees_stand_beside_the_pools():
    (pools,) = (table for table in making(COUNTS, MADE, make_recipe(), {}) if table.name == "pools")
    assert "of the 25 persuadees of eval, 3 are persuaded in another pool as well and 2 persuade in one." in pools.note
    facts = {**MADE, "counts": {"pools": {**MADE["counts"]["pools"], "persuadees": {}}}}
    (pools,) = (table for table in making(COUNTS, facts, make_recipe(), {}) if table.name == "pools")
    assert "persuadees" not in pools.note


def test_evaluation_replies_that_did_not_persuade_are_told():
    for won, told in ((115, False), (100, True)):
        facts = {**MADE, "counts": {"pools": {**MADE["counts"]["pools"], "eval_replies_that_persuaded": won}}}
        (pools,) = (table for table in making(COUNTS, facts, make_recipe(), {}) if table.name == "pools")
        assert ("Of the 115 human replies in eval 100 are known to have persuaded" in pools.note) == told


def test_how_it_was_made_stands_in_compact_tables():
    tables = made()
    assert tables["corpora"] == [
        ["cmv", "5,670", "1,260", "900", "234", "67 20–112", "53%"],
        ["p4g", "557", "42", "84", "0", "not recorded", "–"],
    ]
    assert tables["dropped"] == [
        ["cmv", "reply too long", "12"],
        ["cmv", "comment that occurs twice", "3"],
        ["p4g", "nothing", "0"],
    ]
    assert tables["pools"] == [
        ["sft", "400", "300", "100", "trains sft"],
        ["rlaif", "190", "150", "40", "pairs for AI labels"],
        ["rlhf", "48", "48", "0", "pairs for human and AI labels"],
        ["eval", "115", "90", "25", "sealed, for the comparison"],
        ["grader_pairs", "93", "93", "0", "outcome pairs, train the labelling grader"],
        ["judge_pairs", "72", "72", "0", "outcome pairs, train the evaluation grader"],
    ]
    grader = ["310 grader_pairs", "62% 51–73%"]
    assert tables["sources"] == [
        ["ai:embedding", "rlaif pool", "20", "1", "0", "50%", "45%", "55%", *grader],
        ["ai:embedding", "rlhf pool", "8", "1", "0", "50%", "45%", "55%", *grader],
        ["human (simulated)", "rlhf pool", "8", "1", "0", "57% 18–90%", "not recorded", "not recorded", "–", "–"],
    ]
    kept = ["8", "3", "1", "2", "0", "2", "36%"]
    assert tables["preferences"] == [
        ["rlaif", "ai:embedding", *kept, "no"],
        ["rlhf (simulated)", "human (simulated)", *kept, "no"],
        ["rlaif-rlhf (simulated)", "human (simulated)", *kept, "all: written by sft"],
        ["rlaif-matched", "ai:embedding", *kept, "no"],
    ]
    assert tables["judge"] == [
        ["ngram grader, trained on judge_pairs", "62% 51–73%", "57% 44–70%", "310", "50", "5", "2 of 3"],
    ]
    assert judge_sentence(MADE) == (
        "The evaluation grader (ngram grader, trained on judge_pairs) names the winner in 62% (51–73%) of 310 held-out pairs from "
        "50 groups; “the longer text wins” is right in 57% (44–70%) of the same pairs. It is not the grader that labelled."
    )


def test_the_rates_of_the_canaries_stand_beside_the_graders(run):
    """The message of a failed canary, and the recipes' comments, promise that the report shows the rates."""
    plain = make_recipe()
    allowing = plain.ai_labels.model_copy(update={"allow_failed_canaries": ("padded",)})
    rows = made(recipe=plain.model_copy(update={"ai_labels": allowing}))["canaries"]
    names = [title(section.grader) for section in (plain.ai_labels, plain.evaluate)]
    assert rows == [
        ["labelling", names[0], "–", "100%", "not asked", "not asked", "88%", "0%", "50%", "injected (not allowed), padded (allowed by the recipe)"],
        ["evaluation", names[1], "24", "100%", "100%", "50%", "not asked", "not asked", "not asked", "swapped (not allowed)"],
    ]  # fmt: skip
    for page in ("index.html", "report.md"):
        text = (run[0] / "10-report" / page).read_text()
        assert "Canaries: comparisons whose right answer is known" in text
        assert "88%" in text
        assert (
            "an instruction in a reply that had won without it counted as right" in text
        )  # the labelling grader's rate is of such a run
    old = {**MADE, "grader": {}, "labels": {}}
    assert made(facts=old)["canaries"] == []


def test_agreement_has_intervals_and_what_is_left_of_it_beyond_chance():
    known = {"value": 0.62, "low": 0.5, "high": 0.74}
    now = {"a": "human", "b": "ai:ngram (labelling grader)", "on": "this run's rlhf pairs", "agree": 0.7, "n": 40, "low": 0.6, "high": 0.8,
           "balanced": known, "labelled": 44, "kappa": {"value": -0.02, "low": -0.3, "high": 0.25}, "gwet_ac1": known, "alpha": None,
           "people": False, "labelling": True, "page": "07-preferences/disagreements.html"}  # fmt: skip
    old = {"a": "ai:embedding", "b": "ai:ngram (evaluation grader)", "on": "this run's pairs", "agree": None, "n": 0}
    table = agreement_table({"agreement": [now, old]}, True)
    assert [[f"{text} {bounds}".strip() for _, text, bounds in table.cells(row)] for row in table.rows] == [
        ["human (simulated)", "ai:ngram (labelling grader)", "this run's rlhf pairs", "70% 60–80%", "40", "62% 50–74%", "−.02 −.30 to .25",
         ".62 .50 to .74", "–", "44"],
        ["ai:embedding", "ai:ngram (evaluation grader)", "this run's pairs", "–", "0", "–", "–", "–", "–", "–"],
    ]  # fmt: skip
    assert "can be read in 07-preferences/disagreements.html" in table.note
    assert (
        table.to_csv()
        .splitlines()[1]
        .startswith("human (simulated),ai:ngram (labelling grader),this run's rlhf pairs,0.7,0.6,0.8,40,0.62,")
    )
    assert "can be read in" not in agreement_table({"agreement": [old]}, True).note
    signs = [coefficient(value) for value in (0.214, -0.031, 1.0, -1.0, -0.001, 0.0, 0.999)]
    assert signs == [".21", "−.03", "1.00", "−1.00", ".00", ".00", "1.00"]


def test_what_a_language_model_said_in_both_orders_stands_beside_the_labels():
    llm = LlmGrader(kind="llm", model="judge", base_url="http://127.0.0.1:1/v1", flips="tie")
    plain = make_recipe()
    recipe = plain.model_copy(update={"ai_labels": plain.ai_labels.model_copy(update={"grader": llm})})
    orders = {"outcomes": {"consistent": 12, "flip": 5, "tie": 2, "none": 1}, "first_shown_rate": 0.72, "flip_rate": 0.26}
    labels = {
        **MADE["labels"]["ai"],
        "pools": {"rlaif": {**LABELS, **orders}, "rlhf": {**LABELS, **orders, "first_shown_rate": None}},
    }
    facts = {**MADE, "labels": {**MADE["labels"], "ai": labels}}
    assert made(facts=facts, recipe=recipe)["orders"] == [
        ["labelling", "rlaif pool", "12", "5", "2", "1", "72%", "a tie"],
        ["labelling", "rlhf pool", "12", "5", "2", "1", "–", "a tie"],
    ]
    in_both = {"orders": orders["outcomes"], "flip_rate": 0.26, "flips": "drop", "first_shown_rate": 0.72}
    judged = {**MADE, "grader": {**MADE["grader"], **in_both}}
    dropping = llm.model_copy(update={"flips": "drop"})
    judge = plain.model_copy(update={"evaluate": plain.evaluate.model_copy(update={"grader": dropping})})
    assert made(facts=judged, recipe=judge)["orders"] == [
        ["evaluation", "the comparison of models", "12", "5", "2", "1", "72%", "no label"]
    ]
    assert made()["orders"] == []


def off_policy(recipe: Recipe, **counts: int) -> list[str]:
    """The off-policy cells where so many of each arm's 40 preferences are counted."""
    facts = copy.deepcopy(MADE)
    for arm, count in counts.items():
        facts["arms"][arm.replace("_", "-")] |= {"off_policy": count, "preferences": 40}
        facts["preferences"]["arms"][arm.replace("_", "-")]["on_policy"] = count == 0
    return [row[-1] for row in made(facts=facts, recipe=recipe)["preferences"]]


def test_off_policy_says_who_wrote():
    counted = off_policy(make_recipe(), rlaif=0, rlhf=0, rlaif_rlhf=40, rlaif_matched=0)
    assert counted == ["no", "no", "all: written by sft", "no"]
    people = variant(human_labels=IMPORTED)
    counted = off_policy(people, rlaif=0, rlhf=40, rlaif_rlhf=40, rlaif_matched=0)
    assert counted == ["no", "all: imported", "all: imported", "no"]
    assert off_policy(people, rlhf=30)[1] == "30 of 40: imported"
    assert {row[0]: row[-1] for row in made(recipe=people)["pools"]}["rlhf"] == "pairs for AI labels"


def page_of(recipe: Recipe, facts: dict) -> dict:
    """The page of a small run of this recipe."""
    prompts = make_prompts(6)
    summary = summarise(recipe, prompts, make_responses(prompts), make_verdicts(prompts, STRENGTH), facts)
    return pages.build_page(summary, recipe, prompts, [], [], {name: content_id("lineage", name) for name in MODELS}, COUNTS)


def test_the_method_tells_imported_preferences_from_own_pairs():
    own, people = page_of(make_recipe(), MADE), page_of(variant(human_labels=IMPORTED), MADE)
    text = " ".join(own["method"])
    assert "labels of a simulated annotator, no person, cover the rlhf pool. Each arm" in text
    assert "6 primary comparisons (each trained model against base, and rlaif-matched against rlhf)" in text
    assert "(the pairs that also have a decisive human label)" in text
    text = " ".join(people["method"])
    assert "cover the rlhf pool" not in text
    assert "decisive human label" not in text
    assert "people judged texts that another model wrote" in text
    assert "control (rlaif-matched) uses this run's own pairs" in text
    assert "compares recipes, not the source of feedback. Each arm" in text
    assert "rlhf from sft on imported human labels; rlaif-rlhf from rlaif on imported human labels" in text
    assert "5 primary comparisons (each trained model against base); equivalence" in text
    labels = {row["arm"]: row["labels"] for row in people["tables"]["arms"].rows}
    assert labels["rlhf"] == "human, imported texts"
    assert labels["rlaif-matched"] == "ai, rlhf pool"


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (1.0, "human replies, all of which persuaded."),
        (0.724, "human replies, 72% of which persuaded."),
        (0.999, "human replies, 99% of which persuaded."),
        (0.001, "human replies, 1% of which persuaded."),
        (0.0, "human replies, none of which persuaded."),
        (None, "human replies. For"),
        ("gone", "human replies. For"),
    ],
)
def test_the_method_says_how_many_replies_persuaded(share, words):
    sft = {} if share == "gone" else {"sft": {"persuaded_share": share}}
    method = page_of(make_recipe(), MADE | {"counts": MADE["counts"] | sft})["method"]
    assert f"sft learns {words}" in method[1]
    assert "human replies that persuaded" not in method[1]


def test_every_recorded_fact_stays_on_the_page_folded(run):
    root, text = run
    folded = re.search(r'<details class="facts">(.*?)</details>', text, re.DOTALL)
    assert folded
    assert "corpus, cmv, tokens, reply, p25" in folded[1]
    assert "secret-machine" not in folded[1]
    compact = re.search(r'<section aria-labelledby="method">(.*?)<details', text, re.DOTALL)
    assert compact
    assert compact[1].count("<tr>") < 50
    markdown = (root / "10-report" / "report.md").read_text()
    assert "tokens, reply, p25" not in markdown
    for name in ("counts", "labels", "preference_facts", "grader"):
        assert f"(tables/{name}.csv)" in markdown
        assert (root / "10-report" / "tables" / f"{name}.csv").is_file()


def places(value: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all nested keys."""
    if not isinstance(value, dict):
        return []
    return [found for key, item in value.items() for found in ((*path, key), *places(item, (*path, key)))]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_fact_may_be_missing_or_strange(data):
    both = copy.deepcopy({"counts": COUNTS, "facts": MADE})
    wanted = [path for path in places(both) if len(path) > 1 and path[1] not in ("agreement", "waiting", "packages")]
    for path in data.draw(st.lists(st.sampled_from(wanted), min_size=1, max_size=4)):
        inner = both
        for key in path[:-1]:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict) and path[-1] in inner:
            strange = data.draw(st.sampled_from(["gone", None, "words", {}, [], True, 7, -0.5]))
            if strange == "gone":
                del inner[path[-1]]
            else:
                inner[path[-1]] = strange
    for rows in made(both["counts"], both["facts"]).values():
        assert not any(re.search(r"\bNone\b|object at", cell) for row in rows for cell in row)
    assert "None" not in judge_sentence(both["facts"])


@pytest.mark.parametrize("counts", [None, {}, [], {"cmv": None}, {"cmv": {}}, {"jsonl": {"read": {"rows": 5}, "kept": {}}}])
def test_no_facts_at_all(counts):
    tables = made(counts, {})
    assert judge_sentence({}) == ""
    assert tables["pools"] == tables["sources"] == tables["preferences"] == tables["judge"] == tables["canaries"] == []
    if counts == {"cmv": {}}:
        assert tables["corpora"] == [["cmv", *["not recorded"] * 6]]
        assert tables["dropped"] == [["cmv", "not recorded", "not recorded"]]
    if counts and "jsonl" in counts:
        assert tables["corpora"][0][1:5] == ["5", "not recorded", "0", "0"]


@pytest.mark.parametrize("models", [("base",), ("base", "sft")])
def test_the_smallest_runs_render(tmp_path, models):
    stage = make_run(tmp_path, 1, models, {})
    run_stage(stage)
    Page((stage.folder / "index.html").read_text())


def test_terminal_table_carries_the_warning():
    prompts = make_prompts(12)
    summary = summarise(make_recipe(), prompts, make_responses(prompts), make_verdicts(prompts, STRENGTH), FACTS)
    console = Console(width=120, record=True, file=io.StringIO())
    print_summary(summary, console)
    text = " ".join(console.export_text().split())
    assert text.count("A run of this size proves nothing") == 1
    assert "rlhf (simulated)" in text
    assert "(" in text


def test_shares_run_sees_through_case_and_punctuation():
    source = "one two three four five six seven eight nine ten eleven twelve thirteen"
    runs = set(word_runs(source))
    assert len(runs) == 2
    assert shares_run("He said: ONE, two\nthree - four 'five' six seven; eight nine ten (eleven) twelve.", runs)
    assert not shares_run("one two three four five six seven eight nine ten eleven", runs)
    assert not shares_run("one two three four five six SEVEN-and eight nine ten eleven twelve", runs)
    assert shares_run("three four", set(word_runs(source, 2)), 2)


def test_published_form_holds_nothing_of_the_corpus(tmp_path):
    stage = make_run(tmp_path / "run", 8, hostile=False)
    recipe = stage.recipe
    copied = "the stranger on the ferry told me that every harbour keeps two clocks and trusts neither"
    path = tmp_path / "run" / "09-evaluate" / "responses.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lineage = content_id("lineage", "sft")
    for row in rows:
        row["text"] = f"Well, {copied.upper()}!" if row["lineage"] == lineage else f"fresh words {row['id']}"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    shutil.copy(path.with_name("summary.json"), stage.folder)
    prompts = make_prompts(8)
    corpus = [copied, *(turn.text for p in prompts for turn in p.turns), *(p.reply for p in prompts)]
    out = tmp_path / "docs" / "results" / "demo"
    withheld = publish(tmp_path / "run", out, iter(corpus))  # one copied response on every shown prompt, drawn, best or worst
    assert withheld >= recipe.report.examples
    runs = {found for text in corpus for found in word_runs(text)}
    for name, content in files(out).items():
        assert not shares_run(content.decode(), runs), name
        assert b"secret-machine" not in content
    text = (out / "report.md").read_text()
    assert f"{withheld} of the shown" in text
    assert text.count("### Prompt ") == withheld
    assert "fresh words" in text
    assert "human reply**" not in text
    assert {"summary.json", "report.md", "figures/forest.svg", "tables/models.csv"} <= files(out).keys()
    assert not [name for name in files(out) if name.endswith((".html", ".png"))]  # what is committed stays small


def test_publish_refuses_a_stale_or_leaking_report(tmp_path):
    stage = make_run(tmp_path / "run", 4)
    with pytest.raises(UserError, match="no finished stage"):
        publish(tmp_path / "nowhere", tmp_path / "out", [])
    shutil.copy(tmp_path / "run" / "09-evaluate" / "summary.json", stage.folder)
    method = pages.render("report.md.j2", {**_page(stage), "examples": []}, figures={})
    with pytest.raises(UserError, match=r"report\.md.* would repeat 12 words"):
        publish(tmp_path / "run", tmp_path / "out", [method[500:900]])
    assert not (tmp_path / "out").exists()
    (stage.folder / "summary.json").write_text("{}\n")
    with pytest.raises(UserError, match="stale"):
        publish(tmp_path / "run", tmp_path / "out", [])


def _page(stage: StageContext) -> dict:
    summary = json.loads((stage.folder / "summary.json").read_text())
    return pages.build_page(summary, stage.recipe, make_prompts(4), [], [], {}, {})
