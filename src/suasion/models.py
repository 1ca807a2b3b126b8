"""A model is a base and a list of adapters, its *lineage*. Weights are loaded here and nowhere else, from folders that bases.py finds.

Loading merges adapters in fp32, oldest first. A training merges all adapters of its start model and attaches a fresh one whose
B matrices are zero: at step 0 the policy *is* its start, and the first DPO loss is its zero-margin value (asserted there).
Weights stay in fp32; bf16 compute is autocast, because small LoRA updates vanish when they are folded into bf16 weights.
Full fine-tuning (`lora: null`) leaves whole weights in the place of an adapter: they are a new base for all that comes after.
A base in 4 bits (four_bit.py) keeps its adapters beside it wherever it is trained or scored.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from suasion import four_bit
from suasion.adapters import hold_beside
from suasion.bases import base_folder
from suasion.errors import UserError
from suasion.few_rows import use_for_few_rows
from suasion.records import canonical_json, content_id, read_json, sha256_file, write_json
from suasion.rundir import cache_dir
from suasion.sections.training import LoraSection, ModelSection
from suasion.seeding import derive_seed

if TYPE_CHECKING:
    from suasion.recipe import Recipe
    from suasion.rundir import RunDir


@dataclass(frozen=True)
class Compute:
    """Where and in which type a model computes."""

    device: str
    dtype: str
    threads: int

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """bf16 autocast over fp32 weights, or nothing."""
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16"):
            yield

    def as_dict(self) -> dict[str, Any]:
        """For manifests."""
        return {"device": self.device, "dtype": self.dtype, "threads": self.threads}


def compute(section: ModelSection) -> Compute:
    """Resolve `auto`. Raises UserError where the named device is not there."""
    device = section.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "model.device is cuda, but torch sees no CUDA device. Use --set model.device=cpu, or install a CUDA build of torch."
        )
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("model.device is mps, but this torch has no MPS. Use --set model.device=cpu.")
    dtype = section.dtype
    if dtype == "auto":
        dtype = "bfloat16" if has_fast_bfloat16(device) else "float32"
    return Compute(device=device, dtype=dtype, threads=torch.get_num_threads())


def has_fast_bfloat16(device: str) -> bool:
    """bf16 helps on GPUs from Ampere on (a T4 has none) and on CPUs with AVX512-BF16 or AMX; elsewhere it is emulated and slow."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    if device == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


@lru_cache(maxsize=2)
def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing more special for a file that it cannot parse
        raise UserError(f"the tokenizer in {folder} cannot be read: {error}. Save it anew beside the weights.") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_tokenizer(section: ModelSection) -> Any:
    """The base model's tokenizer, with a padding token (masks never depend on which)."""
    return _tokenizer(str(base_folder(section, weights=False)))


def load_base(section: ModelSection) -> Any:
    """The base model in fp32 (or 4 bits, where the recipe says so), in eval mode.

    Raises UserError where the tokenizer has more tokens than the model, or 4 bits are asked for and cannot be had.
    """
    from transformers import AutoModelForCausalLM

    folder = base_folder(section)
    if section.quantization:
        hardware = compute(section)
        model = four_bit.load(folder, hardware.device, hardware.dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation=section.loaded_attention,
            trust_remote_code=False,
            use_safetensors=True,
        )
    rows = model.get_input_embeddings().weight.shape[0]
    tokens = len(load_tokenizer(section))
    if tokens > rows:
        raise UserError(f"the tokenizer has {tokens} tokens but {section.base} embeds {rows}: they do not belong together.")
    model.eval()
    return model


@dataclass(frozen=True)
class Lineage:
    """A base and its adapters, oldest first; an entry with whole weights (full fine-tuning) replaces all before it."""

    base: ModelSection
    adapters: tuple[Path, ...] = ()

    @property
    def hash(self) -> str:
        """Identity of the weights: the same on every machine."""
        return lineage_hash(base_hash(self.base), self.adapters)

    def extended(self, adapter: Path) -> Lineage:
        """The same with one more adapter."""
        return Lineage(self.base, (*self.adapters, adapter))


