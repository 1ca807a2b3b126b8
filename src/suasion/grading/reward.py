"""The `reward` grader: a language model with a scalar head, trained on outcome pairs (training/reward.py), judges as it was trained.

It sees what every grader sees: the dialogue as plain text, here as one user turn, and the reply as the assistant's. Reads the base
model; writes trained models into $SUASION_CACHE/reward-models, under a name that follows from base, settings, pairs, seed and kind of
hardware. A training that was interrupted goes on there, and one that is wanted again is read: that matters, because measuring the
grader by cross-validation trains a model in every fold. Deleting the folder costs the trainings, nothing else.

A pair that is longer than `model.max_length` teaches nothing, and a reply that does not fit into the base's context has no strength: it is
missing data, never cut.
"""

from __future__ import annotations

import fcntl
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from suasion.chat import Renderer
from suasion.grading.base import BradleyTerryGrader, pairs_hash
from suasion.models import base_hash, compute, load_tokenizer
from suasion.progress import console, progress
from suasion.records import Turn, canonical_json, content_id, read_json
from suasion.rundir import CHECKPOINTS, cache_dir
from suasion.sections.grading import RewardGrader
from suasion.sections.training import RewardSection
from suasion.training.reward import RewardModel, train_reward

if TYPE_CHECKING:
    from suasion.grading.pairs import TrainingPair

DECIMALS = 4  # in fp32 a reward moves by 1e-6 with the replies that are read beside it
CHANGES_NOTHING = ("checkpoints", "micro_batch_tokens", "report_to", *RewardSection.TRANSPORT)  # of the training's settings


@dataclass(frozen=True)
class ReplyPair:
    """A training pair as `train_reward` takes it."""

    turns: tuple[Turn, ...]
    winner: str
    loser: str


def as_turns(context: str) -> tuple[Turn, ...]:
    """The dialogue as graders see it, as one turn of the person to be persuaded."""
    return (Turn(role="user", text=context),)


def trained_folder(spec: RewardGrader, pairs: Sequence[TrainingPair], seed: int) -> Path:
    """Where the model of these settings and pairs lies, or will lie."""
    hardware = compute(spec.model)
    renderer = Renderer(load_tokenizer(spec.model), spec.model.system_prompt)
    name = content_id(
        "reward-model", base_hash(spec.model), renderer.template_hash, spec.model.max_length, hardware.device, hardware.dtype, seed,
        canonical_json(spec.training.model_dump(mode="json", exclude=set(CHANGES_NOTHING))), pairs_hash(pairs),
    )  # fmt: skip
    return cache_dir() / "reward-models" / name


def trained_model(spec: RewardGrader, pairs: Sequence[TrainingPair], seed: int) -> RewardModel:
    """The reward model of these pairs, trained unless it was before. Raises UserError where nothing can be learned from them."""
    folder = trained_folder(spec, pairs, seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process that wants the same model waits for it
        if not (folder / "reward.json").is_file():
            train_reward(
                [ReplyPair(as_turns(p.context), p.winner, p.loser) for p in pairs], spec.model, spec.training, folder, seed
            )
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    said = read_json(folder / "reward.json")["training"]
    left_out = ", ".join(f"{count} {reason}" for reason, count in said["dropped"].items())
    console.print(
        f"  reward model of {said['pairs']} pairs: {said['final_accuracy']:.0%} of its last training pairs right"
        + (f"; left out: {left_out}" if left_out else ""),
        markup=False,
        soft_wrap=True,
    )
    return RewardModel.load(folder, spec.model)


class RewardBradleyTerry(BradleyTerryGrader):
    """See the module's docstring."""

    kind = "reward"

    def __init__(self, spec: RewardGrader, pairs: Sequence[TrainingPair], seed: int):
        self.model = trained_model(spec, pairs, seed)
        super().__init__(spec.tie_margin, content_id("grader", self.kind, spec.tie_margin, self.model.hash))
        self._known: dict[tuple[str, str], float] = {}

    def strengths(self, contexts: Sequence[str], replies: Sequence[str]) -> np.ndarray:
        """[n] rewards; NaN for a reply without text or one that the model cannot read whole. Each (context, reply) is read once a process."""
        asked = list(zip(contexts, replies, strict=True))
        missing = sorted({key for key in asked if key not in self._known})
        if missing:
            with progress("score replies", len(missing), "replies") as advance:
                for context, group in groupby(missing, key=lambda key: key[0]):
                    texts = [reply for _, reply in group]
                    read = [text for text in texts if text.strip() and self._fits(context, text)]
                    rewards = dict(zip(read, self.model.score(as_turns(context), read), strict=True))
                    self._known |= {(context, text): round(rewards.get(text, math.nan), DECIMALS) for text in texts}
                    advance(len(texts))
        return np.array([self._known[key] for key in asked], dtype=np.float64)

    def largest_weights(self, count: int) -> dict[str, float]:
        """None: a network's weights have no names that a reader knows."""
        return {}

    def _fits(self, context: str, reply: str) -> bool:
        return len(self.model.renderer.render(as_turns(context), reply).ids) <= self.model.longest
