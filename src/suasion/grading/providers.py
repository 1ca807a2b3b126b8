"""The servers that LLM graders talk to: anything that speaks OpenAI's chat completions, and Anthropic's own interface.

A provider turns messages into a request body, sends it once, and reads the answer; when to try again, what it may cost and what is
remembered is the runner's business (runner.py). Faults are sorted by what they mean: `Fault` may pass by itself, `Declined` concerns
one request only, `Refused` concerns all of them. No key is part of a body, a message or a file; where a server echoes one, it is
blotted out.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

from suasion.errors import UserError
from suasion.grading.ledger import Answer
from suasion.records import canonical_json
from suasion.sections.grading import LlmGrader
from suasion.servers import CONNECT_SECONDS, OVERLOADED, retry_after
from suasion.servers import Fault as ServerFault

Message = dict[str, str]  # {role: user | assistant, content}; the system text is passed apart

OPENAI_ADDRESS = "https://api.openai.com/v1"
ANTHROPIC_ADDRESS = "https://api.anthropic.com"
DECLINED = (400, 413, 422)  # this request is not taken; another may be
REFUSED = (401, 403, 404, 405)
TOP_TOKENS = 20
SHOWN = 300
BATCHED = "/v1/chat/completions"
BATCH_SECONDS = 600.0  # a batch is many megabytes both ways
TERMS = {
    OPENAI_ADDRESS: "https://openai.com/policies/service-terms/",
    ANTHROPIC_ADDRESS: "https://www.anthropic.com/legal/commercial-terms",
    "https://generativelanguage.googleapis.com": "https://ai.google.dev/gemini-api/terms",
    "https://api.mistral.ai": "https://mistral.ai/terms",
    "https://api.deepseek.com": "https://cdn.deepseek.com/policies/en-US/deepseek-open-platform-terms-of-service.html",
    "https://api.together.xyz": "https://www.together.ai/terms-of-service",
    "https://api.groq.com": "https://groq.com/terms-of-use",
    "https://openrouter.ai": "https://openrouter.ai/terms",
}


class Fault(ServerFault):
    """One request came to nothing; another try may help. charged: it may be on the bill all the same. unreachable: nobody got it."""

    def __init__(self, what: str, charged: bool = False, wait: float = 0.0, server: bool = False, unreachable: bool = False):
        super().__init__(what, server, wait)
        self.charged, self.unreachable = charged, unreachable


class Declined(Exception):
    """The server will not answer this request, however often it is asked."""


Came = Answer | Fault | Declined  # what becomes of one request


class Refused(Exception):
    """The server will answer none of these requests: key, address or model are wrong. where: which server, told by who asked it."""

    def __init__(self, what: str, status: int = 0):
        super().__init__(what)
        self.status, self.where = status, ""


class Provider(Protocol):
    """One kind of server, at one address."""

    address: str

    def body(self, system: str, messages: Sequence[Message], schema: dict[str, Any]) -> dict[str, Any]:
        """The whole request as JSON."""
        ...

    async def send(self, body: dict[str, Any]) -> Answer:
        """One try. Raises Fault, Declined or Refused."""
        ...

    async def submit(self, bodies: Mapping[str, dict[str, Any]]) -> str:
        """Send a batch of requests, by key (64 hex digits); returns its id. Raises Fault, Declined or Refused."""
        ...

    async def collect(self, batch: str) -> dict[str, Came] | None:
        """What became of each request of a batch: an answer, a Fault or Declined; None while it is under way.

        Raises Fault or Refused, and UserError for a batch that failed as a whole.
        """
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


def make_providers(spec: LlmGrader) -> list[Provider]:
    """The servers of a grader, one an address. Raises UserError where a key or a package is missing."""
    kind = AnthropicProvider if spec.provider == "anthropic" else OpenAiProvider
    return [kind(spec, address) for address in addresses_of(spec)]


def addresses_of(spec: LlmGrader) -> list[str]:
    """Where a grader's requests go."""
    own = ANTHROPIC_ADDRESS if spec.provider == "anthropic" else OPENAI_ADDRESS
    return [address.rstrip("/") for address in spec.addresses] or [own]


def terms_lines(spec: LlmGrader) -> list[str]:
    """What to read before labelling with a hosted model; nothing for a model in this process or on this machine's network."""
    return [] if spec.provider == "local" else [line for address in addresses_of(spec) if (line := _terms(address))]


