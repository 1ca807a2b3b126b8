"""The endpoint engine: any server that speaks the OpenAI completions protocol (vLLM, SGLang, llama.cpp, `transformers serve`).

A prompt is sent as `chat.py` rendered it, never as chat messages: as token ids where the server takes them, else as text that was
seen to give the same ids. Requests run at once up to a bound for each address, each answer goes to the journal as it comes, and a fault
(refused, timed out, 429, 5xx, half a body, nonsense) is tried again with growing, jittered pauses, at another address if there is one.
Every sampling field is sent, because servers otherwise take their own from the model's generation_config.json.

What a server does not tell stays unknown: `tokens` and `logprob` are then None, and later checks that compare log-probabilities
have nothing to compare. `check` compares server and local model on a few prompts before the first response.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import httpx2

from suasion.chat import Renderer
from suasion.errors import UserError
from suasion.records import content_id
from suasion.sampling.draws import Deliver, Draw, Drawn, Ended, draw_seed, nobody
from suasion.sections.sampling import EndpointEngine, SampleSection
from suasion.seeding import generator
from suasion.servers import CONNECT_SECONDS, OVERLOADED, Address, Fault, Pool, retry_after

ANSWER_BYTES = 16_000_000  # an answer longer than this is not one
TAKES_IDS = ("vllm", "sglang", "llama.cpp")  # as a prompt; the others take text only
FINAL = (400, 401, 403, 404, 405, 413, 422)  # asking again does not help
PARITY_TOKENS = 32


class Refused(Exception):
    """A request that the server will never answer."""


class EndpointSampler:
    """Draws responses of one model from the servers of a recipe. `load` gives the same model locally, for the parity check."""

    def __init__(
        self,
        engine: EndpointEngine,
        settings: SampleSection,
        name: str,
        renderer: Renderer,
        seed: int,
        load: Callable[[], Any],
    ):
        self.engine, self.settings, self.renderer, self.seed, self.load = engine, settings, renderer, seed, load
        self.model = engine.models.get(name, name)
        self.peers = content_id("peers", *sorted(url.rstrip("/") for url in engine.urls))
        self.headers = {"Authorization": f"Bearer {key}"} if (key := read_key(engine)) else {}

    def batches(self, draws: Sequence[Draw]) -> list[list[Draw]]:
        """Every response on its own: servers batch by themselves."""
        return [[draw] for draw in draws]

    def run(self, work: Sequence[tuple[str, list[Draw]]], deliver: Deliver, ended: Ended = nobody) -> None:
        """Ask for every response. Raises UserError with the last fault where some could not be had; those that came are delivered."""
        if work:
            asyncio.run(self._run([(key, draw) for key, (draw,) in work], deliver, ended))

    async def _run(self, work: list[tuple[str, Draw]], deliver: Deliver, ended: Ended) -> None:
        addresses = [Address(url.rstrip("/")) for url in self.engine.urls]
        pool = Pool(addresses, self.engine.concurrency, generator(self.seed, "retry-jitter"))
        waiting = iter(work)
        failed: list[str] = []
        delivered = 0

        async def worker(client: httpx2.AsyncClient) -> None:
            nonlocal delivered
            for key, draw in waiting:
                before = delivered
                try:
                    drawn = await self._ask_until_answered(client, pool, draw)
                except Fault as fault:
                    failed.append(str(fault))
                    if delivered == before:  # nobody was answered while this one tried: the servers are gone
                        raise
                else:
                    deliver(key, [drawn])
                    ended(1)
                    delivered += 1

        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=self.engine.concurrency * len(addresses))
        timeout = httpx2.Timeout(self.engine.timeout, connect=min(CONNECT_SECONDS, self.engine.timeout))
        async with httpx2.AsyncClient(headers=self.headers, timeout=timeout, limits=limits) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(len(work), self.engine.concurrency * len(addresses))):
                        group.create_task(worker(client))
            except ExceptionGroup as group_of_errors:
                first = first_error(group_of_errors)
                if isinstance(first, Refused):
                    raise UserError(self._refusal(first)) from None
                if not isinstance(first, Fault):
                    raise first from None
        if failed:
            raise UserError(
                f"{len(work) - delivered} of {len(work)} responses of '{self.model}' could not be had from {', '.join(self.engine.urls)} "
                f"(each tried {self.engine.retries + 1} times; last fault: {failed[-1]}). {delivered} came and are on disk. See to the "
                "servers, then run the same command again: only what is missing is asked for."
            )

    def speak(self, draw: Draw, hear: Callable[[str], None]) -> Drawn:
        """One response; a server's answer is checked as a whole, so that its text comes at once."""
        made: list[Drawn] = []
        self.run([("", [draw])], lambda _, drawn: made.extend(drawn))
        hear(made[0].text.strip() if made[0].tokens is None else self.renderer.decode(made[0].tokens))
        return made[0]

    def _refusal(self, refusal: Refused) -> str:
        return (
            f"{refusal} Check sample.engine: server ({self.engine.server}), models ('{self.model}' must be a name that the server knows), "
            "key_env; and that the server's context is long enough. What came before is on disk."
        )

    async def _ask_until_answered(self, client: httpx2.AsyncClient, pool: Pool, draw: Draw) -> Drawn:
        failed_at = ""
        for attempt in range(self.engine.retries + 1):
            address = await pool.take(failed_at)
            fault: Fault | None = None
            try:
                return await self._ask(client, address.url, draw)
            except Fault as error:
                fault, failed_at = error, address.url
            finally:
                pool.give_back(address, fault)
            if attempt == self.engine.retries:
                raise Fault(f"{address.url}: {fault}")
            if not fault.server:
                await asyncio.sleep(max(fault.wait, pool.pause(attempt + 1)))
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _ask(self, client: httpx2.AsyncClient, url: str, draw: Draw) -> Drawn:
        """One request. Raises Fault where another try may help, Refused where none will."""
        seed = draw_seed(self.seed, draw) % 2**31  # llama.cpp takes 32 bits, vLLM a signed number
        body = request_body(self.engine.server, self.model, draw.prompt, self.settings, seed, self.renderer)
        try:
            async with asyncio.timeout(self.engine.timeout), client.stream("POST", f"{url}/completions", json=body) as reply:
                raw = bytearray()
                async for part in reply.aiter_bytes():
                    raw += part
                    if len(raw) > ANSWER_BYTES:
                        raise Fault(f"an answer of more than {ANSWER_BYTES / 1e6:.0f} MB")
        except TimeoutError as error:
            raise Fault(f"no answer within {self.engine.timeout:g} s", server=True) from error
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise Fault(f"no connection ({error})", server=True) from error
        except httpx2.HTTPError as error:
            raise Fault(f"the connection broke off ({type(error).__name__}: {error})", server=True) from error
        if reply.status_code != 200:
            said = f"status {reply.status_code}: {self._shown(raw)}"
            if reply.status_code in FINAL:
                raise Refused(f"{url} refuses a request ({said}).")
            wait = retry_after(reply.headers.get("retry-after"), time.time())
            raise Fault(said, server=reply.status_code in OVERLOADED, wait=wait)
        try:
            answer = json.loads(raw)
        except ValueError as error:
            raise Fault(f"an answer that is not JSON: {self._shown(raw)!r}") from error
        return read_answer(answer, draw, seed, self.settings.max_new_tokens, self.renderer, self.engine.server)

    def _shown(self, raw: bytes | bytearray) -> str:
        text = raw[:300].decode("utf-8", "replace").strip() or "(empty)"
        for value in self.headers.values():
            text = text.replace(value.removeprefix("Bearer "), "(the key)")
        return text

    def check(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """Compare servers and local model on the first prompts, each address on each; facts of the comparison.

        The servers answer greedily. Where they tell tokens and log-probabilities, these are compared with the local model's; else
        the answer is tokenised again and the local model says how much less likely each token is than its own first choice: zero for
        the same model, but for rounding. Raises UserError where the mean over all tokens exceeds parity_tolerance.
        """
        chosen = list({draw.prompt_id: draw for draw in draws}.values())[: self.engine.parity_prompts]
        if not chosen:
            return {}
        greedy = self.settings.model_copy(
            update={"temperature": 0.0, "max_new_tokens": min(PARITY_TOKENS, self.settings.max_new_tokens)}
        )
        found: dict[str, list[Drawn]] = {}
        for url in self.engine.urls:
            engine = self.engine.model_copy(update={"urls": (url,)})
            one = EndpointSampler(engine, greedy, self.model, self.renderer, self.seed, self.load)
            one.model = self.model
            answers: list[Drawn] = []
            one.run([(draw.prompt_id, [draw]) for draw in chosen], lambda _, drawn, answers=answers: answers.extend(drawn))  # type: ignore[misc]
            found[url] = answers
        model = self.load()
        gaps: dict[str, float] = {}
        how = ""
        for url, answers in found.items():
            how, gaps[url] = parity(model, answers, self.renderer)
        worst = max(gaps, key=lambda url: gaps[url])
        if gaps[worst] > self.engine.parity_tolerance:
            raise UserError(
                f"{worst} does not speak as the local model does: '{self.model}' there differs by {gaps[worst]:.3f} nats a token ({how}, "
                f"{len(chosen)} prompts; sample.engine.parity_tolerance is {self.engine.parity_tolerance:g}). It probably serves other weights "
                "or a quantised copy; check which model and adapter it loaded."
            )
        return {"compared": how, "prompts": len(chosen), "nats_a_token": round(gaps[worst], 4)}


def first_error(group: ExceptionGroup[Exception]) -> Exception:
    """The first error in a group that is more than a fault (one that stops everything), else the first."""
    flat: list[Exception] = []
    for error in group.exceptions:
        flat.append(first_error(error) if isinstance(error, ExceptionGroup) else error)
    return next((error for error in flat if not isinstance(error, Fault)), flat[0])


def read_key(engine: EndpointEngine) -> str:
    """The key from the environment, '' where the recipe names none. Raises UserError where the variable is not set."""
    if engine.key_env is None:
        return ""
    key = os.environ.get(engine.key_env, "").strip()
    if not key:
        raise UserError(f"sample.engine.key_env names {engine.key_env}, but this variable is not set. Export it and run again.")
    return key


def request_body(
    server: str, model: str, prompt: tuple[int, ...], settings: SampleSection, seed: int, renderer: Renderer
) -> dict[str, Any]:
    """The request for one response, in the dialect of one kind of server. Raises UserError where text would lose the prompt's ids."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt) if server in TAKES_IDS else text_of(prompt, renderer),
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p if settings.temperature else 1.0,
        "seed": seed,
    }
    stop = renderer.stop_id
    if server == "transformers":  # refuses fields it does not know, and takes all of them in this one
        config: dict[str, Any] = {
            "do_sample": settings.temperature > 0,
            "max_new_tokens": settings.max_new_tokens,
            "eos_token_id": stop,
            "pad_token_id": renderer.tokenizer.pad_token_id,
        }
        if settings.temperature > 0:
            config |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
            config |= {"min_p": settings.min_p} if settings.min_p else {}
        return {"model": model, "prompt": body["prompt"], "seed": seed, "generation_config": json.dumps(config)}
    if server == "openai":
        return body | {"stop": [str(renderer.tokenizer.convert_ids_to_tokens(stop))]}
    body["min_p"] = settings.min_p
    if server == "llama.cpp":
        # By default it truncates before it applies the temperature; the others, and the local engine, after.
        order = ["top_k", "temperature", "top_p", "min_p"]
        return body | {"top_k": settings.top_k, "samplers": order, "repeat_penalty": 1.0, "logprobs": 1}
    body |= {"top_k": settings.top_k or -1, "repetition_penalty": 1.0, "stop_token_ids": [stop]}
    if server == "vllm":
        body |= {"return_token_ids": True, "logprobs": 0}
    return body


def text_of(prompt: Sequence[int], renderer: Renderer) -> str:
    """A prompt's ids as text that the tokenizer reads back as the same ids, special tokens of its own included."""
    tokenizer = renderer.tokenizer
    text = str(tokenizer.decode(prompt, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if tuple(tokenizer(text)["input_ids"]) != tuple(prompt):
        raise UserError(
            "this server takes prompts as text only, and the model's tokenizer reads the rendered text as other tokens (often a second "
            f"'bos'). Serve the model with one that takes token ids ({', '.join(TAKES_IDS)})."
        )
    return text


def read_answer(answer: Any, draw: Draw, seed: int, longest: int, renderer: Renderer, server: str = "openai") -> Drawn:
    """A server's answer as a drawn response. Raises Fault where it is none.

    Tokens count as known if the server lists ids that fit the finish reason; their log-probability if there is one number for each
    token, the stop token included, and the server gives them at temperature 1 and untruncated (vLLM and llama.cpp do).
    """
    choices = answer.get("choices") if isinstance(answer, dict) else None
    choice = choices[0] if isinstance(choices, list) and len(choices) == 1 else None
    if not isinstance(choice, dict) or not isinstance(choice.get("text"), str):
        raise Fault(f"an answer without one choice: {json.dumps(answer)[:300]}")
    if choice.get("finish_reason") not in ("stop", "length"):
        raise Fault(f"an answer that ended with {choice.get('finish_reason')!r}")
    finish: Literal["stop", "length"] = choice["finish_reason"]
    ids, logprobs = _token_ids(choice), _logprobs(choice) if server in ("vllm", "llama.cpp") else None
    if ids is not None and (len(ids) > longest or any(not 0 <= token < len(renderer.tokenizer) for token in ids)):
        raise Fault(f"an answer of {len(ids)} token ids that the model does not have or was not asked for")
    if ids is None:
        return Drawn(draw, None, finish, None, seed, choice["text"])
    stop = renderer.stop_id
    if stop in ids[:-1]:
        raise Fault("an answer that goes on after its stop token")
    if ids and ids[-1] == stop:
        finish = "stop"
    elif finish == "stop":
        if ids and ids[-1] in renderer.tokenizer.all_special_ids:  # ended by a stop token that the template does not use
            return Drawn(draw, None, finish, None, seed, choice["text"])
        ids, logprobs = [*ids, stop], None  # the server does not list its stop token, nor how likely it was
    known = logprobs is not None and len(logprobs) == len(ids)
    return Drawn(draw, tuple(ids), finish, math.fsum(logprobs) if known and logprobs is not None else None, seed)


def _token_ids(choice: dict[str, Any]) -> list[int] | None:
    """`token_ids` (vLLM), or the ids in `logprobs.content` (llama.cpp)."""
    ids = choice.get("token_ids")
    if ids is None and isinstance(choice.get("logprobs"), dict) and isinstance(choice["logprobs"].get("content"), list):
        ids = [entry.get("id") if isinstance(entry, dict) else None for entry in choice["logprobs"]["content"]]
    if not isinstance(ids, list) or not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        return None
    return ids


def _logprobs(choice: dict[str, Any]) -> list[float] | None:
    listed = choice.get("logprobs")
    if not isinstance(listed, dict):
        return None
    values = listed.get("token_logprobs")
    if values is None and isinstance(listed.get("content"), list):
        values = [entry.get("logprob") if isinstance(entry, dict) else None for entry in listed["content"]]
    if not isinstance(values, list) or not all(
        isinstance(value, int | float) and math.isfinite(value) and value <= 0.001 for value in values
    ):
        return None
    return [float(value) for value in values]


def parity(model: Any, answers: Sequence[Drawn], renderer: Renderer) -> tuple[str, float]:
    """(what was compared, mean nats a token) between greedy answers of a server and the local model's view of them."""
    import torch

    exact = all(drawn.tokens and drawn.logprob is not None for drawn in answers)
    difference, count = 0.0, 0
    for drawn in answers:
        ids = drawn.tokens
        if ids is None:
            # The last token of a cut-off text may be half a word: it is left out.
            encoded = tuple(renderer.encode(drawn.text))
            ids = (*encoded, renderer.stop_id) if drawn.finish == "stop" else encoded[:-1]
        if not ids:
            continue
        with torch.no_grad():
            tokens = torch.tensor([[*drawn.draw.prompt, *ids]], device=model.device)
            scores = model(tokens, logits_to_keep=len(ids) + 1).logits[0, :-1].float().log_softmax(-1)
        taken = scores.gather(1, tokens[0, -len(ids) :, None])[:, 0]
        if exact and drawn.logprob is not None:
            difference += abs(float(taken.double().sum()) - drawn.logprob)
        else:
            difference += float((scores.max(1).values - taken).double().sum())
        count += len(ids)
    return ("log-probabilities" if exact else "greedy texts", difference / max(count, 1))
