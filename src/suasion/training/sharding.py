"""fsdp2: how a model comes from files into shards, with one whole copy of it on the host and none on a device.

`accelerate launch` says in the environment that weights are sharded (processes.py). The first process then loads the model on its host as any
training does; the others build its shape on the meta device (transformers 5.23 itself would read the weights in each). accelerate hands
every process its shares, a tensor at a time, when the Trainer prepares the policy, or here, for a model that only scores
(cpu_ram_efficient_loading). Without shards these functions are `load_policy` and `load_to_score`.
"""

from __future__ import annotations

from typing import Any

import torch

from suasion.bases import base_folder
from suasion.models import Lineage, load_policy, load_to_score
from suasion.sections.training import LoraSection, ModelSection
from suasion.training.processes import is_sharded, rank


def policy_here(lineage: Lineage, lora: LoraSection | None, seed: int, device: str) -> Any:
    """`load_policy` for a training in this process: where weights are sharded, on the host, for the Trainer to cut up."""
    if not is_sharded():
        return load_policy(lineage, lora, seed, device)
    policy = load_policy(lineage, lora, seed, device, start=_on_host(lineage))
    return policy if rank() == 0 else with_addresses(policy)


def with_addresses(policy: Any) -> Any:
    """A policy without weights, changed in place: what is trained gets memory that nobody has written to.

    accelerate finds an optimiser's parameters again by their addresses once they are in shards, and on the meta device all have address 0:
    it would train one of them and no other.
    """
    for module in policy.modules():
        if any(parameter.is_meta and parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
    if not hasattr(policy, "peft_config"):
        policy.tie_weights()
    return policy


def scorer_here(lineage: Lineage, device: str) -> Any:
    """`load_to_score`; where weights are sharded, in shards: every process must then make as many passes as the others."""
    if not is_sharded():
        return load_to_score(lineage, device)
    from accelerate import Accelerator
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    return fsdp2_prepare_model(Accelerator(), _on_host(lineage)).eval()


def _on_host(lineage: Lineage) -> Any:
    """The whole model in the first process, its shape in the others; adapters, which are folded in, do not change that."""
    return load_to_score(lineage) if rank() == 0 else shape_of(lineage.base)


def shape_of(section: ModelSection) -> Any:
    """The base model without weights: parameters on the meta device, and buffers, which nobody hands over, computed."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base_folder(section), trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=section.loaded_attention, trust_remote_code=False
        )
    model.tie_weights()  # the context takes every parameter for another one
    return model.eval()
