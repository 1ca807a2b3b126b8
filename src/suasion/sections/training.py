"""Sections of the recipe: the base model, its adapters, SFT and the DPO arms."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from suasion.sections.base import Section

SYSTEM_PROMPT = (
    "You try to change the other person's mind with honest, specific reasons. Answer what they actually said, admit what is "
    "uncertain, and never manipulate, threaten, flatter or invent facts."
)

CPU_TOKENS, GPU_TOKENS = 512, 4096  # a processor is busy with few tokens; attention over a packed row grows with its square


class ModelSection(Section):
    """The base model and how it computes."""

    base: str = Field(
        "bundled:smollm2-135m-instruct",
        description="'bundled:smollm2-135m-instruct', 'random:tiny', a local folder, or a hub name.",
    )
    revision: str | None = Field(
        None, description="Commit of a hub model; None takes the newest; its weights are recorded by hash either way."
    )
    system_prompt: str = Field(
        SYSTEM_PROMPT, description="Stands before every dialogue, in training, sampling and judging alike."
    )
    max_length: int = Field(1024, ge=64, description="Longest sequence in tokens: context, reply and template together.")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: CUDA where there is one, else CPU.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Compute type; weights are kept in float32. auto: bfloat16 where the hardware has it."
    )
    quantization: Literal["nf4"] | None = Field(
        None, description="nf4: linear layers in 4 bits, adapters beside them (QLoRA); needs 'suasion[qlora]'. null: fp32."
    )
    attention: Literal["auto", "sdpa", "eager", "flex"] = Field(
        "auto",
        description="Attention while training. flex: FlexAttention (GPU only), which skips what packed rows hide. auto: flex on a GPU where it "
        "computes what sdpa does (tried before training), else sdpa, on a CPU one packed group at a time.",
    )

    @property
    def loaded_attention(self) -> str:
        """The attention that a model is loaded with; a training may choose another (training/attention.py)."""
        return "eager" if self.attention == "eager" else "sdpa"


class LoraSection(Section):
    """The adapter that a training stage adds."""

    r: int = Field(8, ge=1, description="Rank.")
    alpha: int = Field(32, ge=1, description="Scale is alpha / r.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the adapter's input, off while scoring.")
    targets: tuple[str, ...] = Field(("q_proj", "k_proj", "v_proj", "o_proj"), description="Module names that get an adapter.")


class TrainingSection(Section):
    """Fields that every training stage shares."""

    TRANSPORT: ClassVar[tuple[str, ...]] = ("recompute_activations",)

    learning_rate: float = Field(gt=0, description="Peak learning rate of AdamW.")
    epochs: float = Field(gt=0, description="Passes over the data.")
    batch_size: int = Field(ge=1, description="Rows (SFT) or pairs (DPO) per optimiser step.")
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens per forward pass, whole rows packed; a longer row stands alone. None: 512 on a CPU, 4,096 on a GPU. Changes "
        "memory and speed, not results.",
    )
    recompute_activations: bool = Field(
        False,
        description="Keep of every layer only what enters it and compute the rest again on the way back (gradient checkpointing): one more forward "
        "pass, less memory, the same results. May be changed while a run is unfinished.",
    )
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Share of steps with rising learning rate.")
    scheduler: Literal["linear", "cosine", "constant_with_warmup"] = Field("linear", description="Learning rate after warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient norm from which gradients are scaled down.")
    checkpoints: int = Field(4, ge=0, description="How often a training saves its state, evenly spread, so that it can resume.")
    report_to: Literal["none", "wandb", "trackio"] = Field("none", description="Experiment tracker, besides metrics.jsonl.")


def optimiser_steps(rows: int, section: TrainingSection) -> int:
    """Optimiser steps of a training on `rows` rows; the last batch of an epoch may be smaller."""
    return math.ceil(section.epochs * math.ceil(rows / section.batch_size))


class SftSection(TrainingSection):
    """Supervised fine-tuning on human replies; the pool takes those that persuaded first."""

    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of AdamW.")
    epochs: float = Field(3, gt=0, description="Passes over the data.")
    batch_size: int = Field(64, ge=1, description="Rows per optimiser step.")
    lora: LoraSection | None = Field(LoraSection(), description="The adapter; null trains every weight, and makes a new base.")


class RewardSection(TrainingSection):
    """A reward model: Bradley-Terry on outcome pairs, a scalar head on the last token of a reply, and an adapter."""

    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of AdamW, for adapter and head.")
    epochs: float = Field(1, gt=0, description="Passes over the pairs; more than one or two overfit.")
    batch_size: int = Field(16, ge=1, description="Pairs per optimiser step.")
    lora: LoraSection = Field(LoraSection(), description="The adapter.")


class DpoArm(TrainingSection):
    """One DPO training."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="Name of the arm and of its model.")
    start: str = Field("sft", description="Model that the policy starts from: sft or another arm.")
    reference: str = Field(
        "start", description="Reference model: 'start', or sft or an arm by name; its expected first loss is computed."
    )
    labels: Literal["ai", "human"] = Field(description="Whose verdicts.")
    pool: Literal["rlaif", "rlhf"] = Field(description="On which pairs.")
    matched: bool = Field(False, description="ai labels only on the very pairs that have a decisive human label.")
    engine: Literal["suasion", "trl"] = Field(
        "suasion", description="suasion: prompts are read once, pairs packed; trl: TRL's DPOTrainer on the same ids."
    )
    beta: float = Field(0.1, gt=0, description="Strength of the KL penalty.")
    loss: Literal["sigmoid", "ipo", "robust", "length-normalised", "length-desensitised"] = Field(
        "sigmoid", description="Loss on the margin; the length-normalised one wants a beta of a few units."
    )
    length_alpha: float = Field(
        1.0,
        ge=0,
        le=1,
        description="length-desensitised: weight of the tokens beyond the shorter response's length; 1 is sigmoid.",
    )
    soft_labels: bool = Field(
        False, description="Train on the probability that the grader gave the chosen response, not on a certain label."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="robust: assumed share of flipped labels.")
    learning_rate: float = Field(5e-5, gt=0, description="Peak learning rate of AdamW.")
    epochs: float = Field(1, gt=0, description="Passes over the data.")
    batch_size: int = Field(16, ge=1, description="Pairs per optimiser step.")
    lora: LoraSection | None = Field(LoraSection(), description="The adapter; null trains every weight, and makes a new base.")

    @model_validator(mode="after")
    def _labels_fit_pool(self) -> DpoArm:
        if self.labels == "human" and self.pool != "rlhf":
            raise ValueError("people label the rlhf pool only")
        if self.matched and (self.labels, self.pool) != ("ai", "rlhf"):
            raise ValueError("matched means ai labels on the rlhf pool")
        if self.loss != "robust" and self.label_smoothing:
            raise ValueError("label_smoothing belongs to loss: robust")
        if self.loss != "length-desensitised" and self.length_alpha != 1:
            raise ValueError("length_alpha belongs to loss: length-desensitised")
        if self.soft_labels and self.label_smoothing:
            raise ValueError("soft_labels and label_smoothing both say how certain a label is; choose one")
        return self
