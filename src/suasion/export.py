"""`suasion export RUN MODEL --to FOLDER`: a model of a run as plain peft or transformers read it, without this package.

Without --merged: ONE adapter on the original base, exact. A lineage is a sum of low-rank updates, W + s1 B1 A1 + s2 B2 A2 + ..., and
a sum of products is a product of concatenations: A = [A1; A2; ...], B = [s1 B1, s2 B2, ...]; ranks add up, and the scale is 1.
With --merged: the weights with every adapter folded in, in fp32, with tokenizer and a generation config that knows the stop token.
`lineage.json` beside either says what it is made of. Of a base in 4 bits (`model.quantization: nf4`) the one adapter is exact on that base
in 4 bits only, and --merged holds the de-quantised weights with every adapter folded in: there it is exact.
"""

from __future__ import annotations

from pathlib import Path

import torch

from suasion.adapters import read_adapter
from suasion.chat import Renderer
from suasion.errors import UsageError, UserError
from suasion.models import Lineage, adapter_hash, base_hash, is_whole_model, lineage_of, load_merged, load_tokenizer
from suasion.recipe import Recipe
from suasion.records import write_json
from suasion.rundir import RunDir


def export(directory: RunDir, recipe: Recipe, model: str, to: Path, merged: bool) -> list[Path]:
    """Write a model of a run into a folder of its own; returns the files. Raises UsageError and UserError; nothing is overwritten."""
    if model not in recipe.model_names():
        raise UsageError(f"{directory.path} has no model '{model}'. Its models: {', '.join(recipe.model_names())}.")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(f"--to {to}: something is there already. Name a folder that does not exist yet.")
    names = recipe.adapter_stages(model)
    for name in names:
        if directory.state(name) != "complete":
            raise UserError(
                f"model {model} needs stage {name}, which is {directory.state(name)}. Finish it: {directory.go_on('--until', name)}"
            )
    lineage = lineage_of(directory, recipe, model)
    if not names and not merged:
        raise UsageError("base has no adapter: it is the base model itself. Take it as it is, or write a copy with --merged.")
    expected = directory.manifest(names[-1]).facts.get("lineage") if names else lineage.hash
    if lineage.hash != expected:
        raise UserError(f"the adapters of {model} are not those of its manifest. Look with: suasion verify {directory.path}")
    temporary = to.with_name(to.name + ".tmp")
    temporary.mkdir(parents=True)
    if merged:
        write_merged(lineage, temporary)
    else:
        write_one_adapter(lineage, temporary)
    write_json(
        temporary / "lineage.json",
        {
            "model": model, "run": recipe.name, "lineage": lineage.hash, "base": recipe.model.base, "base_hash": base_hash(recipe.model),
            "quantization": recipe.model.quantization,
            "adapters": [{"stage": name, "hash": adapter_hash(path)} for name, path in zip(names, lineage.adapters, strict=True)],
            "system_prompt": recipe.model.system_prompt, "merged": merged,
        },
    )  # fmt: skip
    if to.exists():
        to.rmdir()
    temporary.replace(to)
    return sorted(path for path in to.rglob("*") if path.is_file())


def write_one_adapter(lineage: Lineage, folder: Path) -> None:
    """All adapters of a lineage as one on the base, with concatenated ranks. Exact up to the rounding of s B in fp32."""
    from safetensors.torch import save_file

    if any(is_whole_model(path) for path in lineage.adapters):
        raise UserError(
            "a training of this model changed every weight (lora: null): there is no adapter of it. Write it with --merged."
        )
    parts = [read_adapter(path) for path in lineage.adapters]
    modules = sorted({name for weights, _ in parts for name in weights})
    rank = sum(config["r"] for _, config in parts)
    tensors: dict[str, torch.Tensor] = {}
    for module in modules:
        downs, ups = [], []
        shapes = next((weights[module] for weights, _ in parts if module in weights))
        for weights, config in parts:
            # An adapter that leaves this module alone adds nothing: zeros, so that every module has the one rank of the config.
            down, up = weights.get(
                module, (torch.zeros(config["r"], shapes[0].shape[1]), torch.zeros(shapes[1].shape[0], config["r"]))
            )
            downs.append(down.float())
            ups.append(up.float() * (config["lora_alpha"] / config["r"]))
        tensors[f"{module}.lora_A.weight"] = torch.cat(downs, dim=0).contiguous()
        tensors[f"{module}.lora_B.weight"] = torch.cat(ups, dim=1).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        **parts[-1][1],
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "inference_mode": True,
        "target_modules": sorted({target for _, part in parts for target in part["target_modules"]}),
    }
    write_json(folder / "adapter_config.json", config)


def write_merged(lineage: Lineage, folder: Path) -> None:
    """The whole model in fp32 safetensors, its tokenizer, and a generation config that stops at the trained stop token."""
    model = load_merged(lineage)
    tokenizer = load_tokenizer(lineage.base)
    stop = Renderer(tokenizer, lineage.base.system_prompt).stop_id
    known = model.generation_config.eos_token_id
    others = [known] if isinstance(known, int) else list(known or [])
    model.generation_config.eos_token_id = [stop, *(token for token in others if token != stop)]
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
