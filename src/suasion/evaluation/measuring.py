"""The text measures that need a model: similarity by embeddings, likelihood of real replies, persuasion strategies.

Called by the evaluate stage; reads the recipe's oracle texts and labelled dialogues, writes nothing but the stage's journal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from suasion.chat import Renderer
from suasion.errors import UserError
from suasion.evaluation import likelihood, strategies
from suasion.evaluation.style import Measured
from suasion.evaluation.summary import HUMAN
from suasion.grading.embedding import embedder
from suasion.models import Compute, Lineage
from suasion.recipe import Recipe
from suasion.records import Example, OutcomePair, Response, read_json_lines, sha256_file
from suasion.sampling.respond import Journal


def external_hashes(recipe: Recipe) -> dict[str, str]:
    """name -> sha256 of the files outside the run that these measures read."""
    hashes: dict[str, str] = {}
    if recipe.evaluate.strategies is not None:
        hashes |= strategies.external_hashes(recipe.evaluate.strategies.path)
    if recipe.evaluate.oracle is not None and Path(recipe.evaluate.oracle.path).is_file():
        hashes["oracle"] = sha256_file(Path(recipe.evaluate.oracle.path))
    return hashes


def require_files(recipe: Recipe) -> None:
    """Raise UserError where a file that these measures read is not there."""
    section = recipe.evaluate
    if section.strategies is not None and not (strategies.corpus_folder(section.strategies.path) / "utterances.jsonl").is_file():
        raise UserError(
            f"no labelled dialogues at {section.strategies.path}, from which evaluate.strategies learns. Get them with `suasion fetch p4g` and "
            "name their folder: --set evaluate.strategies.path=FOLDER (bundled: the project's own; --set evaluate.strategies=null: none)."
        )
    if section.oracle is not None and not Path(section.oracle.path).is_file():
        raise UserError(f"no oracle texts at {section.oracle.path}. Check evaluate.oracle.path, or leave it out.")


def measure_texts(
    recipe: Recipe,
    prompts: Sequence[Example],
    responses: Mapping[str, Mapping[str, Response]],
    lineages: dict[str, Lineage],
    pairs: Sequence[OutcomePair],
    renderer: Renderer,
    hardware: Compute,
    journal: Journal,
) -> Measured:
    """Everything that `style` cannot measure from the text alone. Raises UserError for broken oracle texts."""
    settings = recipe.evaluate
    said = {name: {key: row.text for key, row in rows.items()} for name, rows in responses.items()}
    said[HUMAN] = {example.prompt().id: example.reply for example in prompts if example.reply}
    per_response = {}
    if settings.human_similarity:
        per_response["human_similarity"] = similarity(said, said[HUMAN], HUMAN)
    if settings.oracle is not None:
        per_response["oracle_similarity"] = similarity(said, read_oracle(Path(settings.oracle.path), prompts), "")
    chosen = likelihood.chosen_pairs(pairs, settings.likelihood_pairs, renderer, recipe.model.max_length, recipe.seed)
    return Measured(
        per_response=per_response,
        likelihood=likelihood.compare(
            lineages, chosen, renderer, hardware, journal, recipe.seed, settings.bootstrap, settings.confidence
        ),
        strategies=(
            strategies.compare(settings.strategies.path, prompts, said, recipe.seed) if settings.strategies is not None else {}
        ),
    )


def similarity(said: Mapping[str, Mapping[str, str]], reference: Mapping[str, str], itself: str) -> dict[str, dict[str, float]]:
    """speaker -> prompt id -> cosine of its text's embedding to the reference's; without the speaker `itself` and empty texts."""
    found: dict[str, dict[str, float]] = {}
    for name, texts in said.items():
        keys = [key for key, text in texts.items() if text.strip() and reference.get(key, "").strip()]
        if name == itself or not keys:
            continue
        own, other = embedder()([texts[key] for key in keys]), embedder()([reference[key] for key in keys])
        found[name] = dict(zip(keys, np.sum(own * other, axis=1).tolist(), strict=True))
    return found


def read_oracle(path: Path, prompts: Sequence[Example]) -> dict[str, str]:
    """prompt id -> text. Raises UserError for a missing file, a row without both fields, or where no prompt is answered."""
    wanted = {example.prompt().id for example in prompts}
    texts: dict[str, str] = {}
    for number, row in read_json_lines(path):
        key, text = row.get("prompt_id"), row.get("text")
        if not isinstance(key, str) or not isinstance(text, str):
            raise UserError(f"{path}, line {number}: an oracle's row needs prompt_id and text, both strings.")
        if key in wanted:
            texts[key] = text
    if not texts:
        raise UserError(f"{path} answers none of the {len(wanted)} evaluation prompts: its prompt_id must be theirs.")
    return texts