def lineage_of(directory: RunDir, recipe: Recipe, model: str) -> Lineage:
    """The lineage of one of a run's models, from the folders of its trainings, finished or not."""
    return Lineage(recipe.model, tuple(directory.folder(stage) / "adapter" for stage in recipe.adapter_stages(model)))


def lineage_hash(base: str, adapters: Sequence[Path]) -> str:
    """Hash of a base (by its hash) and adapters, oldest first."""
    return content_id("lineage", base, *(adapter_hash(path) for path in adapters))


def load_merged(lineage: Lineage, device: str = "cpu") -> Any:
    """The model with every adapter folded into its fp32 weights: what is a reference, and what samples in fp32.

    Of a base in 4 bits, folded into the de-quantised weights.
    """
    from peft import PeftModel

    model = load_base(lineage.base)
    if lineage.base.quantization:
        model = four_bit.dequantised(model)
    for adapter in lineage.adapters:
        if is_whole_model(adapter):
            model = _load_whole(adapter, lineage.base, model)
            continue
        check_adapter(adapter, model, lineage.base.base)
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return model.to(device).eval()


def load_to_score(lineage: Lineage, device: str = "cpu") -> Any:
    """The model as a reference and as trainings start from it: `load_merged`, but a base in 4 bits stays so, its adapters beside it."""
    if not lineage.base.quantization:
        return load_merged(lineage, device)
    model = load_base(lineage.base)
    for adapter in lineage.adapters:
        check_adapter(adapter, model, lineage.base.base)
        hold_beside(model, adapter)
    return model.eval()


def load_to_sample(lineage: Lineage, hardware: Compute) -> Any:
    """The model as it decodes. In bf16 compute that is exactly the model that was trained: the newest adapter beside the weights, not in
    them. Folded in and rounded it is another rounding of the same model, 1e-3 nats a token away (docs/LOG.md). In fp32 adapters are folded
    in, which costs nothing while decoding.
    """
    from peft import PeftModel

    if lineage.base.quantization and hardware.dtype == "bfloat16":
        return prepare_to_decode(load_to_score(lineage, hardware.device), hardware)
    if hardware.dtype != "bfloat16" or not lineage.adapters:
        return prepare_to_decode(load_merged(lineage, hardware.device), hardware)
    *older, newest = lineage.adapters
    if is_whole_model(newest):
        return prepare_to_decode(load_merged(lineage, hardware.device), hardware)
    start = load_merged(Lineage(lineage.base, tuple(older)), hardware.device)
    check_adapter(newest, start, lineage.base.base)
    return as_it_samples(PeftModel.from_pretrained(start, str(newest), autocast_adapter_dtype=False), hardware)


def as_it_samples(policy: Any, hardware: Compute) -> Any:
    """A policy, with one adapter beside its weights (peft) or trained whole, made ready to decode; changed in place."""
    from suasion.training.attention import use_sdpa

    use_sdpa(policy)
    if not hasattr(policy, "peft_config"):
        return prepare_to_decode(policy.to(hardware.device).eval().requires_grad_(False), hardware)
    live = hardware.dtype == "bfloat16" or four_bit.is_four_bit(policy)
    model = policy.base_model.model if live else policy.merge_and_unload()
    return prepare_to_decode(model.to(hardware.device).eval(), hardware)


def prepare_to_decode(model: Any, hardware: Compute) -> Any:
    """The model with linear layers as decoding wants them: for few rows where a processor computes in fp32 (few_rows.py), one bf16 copy where
    compute is bf16, unchanged elsewhere; changed in place.

    Autocast rounds the same fp32 weights to bf16 at every token, which is most of the memory traffic of decoding. Here they are rounded once,
    and the outputs are equal bit by bit to those before (tested): nothing is folded into weights that are bf16 already. Embeddings and norms
    stay in fp32; a head that is tied to the embeddings gets a copy of its own. Layers in 4 bits stay as they are.
    """
    if hardware.dtype == "float32":
        return use_for_few_rows(model)
    return _rounded(model, hardware, frozen_only=False)


