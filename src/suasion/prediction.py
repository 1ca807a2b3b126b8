"""What a recipe would take on a machine that is not here: hours, dollars, memory, from the model's FLOPs and bytes.

A rate is a peak of the machine (machines.yaml) times a share of it that software reaches. The shares are this machine's own, where it is
one of the table and was measured; otherwise the assumed ones below, which the numbers name. Formulas:

- reading a token costs 2 FLOPs a parameter, training one with adapters 4 (forward, and backward through frozen weights to the inputs;
  Kaplan et al. 2020, arXiv 2001.08361, less the weight gradients), plus attention: 4 or 8 FLOPs x layers x width x positions seen.
- writing a token reads all weights and the cache of every response in the batch once (Pope et al. 2022, arXiv 2211.05102), and no
  sooner than the host can start the layers' kernels. Both are bf16 there, as the local engine holds them (models.py: prepare_to_decode).

Nothing here is used by a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from suasion.machines import Machine, MachineTable
from suasion.planning import Lengths, Rates, StagePlan, disk_bytes, sft_rows, stage_plans, uncounted
from suasion.progress import duration
from suasion.recipe import Recipe
from suasion.sampling.local import batch_bytes
from suasion.sections.grading import models_of
from suasion.sections.sampling import EndpointEngine
from suasion.sections.training import GPU_TOKENS, ModelSection

GIB = 2**30
HOST_BYTES = 4 * 10**9  # Python, torch and its CUDA libraries, page cache that must stay
WEIGHT_BYTES = 4  # weights are loaded in fp32
ROUNDED_BYTES = 2  # the linear layers that are not trained, rounded once where compute is bf16 (models.py); tables of tokens stay
FOUR_BITS = (
    4 + 8 / 64 + 32 / (64 * 256)
) / 8  # bytes a weight: NF4, a byte of scale for 64, a float for 256 of those (QLoRA, arXiv 2305.14314)
SHORTER = "shorter rows (model.max_length, corpus.context_tokens, sample.max_new_tokens) or a larger GPU"
SMALLER_JUDGE = "a smaller model as judge, a larger GPU, or a server that holds it (provider, base_url)"
MEMORY_SHARE = 0.92  # of a GPU's memory: the rest is the context and fragmentation


@dataclass(frozen=True)
class Shape:
    """A model's sizes, from its config."""

    parameters: int
    layers: int
    width: int
    inner: int
    vocabulary: int
    cache_width: int  # key and value numbers a layer and token: 2 x key-value heads x head width
    tables: int = 1  # of tokens: embeddings and head, one where they are tied


@dataclass(frozen=True)
class Sizes:
    """What the recipe's corpus and models amount to; the same for every machine. judges: stage -> bytes of the largest language model that judges in
    its process, which is read in fp32 whatever the hardware."""

    shape: Shape
    lengths: Lengths
    sft_rows: int
    imported: int | None
    disk_bytes: int
    judges: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Shares:
    """Which share of a machine's peaks software reaches: FLOPs in training and reading, bandwidth in writing.

    layer_seconds: the least time that a layer takes to read a pair or to write a token, whatever its size: starting its kernels from Python.
    trained_layer_seconds: the same there and back. Reading and training were measured in bf16 on an H100 (docs/benchmarks.md), whose 0.5B model
    waits for them; writing is supposed to take what reading takes.
    """

    train: float = 0.30
    prefill: float = 0.40
    decode: float = 0.50
    layer_seconds: float = 2.5e-3
    trained_layer_seconds: float = 7.0e-3
    source: str = "assumed: 30% of the peak in training, 40% in reading, 50% of the bandwidth in writing; a layer takes at least 2.5 ms, 7 ms in training"


