"""A conversation with several models of a run at once: what was said, who hears it, and what may be known of who answers.

Every model gets the same messages and sees its own replies only. The replies are drawn by the recipe's sampling engine with the recipe's
settings, as in stage `sample`; the same message in the same conversation gets the same random numbers in every model, so that models
differ by weights alone. Nothing is stored.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from suasion.chat import Renderer
from suasion.errors import UsageError, UserError
from suasion.memory import free_memory
from suasion.models import compute, lineage_of, load_tokenizer
from suasion.records import Turn, content_id
from suasion.sampling.draws import Draw, Sampler
from suasion.sampling.local import LocalSampler
from suasion.sampling.respond import sampler_for
from suasion.status import load_run

LOADING = 3  # times what a model's weights take in the end: in bf16 they are read in fp32 first
LONGEST_MESSAGE = 8_000  # characters; the model's own limit is counted in tokens and comes first for most

Hear = Callable[[int, str], None]  # (place, the reply so far)
Ended = Callable[[int, "Reply"], None]  # (place, the whole reply)


class Stopped(Exception):
    """Nobody wants the rest of this reply."""


@dataclass
class Reply:
    """What one model said. finish: stop, length, or stopped by the listener."""

    text: str
    finish: str


@dataclass
class Round:
    """One message and the replies to it, by place; a model whose reply is missing has not spoken yet."""

    message: str
    replies: dict[int, Reply] = field(default_factory=dict)


class Talk:
    """The conversation. Methods that speak hold a lock: one reply is computed at a time, since all share the machine."""

    def __init__(self, run: Path, names: Sequence[str] = (), blind: bool = False):
        """Raises UsageError for models that the run does not have or has not finished."""
        directory, recipe = load_run(run)
        self.title, self.recipe = run.resolve().name, recipe
        self.finished = [
            name
            for name in recipe.model_names()
            if all(directory.state(stage) == "complete" for stage in recipe.adapter_stages(name))
        ]
        self._lineages = {name: lineage_of(directory, recipe, name) for name in self.finished}
        self.renderer = Renderer(load_tokenizer(recipe.model), recipe.model.system_prompt)
        self._hardware = compute(recipe.model)
        self._samplers: dict[str, Sampler] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self.begin(names or self.finished, blind)

    def begin(self, names: Sequence[str], blind: bool) -> None:
        """A new conversation with these models; blind: in an order drawn anew, under letters."""
        unknown = [name for name in names if name not in self.finished]
        if unknown or not names:
            what = f"{', '.join(unknown)}: not a finished model of this run." if unknown else "no model was chosen."
            raise UsageError(f"{what} It has {', '.join(self.finished)}.")
        self.stop()
        chosen = [name for name in self.finished if name in names]
        if blind:
            chosen = [chosen[place] for place in np.random.default_rng(secrets.randbits(64)).permutation(len(chosen))]
        with self._lock:
            self.names, self.blind, self.revealed = chosen, blind, not blind
            self.rounds: list[Round] = []
            self.number = secrets.token_hex(4)

    def label(self, place: int) -> str:
        """How the model at this place is called: by name, or by a letter as long as nobody asked."""
        return self.names[place] if self.revealed else f"Model {chr(ord('A') + place)}"

    def reveal(self) -> None:
        """Names from here on."""
        self.revealed = True

    def stop(self) -> None:
        """End the reply that is under way; the models after it do not speak, and what was said stays."""
        self._stopping.set()

    def say(self, message: str, hear: Hear, ended: Ended = lambda place, reply: None) -> Round:
        """Put a message to every model and hand over the replies as they grow and as they end; returns the round.

        Raises UserError for a message that is empty or for which the model has no room.
        """
        message = message.strip()
        if not message:
            raise UserError("there is no message.")
        if len(message) > LONGEST_MESSAGE:
            raise UserError(f"a message of {len(message)} characters is too long; {LONGEST_MESSAGE} is the most.")
        with self._lock:
            self._stopping.clear()
            prompts = [self._prompt(place, message) for place in range(len(self.names))]
            this = Round(message)
            self.rounds.append(this)
            for place, prompt in enumerate(prompts):
                heard = ""

                def listen(text: str, place: int = place) -> None:
                    nonlocal heard
                    heard = text
                    hear(place, text)
                    if self._stopping.is_set():
                        raise Stopped

                try:
                    drawn = self._sampler(self.names[place]).speak(self._draw(prompt), listen)
                except (Stopped, KeyboardInterrupt):  # the page's button, or Ctrl-C in the terminal
                    this.replies[place] = Reply(heard, "stopped")
                else:
                    text = drawn.text.strip() if drawn.tokens is None else self.renderer.decode(drawn.tokens)
                    this.replies[place] = Reply(text, drawn.finish)
                ended(place, this.replies[place])
                if this.replies[place].finish == "stopped":
                    break
        return this

    def _prompt(self, place: int, message: str) -> tuple[int, ...]:
        turns = []
        for past in self.rounds:
            turns.append(Turn(role="user", text=past.message))
            if place in past.replies and past.replies[place].text:
                turns.append(Turn(role="assistant", text=past.replies[place].text))
        ids = self.renderer.render((*turns, Turn(role="user", text=message))).ids
        room = self.recipe.model.max_length
        if len(ids) + self.recipe.sample.max_new_tokens > room:
            raise UserError(
                f"the conversation has {len(ids)} tokens with this message, and {room} less {self.recipe.sample.max_new_tokens} for the reply "
                "is what the model was trained for. Begin a new conversation, or write less."
            )
        return ids

    def _draw(self, prompt: tuple[int, ...]) -> Draw:
        said = [past.message for past in self.rounds]
        return Draw(content_id("chat", self.number, *said), prompt, 0)

    def _sampler(self, name: str) -> Sampler:
        if name not in self._samplers:
            self._samplers[name] = sampler_for(
                name, self._lineages[name], self.recipe.sample, self.renderer, self._hardware, self.recipe.seed
            )
        sampler = self._samplers[name]
        if isinstance(sampler, LocalSampler) and sampler.model is None:
            self._make_room()
        return sampler

    def _make_room(self) -> None:
        """Let the other models go where one more does not fit beside them; they are loaded again when it is their turn."""
        loaded = [each for each in self._samplers.values() if isinstance(each, LocalSampler) and each.model is not None]
        largest = max((weights_bytes(each.model) for each in loaded), default=0)
        if LOADING * largest > free_memory(self._hardware.device):
            for each in loaded:
                each.model = None


def weights_bytes(model: Any) -> int:
    """What the weights of a loaded model take."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())
