"""A recipe: one YAML file, one section a stage, every field typed and documented.

`load_recipe` reads and validates it (an unknown key is refused with the nearest known name), applies `--set key=value`,
resolves paths and grader files, and checks what can be checked before anything runs. The resolved copy stands in the run
directory; the slice that a stage reads stands in its manifest, so that a change is noticed by exactly the stages it concerns.
"""

from __future__ import annotations

import difflib
import types
import typing
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from suasion.errors import UsageError
from suasion.grading.files import make_absolute, make_base_absolute, read_mapping, resolve_grader
from suasion.sections.base import Section
from suasion.sections.corpus import LEAST_CONTEXT, CorpusSection, PoolsSection
from suasion.sections.grading import KINDS as GRADER_KINDS
from suasion.sections.grading import AiLabelsSection, EvaluateSection, families, learns_from, read_pairs_of
from suasion.sections.labeling import HumanLabelsSection, PreferencesSection
from suasion.sections.processes import ProcessesSection
from suasion.sections.reporting import ReportSection
from suasion.sections.sampling import EndpointEngine, SampleSection
from suasion.sections.training import DpoArm, ModelSection, SftSection


class Recipe(Section):
    """The whole experiment."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="Name of the run: its folder is runs/<name>.")
    seed: int = Field(0, ge=0, description="Seed of every random choice.")
    model: ModelSection = Field(ModelSection(), description="Base model.")
    corpus: CorpusSection = Field(description="Stage 01.")
    pools: PoolsSection = Field(PoolsSection(), description="Stage 02.")
    sft: SftSection = Field(SftSection(), description="Stage 03.")
    sample: SampleSection = Field(SampleSection(), description="Stage 04.")
    ai_labels: AiLabelsSection = Field(description="Stage 05.")
    human_labels: HumanLabelsSection = Field(description="Stage 06.")
    preferences: PreferencesSection = Field(PreferencesSection(), description="Stage 07.")
    dpo: tuple[DpoArm, ...] = Field(min_length=1, description="Stage 08, one folder an arm.")
    evaluate: EvaluateSection = Field(description="Stage 09.")
    report: ReportSection = Field(ReportSection(), description="Stage 10.")
    processes: ProcessesSection = Field(ProcessesSection(), description="In how many processes trainings run.")

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        low, high = self.corpus.reply_tokens
        if not 1 <= low < high:
            raise ValueError(f"corpus.reply_tokens [{low}, {high}]: the first must be positive and smaller than the second")
        if high > self.sample.max_new_tokens:
            raise ValueError(
                f"corpus.reply_tokens allows replies of {high} tokens but sample.max_new_tokens is {self.sample.max_new_tokens}: "
                "the model would learn replies that it cannot finish. Raise max_new_tokens or lower reply_tokens"
            )
        needed = max(self.corpus.context_tokens + self.sample.max_new_tokens, LEAST_CONTEXT + high)
        if needed > self.model.max_length:
            raise ValueError(
                f"context_tokens {self.corpus.context_tokens} and {self.sample.max_new_tokens} reply tokens do not fit into model.max_length "
                f"{self.model.max_length}, or the longest reply leaves no {LEAST_CONTEXT} to its context: raise it to at least {needed}"
            )
        if self.model.quantization:
            if None in (self.sft.lora, *(arm.lora for arm in self.dpo)):
                raise ValueError(
                    "lora is null, but weights in 4 bits cannot be trained: set model.quantization to null, or give lora"
                )
            if self.processes.profile == "fsdp2":
                raise ValueError("weights in 4 bits are not sharded: with model.quantization use processes.profile ddp or one")
        known = ["sft"]
        if isinstance(self.sample.engine, EndpointEngine):
            unknown = sorted(set(self.sample.engine.models) - set(self.model_names()))
            if unknown:
                raise ValueError(
                    f"sample.engine.models names {', '.join(unknown)}; the models are {', '.join(self.model_names())}"
                )
        for arm in self.dpo:
            if arm.name in (*known, "base", "start", "human"):
                raise ValueError(f"dpo arm name '{arm.name}' is taken or reserved")
            for field, value in (("start", arm.start), ("reference", arm.reference)):
                if value not in known and not (field == "reference" and value in ("start", "base")):
                    raise ValueError(f"dpo arm '{arm.name}': {field} '{value}' is not sft or an earlier arm ({', '.join(known)})")
            known.append(arm.name)
        corpora = {source.path for source in self.corpus.sources}
        for section, grader in (("ai_labels", self.ai_labels.grader), ("evaluate", self.evaluate.grader)):
            for data in read_pairs_of(grader):
                if data.kind == "cmv" and data.path in corpora:
                    raise ValueError(
                        f"{section}.grader is trained on all pairs of a corpus that this recipe reads ({data.path}), evaluation threads "
                        "included. Train it on grader_pairs (of the SFT pool) or judge_pairs (of no pool), or on another corpus"
                    )
        if not self.evaluate.allow_same_grader:
            label, judge = self.ai_labels.grader, self.evaluate.grader
            kinds = sorted(families(label) & families(judge))
            rows = learns_from(label) if learns_from(label) == learns_from(judge) else None
            if kinds or rows:
                raise ValueError(
                    "the evaluation grader must differ from the labelling grader in kind and in training rows "
                    f"(both: kind {', '.join(kinds) or '-'}, train {rows.kind if rows else '-'}); "
                    "choose another, or set evaluate.allow_same_grader and the report will say so"
                )
        return self

    def model_names(self) -> list[str]:
        """All compared models, in the order of the tables."""
        return ["base", "sft", *(arm.name for arm in self.dpo)]

    def adapter_stages(self, model: str) -> list[str]:
        """Stages whose adapters make up a model, oldest first: rlaif-rlhf -> [sft, dpo-rlaif, dpo-rlaif-rlhf]."""
        if model in ("base", "sft"):
            return ["sft"] if model == "sft" else []
        return [*self.adapter_stages(self.arm(model).start), f"dpo-{model}"]

    def arm(self, name: str) -> DpoArm:
        """The arm of this name."""
        return next(arm for arm in self.dpo if arm.name == name)


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read, override, resolve and validate a recipe.

    Paths inside it and in overrides are relative to the recipe's folder and become absolute; grader files are read in place, before
    an override that reaches into one (ai_labels.grader.train.path=...).
    Raises UsageError with the field, its value and, for unknown keys, the nearest known name.
    """
    if not path.is_file():
        raise UsageError(f"no recipe at {path}. Shipped recipes stand in recipes/, for example recipes/demo.yaml.")
    data = read_mapping(path)
    for override in overrides:
        _apply_override(data, override, path.parent)
    _resolve(data, path.parent)
    return validate_recipe(data, str(path))


