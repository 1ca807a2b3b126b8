"""From prompts and a model to `Response` rows, whatever engine decodes: resampling of faulty responses, and a journal that survives
kill -9.

Batches are planned from the full list of draws, and a batch is journalled as one line when it is done: an interrupted batch is
redone whole, so that a resumed run computes the same sums in the same batches as an undisturbed one.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suasion.chat import Renderer
from suasion.errors import UserError
from suasion.models import Compute, Lineage, load_to_sample, load_to_score
from suasion.progress import progress
from suasion.records import Prompt, Response, content_id
from suasion.sampling.draws import Draw, Drawn, Sampler
from suasion.sampling.local import LocalSampler
from suasion.sections.sampling import EndpointEngine, SampleSection
from suasion.sections.training import ModelSection

LOOP_SHARE = 0.5  # of word 4-grams that are repetitions
COPY_WORDS = 20  # words in a row taken over from the context


class Journal:
    """An append-only file with one line a finished batch; a torn last line is dropped."""

    def __init__(self, path: Path):
        self.path = path
        self.done: dict[str, list[dict[str, Any]]] = {}
        valid = 0
        if path.is_file():
            with path.open("rb") as handle:
                for raw in handle:
                    try:
                        line = json.loads(raw)
                    except json.JSONDecodeError:
                        break
                    if not raw.endswith(b"\n"):
                        break
                    self.done[line["batch"]] = line["rows"]
                    valid += len(raw)
            if valid < path.stat().st_size:
                os.truncate(path, valid)

    def add(self, batch: str, rows: list[dict[str, Any]]) -> None:
        """Write one batch and make it durable."""
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"batch": batch, "rows": rows}) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        self.done[batch] = rows

    def compared(self, label: str) -> dict[str, Any]:
        """What the last comparison of servers with the local model found, {} where there was none."""
        return next((rows[0] for key, rows in reversed(self.done.items()) if key.startswith(f"{label}/parity/")), {})

    def first_draws(self, label: str) -> list[Response]:
        """The responses of a label before any was drawn again."""
        batches = [rows for batch, rows in self.done.items() if batch.split("/")[0] == label and batch.split("/")[2] == "0"]
        return [Response.model_validate(row) for rows in batches for row in rows]


def at_limit(responses: Sequence[Response]) -> float:
    """Share of responses that ended at the token limit; 0 for none."""
    return round(sum(row.finish == "length" for row in responses) / max(len(responses), 1), 4)


def batch_key(label: str, lineage_hash: str, attempt: int, number: int) -> str:
    """A batch's name in the journal: of which model and attempt, and its number in the engine's plan."""
    return f"{label}/{lineage_hash}/{attempt}/{number}"


def prompt_ids(
    prompts: Sequence[Prompt], settings: SampleSection, model: ModelSection, renderer: Renderer
) -> dict[str, tuple[int, ...]]:
    """Token ids by prompt id. Raises UserError where a prompt leaves no room for a response within model.max_length."""
    ids = {prompt.id: renderer.render(prompt.turns).ids for prompt in prompts}
    longest = max((len(value) for value in ids.values()), default=0)
    if longest + settings.max_new_tokens > model.max_length + 64:  # the template may add a few tokens to context_tokens
        raise UserError(
            f"a prompt of {longest} tokens and {settings.max_new_tokens} new ones exceed model.max_length {model.max_length}. "
            "Lower corpus.context_tokens or sample.max_new_tokens, or raise model.max_length."
        )
    return ids


def add_drawn(
    journal: Journal, key: str, drawn: Sequence[Drawn], prompts: Sequence[Prompt], renderer: Renderer, lineage: str
) -> None:
    """Journal a batch of a model, by the hash of its lineage, as `Response` rows. prompts: those that were answered are among them."""
    texts = {prompt.id: "\n".join(turn.text for turn in prompt.turns) for prompt in prompts}
    rows = [_response(item, renderer, texts[item.draw.prompt_id], lineage) for item in drawn]
    journal.add(key, [row.model_dump(mode="json") for row in rows])


@dataclass(frozen=True)
class Responses:
    """The rows in the order of the prompts, and what is known of their making.

    drawn_again: fault -> how many responses were drawn once more because of it (each draw counts). checked: what the engine's
    comparison with the local model found, {} where there was none.
    """

    rows: list[Response]
    drawn_again: dict[str, int]
    checked: dict[str, Any]


def sampler_for(
    name: str, lineage: Lineage, settings: SampleSection, renderer: Renderer, hardware: Compute, seed: int, processes: int = 1
) -> Sampler:
    """The recipe's engine for one model of the run; the local one in so many processes."""
    if isinstance(settings.engine, EndpointEngine):
        from suasion.sampling.endpoint import EndpointSampler

        return EndpointSampler(settings.engine, settings, name, renderer, seed, lambda: load_to_score(lineage, hardware.device))
    if processes > 1:
        from suasion.sampling.spread import SpreadSampler

        return SpreadSampler(lineage, settings, renderer, hardware, seed, processes)
    return LocalSampler(lambda: load_to_sample(lineage, hardware), settings, renderer, hardware, seed)


