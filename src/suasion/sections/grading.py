"""Sections of the recipe: graders, what they learn from, and the comparison that one of them judges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from suasion.sections.base import Section, require_addresses
from suasion.sections.training import ModelSection, RewardSection


class PairData(Section):
    """Outcome pairs that a grader is trained on."""

    kind: Literal["grader_pairs", "judge_pairs", "cmv", "ukp"] = Field(
        description="The run's own pairs (of the SFT pool's, or of no pool's conversations), or a corpus at `path`."
    )
    path: str | None = Field(None, description="cmv: ConvoKit folder or 'bundled'; ukp: folder of UKPConvArg1Strict's csv files.")

    @model_validator(mode="after")
    def _path_where_needed(self) -> PairData:
        if (self.kind in ("cmv", "ukp")) != (self.path is not None):
            raise ValueError(f"kind {self.kind} {'needs a path' if self.path is None else 'takes no path'}")
        return self


class ReadableGrader(Section):
    """Readable features alone; Bradley-Terry logistic regression on their difference."""

    kind: Literal["readable"] = Field(description="Readable features.")
    train: PairData = Field(description="What it learns from.")
    ridge: float = Field(30.0, gt=0, description="Strength of the L2 penalty, on standardised features.")
    interplay: Literal["content", "all"] = Field("content", description="Overlap of reply and context, as of `embedding`.")
    residualise_length: bool = Field(
        True, description="Remove from every feature what log length predicts of it, so that length itself cannot win."
    )
    tie_margin: float = Field(0.0, ge=0, lt=0.5, description="Probabilities within this distance of .5 are ties.")


class EmbeddingGrader(Section):
    """Sentence embeddings and readable features; Bradley-Terry logistic regression on their difference."""

    kind: Literal["embedding"] = Field(description="Embeddings and features.")
    train: PairData = Field(description="What it learns from.")
    ridge: float = Field(
        300.0,
        gt=0,
        description="Strength of the L2 penalty, on standardised features; about 100 for a few hundred training pairs.",
    )
    embedding_weight: float = Field(0.3, ge=0, description="Scale of the embedding block against the readable features.")
    interplay: Literal["content", "all"] = Field(
        "content",
        description="Overlap of reply and context: in content words, or in stop words and all words too (Tan et al. 2016).",
    )
    tune: bool = Field(
        False, description="Choose ridge and embedding_weight by cross-validation by group on the training pairs (16 settings)."
    )
    residualise_length: bool = Field(
        True, description="Remove from every feature what log length predicts of it, so that length itself cannot win."
    )
    tie_margin: float = Field(0.0, ge=0, lt=0.5, description="Probabilities within this distance of .5 are ties.")


class NgramGrader(Section):
    """TF-IDF of word n-grams; Bradley-Terry logistic regression on their difference."""

    kind: Literal["ngram"] = Field(description="Word n-grams.")
    train: PairData = Field(description="What it learns from.")
    ridge: float = Field(1.0, gt=0, description="Strength of the L2 penalty.")
    ngrams: tuple[int, int] = Field((1, 2), description="Shortest and longest n-gram, in words.")
    min_count: int = Field(2, ge=1, description="N-grams in fewer texts than this are ignored.")
    tie_margin: float = Field(0.0, ge=0, lt=0.5, description="Probabilities within this distance of .5 are ties.")


class RewardGrader(Section):
    """A reward model: a language model with a scalar head, trained here on outcome pairs (training/reward.py)."""

    kind: Literal["reward"] = Field(description="A reward model.")
    train: PairData = Field(description="What it learns from; pairs longer than model.max_length are left out and counted.")
    model: ModelSection = Field(ModelSection(), description="What it starts from, and how it computes.")
    training: RewardSection = Field(RewardSection(), description="How it is trained.")
    folds: int = Field(
        5, ge=2, description="Folds in which its accuracy is measured before it judges: each is one more training."
    )
    tie_margin: float = Field(0.0, ge=0, lt=0.5, description="Probabilities within this distance of .5 are ties.")


class LlmGrader(Section):
    """A language model that compares by a written rubric: behind a server, or in this process."""

    TRANSPORT: ClassVar[tuple[str, ...]] = (
        "base_url", "key_env", "timeout", "retries", "concurrency", "requests_per_minute", "tokens_per_minute", "price_in", "price_out",
        "max_cost", "batch",
    )  # fmt: skip

    kind: Literal["llm"] = Field(description="A language model that is asked.")
    provider: Literal["openai", "anthropic", "local"] = Field(
        "openai",
        description="openai: chat completions as OpenAI, vLLM, SGLang, Ollama and `transformers serve` speak them; local: in this process.",
    )
    model: str = Field(
        description="Its name on the server; local: a base model as in model.base, e.g. bundled:smollm2-135m-instruct."
    )
    base_url: str | tuple[str, ...] | None = Field(
        None,
        description="Address up to and with /v1, or a list of them: servers of one model that share the work. The provider's own if not said.",
    )
    key_env: str | None = Field(
        None,
        description="Environment variable with the key. Not said: OPENAI_API_KEY or ANTHROPIC_API_KEY, none beside a base_url.",
    )
    template: str = Field("persuasion-1", description="Rubric: a shipped template, or the path of a file.")
    mode: Literal["pairs", "ranking"] = Field(
        "pairs", description="pairs: one request a pair and order. ranking: all replies to one context at once, in two orders."
    )
    orders: Literal["both", "given"] = Field(
        "both", description="given: the order of the pair only, at half the cost and with its bias."
    )
    flips: Literal["drop", "tie", "soft"] = Field(
        "drop", description="What two orders that disagree become: no label, a tie, or what their mean probability says."
    )
    probability: Literal["stated", "tokens"] = Field(
        "stated",
        description="Where P comes from: the confidence that the model states, or the verdict's tokens (servers with logprobs).",
    )
    structured: Literal["json_schema", "json_object", "none"] = Field(
        "json_schema", description="What the server is asked to enforce; none for servers without response_format."
    )
    temperature: float | None = Field(0.0, ge=0, description="null: not sent, for models that refuse it; anthropic takes none.")
    max_tokens: int = Field(600, ge=8, description="Longest answer, in tokens.")
    repairs: int = Field(1, ge=0, le=5, description="How often an answer that cannot be read is asked for again.")
    canary_comparisons: int = Field(20, ge=1, description="Comparisons that canaries are made from; each costs several requests.")
    measure: PairData | None = Field(
        None, description="Pairs on which its accuracy is measured before it labels; null: not measured."
    )
    measure_pairs: int = Field(60, ge=2, description="How many of them, drawn by the hash of their content.")
    timeout: float = Field(120.0, gt=0, description="Seconds for one answer.")
    retries: int = Field(6, ge=0, description="Further tries after a fault.")
    concurrency: int = Field(8, ge=1, description="Requests at once, for each address.")
    requests_per_minute: float | None = Field(None, gt=0, description="Limit of the provider.")
    tokens_per_minute: float | None = Field(None, gt=0, description="Limit of the provider, both ways together.")
    price_in: float | None = Field(None, ge=0, description="US dollars a million tokens read.")
    price_out: float | None = Field(None, ge=0, description="US dollars a million tokens written.")
    batch: bool = Field(
        False,
        description="Ask through the provider's batch interface: about half the price, answers within a day; the prices are then a batch's.",
    )
    max_cost: float | None = Field(None, gt=0, description="Hard cap in US dollars; asking stops before it would be exceeded.")

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses that the settings name; none where the provider's own is meant."""
        if self.base_url is None:
            return ()
        return (self.base_url,) if isinstance(self.base_url, str) else self.base_url

    @model_validator(mode="after")
    def _fits(self) -> LlmGrader:
        require_addresses(self.addresses, "base_url")
        if self.base_url == ():
            raise ValueError("base_url: the list is empty; leave it out for the provider's own address")
        if self.batch and len(self.addresses) > 1:
            raise ValueError("batch: a batch lives on one server; give one base_url")
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("price_in and price_out belong together")
        if self.max_cost is not None and self.price_in is None:
            raise ValueError("max_cost needs price_in and price_out: without prices nothing can be capped")
        if self.batch and self.provider == "local":
            raise ValueError("batch asks a provider; a model in this process has no batch interface")
        if self.mode == "ranking" and (self.provider == "local" or self.orders != "both" or self.probability == "tokens"):
            raise ValueError("mode ranking needs a server, orders: both and probability: stated")
        if self.provider == "anthropic" and self.probability == "tokens":
            raise ValueError("this provider tells no token probabilities; set probability: stated")
        if self.provider == "anthropic" and (
            self.structured == "json_object" or ("temperature" in self.model_fields_set and self.temperature)
        ):
            raise ValueError("this provider takes structured json_schema or none, and no temperature")
        return self


