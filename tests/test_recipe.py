"""Recipes: every shipped one loads, every field is read somewhere, and what is wrong is named."""

import ast
import importlib.util
import pkgutil
from pathlib import Path

import pytest
import yaml

from suasion import recipe as recipe_module
from suasion import sections
from suasion.errors import UsageError
from suasion.grading.rubric import template_hashes
from suasion.recipe import Recipe, dump_recipe, load_recipe, validate_recipe
from suasion.sections.base import Section

REPOSITORY = Path(__file__).parents[1]
RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))
SOURCES = [path for path in (REPOSITORY / "src").rglob("*.py") if path.parent.name != "sections"]
READ = {node.attr for path in SOURCES for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
MODULES = [importlib.import_module(f"suasion.sections.{module.name}") for module in pkgutil.iter_modules(sections.__path__)]
SECTIONS = sorted(
    {
        kind
        for module in (recipe_module, *MODULES)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Section) and kind is not Section
    },
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_its_resolved_copy_is_equal(path):
    loaded = load_recipe(path)
    assert validate_recipe(yaml.safe_load(dump_recipe(loaded)), "copy") == loaded
    assert loaded.name == path.stem


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_arm_takes_at_least_twelve_optimiser_steps(path):
    from suasion.sections.training import optimiser_steps

    loaded = load_recipe(path)
    for arm in loaded.dpo:
        source = loaded.human_labels.source
        imported = arm.labels == "human" and source.kind == "file" and source.layout == "preferences"
        asked = 160 if imported else getattr(loaded.pools, arm.pool)
        kept = int(asked * 0.7)  # some pairs are dropped: ties, cut-off responses
        assert optimiser_steps(kept, arm) >= 12, arm.name


@pytest.mark.parametrize("kind", SECTIONS, ids=lambda kind: kind.__name__)
def test_every_field_is_documented_and_read_somewhere(kind):
    for name, field in kind.model_fields.items():
        assert field.description, f"{kind.__name__}.{name} has no description"
        assert name in READ, f"{kind.__name__}.{name} is read nowhere"


@pytest.fixture
def data():
    return yaml.safe_load(dump_recipe(load_recipe(REPOSITORY / "recipes" / "tiny.yaml")))


def refused(data) -> str:
    with pytest.raises(UsageError) as error:
        validate_recipe(data, "test")
    return str(error.value)


def test_an_unknown_key_names_the_nearest_known_one(data):
    data["sft"]["learning_rte"] = 1
    assert "sft.learning_rte: unknown key, did you mean 'learning_rate'?" in refused(data)
    data["dpo"][0]["betta"] = 1
    assert "dpo.0.betta: unknown key, did you mean 'beta'?" in refused(data)


def test_an_unknown_key_of_a_grader_is_found(data):
    data["evaluate"]["grader"]["rigde"] = 1
    assert "did you mean 'ridge'?" in refused(data)


def test_replies_longer_than_responses_are_refused(data):
    data["corpus"]["reply_tokens"] = [10, 500]
    assert "could not" not in refused(data)
    assert "the model would learn replies that it cannot finish" in refused(data)


def test_lengths_that_exceed_the_sequence_are_refused(data):
    data["model"]["max_length"] = 300
    assert "raise it to at least" in refused(data)


def test_the_longest_reply_leaves_256_tokens_to_its_context(data):
    data["corpus"].update(reply_tokens=[12, 128], context_tokens=100)
    data["sample"]["max_new_tokens"] = 128
    data["model"]["max_length"] = 128 + 256
    validate_recipe(data, "test")
    data["corpus"]["reply_tokens"] = [12, 129]
    data["sample"]["max_new_tokens"] = 129
    assert "leaves no 256 to its context: raise it to at least 385" in refused(data)


def test_one_grader_may_not_label_and_judge(data):
    data["evaluate"]["grader"] = data["ai_labels"]["grader"]
    assert "must differ" in refused(data)
    data["evaluate"]["allow_same_grader"] = True
    validate_recipe(data, "test")
    data["evaluate"]["allow_same_grader"] = False
    data["ai_labels"]["grader"] = {"kind": "embedding", "train": {"kind": "grader_pairs"}}
    data["evaluate"]["grader"] = {"kind": "readable", "train": {"kind": "judge_pairs"}}
    assert "both: kind readable features, train -" in refused(data)


def test_an_arm_must_start_from_an_earlier_model(data):
    data["dpo"][0]["start"] = "rlhf"
    assert "is not sft or an earlier arm" in refused(data)


def test_people_label_only_their_pool(data):
    data["dpo"][1]["pool"] = "rlaif"
    assert "people label the rlhf pool only" in refused(data)


def test_settings_of_one_loss_are_refused_with_another(data):
    data["dpo"][0]["length_alpha"] = 0.5
    assert "length_alpha belongs to loss: length-desensitised" in refused(data)


def test_soft_labels_and_smoothing_exclude_each_other(data):
    data["dpo"][0].update(loss="robust", label_smoothing=0.1, soft_labels=True)
    assert "choose one" in refused(data)


def test_overrides_reach_sections_arms_and_lists():
    loaded = load_recipe(
        REPOSITORY / "recipes" / "tiny.yaml",
        ("seed=9", "dpo.rlhf.beta=0.3", "corpus.sources.0.max_per_conversation=1", "sft.lora.r=2"),
    )
    assert (loaded.seed, loaded.arm("rlhf").beta, loaded.corpus.sources[0].max_per_conversation, loaded.sft.lora.r) == (
        9,
        0.3,
        1,
        2,
    )


def test_an_override_reaches_into_a_grader_file():
    loaded = load_recipe(
        REPOSITORY / "recipes" / "p4g-cpu.yaml", ("ai_labels.grader.train.path=/data/ukp", "evaluate.grader.train.path=../cmv")
    )
    assert loaded.ai_labels.grader.train.path == "/data/ukp"
    assert (loaded.ai_labels.grader.kind, loaded.ai_labels.grader.ridge) == ("embedding", 300.0)  # the file's
    assert loaded.evaluate.grader.train.path == str(REPOSITORY / "cmv")  # relative to the recipe


def test_files_of_a_grader_file_are_relative_to_it(tmp_path):
    (tmp_path / "graders").mkdir()
    (tmp_path / "graders" / "own.yaml").write_text("system: x")
    (tmp_path / "graders" / "judge.yaml").write_text(
        "kind: llm\nmodel: m\nbase_url: http://127.0.0.1:1/v1\ntemplate: own.yaml\nmeasure: {kind: ukp, path: ukp}\n"
    )
    grader = load_recipe(
        REPOSITORY / "recipes" / "tiny.yaml", (f"evaluate.grader={tmp_path / 'graders' / 'judge.yaml'}",)
    ).evaluate.grader
    assert (grader.template, grader.measure.path) == (str(tmp_path / "graders/own.yaml"), str(tmp_path / "graders/ukp"))
    assert list(template_hashes(grader)) == ["template/own.yaml"]  # another template makes labels stale
    named = load_recipe(REPOSITORY / "recipes" / "tiny.yaml", ("evaluate.grader=../graders/llm-server.yaml",)).evaluate.grader
    assert named.template == "persuasion-1"
    assert template_hashes(named) == {}


def test_the_page_of_fields_is_what_the_sections_say():
    found = importlib.util.spec_from_file_location("recipe_fields", REPOSITORY / "scripts" / "recipe_fields.py")
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    assert script.PAGE.read_text() == script.page(), "run: python scripts/recipe_fields.py"
    assert all(f"`{name}`" in script.page() for name in ("likelihood_pairs", "requests_per_minute", "donating_only", "side_bias"))


@pytest.mark.parametrize("bad", ["seed", "dpo.nobody.beta=1", "seed.x=1", "sft.learning_rte=1"])
def test_a_wrong_override_is_wrong_use(bad):
    with pytest.raises(UsageError):
        load_recipe(REPOSITORY / "recipes" / "tiny.yaml", (bad,))


def test_paths_are_relative_to_the_recipe(tmp_path, data):
    data["corpus"]["sources"] = [{"kind": "p4g", "path": "corpus"}]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(data))
    assert load_recipe(tmp_path / "own.yaml").corpus.sources[0].path == str(tmp_path / "corpus")


@pytest.mark.parametrize("text", ["", "- a list", "a: [", "name: 'x\n"])
def test_files_that_are_no_recipe_are_refused(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UsageError):
        load_recipe(tmp_path / "bad.yaml")


def test_models_are_named_in_table_order():
    assert load_recipe(REPOSITORY / "recipes" / "tiny.yaml").model_names() == [
        "base",
        "sft",
        "rlaif",
        "rlhf",
        "rlaif-rlhf",
        "rlaif-matched",
    ]
    assert Recipe.model_fields["dpo"].is_required()