def respond(
    name: str,
    lineage: Lineage,
    prompts: Sequence[Prompt],
    responses_a_prompt: int,
    settings: SampleSection,
    model: ModelSection,
    renderer: Renderer,
    hardware: Compute,
    seed: int,
    journal: Journal,
    label: str,
    processes: int = 1,
) -> Responses:
    """`responses_a_prompt` responses of the model `name` to every prompt; faulty ones are drawn again, then flagged.

    Raises UserError where a prompt leaves no room for a response within model.max_length.
    """
    ids = prompt_ids(prompts, settings, model, renderer)
    lineage_hash = lineage.hash
    sampler = sampler_for(name, lineage, settings, renderer, hardware, seed, processes)
    best: dict[tuple[str, int], Response] = {}
    again: Counter[str] = Counter()
    checked: dict[str, Any] = {}
    pending = [Draw(prompt.id, ids[prompt.id], n) for prompt in prompts for n in range(responses_a_prompt)]
    for attempt in range(settings.resample + 1):
        batches = sampler.batches(pending)
        keys = [batch_key(label, lineage_hash, attempt, number) for number in range(len(batches))]
        work = [(key, batch) for key, batch in zip(keys, batches, strict=True) if key not in journal.done]
        parity = f"{label}/{lineage_hash}/parity/{sampler.peers}"  # servers that come in later are compared too
        if work and attempt == 0 and parity not in journal.done:
            comparison = sampler.check(pending)
            if comparison:
                journal.add(parity, [comparison])
        checked = journal.compared(f"{label}/{lineage_hash}")
        title = f"{label}" if attempt == 0 else f"{label}, drawn again ({attempt})"
        left = sum(len(batch) for _, batch in work)
        if work:
            with progress(title, len(pending), "responses", len(pending) - left) as advance:
                sampler.run(work, lambda key, drawn: add_drawn(journal, key, drawn, prompts, renderer, lineage_hash), advance)
        for key in keys:
            for row in journal.done[key]:
                response = Response.model_validate(row)
                best[response.prompt_id, response.n] = response
        if attempt == settings.resample:
            break
        faulty = {key: found for key in best if (found := faults(best, key) & set(settings.resample_for))}
        again.update(fault for found in faulty.values() for fault in found)
        pending = [
            Draw(prompt.id, ids[prompt.id], n, attempt + 1)
            for prompt in prompts
            for n in range(responses_a_prompt)
            if (prompt.id, n) in faulty
        ]
        if not pending:
            break
    rows = [best[prompt.id, n] for prompt in prompts for n in range(responses_a_prompt)]
    return Responses(rows, dict(sorted(again.items())), checked)


def faults(responses: Mapping[tuple[str, int], Response], key: tuple[str, int]) -> set[str]:
    """The flags of a response, and 'identical' where an earlier response to the same prompt has the same text."""
    own = responses[key]
    prompt_id, n = key
    same = any(responses[prompt_id, earlier].text == own.text for earlier in range(n))
    return {*own.flags, "identical"} if same else set(own.flags)


def is_finished(response: Response) -> bool:
    """Neither cut off nor empty."""
    return not {"cut-off", "empty"} & set(response.flags)


def is_degenerate(response: Response) -> bool:
    """Loops, or copies the context."""
    return bool({"looping", "copying"} & set(response.flags))


def flags(text: str, finish: str, context: str) -> tuple[str, ...]:
    """What is wrong with a response: cut-off, empty, looping, copying."""
    found = []
    if finish != "stop":
        found.append("cut-off")
    if not text.strip():
        found.append("empty")
    if repeated_share(text) > LOOP_SHARE:
        found.append("looping")
    if longest_copy(text, context, COPY_WORDS):
        found.append("copying")
    return tuple(found)


def repeated_share(text: str, n: int = 4) -> float:
    """Share of word n-grams that occurred before in the text."""
    words = text.lower().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def longest_copy(text: str, context: str, words: int) -> bool:
    """Whether the text takes over a run of this many words from the context."""
    ours, theirs = text.lower().split(), context.lower().split()
    known = {tuple(theirs[i : i + words]) for i in range(len(theirs) - words + 1)}
    return any(tuple(ours[i : i + words]) in known for i in range(len(ours) - words + 1))


def count_flags(responses: Iterable[Response]) -> dict[str, int]:
    """How often each flag occurs."""
    return dict(sorted(Counter(flag for response in responses for flag in response.flags).items()))


def _response(item: Drawn, renderer: Renderer, context: str, lineage_hash: str) -> Response:
    text = item.text.strip() if item.tokens is None else renderer.decode(item.tokens)
    said = text if item.tokens is None else " ".join(map(str, item.tokens))
    return Response(
        id=content_id("response", item.draw.prompt_id, item.draw.n, lineage_hash, said),
        prompt_id=item.draw.prompt_id,
        n=item.draw.n,
        text=text,
        finish=item.finish,
        flags=flags(text, item.finish, context),
        tokens=item.tokens,
        logprob=None if item.logprob is None else round(item.logprob, 6),
        lineage=lineage_hash,
        seed=item.seed,
    )
