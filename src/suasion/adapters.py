"""LoRA adapters as files: reading one, and computing with one beside weights that must not change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from suasion.errors import UserError
from suasion.records import read_json

PREFIX = "base_model.model."  # of module names in peft's files


def read_adapter(folder: Path) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], dict[str, Any]]:
    """module -> (A [r, in], B [out, r]), and the config. Raises UserError for an adapter that is no plain LoRA."""
    from safetensors.torch import load_file

    config = read_json(folder / "adapter_config.json")
    special = [
        key
        for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out")
        if config.get(key)
    ]
    if config.get("peft_type") != "LORA" or special or config.get("bias", "none") != "none":
        raise UserError(
            f"{folder} is no plain LoRA adapter ({', '.join(special) or config.get('peft_type')}): write the model with --merged."
        )
    weights = load_file(folder / "adapter_model.safetensors")
    downs = {name.removesuffix(".lora_A.weight"): value for name, value in weights.items() if name.endswith(".lora_A.weight")}
    if len(weights) != 2 * len(downs) or not downs:
        raise UserError(f"{folder}/adapter_model.safetensors holds more than LoRA matrices: write the model with --merged.")
    return {name: (down, weights[f"{name}.lora_B.weight"]) for name, down in downs.items()}, config


def is_plain(folder: Path) -> bool:
    """Whether `read_adapter` reads it: peft also writes adapters of embeddings and of GPT-2's layers, and saves an adapted head whole."""
    try:
        read_adapter(folder)
    except UserError:
        return False
    return True


class _Update:
    """Forward hook of a linear layer: adds s B A x. The same order of operations as peft's, so that nothing but the place differs."""

    def __init__(self, down: torch.Tensor, up: torch.Tensor, scale: float):
        self.down, self.up, self.scale = down, up, scale

    def __call__(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + F.linear(F.linear(inputs[0], self.down), self.up) * self.scale


def hold_beside(model: Any, folder: Path) -> None:
    """Let a model compute with an adapter beside its weights, for good and without training it; changed in place.

    For weights that are rounded already: merging would round the sum again. The model must be where it computes.
    """
    weights, config = read_adapter(folder)
    modules = dict(model.named_modules())
    for name, (down, up) in weights.items():
        module = modules[name.removeprefix(PREFIX)]
        device = module.weight.device
        module.register_forward_hook(_Update(down.float().to(device), up.float().to(device), config["lora_alpha"] / config["r"]))


class AdaptersByRow:
    """Several models that share their weights, in one batch: each row computes with the adapters of its own model beside them.

    The adapters of all models lie side by side as one of their summed rank R, computed for every row; before it is added, a row's share in each
    adapter's ranks is multiplied by that adapter's scale, or by 0 where it is none of its model's. In bf16 a scale that is no power of two is
    thus rounded with the smaller of the two products, where peft rounds it with the sum.
    """

    def __init__(self, model: Any, adapters: Mapping[str, Sequence[Path]]):
        """adapters: model's name -> its adapters, which may be others' too. `model` is changed in place and must be where it computes."""
        folders = list(dict.fromkeys(folder for own in adapters.values() for folder in own))
        read = [read_adapter(folder) for folder in folders]
        self._scales = {
            name: torch.tensor(
                [config["lora_alpha"] / config["r"] * (folder in own) for folder, (_, config) in zip(folders, read, strict=True)]
            )
            for name, own in adapters.items()
        }
        self._of_rows: torch.Tensor  # [rows, adapters]
        self._by_rank: dict[Any, torch.Tensor] = {}  # (adapter of each rank, device) -> [rows, 1, R], the same for most layers
        modules = dict(model.named_modules())
        for name in dict.fromkeys(name for weights, _ in read for name in weights):
            module = modules[name.removeprefix(PREFIX)]
            parts = [(number, *weights[name]) for number, (weights, _) in enumerate(read) if name in weights]
            device = module.weight.device
            down = torch.cat([down for _, down, _ in parts]).float().to(device)
            up = torch.cat([up for _, _, up in parts], dim=1).float().to(device)
            ranks = tuple(number for number, down, _ in parts for _ in down)
            module.register_forward_hook(self._update(down, up, ranks))

    def rows_are(self, models: Sequence[str]) -> None:
        """Say of which model each row of the coming pass is."""
        self._of_rows = torch.stack([self._scales[name] for name in models])
        self._by_rank.clear()

    def _update(self, down: torch.Tensor, up: torch.Tensor, ranks: tuple[int, ...]) -> Callable[..., torch.Tensor]:
        columns = torch.tensor(ranks)

        def update(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if (ranks, down.device) not in self._by_rank:
                self._by_rank[ranks, down.device] = self._of_rows[:, columns].to(down.device)[:, None]
            scales = self._by_rank[ranks, down.device]
            low = F.linear(inputs[0], down)
            shaped = low.reshape(len(scales), -1, low.shape[-1])  # some models give a layer [rows * T, in]
            return output + F.linear((shaped * scales).view(low.shape), up)

        return update