def validate_recipe(data: dict[str, Any], where: str) -> Recipe:
    """Validate resolved data. Raises UsageError."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = [f"{where} is not a valid recipe:"]
        for item in error.errors():
            kinds = (*GRADER_KINDS, "simulated", "file", "page", "local", "endpoint")
            location = [part for part in item["loc"] if part not in kinds]
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] == "extra_forbidden":
                message = "unknown key" + _nearest(location)
            value = item.get("input")
            shown = (
                f" (it is {value!r})" if isinstance(value, str | int | float | bool) and item["type"] != "extra_forbidden" else ""
            )
            lines.append(f"  {'.'.join(map(str, location)) or 'recipe'}: {message}{shown}")
        raise UsageError("\n".join(lines)) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; equal recipes have equal bytes."""
    return str(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120))


def _apply_override(data: dict[str, Any], override: str, folder: Path) -> None:
    """`a.b.0.c=value` sets one value, parsed as YAML; arms can be named: dpo.rlhf.beta=0.2. folder: the recipe's."""
    key, separator, text = override.partition("=")
    if not separator:
        raise UsageError(f"--set {override}: write key=value, for example --set sft.epochs=1.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {override}: the value is not valid YAML ({error}).") from error
    node: Any = data
    parts = key.split(".")
    for part in parts[:-1]:
        node = _descend(node, part, override, folder)
    if isinstance(node, list):
        node[_index(node, parts[-1], override)] = value
    elif isinstance(node, dict):
        node[parts[-1]] = value
    else:
        raise UsageError(f"--set {override}: {'.'.join(parts[:-1])} is a value, not a section.")


def _descend(node: Any, part: str, override: str, folder: Path) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, override)]
    if isinstance(node, dict):
        if part == "grader" and isinstance(node.get(part), str):
            node[part] = resolve_grader(node[part], folder)
        return node.setdefault(part, {})
    raise UsageError(f"--set {override}: '{part}' lies below a value, not a section.")


def _index(node: list[Any], part: str, override: str) -> int:
    names = [item.get("name", str(i)) if isinstance(item, dict) else str(i) for i, item in enumerate(node)]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(node):
        return int(part)
    raise UsageError(f"--set {override}: no entry '{part}' (there are: {', '.join(names)}).")


def _resolve(data: dict[str, Any], folder: Path) -> None:
    """Read grader files and make the paths of data absolute, in place."""
    for section in ("ai_labels", "evaluate"):
        holder = data.get(section)
        if not isinstance(holder, dict):
            continue
        if "grader" in holder:
            holder["grader"] = resolve_grader(holder["grader"], folder)
        for key in ("strategies", "oracle"):
            make_absolute(holder.get(key), folder)
    corpus = data.get("corpus")
    sources = corpus.get("sources") if isinstance(corpus, dict) else None
    for source in sources if isinstance(sources, list) else []:
        make_absolute(source, folder)
    make_absolute((data.get("human_labels") or {}).get("source") if isinstance(data.get("human_labels"), dict) else None, folder)
    make_base_absolute(data.get("model"), "base", folder)


def _nearest(location: list[Any]) -> str:
    """', did you mean X?' for an unknown key, from the fields of the section that holds it."""
    kinds: list[type[BaseModel]] = [Recipe]
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        kinds = [sub for kind in kinds if part in kind.model_fields for sub in models_in(kind.model_fields[part].annotation)]
    names = sorted({name for kind in kinds for name in kind.model_fields})
    close = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
    known = f" Known here: {', '.join(names)}." if names else ""
    return (f", did you mean '{close[0]}'?" if close else ".") + known


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models inside a type such as tuple[DpoArm, ...] or A | B."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (tuple, list, typing.Union, types.UnionType, Annotated):
        return [model for argument in typing.get_args(annotation) for model in models_in(argument)]
    return []
