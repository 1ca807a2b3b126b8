"""A model that leaves the project: one exact adapter read by plain peft, or merged weights read by plain transformers."""

import json
from pathlib import Path

import pytest
import torch

from suasion.bases import base_folder
from suasion.chat import Renderer
from suasion.errors import UsageError, UserError
from suasion.export import write_merged, write_one_adapter
from suasion.models import Lineage, adapter_hash, load_merged, load_policy, load_tokenizer, save_adapter
from suasion.sections.training import LoraSection

PROMPTS = [[5, 9, 300, 41, 7], [800, 3, 3, 12, 99, 140, 8]]


def adapter(lineage: Lineage, folder, seed: int, lora: LoraSection):
    """A trained-looking adapter: B is not zero."""
    policy = load_policy(lineage, lora, seed)
    torch.manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(policy, folder, lineage.base)
    return folder


@pytest.fixture(scope="module")
def lineage(tiny, tmp_path_factory) -> Lineage:
    """Three adapters of other ranks, scales and targets, as sft -> rlaif -> rlaif-rlhf may have."""
    folder = tmp_path_factory.mktemp("lineage")
    result = Lineage(tiny)
    for number, lora in enumerate(
        (
            LoraSection(r=4, alpha=16),
            LoraSection(r=3, alpha=7, targets=("q_proj", "up_proj")),
            LoraSection(r=8, alpha=32, targets=("v_proj", "o_proj")),
        )
    ):
        result = result.extended(adapter(result, folder / str(number), number, lora))
    return result


def logprobs(model) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1) for ids in PROMPTS])


def test_plain_peft_reads_one_adapter_on_the_original_base_with_the_same_logprobs(tiny, lineage, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tmp_path.mkdir(exist_ok=True)
    write_one_adapter(lineage, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 15
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["base_model_name_or_path"] == tiny.base
    base = AutoModelForCausalLM.from_pretrained(base_folder(tiny), dtype=torch.float32)
    before = logprobs(base)
    exported = logprobs(PeftModel.from_pretrained(base, str(tmp_path)).eval())
    assert (exported - logprobs(load_merged(lineage))).abs().max() < 1e-4
    assert (exported - before).abs().max() > 0.1  # or nothing was tested


def test_plain_transformers_reads_the_merged_model(tiny, lineage, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_merged(lineage, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logprobs(model), logprobs(load_merged(lineage)))
    stop = Renderer(load_tokenizer(tiny), tiny.system_prompt).stop_id
    eos = model.generation_config.eos_token_id
    assert stop == (eos[0] if isinstance(eos, list) else eos)  # pitfall 2: whoever samples stops where training said
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == load_tokenizer(tiny).chat_template
    assert not list(tmp_path.rglob("*.bin"))


def test_an_adapter_that_is_no_plain_lora_is_refused(tiny, lineage, tmp_path):
    import shutil

    copy = shutil.copytree(lineage.adapters[0], tmp_path / "dora")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(UserError, match=r"no plain LoRA adapter \(use_dora"):
        write_one_adapter(Lineage(tiny, (copy,)), tmp_path)


def test_the_saved_adapter_holds_no_path_and_no_pickle(lineage):
    for folder in lineage.adapters:
        assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        assert adapter_hash(folder)


def test_what_cannot_be_exported_is_refused(tmp_path):
    from suasion.export import export
    from suasion.pipeline import open_run
    from suasion.recipe import load_recipe

    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "tiny.yaml")
    directory = open_run(recipe, tmp_path)
    with pytest.raises(UsageError, match="no model 'rlfh'"):
        export(directory, recipe, "rlfh", tmp_path / "x", False)
    with pytest.raises(UserError, match="needs stage sft, which is absent"):
        export(directory, recipe, "sft", tmp_path / "x", False)
    with pytest.raises(UsageError, match="it is the base model itself"):
        export(directory, recipe, "base", tmp_path / "x", False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UsageError, match="something is there already"):
        export(directory, recipe, "sft", tmp_path / "full", True)
    assert not (tmp_path / "x").exists()