def _terms(address: str) -> str:
    for known, link in TERMS.items():
        if address.startswith(known):
            return (
                f"{address} is a provider with terms of its own; some forbid training generative models on their output: {link}"
            )
    host = address.split("//", 1)[-1].split("/", 1)[0].rsplit(":", 1)[0]
    if host in ("localhost", "[::1]") or host.startswith(("127.", "10.", "192.168.")) or host.endswith((".local", ".internal")):
        return ""
    return f"{address}: read its terms first; some providers forbid training generative models on their output (docs/grading.md)."


def read_key(spec: LlmGrader) -> str:
    """The key from the environment, '' for a server that wants none. Raises UserError where the named variable is not set."""
    name = spec.key_env
    if name is None:
        if spec.addresses:
            return ""
        name = "ANTHROPIC_API_KEY" if spec.provider == "anthropic" else "OPENAI_API_KEY"
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(
            f"the grader needs the key of {addresses_of(spec)[0]} in {name}, which is not set. Export it and run again."
        )
    return key


class OpenAiProvider:
    """Chat completions, as OpenAI, vLLM, SGLang, Ollama, llama.cpp and `transformers serve` speak them."""

    def __init__(self, spec: LlmGrader, address: str):
        self.spec, self.address, self._key = spec, address, read_key(spec)
        self._client: Any = None

    def body(self, system: str, messages: Sequence[Message], schema: dict[str, Any]) -> dict[str, Any]:
        """OpenAI itself takes the limit as max_completion_tokens; other servers know the older name only."""
        spec = self.spec
        body: dict[str, Any] = {
            "model": spec.model,
            "messages": [{"role": "system", "content": system}, *messages],
            "max_completion_tokens" if self.address == OPENAI_ADDRESS else "max_tokens": spec.max_tokens,
        }
        if spec.temperature is not None:
            body["temperature"] = spec.temperature
        if spec.structured == "json_schema":
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": schema},
            }
        elif spec.structured == "json_object":
            body["response_format"] = {"type": "json_object"}
        if spec.probability == "tokens":
            body |= {"logprobs": True, "top_logprobs": TOP_TOKENS}
        return body

    async def send(self, body: dict[str, Any]) -> Answer:
        """One try with the `openai` SDK, whose own retries are off: the runner keeps the bill."""
        async with self._asking(self.spec.timeout) as client:
            raw = await client.chat.completions.with_raw_response.create(**body)
            text = raw.http_response.text
        return self._read(text)

    async def submit(self, bodies: Mapping[str, dict[str, Any]]) -> str:
        """A file of requests, and the batch that works on it."""
        rows = [{"custom_id": key, "method": "POST", "url": BATCHED, "body": body} for key, body in bodies.items()]
        content = "".join(f"{canonical_json(row)}\n" for row in rows).encode()
        async with self._asking(BATCH_SECONDS) as client:
            file = await client.files.create(file=("requests.jsonl", content), purpose="batch")
        async with self._asking(BATCH_SECONDS) as client:
            batch = await client.batches.create(input_file_id=file.id, endpoint=BATCHED, completion_window="24h")
        return str(batch.id)

    async def collect(self, batch: str) -> dict[str, Came] | None:
        """Answers stand in one file, errors in another; a batch that expired has both."""
        async with self._asking(BATCH_SECONDS) as client:
            state = await client.batches.retrieve(batch)
            if state.status == "failed":
                said = "; ".join(str(error.message) for error in (state.errors.data if state.errors else None) or ())
                raise UserError(f"{self.address} did not take batch {batch}: {self._blot(said) or 'it does not say why'}")
            if state.status not in ("completed", "expired", "cancelled"):
                return None
            files = [name for name in (state.output_file_id, state.error_file_id) if name]
            lines = [line for name in files for line in (await client.files.content(name)).text.splitlines() if line.strip()]
        found: dict[str, Came] = {}
        for line in lines:
            row = parsed(line, self._blot)
            answer = row.get("response") or {}
            status, said = answer.get("status_code"), self._blot(json.dumps(answer.get("body") or row.get("error"))[:SHOWN])
            if status == 200:
                found[row["custom_id"]] = read_or_fault(self._read, answer["body"])
            else:
                found[row["custom_id"]] = Declined(said) if status in (*DECLINED, *REFUSED) else Fault(said)
        return found

    @asynccontextmanager
    async def _asking(self, seconds: float) -> AsyncIterator[Any]:
        import openai

        if self._client is None:
            self._client = openai.AsyncOpenAI(
                api_key=self._key or "none", base_url=self.address, max_retries=0, timeout=limits(self.spec)
            )
        async with faults_of(openai, seconds, self._blot):
            yield self._client

    def _read(self, text: str) -> Answer:
        data = parsed(text, self._blot)
        choices = data.get("choices") if isinstance(data, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
        message = choice.get("message") if choice else None
        if choice is None or not isinstance(message, dict):
            raise Fault(f"an answer without a message: {self._blot(text[:SHOWN])!r}", charged=True)
        finish = {"stop": "stop", "length": "length", "content_filter": "refusal"}.get(str(choice.get("finish_reason")), "other")
        refusal = message.get("refusal")
        if isinstance(refusal, str) and refusal:
            finish = "refusal"
        content = message.get("content")
        tokens, alternatives = _alternatives(choice.get("logprobs"))
        usage = data.get("usage")
        return Answer(
            content if isinstance(content, str) else str(refusal or ""),
            finish,
            _count(usage, "prompt_tokens"),
            _count(usage, "completion_tokens"),
            alternatives=alternatives,
            tokens=tokens,
        )

    def _blot(self, text: str) -> str:
        return text.replace(self._key, "(the key)") if self._key else text

    async def close(self) -> None:
        """Close the SDK's connections."""
        if self._client is not None:
            await self._client.close()
            self._client = None


@asynccontextmanager
async def faults_of(sdk: Any, seconds: float, blot: Callable[[str], str]) -> AsyncIterator[None]:
    """One request within its time; what an SDK raises becomes a fault. Both SDKs name their errors alike. Raises Fault and UserError."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise Fault(f"no answer within {seconds:g} s", charged=True, server=True) from error
    except sdk.APIStatusError as error:
        raise status_error(error.status_code, error.response.text, error.response.headers, blot) from error
    except sdk.APIConnectionError as error:  # and its child, APITimeoutError
        sent = was_sent(error)
        timed_out = sent and isinstance(error, sdk.APITimeoutError)
        what = (
            f"no answer within {seconds:g} s" if timed_out else f"the connection failed ({blot(str(error.__cause__ or error))})"
        )
        raise Fault(what, charged=sent, server=True, unreachable=not sent) from error


def limits(spec: LlmGrader) -> Any:
    """A request's time-outs, for the SDKs: a machine that is gone is noticed before its answer would be late."""
    import httpx2

    return httpx2.Timeout(spec.timeout, connect=min(CONNECT_SECONDS, spec.timeout))


def parsed(text: str, blot: Callable[[str], str]) -> Any:
    """The JSON of an answer that was paid for. Raises Fault."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise Fault(f"an answer that is not JSON: {blot(text[:SHOWN])!r}", charged=True) from error


def read_or_fault(read: Callable[[str], Answer], body: Any) -> Answer | Fault:
    """One answer out of a batch; a faulty one is told apart from the others, not raised."""
    try:
        return read(json.dumps(body))
    except Fault as error:
        return error


class AnthropicProvider:
    """Anthropic's messages; the answer's schema is enforced through output_config."""

    def __init__(self, spec: LlmGrader, address: str):
        try:
            import anthropic
        except ImportError as error:
            raise UserError("provider anthropic needs its package: pip install 'suasion[anthropic]'") from error
        self._sdk = anthropic
        self.spec, self.address, self._key = spec, address, read_key(spec)
        self._client: Any = None

    def body(self, system: str, messages: Sequence[Message], schema: dict[str, Any]) -> dict[str, Any]:
        """The whole request. The interface takes no temperature any more."""
        spec = self.spec
        body: dict[str, Any] = {"model": spec.model, "system": system, "messages": list(messages), "max_tokens": spec.max_tokens}
        if spec.structured == "json_schema":
            body["output_config"] = {"format": {"type": "json_schema", "schema": schema}}
        return body

    async def send(self, body: dict[str, Any]) -> Answer:
        """One try with the `anthropic` SDK, whose own retries are off."""
        async with self._asking(self.spec.timeout) as client:
            raw = await client.messages.with_raw_response.create(**body)
            text = await raw.text()
        return self._read(text)

    async def submit(self, bodies: Mapping[str, dict[str, Any]]) -> str:
        """A message batch."""
        async with self._asking(BATCH_SECONDS) as client:
            batch = await client.messages.batches.create(
                requests=[{"custom_id": key, "params": body} for key, body in bodies.items()]
            )
        return str(batch.id)

    async def collect(self, batch: str) -> dict[str, Came] | None:
        """Every request of an ended batch has succeeded, or it was in error, cancelled or out of time, and costs nothing."""
        found: dict[str, Came] = {}
        async with self._asking(BATCH_SECONDS) as client:
            if (await client.messages.batches.retrieve(batch)).processing_status != "ended":
                return None
            async for row in await client.messages.batches.results(batch):
                if row.result.type == "succeeded":
                    found[row.custom_id] = read_or_fault(self._read, row.result.message.to_dict(mode="json"))
                elif row.result.type == "errored":
                    said = row.result.error.error
                    kind = Declined if said.type == "invalid_request_error" else Fault
                    found[row.custom_id] = kind(self._blot(f"{said.type}: {said.message}"[:SHOWN]))
                else:
                    found[row.custom_id] = Fault(str(row.result.type))
        return found

    @asynccontextmanager
    async def _asking(self, seconds: float) -> AsyncIterator[Any]:
        if self._client is None:
            self._client = self._sdk.AsyncAnthropic(
                api_key=self._key or "none", base_url=self.address, max_retries=0, timeout=limits(self.spec)
            )
        async with faults_of(self._sdk, seconds, self._blot):
            yield self._client

    def _read(self, text: str) -> Answer:
        data = parsed(text, self._blot)
        content = data.get("content") if isinstance(data, dict) else None
        if not isinstance(content, list):
            raise Fault(f"an answer without content: {self._blot(text[:SHOWN])!r}", charged=True)
        said = [str(block.get("text", "")) for block in content if isinstance(block, dict) and block.get("type") == "text"]
        stop = str(data.get("stop_reason"))
        finish = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length"}.get(stop, stop)
        usage = data.get("usage")
        return Answer(
            "\n".join(said),
            finish if finish in ("stop", "length", "refusal") else "other",
            _count(usage, "input_tokens"),
            _count(usage, "output_tokens"),
        )

    def _blot(self, text: str) -> str:
        return text.replace(self._key, "(the key)") if self._key else text

    async def close(self) -> None:
        """Close the SDK's connections."""
        if self._client is not None:
            await self._client.close()
            self._client = None


def status_error(status: int, text: str, headers: Any, blot: Any) -> Exception:
    """What an HTTP status means for a request."""
    said = f"status {status}: {blot(text[:SHOWN]).strip() or '(empty)'}"
    if status in REFUSED:
        return Refused(said, status)
    if status in DECLINED:
        return Declined(said)
    return Fault(said, wait=retry_after(headers.get("retry-after"), time.time()), server=status in OVERLOADED)


def was_sent(error: Exception) -> bool:
    """Whether the server may have got a request that ended in a connection error: not if there never was a connection."""
    import httpx2

    return not isinstance(error.__cause__, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout)


def _count(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _alternatives(logprobs: Any) -> tuple[tuple[str, ...], tuple[tuple[tuple[str, float], ...], ...]]:
    """(tokens, likeliest tokens at each place) of OpenAI's logprobs; empty where they are missing or malformed."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    tokens: list[str] = []
    places: list[tuple[tuple[str, float], ...]] = []
    for entry in content if isinstance(content, list) else ():
        if not isinstance(entry, dict) or not isinstance(entry.get("token"), str):
            return (), ()
        listed = entry.get("top_logprobs")
        tokens.append(entry["token"])
        places.append(
            tuple(
                (other["token"], float(other["logprob"]))
                for other in (listed if isinstance(listed, list) else ())
                if isinstance(other, dict)
                and isinstance(other.get("token"), str)
                and isinstance(other.get("logprob"), int | float)
                and math.isfinite(other["logprob"])
            )
        )
    return tuple(tokens), tuple(places)
