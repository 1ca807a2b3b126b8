"""Decoding in which a place that becomes free is taken by the next response: the library's continuous batching, for GPUs.

A queue of draws is handed over whole. So many of them as there are places are written at once, each reads its prompt by itself, and where
one ends the next begins. Each response owns its random numbers here as in static batches (local.py): tokens are chosen by the same
`choose`, and only floating-point sums can make a difference. Which responses stand beside each other follows from the queue and the
number of places alone (no thread adds draws while others are written, and sizes are given instead of taken from free memory), so that a
queue that is made again whole is made of the same sums.

The library (transformers 5.23) has no argument for a choice of one's own: `OwnDraws` takes the place of its list of logits processors and
leaves one finite score a row, which its greedy decoding then picks. Attention is SDPA over paged keys and values under a mask, because
FlashAttention would want weights in bf16, and what samples here are fp32 weights under autocast (models.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList

from suasion.errors import UserError
from suasion.models import Compute
from suasion.sampling.draws import Draw, Drawn, draw_seed
from suasion.sampling.local import choose, penalise
from suasion.sections.sampling import SampleSection

PAGE = 32  # positions of the cache that are given to a response at once
PASS_TOKENS = 512  # of prompts and responses in one pass; a longer prompt is read in several


class OwnDraws(ContinuousBatchingLogitsProcessorList):  # type: ignore[misc]  # the library is not followed by the type checker
    """Chooses the next token of each response by its own random numbers, and keeps what was chosen with its log-probability."""

    def __init__(self, queue: Sequence[Draw], settings: SampleSection, seed: int):
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self.queue, self.settings = queue, settings
        self.seeds = np.array([draw_seed(seed, draw) for draw in queue], dtype=np.uint64)
        self.tokens: list[list[int]] = [[] for _ in queue]
        self.logprobs = [0.0] * len(queue)
        self._rows: list[int] = []  # of the coming pass: which responses get a token

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: torch.Tensor) -> torch.Tensor:
        """Told which requests are in the coming pass, when they were moved to their new positions."""
        with_token = [request.state for request in requests_in_batch if request.has_new_token]
        self._rows = [int(state.request_id) for state in with_token]
        for row, state in zip(self._rows, with_token, strict=True):
            assert state.position_offset == len(self.queue[row].prompt) + len(self.tokens[row]), "a token of a response was lost"
        return arg_storage

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, logits_processor_args: torch.Tensor) -> torch.Tensor:
        """scores: logits [rows, V]. Returns [rows, V], minus infinity but for the chosen token."""
        settings, rows = self.settings, self._rows
        if not rows:  # nothing but prompts, of which more has to be read
            return scores
        logits = scores[: len(rows)]
        positions = np.array([len(self.tokens[row]) for row in rows])
        penalised = penalise([self.tokens[row] for row in rows], logits, settings.repetition_penalty)
        choice = choose(
            penalised, self.seeds[rows], positions, settings.temperature, settings.top_p, settings.top_k, settings.min_p
        )
        picked = (logits.gather(1, choice[:, None])[:, 0] - logits.logsumexp(dim=1)).tolist()
        for row, token, logprob in zip(rows, choice.tolist(), picked, strict=True):
            self.tokens[row].append(token)
            self.logprobs[row] += logprob
        return torch.full_like(scores, -torch.inf).scatter(1, choice[:, None], 0.0)


def decode(
    model: Any, queue: Sequence[Draw], settings: SampleSection, seed: int, stop_id: int, hardware: Compute, places: int
) -> list[Drawn]:
    """Decode a queue, at most `places` responses at once.

    Raises UserError for a model that the library cannot decode like this, and what its thread died of, such as a lack of memory.
    """
    refuse_unsupported(model)
    own = OwnDraws(queue, settings, seed)
    longest = max(len(draw.prompt) for draw in queue) + settings.max_new_tokens
    config = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=places * -(-longest // PAGE),
        max_batch_tokens=max(PASS_TOKENS, places),
        max_requests_per_batch=places,
        max_blocks_per_request=0,
        safety_margin=0.0,  # there are pages for as many as there are places
        allow_block_sharing=False,
        use_async_batching=False,
        use_cuda_graph=False,
        auto_switch_to_flash=False,
    )
    greedy = GenerationConfig(do_sample=False, max_new_tokens=settings.max_new_tokens, eos_token_id=stop_id)
    with _as_the_library_calls_it(model, hardware):
        manager = model.init_continuous_batching(generation_config=greedy, continuous_batching_config=config)
        manager.logit_processor = own
        for number, draw in enumerate(queue):  # before the start: else the first passes would depend on threads
            manager.add_request(list(draw.prompt), request_id=str(number))
        manager.start()
        try:
            _wait(manager, len(queue))
        finally:
            manager.stop(block=True, hard_stop=True)
            manager.destroy()
    return [
        Drawn(
            draw,
            tuple(own.tokens[number]),
            "stop" if own.tokens[number][-1] == stop_id else "length",
            own.logprobs[number],
            int(own.seeds[number]),
        )
        for number, draw in enumerate(queue)
    ]


def refuse_unsupported(model: Any) -> None:
    """Raises UserError for layers that keep something else than keys and values (states of linear attention)."""
    from transformers.generation.continuous_batching.cache import group_layers_by_attn_type

    try:
        group_layers_by_attn_type(model.config.get_text_config())
    except ValueError as error:
        raise UserError(f"continuous batching cannot take this model ({error}). Use sample.engine.kind: local.") from error


def _wait(manager: Any, count: int) -> None:
    """Until so many responses have ended. Raises the error that ended the library's thread."""
    left = count
    while left:
        running = manager.is_running()
        result = manager.get_result(timeout=0.2)
        if result is None:
            if (error := manager.background_thread_status.fatal_error) is not None:
                raise error
            assert running, "continuous batching ended without a word"
        elif result.error is None:  # else the thread is about to end
            left -= 1


@contextmanager
def _as_the_library_calls_it(model: Any, hardware: Compute) -> Iterator[None]:
    """The library decodes in a thread of its own, to which autocast has to be carried; the model's attention is put back afterwards."""
    forward, own, attention = model.forward, vars(model).get("forward"), model.config._attn_implementation

    @functools.wraps(forward)  # the library reads the arguments' names
    def under_autocast(*args: Any, **kwargs: Any) -> Any:
        _store_as_is(kwargs["cache"])
        with hardware.autocast():
            return forward(*args, **kwargs)

    model.forward = under_autocast
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own
        model.set_attn_implementation(attention)


def _store_as_is(cache: Any) -> None:
    """Let a paged cache take what autocast hands over: keys in fp32 (they were rotated), values in bf16. Stored in fp32, both keep every bit."""
    if "update" in vars(cache):
        return
    update = cache.update

    def widened(key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]) -> Any:
        return update(key_states.to(cache.dtype), value_states.to(cache.dtype), layer_idx, kwargs)

    cache.update = widened
