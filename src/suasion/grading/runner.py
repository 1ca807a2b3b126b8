"""Asks one server, or several of one model, many questions: cached, paced, repeated where it helps, and never beyond the cap.

`ask` gives an answer, or the reason why there is none, for every request, in order. What is answered is stored at once (ledger.py),
so that a run that is killed and started again asks only for what it has not got; at most the requests in flight are paid twice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from suasion.errors import UserError
from suasion.grading.batches import ask_in_batches
from suasion.grading.ledger import Answer, Ledger, Missing, request_key
from suasion.grading.pace import Pace
from suasion.grading.providers import Declined, Fault, Provider, Refused
from suasion.progress import LOG_EVERY_SECONDS, console, progress
from suasion.records import canonical_json
from suasion.sections.grading import LlmGrader
from suasion.seeding import generator
from suasion.servers import Address, Pool

BYTES_A_TOKEN = 4.0  # English text; the bill is bounded with one byte a token instead, which no tokenizer exceeds
TEMPLATE_TOKENS = 64  # what a server's chat template adds to the messages, at most
EXPECTED_SHARE = 0.5  # of max_tokens, for the estimate
DECLINED_AT_FIRST = 3  # requests declined before any was answered: the settings are wrong, not the requests


@dataclass(frozen=True)
class Estimate:
    """What is left to ask for: requests, tokens both ways, US dollars (None without prices) and the most that they can come to."""

    requests: int
    cached: int
    tokens_in: float
    tokens_out: float
    cost: float | None
    worst: float | None


class Runner:
    """One grader's way to its servers. providers: one an address; all serve the same model."""

    def __init__(self, providers: Sequence[Provider], spec: LlmGrader, ledger: Ledger, seed: int):
        self.providers = {provider.address: provider for provider in providers}
        self.provider = providers[0]
        self.spec, self.ledger, self.seed = spec, ledger, seed
        self._pool = self._new_pool()
        self._requests, self._tokens = Pace(spec.requests_per_minute), Pace(spec.tokens_per_minute)
        self._in_flight = 0
        self._settled = asyncio.Event()
        self._stopped: Exception | None = None
        self._answered = self._declined = 0

    @property
    def where(self) -> str:
        """The addresses, for messages."""
        return ", ".join(self.providers)

    def keys(self, body: dict[str, Any]) -> tuple[str, ...]:
        """What a request goes by: one key for each server that may answer it."""
        return tuple(request_key(address, body) for address in self.providers)

    def _new_pool(self) -> Pool:
        return Pool([Address(url) for url in self.providers], self.spec.concurrency, generator(self.seed, "retry-jitter"))

    def estimate(self, bodies: Sequence[dict[str, Any]]) -> Estimate:
        """What asking these would take, before any of them is asked."""
        keys = {self.keys(body): body for body in bodies}
        left = [body for key, body in keys.items() if self.ledger.answer(*key) is None]
        tokens_in = sum(size(body) / BYTES_A_TOKEN for body in left)
        tokens_out = EXPECTED_SHARE * self.spec.max_tokens * len(left)
        priced = self.spec.price_in is not None and self.spec.price_out is not None
        return Estimate(
            len(left),
            len(keys) - len(left),
            tokens_in,
            tokens_out,
            self.price(tokens_in, tokens_out) if priced else None,
            sum(self.worst(body) for body in left) if priced else None,
        )

    def announce(self, bodies: Sequence[dict[str, Any]]) -> None:
        """Print the estimate, and whether the cap will let it through."""
        known = self.estimate(bodies)
        if not known.requests:
            return
        line = f"  {known.requests} requests to {self.spec.model} at {self.where}"
        line += f" ({known.cached} more are answered already)" if known.cached else ""
        line += f": about {known.tokens_in:,.0f} tokens in and {known.tokens_out:,.0f} out"
        if known.cost is not None and known.worst is not None:
            line += f", about ${known.cost:.2f}, at most ${known.worst:.2f} if none has to be asked again"
        cap = self.spec.max_cost
        if cap is not None:
            spent = self.ledger.spent()
            line += f"; the cap is ${cap:.2f}, ${spent:.2f} of it spent"
            if known.cost is not None and spent + known.cost > cap:
                line += ": it will stop this before the end"
        console.print(line, markup=False, soft_wrap=True)

    def ask(self, bodies: Sequence[dict[str, Any]], what: str) -> list[Answer | Missing]:
        """An answer or the reason why there is none for each body, in order; equal bodies are asked once.

        Raises UserError where the cap would be exceeded, where a server refuses all requests, or where none can be reached any more.
        What came before is stored.
        """
        keys = [self.keys(body) for body in bodies]
        found: dict[str, Answer | Missing] = {}
        waiting: dict[str, dict[str, Any]] = {}
        for (key, *others), body in zip(keys, bodies, strict=True):
            if key in found or key in waiting:
                continue
            stored = self.ledger.answer(key, *others)
            if stored is None:
                waiting[key] = body
            else:
                found[key] = stored
        if waiting:
            asyncio.run((ask_in_batches if self.spec.batch else Runner._ask_all)(self, waiting, found, what))
        return [found[key] for key, *_ in keys]

    async def _ask_all(self, waiting: dict[str, dict[str, Any]], found: dict[str, Answer | Missing], what: str) -> None:
        self._stopped, self._settled, self._pool = None, asyncio.Event(), self._new_pool()
        work = iter(waiting.items())
        last = time.monotonic()

        async def worker() -> None:
            nonlocal last
            for key, body in work:
                if self._stopped is not None:
                    return
                try:
                    found[key] = await self._ask_until_answered(body)
                except (UserError, Refused) as error:
                    self._stopped = self._stopped or error  # what others have in flight is paid for: let it arrive
                    return
                advance(1)
                if self.spec.price_out is not None and time.monotonic() - last >= LOG_EVERY_SECONDS:
                    last = time.monotonic()
                    console.print(f"  spent so far: ${self.ledger.spent():.4f}", markup=False)

        try:
            with progress(what, len(waiting), "requests") as advance:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.spec.concurrency * len(self.providers), len(waiting))):
                        group.create_task(worker())
        finally:
            for provider in self.providers.values():
                await provider.close()
        if isinstance(self._stopped, Refused):
            raise UserError(
                f"{self._stopped.where} refuses requests to '{self.spec.model}' ({self._stopped}). Check the grader's base_url, model and "
                "key_env. What was answered before is kept."
            ) from None
        if self._stopped is not None:
            raise self._stopped

    async def _ask_until_answered(self, body: dict[str, Any]) -> Answer | Missing:
        """One request, tried again after a fault, at another server if there is one.

        Raises UserError where the last try found nobody and nobody else was answered meanwhile: the servers are gone, which says
        nothing of what was to be judged.
        """
        before, failed_at = self._answered, ""
        fault: Fault | None = None
        for attempt in range(self.spec.retries + 1):
            await self._requests.take(1)
            entry = await self._tokens.take(size(body) / BYTES_A_TOKEN + EXPECTED_SHARE * self.spec.max_tokens)
            server = await self._pool.take(failed_at)
            fault = None
            try:
                answer = await self._try(self.providers[server.url], body)
            except Fault as error:
                fault, failed_at = error, server.url
            except Declined as error:
                self._declined += 1
                if not self._answered and self._declined >= DECLINED_AT_FIRST:
                    raise self.declines_all(error) from None
                return Missing(f"declined: {error}")
            finally:
                self._pool.give_back(server, fault)
            if fault is None:
                if answer.tokens_in is not None and answer.tokens_out is not None:
                    Pace.correct(entry, answer.tokens_in + answer.tokens_out)
                self._answered += 1
                return answer
            if attempt < self.spec.retries and not fault.server:
                await asyncio.sleep(max(fault.wait, self._pool.pause(attempt + 1)))
        assert fault is not None, "the last try returned or failed"
        if fault.unreachable and self._answered == before:
            raise UserError(
                f"{self.where} cannot be reached ({self.spec.retries + 1} tries; last: {fault}). What was answered is kept: see to "
                f"{'the servers' if len(self.providers) > 1 else 'the server'}, then run the same command again, and only the rest is asked for."
            )
        return Missing(f"no answer in {self.spec.retries + 1} tries: {fault}")

    async def _try(self, provider: Provider, body: dict[str, Any]) -> Answer:
        """Ask one server once, on the bill before the request leaves. Raises Fault, Declined, Refused, and UserError at the cap."""
        keys = self.keys(body)
        sent = await self._reserve(keys[0], body)
        self._in_flight += 1
        try:
            answer = await provider.send(body)
        except (Fault, Declined, Refused) as error:
            if not (isinstance(error, Fault) and error.charged):
                self.ledger.release(sent)
            if isinstance(error, Refused):
                error.where = provider.address
            raise
        finally:
            self._in_flight -= 1
            self._settled.set()
        answer = replace(answer, cost=self.paid(answer, body))
        self.ledger.settle(sent, keys, answer)
        return answer

    async def _reserve(self, key: str, body: dict[str, Any]) -> int:
        """Put the request on the bill; wait for others in flight where the cap leaves no room for its highest price."""
        worst, cap = self.worst(body), self.spec.max_cost
        while True:
            self._settled.clear()
            if self._stopped is not None:
                raise UserError(str(self._stopped))
            sent = self.ledger.reserve(key, worst, cap)
            if sent is not None:
                return sent
            if not self._in_flight:
                raise self.cap_reached(body)
            await self._settled.wait()

    def cap_reached(self, body: dict[str, Any]) -> UserError:
        """No request fits under the cap any more."""
        return UserError(
            f"the cap of ${self.spec.max_cost:.2f} is reached: ${self.ledger.spent():.4f} are spent, and the next request can cost "
            f"${self.worst(body):.4f}. What was answered is kept: raise the grader's max_cost and run the same command again."
        )

    def declines_all(self, error: Exception) -> UserError:
        """The settings are wrong, not the requests."""
        return UserError(
            f"{self.provider.address} declines every request ({error}). Some servers do not know response_format: set the grader's structured "
            "to none; or the model's context is too short."
        )

    def price(self, tokens_in: float, tokens_out: float) -> float:
        """US dollars of so many tokens; 0 without prices."""
        return (tokens_in * (self.spec.price_in or 0.0) + tokens_out * (self.spec.price_out or 0.0)) / 1e6

    def worst(self, body: dict[str, Any]) -> float:
        """The most that a request can cost: a token has at least one byte, and the answer at most max_tokens."""
        return self.price(size(body) + TEMPLATE_TOKENS, self.spec.max_tokens)

    def paid(self, answer: Answer, body: dict[str, Any]) -> float:
        """US dollars of an answer."""
        if answer.tokens_in is None or answer.tokens_out is None:
            return self.worst(body)  # the server does not say: assume the most
        return self.price(answer.tokens_in, answer.tokens_out)


def size(body: dict[str, Any]) -> int:
    """Bytes of a request."""
    return len(canonical_json(body).encode())
