"""A base model in 4 bits, for QLoRA (Dettmers et al. 2023, arXiv 2305.14314): linear layers as NF4 with double quantisation.

`model.quantization: nf4` makes another base of a model: the weights that the 4-bit numbers stand for. Adapters are trained on it and
belong to it, so its hash is another one. Rounding a second time would change the model again, therefore an adapter is never merged into
4-bit weights: while a model is trained or scored its adapters stand beside them (`adapters.py`), and to be published or sampled in
fp32 they are merged into the de-quantised weights (`dequantised`).

Needs the extra `qlora` (bitsandbytes). Loading quantises layer by layer on the device: no fp32 copy of the whole model is made.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from suasion.errors import UserError


def check_available(device: str) -> None:
    """Raises UserError where bitsandbytes is missing, or cannot quantise on this device."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "model.quantization is nf4, which needs bitsandbytes: pip install 'suasion[qlora]'. Or train on unrounded weights: "
            "--set model.quantization=null."
        )
    import bitsandbytes.functional as functional

    try:  # what its builds support depends on the GPU, on CUDA's version and on its own: asked, not looked up
        numbers = torch.linspace(-1, 1, 128, device=device)
        functional.dequantize_4bit(*functional.quantize_4bit(numbers, quant_type="nf4", compress_statistics=True))
    except (RuntimeError, AttributeError, ValueError, OSError) as error:
        raise UserError(
            f"model.quantization is nf4, but bitsandbytes cannot quantise on {device} ({type(error).__name__}: {error}). Use an NVIDIA GPU "
            "that its build supports (its documentation lists them), or --set model.quantization=null."
        ) from error


def load(folder: Path, device: str, dtype: str) -> Any:
    """The model of a folder with its linear layers (but not the head) in 4 bits, all else in fp32. dtype: what they compute in."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    check_available(device)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32,
        ),
        device_map={"": torch.cuda.current_device() if device == "cuda" else device},
        attn_implementation="sdpa",
        trust_remote_code=False,
        use_safetensors=True,
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # The first pass in eval mode on such a CPU would repack the weights for another kernel: scoring would differ from training,
            # and small layers fail (bitsandbytes 0.50.2).
            module.support_avx512bf16_for_cpu = False
    model.base_model.is_loaded_in_4bit = True  # peft asks the module that gets the adapter
    return model


def is_four_bit(model: Any) -> bool:
    """Whether any linear layer of a model is held in 4 bits."""
    return any(isinstance(module, torch.nn.Linear) and not module.weight.is_floating_point() for module in model.modules())


def dequantised(model: Any) -> Any:
    """The same model with plain fp32 weights, the very numbers that the 4-bit ones stand for; changed in place."""
    model = model.dequantize(torch.float32)
    model.is_loaded_in_4bit = model.base_model.is_loaded_in_4bit = False
    return model
