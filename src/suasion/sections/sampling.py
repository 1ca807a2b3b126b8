"""Sections of the recipe: how responses are drawn, and by which engine."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from suasion.sections.base import Section, require_addresses


class LocalEngine(Section):
    """Decoding in this process, with transformers."""

    kind: Literal["local"] = Field("local", description="In this process.")


class ContinuousEngine(Section):
    """As local, but a place that a finished response leaves is taken by the next one. See docs/scale.md."""

    kind: Literal["continuous"] = Field(
        description="In this process, by the library's continuous batching; on GPUs only. batch_size: places."
    )


class EndpointEngine(Section):
    """Servers that speak the OpenAI completions protocol and hold the run's models. See docs/scale.md."""

    kind: Literal["endpoint"] = Field(description="Through servers.")
    server: Literal["vllm", "sglang", "llama.cpp", "transformers", "openai"] = Field(
        description="What answers there; it decides which fields a request may carry. 'openai': the bare protocol."
    )
    urls: tuple[str, ...] = Field(
        min_length=1,
        description="Base addresses, e.g. http://127.0.0.1:8000/v1. Several serve the same models and share the work.",
    )
    models: dict[str, str] = Field(
        {}, description="Model of the run (base, sft, an arm) -> its name on the servers. Models not listed go by their own name."
    )
    key_env: str | None = Field(
        None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="Environment variable that holds the key; never the key itself."
    )
    concurrency: int = Field(32, ge=1, description="Requests under way at once, for each address.")
    timeout: float = Field(300.0, gt=0, description="Seconds after which one request counts as lost.")
    retries: int = Field(6, ge=0, description="How often a response is asked for again after a fault, before the stage stops.")
    parity_prompts: int = Field(
        4, ge=0, description="Prompts on which a server is compared with the local model before the first response; 0 is off."
    )
    parity_tolerance: float = Field(
        0.1,
        gt=0,
        description="Nats a token by which server and local model may differ there; bf16 against fp32 differs by about .02.",
    )

    TRANSPORT: ClassVar[tuple[str, ...]] = (
        "urls", "key_env", "concurrency", "timeout", "retries", "parity_prompts", "parity_tolerance",
    )  # fmt: skip

    @model_validator(mode="after")
    def _addresses(self) -> EndpointEngine:
        require_addresses(self.urls, "urls")
        return self


Fault = Literal["cut-off", "empty", "looping", "copying", "identical"]


class SampleSection(Section):
    """Two responses a prompt from the SFT model; evaluation uses the same settings."""

    engine: Annotated[LocalEngine | ContinuousEngine | EndpointEngine, Field(discriminator="kind")] = Field(
        LocalEngine(),
        description="What decodes: 'kind: local' (this process), 'kind: continuous' (this process, free places taken again) or 'kind: endpoint' (servers).",
    )
    temperature: float = Field(0.7, ge=0, description="0 is greedy.")
    top_p: float = Field(0.9, gt=0, le=1, description="Smallest set of tokens with this share of the probability.")
    top_k: int = Field(0, ge=0, description="Only the k most likely tokens; 0 is off.")
    min_p: float = Field(0.0, ge=0, lt=1, description="Only tokens at least this likely relative to the likeliest; 0 is off.")
    repetition_penalty: float = Field(1.0, ge=1, description="Divides the logits of tokens already in the response; 1 is off.")
    max_new_tokens: int = Field(256, ge=1, description="Longest response. It must not be the usual way a response ends.")
    batch_size: int = Field(32, ge=1, description="local: responses decoded together; halved where memory does not suffice.")
    resample: int = Field(2, ge=0, description="How often a faulty response is drawn again before it is kept and flagged.")
    resample_for: tuple[Fault, ...] = Field(
        ("cut-off", "empty"),
        description="Which faults are drawn again; identical: the second response of a pair that repeats the first.",
    )
    unfinished: Literal["drop", "keep"] = Field(
        "drop", description="Whether pairs with a response that is still cut off or empty are dropped or kept."
    )
    degenerate: Literal["drop", "keep"] = Field(
        "keep", description="Whether pairs with a response that still loops or copies the context are dropped or kept, flagged."
    )

    @model_validator(mode="after")
    def _engine_can(self) -> SampleSection:
        if isinstance(self.engine, EndpointEngine):
            if self.repetition_penalty != 1:
                raise ValueError(
                    "repetition_penalty: servers apply it to the prompt too, which is another thing; only engine local has it"
                )
            if self.engine.server == "openai" and (self.top_k or self.min_p):
                raise ValueError(
                    "top_k and min_p: the bare openai protocol has neither; name the server (vllm, sglang, llama.cpp)"
                )
        return self