@dataclass(frozen=True)
class Prediction:
    """Stages with their seconds; peak memory in bytes by stage, on one GPU and on the host; and what will not fit."""

    stages: list[StagePlan]
    rates: Rates
    gpu_bytes: Mapping[str, int]
    host_bytes: Mapping[str, int]
    problems: list[str]
    shares: Shares

    @property
    def seconds(self) -> float:
        """Of all stages together."""
        return sum(stage.seconds for stage in self.stages)


def shape_of(config: Any, parameters: int) -> Shape:
    """The sizes of a transformers config."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        parameters, config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size, 2 * heads * width,
        tables=1 if config.tie_word_embeddings else 2,
    )  # fmt: skip


def read_sizes(recipe: Recipe) -> Sizes:
    """Read the corpus and the models' configs (not their weights). Raises UserError where one of them cannot be read."""
    from suasion.planning import read_corpus

    corpus = read_corpus(recipe)
    shape = read_shape(recipe.model)
    graders = {"ai-labels": recipe.ai_labels.grader, "evaluate": recipe.evaluate.grader}
    read = {
        stage: {section.base: WEIGHT_BYTES * read_shape(section).parameters for section in models_of(grader)}
        for stage, grader in graders.items()
    }
    models = {recipe.model.base: WEIGHT_BYTES * shape.parameters} | read["ai-labels"] | read["evaluate"]
    return Sizes(
        shape,
        corpus.lengths,
        sft_rows(recipe, corpus.attainable),
        corpus.imported,
        disk_bytes(recipe, corpus.examples) + sum(models.values()),
        {stage: max(found.values()) for stage, found in read.items() if found},
    )