Member = Annotated[EmbeddingGrader | ReadableGrader | NgramGrader | RewardGrader | LlmGrader, Field(discriminator="kind")]


class PanelGrader(Section):
    """Several graders that vote with the weight of their measured accuracy."""

    kind: Literal["panel"] = Field(description="Several graders together.")
    train: PairData = Field(description="Pairs on which the members learn, and by group are measured.")
    members: tuple[Member, ...] = Field(min_length=2, description="Graders, or paths of grader files.")
    tie_margin: float = Field(0.0, ge=0, lt=0.5, description="Probabilities within this distance of .5 are ties.")


TrainedGrader = EmbeddingGrader | ReadableGrader | NgramGrader | RewardGrader
AnyGrader = TrainedGrader | LlmGrader | PanelGrader
Grader = Annotated[AnyGrader, Field(discriminator="kind")]
KINDS = ("embedding", "readable", "ngram", "reward", "llm", "panel")


def learns_from(grader: AnyGrader) -> PairData | None:
    """The pairs that a grader is trained on; None for one that is not trained here."""
    return None if isinstance(grader, LlmGrader) else grader.train


def read_pairs_of(grader: AnyGrader) -> tuple[PairData, ...]:
    """All pairs that a grader reads, to learn from or to be measured on."""
    data = grader.measure if isinstance(grader, LlmGrader) else grader.train
    return () if data is None else (data,)


