"""The local engine: left-padded static batches of similar lengths, one prefill for all responses of a prompt.

`decode` makes one batch; `LocalSampler` makes all of them and halves them where memory does not suffice.

Each response owns its random numbers, from (seed, prompt, number, attempt, position, token): batch size, order and restarts
change nothing but floating-point sums. Finished rows leave the batch. The log-probability stored with a response is of the
sampled tokens at temperature 1 under the untruncated distribution, so that it can be compared with any later scoring pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from suasion.chat import Renderer
from suasion.errors import UserError
from suasion.memory import OUT_OF_MEMORY, free_memory, is_out_of_memory
from suasion.models import Compute
from suasion.progress import console
from suasion.sampling.draws import Deliver, Draw, Drawn, Ended, draw_seed, nobody
from suasion.sampling.noise import gumbel
from suasion.sections.sampling import ContinuousEngine, SampleSection

MEMORY_SHARE = 0.9  # of the free memory, for one batch
QUEUE = 8  # batches that stand in one queue where places are taken again
READ_TOKENS = 1024  # of prompts in one pass on a CPU, whose caches hold the activations of so many; a GPU reads all at once
CANDIDATES = 256  # nucleus sampling looks at this many tokens first; the exact full sort follows where they are not enough


def plan_batches(draws: Sequence[Draw], batch_size: int) -> list[list[Draw]]:
    """Batches of at most batch_size responses, all draws of one prompt side by side, prompts of similar length together."""
    by_prompt: dict[tuple[str, int], list[Draw]] = {}
    for draw in draws:
        by_prompt.setdefault((draw.prompt_id, draw.attempt), []).append(draw)
    groups = sorted(by_prompt.values(), key=lambda group: (-len(group[0].prompt), group[0].prompt_id))
    batches: list[list[Draw]] = []
    for group in groups:
        if not batches or len(batches[-1]) + len(group) > batch_size:
            batches.append([])
        batches[-1] += group
    return batches


def refuse_device(settings: SampleSection, hardware: Compute) -> None:
    """Raises UserError for continuous batching on a CPU."""
    if isinstance(settings.engine, ContinuousEngine) and hardware.device == "cpu":
        raise UserError("sample.engine.kind: continuous is for GPUs, and this is a CPU. Use kind: local.")


class LocalSampler:
    """Draws responses of one model in this process; `load` gives the model as it samples, and is called only where something is left to do."""

    peers = ""

    def __init__(
        self,
        load: Callable[[], Any],
        settings: SampleSection,
        renderer: Renderer,
        hardware: Compute,
        seed: int,
        share: float = MEMORY_SHARE,
    ):
        self.share = share
        self.load, self.settings, self.renderer, self.hardware, self.seed = load, settings, renderer, hardware, seed
        self.model: Any = None
        self.most = settings.batch_size  # responses at once; sinks where memory does not suffice
        self.queued = isinstance(settings.engine, ContinuousEngine)

    def batches(self, draws: Sequence[Draw]) -> list[list[Draw]]:
        """Planned by the recipe's batch_size alone: a resumed run, or one with less memory, journals the same groups."""
        return plan_batches(draws, self.settings.batch_size * (QUEUE if self.queued else 1))

    def check(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """Nothing to compare: this is the local model."""
        return {}

    def run(self, work: Sequence[tuple[str, list[Draw]]], deliver: Deliver, ended: Ended = nobody) -> None:
        """Batch after batch. Raises UserError where one response alone exceeds the memory, and for continuous batching on a CPU."""
        refuse_device(self.settings, self.hardware)
        for key, batch in work:
            if self.model is None:
                self.model = self.load()
            deliver(key, self._queue(batch, ended) if self.queued else self._within_memory(batch, ended))

    def speak(self, draw: Draw, hear: Callable[[str], None]) -> Drawn:
        """One response, its text growing token by token."""
        if self.model is None:
            self.model = self.load()
        tokens: list[int] = []

        def heard(_: int, token: int) -> None:
            tokens.append(token)
            hear(self.renderer.decode(tokens).rstrip("\ufffd"))  # a letter of several tokens may be half there

        return self._decode([draw], heard=heard)[0]

    def _decode(self, part: Sequence[Draw], **watchers: Any) -> list[Drawn]:
        pad_id = self.renderer.tokenizer.pad_token_id
        return decode(self.model, part, self.settings, self.seed, self.renderer.stop_id, pad_id, self.hardware, **watchers)

    def _within_memory(self, batch: list[Draw], ended: Ended) -> list[Drawn]:
        """Decode a batch in as many parts as memory asks for."""
        drawn: list[Drawn] = []
        while len(drawn) < len(batch):
            part = self._that_fits(batch[len(drawn) :], self.hardware.dtype)
            told = 0

            def tell(count: int) -> None:
                nonlocal told
                told += count
                ended(count)

            made = self._unless_out_of_memory(part, partial(self._decode, part, ended=tell))
            if made is None:
                ended(-told)  # they are made again
            drawn += made or []
        return drawn

    def _queue(self, queue: list[Draw], ended: Ended) -> list[Drawn]:
        """Decode a queue with as many places as memory has for its longest draws, which come first."""
        from suasion.sampling import continuous

        while True:
            part = self._that_fits(queue, "float32")  # as the weights: so the library keeps keys and values
            make = partial(
                continuous.decode, self.model, queue, self.settings, self.seed, self.renderer.stop_id, self.hardware, len(part)
            )
            if (drawn := self._unless_out_of_memory(part, make)) is not None:
                ended(len(drawn))
                return drawn

    def _that_fits(self, draws: list[Draw], dtype: str) -> list[Draw]:
        """The first draws, as many as may be decoded at once. dtype: of the cache."""
        part = draws[: self.most]
        free = free_memory(self.hardware.device)
        while len(part) > 1 and (needed := memory_needed(self.model, part, self.settings, dtype)) > self.share * free:
            part = self._halved(part, f"{needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
        return part

    def _unless_out_of_memory(self, part: list[Draw], make: Callable[[], list[Drawn]]) -> list[Drawn] | None:
        """What `make` returns; None where memory did not suffice for this part: half of it is tried next. Raises UserError for a single draw."""
        try:
            return make()
        except OUT_OF_MEMORY as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler: the error's traceback keeps the batch's tensors alive.
        if len(part) == 1:
            raise UserError("out of memory on a single response. Lower sample.max_new_tokens or corpus.context_tokens.")
        if self.hardware.device == "cuda":
            torch.cuda.empty_cache()
        self._halved(part, "out of memory")
        return None

    def _halved(self, part: list[Draw], reason: str) -> list[Draw]:
        self.most = len(part) // 2
        console.print(
            f"  [yellow]{reason} with {len(part)} responses at once: {self.most} from here on. sample.batch_size={self.most} saves the detour.[/]"
        )
        return part[: self.most]


def memory_needed(model: Any, batch: Sequence[Draw], settings: SampleSection, dtype: str) -> int:
    """Estimated bytes of one batch beyond the weights."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return batch_bytes(
        len(batch),
        len({draw.read for draw in batch}),
        max(len(draw.prompt) for draw in batch),
        settings.max_new_tokens,
        2 * heads * width * config.num_hidden_layers,
        config.intermediate_size,
        config.hidden_size,
        config.vocab_size,
        dtype,
        read_tokens(model),
    )


def batch_bytes(
    responses: int,
    prompts: int,
    longest: int,
    new_tokens: int,
    position: int,
    inner: int,
    width: int,
    vocabulary: int,
    dtype: str,
    at_once: int | None = None,
) -> int:
    """Bytes of a batch of so many responses to so many prompts, the longest of so many tokens: the cache for all responses (`position`
    numbers a token, of all layers) and, until it is there, that of the prompts; the widest activations of the prefill, of `at_once` tokens
    or else of all; and six rows of the vocabulary a response while a token is chosen. Numbers take four bytes, two in the cache where
    compute is bf16."""
    cache = responses * (longest + new_tokens) * position * (2 if dtype == "bfloat16" else 4)
    read = prompts * longest
    prefill = read * position + min(read, max(at_once or read, longest)) * (3 * inner + 8 * width)
    return int(cache + 4 * (prefill + 6 * responses * vocabulary))


@torch.no_grad()
def decode(
    model: Any,
    batch: Sequence[Draw],
    settings: SampleSection,
    seed: int,
    stop_id: int,
    pad_id: int,
    hardware: Compute,
    heard: Callable[[int, int], None] | None = None,
    ended: Ended = nobody,
    whose: Callable[[Sequence[str]], None] | None = None,
) -> list[Drawn]:
    """Decode one batch. Prompts are read once each, then their cache is repeated for every response.

    heard: called with (place in the batch, token) as each token is chosen; ended: told how many responses have ended more; both for who
    wants to watch. whose: for a model that is several, told before every pass which model (`Draw.model`) each of its rows is of.
    """
    from suasion.sampling.cache import closing_moves, keep_rows

    logits, lengths, cache = _read(model, batch, settings.max_new_tokens, pad_id, hardware, whose)
    device, longest, next_position = model.device, int(lengths.max()), lengths
    mask = (torch.arange(longest + settings.max_new_tokens, device=device) >= (longest - lengths)[:, None]).long()
    seeds = np.array([draw_seed(seed, draw) for draw in batch], dtype=np.uint64)

    tokens: list[list[int]] = [[] for _ in batch]
    sums = [0.0] * len(batch)
    finish: list[Literal["stop", "length"]] = ["length"] * len(batch)
    active = list(range(len(batch)))
    for position in range(settings.max_new_tokens):
        penalised = penalise([tokens[row] for row in active], logits, settings.repetition_penalty)
        choice = choose(penalised, seeds[active], position, settings.temperature, settings.top_p, settings.top_k, settings.min_p)
        picked = (logits.gather(1, choice[:, None])[:, 0] - logits.logsumexp(dim=1)).tolist()
        keep = []
        for place, (row, token) in enumerate(zip(active, choice.tolist(), strict=True)):
            tokens[row].append(token)
            sums[row] += picked[place]
            if heard:
                heard(row, token)
            if token == stop_id:
                finish[row] = "stop"
            else:
                keep.append(place)
        if not keep or position + 1 == settings.max_new_tokens:
            ended(len(active))
            break
        if len(keep) < len(active):
            ended(len(active) - len(keep))
            order, *moves = closing_moves(len(active), keep)
            kept = torch.tensor(order, device=device)
            keep_rows(cache, kept, *(torch.tensor(move, dtype=torch.long, device=device) for move in moves))
            mask, choice, next_position = mask[kept], choice[kept], next_position[kept]
            active = [active[place] for place in order]
        if whose:
            whose([batch[row].model for row in active])
        with hardware.autocast():
            logits = model(
                input_ids=choice[:, None], attention_mask=mask[:, : longest + position + 1], position_ids=next_position[:, None],
                past_key_values=cache, use_cache=True,
            ).logits[:, -1].float()  # fmt: skip
        next_position = next_position + 1
    return [Drawn(draw, tuple(tokens[i]), finish[i], sums[i], draw_seed(seed, draw)) for i, draw in enumerate(batch)]


def _read(
    model: Any, batch: Sequence[Draw], room: int, pad_id: int, hardware: Compute, whose: Callable[[Sequence[str]], None] | None
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Read every prompt once, those of similar length together. Returns, a row for each draw, logits [B, V] of the first token, lengths [B] of
    the prompts, and the cache with room for so many tokens more."""
    from transformers import DynamicCache

    from suasion.sampling.cache import reserve

    prompts = sorted({draw.read: draw.prompt for draw in batch}.items(), key=lambda item: -len(item[1]))
    lengths = [len(prompt) for _, prompt in prompts]
    logits, caches = [], []
    for first, stop in passes(lengths, read_tokens(model)):
        part = prompts[first:stop]
        ids = torch.full((len(part), lengths[first]), pad_id)
        mask = torch.zeros_like(ids)
        for row, (_, prompt) in enumerate(part):
            ids[row, lengths[first] - len(prompt) :] = torch.tensor(prompt)
            mask[row, lengths[first] - len(prompt) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        caches.append(DynamicCache(config=model.config))
        if whose:
            whose([name for (name, _), _ in part])
        with hardware.autocast():
            output = model(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), position_ids=positions.to(model.device),
                past_key_values=caches[-1], use_cache=True, logits_to_keep=1,
            )  # fmt: skip
        logits.append(output.logits[:, -1].float())
    number = {read: row for row, (read, _) in enumerate(prompts)}
    source = torch.tensor([number[draw.read] for draw in batch], device=model.device)
    cache = reserve(caches, source, lengths[0], room, torch.bfloat16 if hardware.dtype == "bfloat16" else None)
    return torch.cat(logits)[source], torch.tensor(lengths, device=model.device)[source], cache


def read_tokens(model: Any) -> int | None:
    """How many tokens of prompts a model reads in one pass; None: all. Layers that keep something else than keys and values (sliding
    windows, states of linear attention) cannot be put together from several passes."""
    from transformers import DynamicCache

    from suasion.sampling.cache import can_be_put_together

    return READ_TOKENS if model.device.type == "cpu" and can_be_put_together(DynamicCache(config=model.config)) else None


def passes(lengths: Sequence[int], most: int | None) -> list[tuple[int, int]]:
    """[first, stop) of the prompts that are read together: at most `most` tokens with padding, a longer prompt alone. lengths: falling."""
    if most is None:
        return [(0, len(lengths))]
    cuts = [0]
    for row in range(1, len(lengths)):
        if (row - cuts[-1] + 1) * lengths[cuts[-1]] > most:
            cuts.append(row)
    return list(zip(cuts, [*cuts[1:], len(lengths)], strict=True))


def choose(
    logits: torch.Tensor,
    seeds: np.ndarray,
    position: int | np.ndarray,
    temperature: float,
    top_p: float,
    top_k: int = 0,
    min_p: float = 0.0,
) -> torch.Tensor:
    """Sample one token a row from the truncated distribution with the row's own random numbers.

    logits: [B, V]; seeds: [B] uint64; position: one for all rows, or [B]. Returns [B]. Gumbel-max: the token with the largest logit / temperature + noise, the noise
    belonging to (seed, position, token). Unlike inverting a cumulative sum, rounding differences between batch sizes can only
    matter where two tokens are within rounding of one another. The nucleus is the smallest set whose probability reaches top_p
    (Holtzman et al. 2020, arXiv 1904.09751), after top_k; of it, tokens less likely than min_p times the likeliest are left out
    (Nguyen et al. 2024, arXiv 2407.01082). All of them look at the distribution at the given temperature.
    """
    if temperature == 0:
        return logits.argmax(dim=1)
    if logits.device.type == "mps":  # which has no float64
        return choose(logits.cpu(), seeds, position, temperature, top_p, top_k, min_p).to(logits.device)
    size = top_k or (logits.shape[1] if top_p >= 1 and min_p == 0 else CANDIDATES)
    tokens, enough = _choose_among(logits, seeds, position, temperature, top_p, top_k, min_p, size)
    if not bool(enough.all()):
        flat = (~enough).nonzero()[:, 0]
        rows = flat.cpu().numpy()
        tokens[flat] = _choose_among(
            logits[flat],
            seeds[rows],
            np.broadcast_to(position, seeds.shape)[rows],
            temperature,
            top_p,
            top_k,
            min_p,
            logits.shape[1],
        )[0]
    return tokens


def _choose_among(
    logits: torch.Tensor,
    seeds: np.ndarray,
    position: int | np.ndarray,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`choose` among the `size` likeliest tokens of each row; and [B] bool, whether more of them could not have changed the row's."""
    scaled = logits / temperature
    size = min(size, logits.shape[1])
    values, tokens = scaled.topk(size, dim=1)
    total = (values if top_k else scaled).logsumexp(dim=1, keepdim=True)
    probabilities = (values - total).double().exp()
    cumulative = probabilities.cumsum(1)
    enough = torch.full_like(total[:, 0], bool(top_k) or size == logits.shape[1], dtype=torch.bool)
    outside = torch.zeros_like(probabilities, dtype=torch.bool)
    if top_p < 1:  # enough once the nucleus lies among them
        outside |= cumulative - probabilities >= top_p
        enough |= cumulative[:, -1] >= top_p
    if min_p:  # or once the last of them is too unlikely anyway
        outside |= probabilities < min_p * probabilities[:, :1]
        enough |= probabilities[:, -1] < min_p * probabilities[:, 0]
    best = (values.double() + gumbel(seeds, position, tokens)).masked_fill(outside, -torch.inf).argmax(dim=1)
    return tokens.gather(1, best[:, None])[:, 0], enough


def penalise(said: Sequence[Sequence[int]], logits: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divide positive logits of tokens already in the response by the penalty, multiply negative ones (as transformers; after Keskar et al. 2019)."""
    if penalty == 1.0:
        return logits
    logits = logits.clone()
    for row, tokens in enumerate(said):
        if tokens:
            seen = torch.tensor(sorted(set(tokens)), device=logits.device)
            values = logits[row, seen]
            logits[row, seen] = torch.where(values > 0, values / penalty, values * penalty)
    return logits