def read_shape(section: ModelSection) -> Shape:
    """The sizes of a model, from its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from suasion.bases import base_folder

    config = AutoConfig.from_pretrained(base_folder(section, weights=False), trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return shape_of(config, sum(parameter.numel() for parameter in model.parameters()))


def flops_a_token(shape: Shape, positions: float, trained: bool) -> float:
    """FLOPs of reading (2 a parameter) or training (4) one token that sees so many positions."""
    factor = 4 if trained else 2
    return factor * (shape.parameters + 2 * shape.layers * shape.width * positions)


def rates_of(
    shape: Shape,
    lengths: Lengths,
    batch: int,
    machine: Machine,
    shares: Shares,
    number_bytes: int = ROUNDED_BYTES,
    micro_batch: int = GPU_TOKENS,
    rows: float = math.inf,
) -> Rates:
    """Tokens a second of one GPU of the machine, which reads a pair, reads `batch` prompts, and trains `micro_batch` tokens in one pass.

    number_bytes: of a weight and of a number of the cache while writing. rows: how many pairs a pass trains at most.
    """
    peak, bandwidth = machine.gpu.tflops * 1e12, machine.gpu.gbps * 1e9
    pair = lengths.context + 2 * lengths.reply
    trained = max(1, min(micro_batch // pair, rows)) * pair
    positions = (lengths.context + lengths.reply) / 2
    cached = (lengths.context + lengths.reply / 2) * shape.layers * shape.cache_width
    looked_up = (shape.tables - 1) * shape.vocabulary * shape.width  # embeddings that are no head: a row a token
    step = max(
        number_bytes * (shape.parameters - looked_up + batch * cached) / (bandwidth * shares.decode),
        shape.layers * shares.layer_seconds,
    )
    token = flops_a_token(shape, positions, trained=False) / (peak * shares.prefill)
    prompts = batch * lengths.context
    training = trained * flops_a_token(shape, positions, trained=True) / (peak * shares.train)
    return Rates(
        prefill=pair / max(pair * token, shape.layers * shares.layer_seconds),
        decode=batch / step,
        train=trained / max(training, shape.layers * shares.trained_layer_seconds),
        prompts=prompts / max(prompts * token, shape.layers * shares.layer_seconds),
    )


def measured_shares(rates: Rates, shape: Shape, lengths: Lengths, batch: int, machine: Machine, name: str) -> Shares:
    """The shares of the peaks that were reached on a machine of the table, from rates measured there."""
    full = rates_of(shape, lengths, batch, machine, Shares(1.0, 1.0, 1.0, 0.0, 0.0, ""))
    return Shares(
        rates.train / full.train, rates.prefill / full.prefill, rates.decode / full.decode, 0.0, 0.0, f"measured here, on {name}"
    )  # fmt: skip


def loaded_bytes(recipe: Recipe, shape: Shape) -> int:
    """Bytes of the weights as they are loaded."""
    return four_bit_bytes(shape) if recipe.model.quantization else WEIGHT_BYTES * shape.parameters


def rounded_bytes(recipe: Recipe, shape: Shape) -> int:
    """Bytes of the weights at work, once linear layers are rounded; a head that is tied to the embeddings has a copy of its own then."""
    if recipe.model.quantization or recipe.model.dtype == "float32":
        return loaded_bytes(recipe, shape)
    table = shape.vocabulary * shape.width
    return (WEIGHT_BYTES + ROUNDED_BYTES) * table + ROUNDED_BYTES * (shape.parameters - shape.tables * table)


def four_bit_bytes(shape: Shape) -> int:
    """Bytes of a base in 4 bits: its linear layers; tables of tokens stay in fp32."""
    tables = shape.tables * shape.vocabulary * shape.width
    return WEIGHT_BYTES * tables + int(FOUR_BITS * (shape.parameters - tables))


def gpu_memory(recipe: Recipe, shape: Shape, processes: int) -> dict[str, int]:
    """Peak bytes on one GPU by stage: the weights as they are loaded or, once rounded, with adapters and their optimiser state and what
    backward or the cache needs, whichever is more.

    A batch of responses takes what the sampler itself reckons with (sampling/local.py), each to a prompt of its own, as in `evaluate`. Where
    servers sample, a GPU here holds a model only to compare it with theirs, and for the likelihood of real replies.
    """
    found = {}
    for stage in ("sft", *(f"dpo-{arm.name}" for arm in recipe.dpo)):
        loaded, fixed, per_token, longest, budget = training_memory(stage, recipe, shape, processes)
        found[stage] = max(loaded, fixed + per_token * max(budget, longest))
    loaded = loaded_bytes(recipe, shape)
    if isinstance(recipe.sample.engine, EndpointEngine):
        compared = recipe.sample.engine.parity_prompts > 0
        found["sample"] = loaded if compared else 0
        found["evaluate"] = loaded if compared or recipe.evaluate.likelihood_pairs > 0 else 0
        return found
    found["sample"] = found["evaluate"] = max(loaded, sampling_memory(recipe, shape, recipe.sample.batch_size))
    return found


def sampling_memory(recipe: Recipe, shape: Shape, responses: int) -> int:
    """Bytes on a GPU while so many responses are written at once. The continuous engine keeps its cache in fp32 (sampling/continuous.py)."""
    whole = recipe.model.dtype == "float32" or recipe.sample.engine.kind == "continuous"
    batch = batch_bytes(
        responses, responses, recipe.corpus.context_tokens, recipe.sample.max_new_tokens, shape.layers * shape.cache_width, shape.inner,
        shape.width, shape.vocabulary, "float32" if whole else "bfloat16",
    )  # fmt: skip
    return rounded_bytes(recipe, shape) + batch


def host_memory(recipe: Recipe, shape: Shape) -> dict[str, int]:
    """Peak bytes on a machine's host by stage. Every process loads its model there before it moves to its GPU; of a sharded training only
    the first (training/sharding.py), and where servers sample one is loaded here at most, as `gpu_memory` says.
    """
    count = recipe.processes.count
    found = {}
    for stage, on_gpu in gpu_memory(recipe, shape, 1).items():
        if stage in ("sample", "evaluate"):
            alone = isinstance(recipe.sample.engine, EndpointEngine)
        else:
            alone = recipe.processes.profile == "fsdp2"
        copies = 0 if on_gpu == 0 else 1 if alone else count
        found[stage] = HOST_BYTES + loaded_bytes(recipe, shape) * copies
    return found


def training_memory(
    stage: str, recipe: Recipe, shape: Shape, processes: int, recompute: bool | None = None
) -> tuple[int, int, int, int, int]:
    """Of a training: bytes while it loads, bytes that are always there, bytes a token of a micro-batch, tokens of the longest row, and the
    micro-batch's tokens.

    A token keeps about 12 rows of the model's width and 4 of its inner width a layer in bf16, and three fp32 rows of the vocabulary where
    it belongs to a reply. recompute: in the place of the section's recompute_activations; a token then keeps what enters each layer, in
    fp32, and one layer at a time whole.
    """
    section = recipe.sft if stage == "sft" else recipe.arm(stage.removeprefix("dpo-"))
    if stage == "sft":
        replies, longest = recipe.corpus.reply_tokens[1], recipe.model.max_length
    else:
        replies = 2 * recipe.sample.max_new_tokens
        longest = recipe.corpus.context_tokens + replies
    share = replies / (recipe.corpus.context_tokens + replies)
    loaded = weights = loaded_bytes(recipe, shape)
    if recipe.processes.profile == "fsdp2":  # shards are held in fp32
        loaded = weights = weights // processes
    elif section.lora is not None:
        weights = rounded_bytes(recipe, shape)
    # value, gradient and two moments of AdamW
    trained = (
        shape.parameters if section.lora is None else shape.layers * len(section.lora.targets) * section.lora.r * 2 * shape.width
    )
    layer = (12 * shape.width + 4 * shape.inner) * 2
    recompute = section.recompute_activations if recompute is None else recompute
    layers = shape.layers * shape.width * 4 + layer if recompute else shape.layers * layer
    token = layers + int(share * shape.vocabulary * 4 * 3)
    return loaded, weights + 16 * trained, token, longest, section.micro_batch_tokens or GPU_TOKENS


def predict(recipe: Recipe, sizes: Sizes, machine: Machine, shares: Shares | None = None) -> Prediction:
    """Hours and memory of every stage on one GPU of the machine, or on as many, of as many such machines, as the recipe's profile uses."""
    shares = shares or Shares()
    shape, lengths = sizes.shape, sizes.lengths
    count, machines = recipe.processes.count, recipe.processes.machines
    number_bytes = WEIGHT_BYTES if recipe.model.dtype == "float32" else ROUNDED_BYTES
    rows = -(-recipe.sft.batch_size // (count * machines))  # of a step, that one process trains
    micro_batch = recipe.sft.micro_batch_tokens or GPU_TOKENS
    rates = rates_of(shape, lengths, recipe.sample.batch_size, machine, shares, number_bytes, micro_batch, rows)
    assert rates.prompts is not None
    spread = Rates(rates.prefill * count, rates.decode * count, rates.train * count * machines, prompts=rates.prompts * count)
    memory = gpu_memory(recipe, shape, count * machines)
    host = host_memory(recipe, shape)
    for stage, held in sizes.judges.items():
        memory[stage] = max(memory.get(stage, 0), held)
        host[stage] = max(host.get(stage, 0), HOST_BYTES + held * count)
    problems = []
    room = machine.gpu.gib * GIB * MEMORY_SHARE
    for stage, needed in memory.items():
        if needed > room:
            change = SMALLER_JUDGE if sizes.judges.get(stage, 0) > room else advice(stage, room, recipe, shape)
            problems.append(f"{stage} needs {needed / GIB:.1f} GiB of the GPU's {machine.gpu.gib:g}: {change}")
    largest = max(host, key=lambda stage: host[stage])
    if host[largest] > machine.host_gib * GIB:
        problems.append(
            f"loading for {largest} needs {host[largest] / GIB:.1f} GiB of the host's {machine.host_gib:g}: take a larger size of the same machine"
        )
    if count > machine.gpus:
        fewer = f"processes.count={machine.gpus}" if machine.gpus > 1 else "processes.count=1 and processes.profile=one"
        problems.append(f"processes.count is {count}, it has {machine.gpus} GPUs: {fewer}")
    return Prediction(
        stage_plans(recipe, lengths, spread, sizes.sft_rows, sizes.imported), spread, memory, host, problems, shares
    )


def advice(stage: str, room: float, recipe: Recipe, shape: Shape) -> str:
    """What to change so that a stage fits, with the value where one setting will do."""
    weights = loaded_bytes(recipe, shape)
    serving = stage in ("sample", "evaluate")
    if weights > room and serving:
        return (
            "the weights alone do not fit: a larger GPU, or servers that split a model (sample.engine), with their parity_prompts and "
            "evaluate.likelihood_pairs at 0"
        )
    if serving:
        size = recipe.sample.batch_size
        while size and sampling_memory(recipe, shape, size) > room:
            size -= 1
        return f"sample.batch_size={size} (it halves itself while it runs, too)" if size else SHORTER
    key = "sft" if stage == "sft" else f"dpo.{stage.removeprefix('dpo-')}"
    section = recipe.sft if stage == "sft" else recipe.arm(stage.removeprefix("dpo-"))
    for recompute in sorted({section.recompute_activations, True}):
        loaded, fixed, per_token, longest, budget = training_memory(
            stage, recipe, shape, recipe.processes.count * recipe.processes.machines, recompute
        )
        if loaded > room:
            return "the weights alone do not fit: a larger GPU, model.quantization=nf4 or processes.profile=fsdp2 on several"
        fits = int((room - fixed) / per_token)
        if fits >= longest:
            settings = [f"{key}.recompute_activations=true"] if recompute > section.recompute_activations else []
            settings += [f"{key}.micro_batch_tokens={fits}"] if fits < budget else []
            return " and ".join(settings)
    return SHORTER


def lines(recipe: Recipe, sizes: Sizes, names: list[str], table: MachineTable, shares: Shares | None = None) -> list[str]:
    """Hours, dollars and memory on each named machine, a line a stage, what will not fit, and what these numbers leave out."""
    out = []
    for name in names:
        machine = table.machines[name]
        made = predict(recipe, sizes, machine, shares)
        gpu, price = machine.gpu, machine.price

        def dollars(seconds: float, price: float | None = price) -> str:
            return "" if price is None else f"${seconds / 3600 * price * recipe.processes.machines:.2f}"

        out.append(
            f"{name} ({machine.gpus} x {gpu.name}, {gpu.gib:g} GiB; host {machine.host_gib:g} GiB): {duration(made.seconds)}, "
            + ("price asked at launch" if price is None else f"{dollars(made.seconds)} at ${price:.4g} an hour of {table.date}")
        )
        if recipe.processes.count < machine.gpus:
            out.append(
                f"  uses {recipe.processes.count} of its {machine.gpus} GPUs; all of them: processes.profile=ddp processes.count={machine.gpus}"
            )
        for stage in made.stages:
            line = f"  {stage.stage:<22}{duration(stage.seconds):>14}{dollars(stage.seconds):>9}"
            if stage.stage in made.gpu_bytes:
                line += f"{made.gpu_bytes[stage.stage] / GIB:8.1f} GiB GPU{made.host_bytes[stage.stage] / GIB:8.1f} GiB host"
            out.append(line)
        out += [f"  does not fit: {problem}" for problem in made.problems]
    out.append(f"rates {(shares or Shares()).source}; peaks and prices: {table.date}, machines.yaml")
    if recipe.model.dtype == "float32":
        out.append("warning: model.dtype is float32, these peaks are of bf16: hours will be longer.")
    return out + [f"warning: {warning}" for warning in uncounted(recipe)]