def round_for_training(policy: Any, hardware: Compute) -> Any:
    """The same for the layers of a policy that are not trained: they take half the memory and are not rounded again at every pass, and outputs
    and gradients stay equal bit by bit (tested). A model that is trained whole keeps its fp32 weights.
    """
    return _rounded(policy, hardware, frozen_only=True)


@contextmanager
def in_fp32(model: Any) -> Iterator[None]:
    """Within it the model computes in fp32 with the weights that it has, rounded ones too: for differences that bf16 would drown.

    Two models a hair apart are 1e-3 nats a token apart in bf16, by rounding alone (docs/benchmarks.md). One layer's weights are converted at
    a time. Layers in 4 bits compute as they always do.
    """
    rounded = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight.dtype == torch.bfloat16]
    autocasting = vars(model).pop("forward", None)  # accelerate's, which would turn autocast on again
    for module in rounded:
        module.forward = partial(_linear_in_fp32, module)  # type: ignore[method-assign]
    try:
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield
    finally:
        for module in rounded:
            del module.forward
        if autocasting is not None:
            model.forward = autocasting


def _linear_in_fp32(layer: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(input.float(), layer.weight.float(), None if layer.bias is None else layer.bias.float())


def _rounded(model: Any, hardware: Compute, frozen_only: bool) -> Any:
    if hardware.dtype == "bfloat16":
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module.weight.is_floating_point():
                if frozen_only and module.weight.requires_grad:
                    continue
                module.weight = torch.nn.Parameter(module.weight.detach().to(torch.bfloat16), requires_grad=False)
                if module.bias is not None:
                    module.bias = torch.nn.Parameter(module.bias.detach().to(torch.bfloat16), requires_grad=False)
    return model


def load_policy(lineage: Lineage, lora: LoraSection | None, seed: int, device: str = "cpu", start: Any = None) -> Any:
    """The start model with a fresh adapter that changes nothing yet (B = 0), ready to train; without `lora` every weight is trained.

    The A matrices are drawn from `seed`, so that a restarted training starts the same. start: the model, where it waits for being sharded.
    """
    from suasion.training.attention import set_attention

    model = load_to_score(lineage, device) if start is None else start
    if lora is None:
        policy = model.requires_grad_(True)
    else:
        policy = attach_adapter(model, lora, seed, lineage.hash, lineage.base.base)  # on the device of the layers that it adapts
    set_attention(policy, lineage.base, device, whole=start is None)
    return policy


def attach_adapter(model: Any, lora: LoraSection, seed: int, key: str, base: str, task: str | None = "CAUSAL_LM") -> Any:
    """A model with a fresh adapter whose A matrices are drawn from (seed, key) and whose B matrices are zero.

    task: peft's task type; None for a model without a language-model head. Raises UserError where a target names no module.
    """
    from peft import LoraConfig, get_peft_model

    missing = [t for t in lora.targets if not any(name.split(".")[-1] == t for name, _ in model.named_modules())]
    if missing:
        kinds = sorted({name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)})
        raise UserError(f"lora.targets {missing} name no module of {base}. Its linear modules are: {', '.join(kinds)}.")
    torch.manual_seed(derive_seed(seed, "adapter-init", key) % 2**63)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        task_type=task,
        bias="none",
    )
    return get_peft_model(model, config)