def members_of(grader: AnyGrader) -> Sequence[AnyGrader]:
    """The graders that give the judgements: a panel's members, else the grader itself."""
    return grader.members if isinstance(grader, PanelGrader) else (grader,)


def models_of(grader: AnyGrader) -> tuple[ModelSection, ...]:
    """The language models that a grader reads in this process: what it says depends on their weights."""
    if isinstance(grader, PanelGrader):
        return tuple(model for member in grader.members for model in models_of(member))
    if isinstance(grader, RewardGrader):
        return (grader.model,)
    return (ModelSection(base=grader.model),) if isinstance(grader, LlmGrader) and grader.provider == "local" else ()


def settings_of(grader: AnyGrader) -> dict[str, Any]:
    """The settings of a grader that can change a judgement, as JSON: neither its data, nor how requests travel, nor folders of this machine."""
    data: dict[str, Any] = grader.model_dump(mode="json", exclude={"kind", "train", "measure", "members", *LlmGrader.TRANSPORT})
    if isinstance(grader, PanelGrader):
        data["members"] = [{"kind": member.kind, **settings_of(member)} for member in grader.members]
    elif isinstance(grader, RewardGrader):
        data["model"]["base"] = without_folder(grader.model.base)
    elif isinstance(grader, LlmGrader):
        data |= {"model": without_folder(grader.model), "template": without_folder(grader.template)}
    return data


def without_folder(name: str) -> str:
    """The name of a model or template; of one that lies in a folder of this machine its last part."""
    return Path(name).name if name.startswith("/") else name


def families(grader: AnyGrader) -> frozenset[str]:
    """What kinds of judge a grader is made of: two graders with one in common are not independent."""
    if isinstance(grader, PanelGrader):
        return frozenset(name for member in grader.members for name in families(member))
    if isinstance(grader, LlmGrader):
        return frozenset({f"llm {grader.model}"})
    if isinstance(grader, EmbeddingGrader | ReadableGrader):
        return frozenset({"readable features"})  # the first has all features of the second
    return frozenset({grader.kind})


def title(grader: AnyGrader) -> str:
    """A grader in words, for tables."""
    if isinstance(grader, LlmGrader):
        return f"llm grader, {grader.model}"
    return f"{grader.kind} grader, trained on {grader.train.kind}"


AllowFailed = Annotated[
    tuple[Literal["empty", "identical", "swapped", "injected", "padded"], ...],
    Field(description="Canaries below their threshold that do not stop the run; the report shows the rates."),
]


class AiLabelsSection(Section):
    """The labelling grader."""

    grader: Grader = Field(description="A grader, or the path of a grader file relative to the recipe.")
    allow_failed_canaries: AllowFailed = ()


class StrategyCorpus(Section):
    """Dialogues with one strategy label a sentence."""

    path: str = Field(
        "bundled", description="PersuasionForGood in ConvoKit's format, or 'bundled': 42 dialogues of this project."
    )


class OracleTexts(Section):
    """Texts of a strong writer on the evaluation prompts, to which responses are compared."""

    path: str = Field(description="JSONL with prompt_id and text.")


class EvaluateSection(Section):
    """The comparison on the sealed prompts."""

    grader: Grader = Field(
        description="The evaluation grader: another family and other training rows than the labelling grader's."
    )
    allow_failed_canaries: AllowFailed = ()
    allow_same_grader: bool = Field(False, description="Let the labelling grader judge; the report says so.")
    bootstrap: int = Field(2000, ge=100, description="Bootstrap repetitions, by conversation.")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Level of the intervals.")
    equivalence_margin: float = Field(
        0.1, gt=0, lt=0.5, description="Win rates within this distance of .5 count as equivalent (TOST)."
    )
    likelihood_pairs: int = Field(
        100, ge=0, description="Pairs of real winning and losing replies that every model scores; of conversations in no pool."
    )
    strategies: StrategyCorpus | None = Field(
        StrategyCorpus(), description="What the classifier of persuasion strategies learns from; null: no strategies."
    )
    human_similarity: bool = Field(
        True, description="Measure how like the human reply each response is, by sentence embeddings; false: for dry runs."
    )
    oracle: OracleTexts | None = Field(None, description="Texts of a strong writer, for similarity; null: none.")

    @model_validator(mode="after")
    def _both_orders(self) -> EvaluateSection:
        if any(isinstance(judge, LlmGrader) and judge.orders == "given" for judge in members_of(self.grader)):
            raise ValueError(
                "the evaluation grader must see both orders (orders: both): with one, the model named first would gain from its position"
            )
        return self
