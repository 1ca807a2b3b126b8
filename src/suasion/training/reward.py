"""A reward model: outcome pairs -> a folder with `adapter/`, `head.safetensors`, `reward.json`, `metrics.jsonl`; and its use.

Bradley-Terry (1952): P(winner beats loser) = sigmoid(r(winner) - r(loser)), where r is a linear head on the hidden state of the
reply's last token, the stop token, which has seen all of it. The loss is -log of that (Ouyang et al. 2022, arXiv 2203.02155, eq. 1).
The base is any model that models.py loads, with a LoRA adapter; winner and loser share one pass over their context (prefix.py).

The head starts at zero, so that the first loss is ln 2 exactly (checked: another value means that winners and losers are not
treated alike). Rewards have no unit and no zero: only differences in one context mean something.

    train_reward(pairs, model, settings, folder, seed)       pairs: rows with turns, winner and loser, such as OutcomePair
    RewardModel.load(folder, model).score(turns, replies)    one reward a reply
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from suasion import four_bit
from suasion.chat import Renderer
from suasion.errors import UserError
from suasion.models import (
    Compute,
    adapter_hash,
    attach_adapter,
    base_hash,
    check_adapter,
    compute,
    load_base,
    load_tokenizer,
    save_adapter,
)
from suasion.records import Turn, content_id, read_json, sha256_file, write_json
from suasion.sections.training import ModelSection, RewardSection
from suasion.training.attention import set_attention
from suasion.training.loop import arguments, on_first_gpu, train
from suasion.training.prefix import Packed, pack
from suasion.training.processes import rank
from suasion.training.steps import GOES_ON, WholeSteps

FORMAT = "reward/1"
FIRST_LOSS_TOLERANCE = 1e-6  # zero times anything finite is zero: only the logarithm rounds, in every compute type
WEIGHTS = "trained.safetensors"  # of a checkpoint: adapter and head, not the frozen base


class ReplyPair(Protocol):
    """Two replies to one context, of which one won; OutcomePair is one."""

    @property
    def turns(self) -> tuple[Turn, ...]: ...
    @property
    def winner(self) -> str: ...
    @property
    def loser(self) -> str: ...


@dataclass(frozen=True)
class RankedIds:
    """One outcome pair as token ids; both replies end with the stop token."""

    id: str
    prompt: tuple[int, ...]
    winner: tuple[int, ...]
    loser: tuple[int, ...]


def ranked_ids(pairs: Sequence[ReplyPair], renderer: Renderer, max_length: int) -> tuple[list[RankedIds], dict[str, int]]:
    """Rendered pairs without doubles, by id, and what was dropped by reason. A reply is never cut: a pair too long is left out."""
    rows: dict[str, RankedIds] = {}
    dropped = {"no reply": 0, "equal replies": 0, "longer than max_length": 0, "double": 0}
    for pair in pairs:
        if not pair.winner.strip() or not pair.loser.strip():
            dropped["no reply"] += 1
            continue
        if pair.winner.strip() == pair.loser.strip():
            dropped["equal replies"] += 1
            continue
        winner, loser = (renderer.render(pair.turns, text) for text in (pair.winner, pair.loser))
        name = content_id("ranked", *map(str, winner.ids), "over", *map(str, loser.reply_ids))
        if max(len(winner.ids), len(loser.ids)) > max_length:
            dropped["longer than max_length"] += 1
        elif name in rows:
            dropped["double"] += 1
        else:
            rows[name] = RankedIds(name, winner.prompt_ids, winner.reply_ids, loser.reply_ids)
    return [rows[name] for name in sorted(rows)], {reason: count for reason, count in dropped.items() if count}


class RewardNet(torch.nn.Module):
    """A transformer without its language-model head, and one number a reply."""

    def __init__(self, backbone: Any):
        super().__init__()
        self.backbone = backbone
        self.head = torch.nn.Linear(backbone.config.get_text_config().hidden_size, 1, bias=False)
        torch.nn.init.zeros_(self.head.weight)

    def forward(self, packed: Packed) -> torch.Tensor:
        """Rewards [S] in fp32 of the replies of a packed row."""
        hidden = self.backbone(**packed.inputs_for(self.backbone)).last_hidden_state[0, packed.ends]
        with torch.autocast(hidden.device.type, enabled=False):
            rewards: torch.Tensor = self.head(hidden.float())[:, 0]
        return rewards

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """What the Trainer calls for `recompute_activations`; the head keeps next to nothing."""
        self.backbone.activation_checkpointing_enable(**kwargs)

    def trained(self) -> dict[str, torch.Tensor]:
        """The weights that training changes."""
        return {name: value.detach().cpu().contiguous() for name, value in self.named_parameters() if value.requires_grad}


class RewardTrainer(WholeSteps, Trainer):  # type: ignore[misc]
    """transformers' Trainer with the Bradley-Terry loss, averaged over the pairs of the whole optimiser step."""

    SETTINGS = "the grader's training."
    SMALLER_PASSES = GOES_ON  # such a training lies in the cache, under a name that does not depend on them (grading/reward.py)
    SHORTER_ROWS = "lower the grader's model.max_length (longer pairs are then left out): its training then begins anew"

    def __init__(self, *args: Any, section: RewardSection, hardware: Compute, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.section, self.hardware = section, hardware

    def row_id(self, row: RankedIds) -> str:
        return row.id

    def row_tokens(self, row: RankedIds) -> int:
        return len(row.prompt) + len(row.winner) + len(row.loser)

    def row_weight(self, row: RankedIds) -> float:
        return 1.0

    def micro_loss(self, model: Any, rows: list[RankedIds]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        packed = pack([(row.prompt, (row.winner, row.loser)) for row in rows]).to(self.args.device)
        with self.hardware.autocast():
            rewards = model(packed).view(len(rows), 2)
        margins = rewards[:, 0] - rewards[:, 1]
        losses = bradley_terry_loss(margins)
        if self.state.global_step == 0 and not (losses.detach() - math.log(2)).abs().max() <= FIRST_LOSS_TOLERANCE:
            raise UserError(
                f"reward model: the first loss is {losses.mean().item():.6f}, a head of zeros gives ln 2 = {math.log(2):.6f}. Nothing was "
                "trained: its folder holds another training's checkpoint, or this is a defect. Remove the folder and run again."
            )
        tokens = torch.tensor([[len(row.winner), len(row.loser)] for row in rows], dtype=torch.float32)
        return losses.sum(), {
            "margin": margins.sum(),
            "accuracy": ((margins > 0).float() + 0.5 * (margins == 0).float()).sum(),
            "winner_reward": rewards[:, 0].sum(),
            "loser_reward": rewards[:, 1].sum(),
            "winner_tokens": tokens[:, 0].sum(),
            "loser_tokens": tokens[:, 1].sum(),
        }

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.accelerator.unwrap_model(self.model).trained(), folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        net = self.accelerator.unwrap_model(model or self.model)
        weights = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        assert weights.keys() == net.trained().keys(), "the checkpoint is of another model"
        net.load_state_dict(weights, strict=False)


def bradley_terry_loss(margins: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(r(winner) - r(loser)) of each pair. margins: [n]; returns [n]."""
    return -F.logsigmoid(margins)


def train_reward(
    pairs: Sequence[ReplyPair], model: ModelSection, settings: RewardSection, folder: Path, seed: int, speeds: Path | None = None
) -> dict[str, Any]:
    """Train a reward model into `folder`, or go on with it there; returns facts for a manifest.

    Written: adapter/, head.safetensors, reward.json, metrics.jsonl (and checkpoints/, a working file). speeds: see loop.train.
    Raises UserError where no pair is left to train on, and for a base or settings that do not fit together.
    """
    hardware = compute(model)
    renderer = Renderer(load_tokenizer(model), model.system_prompt)
    rows, dropped = ranked_ids(pairs, renderer, model.max_length)
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "there are none"
        raise UserError(f"no outcome pair to train a reward model on ({reasons}). Give it pairs, or raise model.max_length.")
    folder.mkdir(parents=True, exist_ok=True)
    name = content_id("reward-training", base_hash(model), renderer.template_hash, *(row.id for row in rows))
    backbone = attach_adapter(load_base(model).base_model, settings.lora, seed, name, model.base, task=None)
    net = RewardNet(backbone).to(hardware.device)
    set_attention(backbone, model, hardware.device)
    trainer = RewardTrainer(
        model=net, section=settings, hardware=hardware, train_dataset=rows,
        args=on_first_gpu(arguments(TrainingArguments, settings, folder, hardware, len(rows), seed, "reward")),
    )  # fmt: skip
    metrics = train(trainer, folder, "reward", speeds)
    tail = metrics[-max(1, len(metrics) // 4) :]
    facts = {
        "pairs": len(rows),
        "dropped": dropped,
        "steps": metrics[-1]["step"],
        "first_loss": metrics[0]["loss"],
        "final_loss": sum(row["loss"] for row in tail) / len(tail),
        "final_accuracy": sum(row["accuracy"] for row in tail) / len(tail),
        "longer_wins": sum((len(r.winner) > len(r.loser)) + 0.5 * (len(r.winner) == len(r.loser)) for r in rows) / len(rows),
    }
    if rank() == 0:
        save_adapter(backbone, folder / "adapter", model)
        save_file({"weight": net.head.weight.detach().cpu().contiguous()}, folder / "head.safetensors")
        # Last: a folder without it holds no reward model.
        write_json(
            folder / "reward.json",
            {
                "format": FORMAT,
                "base": model.base,
                "base_hash": base_hash(model),
                "template_hash": renderer.template_hash,
                "adapter_hash": adapter_hash(folder / "adapter"),
                "head_sha256": sha256_file(folder / "head.safetensors"),
                "training": facts,
            },
        )
    return facts


class RewardModel:
    """A trained reward model, ready to score. `hash` is its identity: it changes with anything that can change a reward."""

    def __init__(self, net: RewardNet, renderer: Renderer, hardware: Compute, hash_: str, longest: int):
        self.net, self.renderer, self.hardware, self.hash, self.longest = net, renderer, hardware, hash_, longest

    @classmethod
    def load(cls, folder: Path, model: ModelSection) -> RewardModel:
        """Load what `train_reward` wrote. Raises UserError for another base, another template, or changed or missing files."""
        from peft import PeftModel

        said = read_json(folder / "reward.json")
        if said.get("format") != FORMAT:
            raise UserError(
                f"{folder}/reward.json is of format {said.get('format')}, not {FORMAT}: train the reward model again."
            )
        renderer = Renderer(load_tokenizer(model), model.system_prompt)
        base = four_bit.dequantised(load_base(model)) if model.quantization else load_base(model)
        check_adapter(folder / "adapter", base.base_model, model.base)
        found = {
            "base_hash": base_hash(model),
            "template_hash": renderer.template_hash,
            "adapter_hash": adapter_hash(folder / "adapter"),
            "head_sha256": sha256_file(folder / "head.safetensors"),
        }
        for what, value in found.items():
            if said[what] != value:
                raise UserError(
                    f"the reward model in {folder} was trained with {what} {said[what]} (base {said['base']}), here it is {value} (base "
                    f"{model.base}). Use the base and system prompt that it was trained with, or train it again."
                )
        hardware = compute(model)
        longest = int(base.config.get_text_config().max_position_embeddings)
        net = RewardNet(PeftModel.from_pretrained(base.base_model, str(folder / "adapter")).merge_and_unload())
        net.head.weight.data.copy_(load_file(folder / "head.safetensors")["weight"])
        return cls(net.to(hardware.device).eval(), renderer, hardware, content_id("reward", *found.values()), longest)

    @torch.no_grad()
    def score(self, turns: Sequence[Turn], replies: Sequence[str]) -> list[float]:
        """One reward a reply, in order; only differences within one context mean something.

        The context is read once for all replies, in fp32 whatever the recipe's dtype: in bf16 the same reply moved by a tenth of the spread
        between replies when it was scored beside others. Raises UserError for a reply without text or one longer than the model can read.
        """
        rendered = [self.renderer.render(turns, reply) for reply in replies]
        for reply, row in zip(replies, rendered, strict=True):
            if not reply.strip():
                raise UserError("a reply without text has no reward; decide such pairs before the reward model is asked.")
            if len(row.ids) > self.longest:
                raise UserError(
                    f"context and reply have {len(row.ids)} tokens, the reward model reads {self.longest}: {reply[:60]!r}. Leave it out."
                )
        if not rendered:
            return []
        packed = pack([(rendered[0].prompt_ids, [row.reply_ids for row in rendered])]).to(self.hardware.device)
        rewards = self.net(packed)
        return [float(reward) for reward in rewards]