def save_adapter(policy: Any, folder: Path, base: ModelSection, state: dict[str, Any] | None = None) -> str:
    """Write what was trained, the newest adapter or the whole weights, as safetensors with a config free of machine paths.

    Returns its hash. The folder appears by rename. state: whole tensors, where the policy itself holds only shards of them.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    if hasattr(policy, "peft_config"):
        policy.save_pretrained(
            temporary, safe_serialization=True, state_dict=state, selected_adapters=["default"]
        )  # TRL adds one named ref
        (temporary / "README.md").unlink(missing_ok=True)
        config = json.loads((temporary / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = base.base
        config["target_modules"] = sorted(config["target_modules"])
        write_json(temporary / "adapter_config.json", config)
    else:
        policy.save_pretrained(temporary, safe_serialization=True, state_dict=state)
        config = json.loads((temporary / "config.json").read_text())
        config.pop("_name_or_path", None)
        write_json(temporary / "config.json", config)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    return adapter_hash(folder)


def is_whole_model(folder: Path) -> bool:
    """Whether a training left whole weights there instead of an adapter."""
    return not (folder / "adapter_config.json").is_file() and any(folder.glob("model*.safetensors"))


def adapter_hash(folder: Path) -> str:
    """Hash of an adapter's weights and of the fields of its config that change what it computes; of whole weights, theirs."""
    if is_whole_model(folder):
        return content_id("whole", *(f"{file.name}:{sha256_file(file)}" for file in sorted(folder.glob("model*.safetensors"))))
    config = json.loads((folder / "adapter_config.json").read_text())
    kept = {key: config.get(key) for key in ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "fan_in_fan_out")}
    return content_id("adapter", sha256_file(folder / "adapter_model.safetensors"), canonical_json(kept))


@lru_cache(maxsize=4)
def base_hash(section: ModelSection) -> str:
    """Hash of the base's weights and tokenizer: of their files, and of the rounding to 4 bits where the recipe asks for it."""
    digest = _files_hash(base_folder(section))
    return content_id("base in 4 bits", section.quantization, digest) if section.quantization else digest


def _files_hash(folder: Path) -> str:
    """Hash of weight and tokenizer files; kept in the cache by size and time, since weights are large."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("tokenizer*.json"), folder / "config.json"])
    stamp = canonical_json([[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files])
    note = cache_dir() / "hashes" / content_id("hash", str(folder.resolve()), stamp)
    if note.is_file():
        return note.read_text()
    # config.json holds the transformers version that wrote it, which changes nothing: shapes are in the weights.
    digest = content_id("base", *(f"{file.name}:{sha256_file(file)}" for file in files if file.name != "config.json"))
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(digest)
    return digest


def _load_whole(folder: Path, base: ModelSection, model: Any) -> Any:
    """Whole weights in the place of `model`. Raises UserError where they are of another architecture."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=model.config._attn_implementation, trust_remote_code=False, use_safetensors=True
    )  # fmt: skip
    if {name: value.shape for name, value in whole.named_parameters()} != {
        name: value.shape for name, value in model.named_parameters()
    }:
        raise UserError(f"the weights in {folder} are not of {base.base}'s shape. Use the base that they were trained from.")
    whole.generation_config = model.generation_config
    return whole


def check_adapter(folder: Path, model: Any, base: str) -> None:
    """Raises UserError where a folder holds no adapter as safetensors, or one that was not made for this model."""
    from safetensors import safe_open

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"{folder} holds no adapter_model.safetensors: run the training stage that writes it again.")
    trained_on = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    local = any(
        str(name).startswith(("/", ".")) for name in (trained_on, base)
    )  # a folder may have moved; its weights are hashed
    if trained_on != base and not local:
        raise UserError(
            f"the adapter in {folder} was trained on {trained_on}, the recipe's base is {base}. Use that base, or train again."
        )
    modules = {f"base_model.model.{name}": module for name, module in model.named_modules()}
    with safe_open(file, framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - the handle is no mapping
            module, _, side = name.removesuffix(".weight").rpartition(".lora_")
            shape = weights.get_slice(name).get_shape()
            size = getattr(modules.get(module), "in_features" if side == "A" else "out_features", None)
            if module and side in ("A", "B") and size != shape[1 if side == "A" else 0]:
                raise UserError(
                    f"{folder} is not an adapter of {base}: {name} has shape {shape}, the model's {module.rpartition('.')[2]} has "
                    f"{size or 'no such module'}. Use the base that it was trained on, or train again."
                )
