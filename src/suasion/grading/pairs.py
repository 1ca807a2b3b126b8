"""What graders learn from, and what they are asked about.

Training pairs come from the run's own outcome pairs (grader_pairs: conversations of the SFT pool; judge_pairs: conversations of
no pool), from a ConvoKit folder of ChangeMyView, or from UKPConvArg1Strict (Habernal & Gurevych, ACL 2016). The `group` of a
pair (the poster, the topic) is the unit of folds and intervals. Sampled pairs are the run's own: two responses to one prompt.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from suasion.chat import as_text
from suasion.errors import UserError
from suasion.grading.base import Comparison
from suasion.records import OutcomePair, Pair, Prompt, Response, read_rows, sha256_file
from suasion.rundir import StageContext
from suasion.sections import grading as sections

UKP_FILES = 32
NAME_IT = "--set ai_labels.grader.train.path=FOLDER, or evaluate.grader.train.path, or in the grader's file"
CMV_FILES = ("utterances.jsonl", "conversations.json")


@dataclass(frozen=True)
class TrainingPair:
    """Two texts on one context, of which one won. first_won: whether the source listed the winner first, True where it does not say."""

    context: str
    winner: str
    loser: str
    group: str
    first_won: bool = True


@dataclass(frozen=True)
class SampledPair:
    """A pair of the run with everything that it refers to."""

    pair: Pair
    prompt: Prompt
    a: Response
    b: Response

    def comparison(self) -> Comparison:
        """As a grader sees it."""
        return Comparison(as_text(self.prompt.turns), self.a.text, self.b.text)


def load_training_pairs(data: sections.PairData, grader_pairs: Path | None, judge_pairs: Path | None) -> list[TrainingPair]:
    """The pairs a recipe names.

    grader_pairs, judge_pairs: the run's files of OutcomePair rows. Raises UserError where data is missing or empty.
    """
    if data.kind == "ukp":
        pairs = [pair for file in ukp_files(Path(data.path or "")) for pair in read_ukp(file)]
    elif data.kind == "cmv":
        from suasion.corpora.cmv import outcome_pairs

        pairs = from_outcome_pairs(outcome_pairs(cmv_folder(data.path or "")))
    else:
        file = grader_pairs if data.kind == "grader_pairs" else judge_pairs
        assert file is not None, f"the stage did not declare {data.kind}.jsonl as an input"
        pairs = from_outcome_pairs(read_rows(file, OutcomePair))
    if not pairs:
        raise UserError(
            f"there are no outcome pairs of kind {data.kind} to train a grader on. PersuasionForGood has none (no two replies to one "
            "context): train on kind cmv or ukp with a path; judge_pairs need pools.judge_conversations above 0."
        )
    return pairs


def require_pairs(data: sections.PairData) -> None:
    """Raise UserError where the folder that pairs are read from is not there; the run's own pairs come with the run."""
    if data.kind == "ukp":
        ukp_files(Path(data.path or ""))
    elif data.kind == "cmv":
        cmv_folder(data.path or "")


def training_hashes(data: sections.PairData) -> dict[str, str]:
    """name -> sha256 of the files outside the run that a grader is trained on; empty where it learns from the run's own pairs."""
    if data.kind == "ukp":
        return {
            "ukp": hashlib.sha256("".join(sha256_file(file) for file in ukp_files(Path(data.path or ""))).encode()).hexdigest()
        }
    if data.kind == "cmv":
        folder = cmv_folder(data.path or "")
        return {f"cmv/{name}": sha256_file(folder / name) for name in CMV_FILES if (folder / name).is_file()}
    return {}


def from_outcome_pairs(rows: Iterable[OutcomePair]) -> list[TrainingPair]:
    """Outcome pairs as training pairs. A pair of equal or empty texts teaches nothing and is left out."""
    return [
        TrainingPair(as_text(row.turns), row.winner, row.loser, row.group)
        for row in rows
        if row.winner.strip() and row.loser.strip() and row.winner.strip() != row.loser.strip()
    ]


def cmv_folder(source: str) -> Path:
    """The ConvoKit folder of a ChangeMyView corpus: a path or 'bundled'. Raises UserError where it is none."""
    if source == "bundled":
        from suasion.corpora.stage import bundled_path

        folder: Path = bundled_path("cmv")
    else:
        folder = Path(source)
    if not (folder / CMV_FILES[0]).is_file():
        raise UserError(
            f"no ConvoKit corpus for a grader at {folder} ({CMV_FILES[0]} is missing). Get it with `suasion fetch cmv`, and name its folder: {NAME_IT}."
        )
    return folder


def ukp_files(folder: Path) -> list[Path]:
    """The 32 files of UKPConvArg1Strict, in order of their names. Raises UserError where they are not there."""
    files = sorted(folder.glob("*.csv")) if folder.is_dir() else []
    if len(files) != UKP_FILES:
        raise UserError(
            f"expected the {UKP_FILES} csv files of UKPConvArg1Strict in {folder}, found {len(files)}. Get the data with "
            f"`suasion fetch ukp` (CC-BY 4.0), and name its folder: {NAME_IT}."
        )
    return files


def read_ukp(file: Path) -> list[TrainingPair]:
    """One topic-side of UKPConvArg1Strict: tab-separated `#id label a1 a2` without quoting, label a1 or a2 for the winner.

    The group is the topic (both of its sides), so that no fold is tested on a topic it was trained on; the context is the
    topic in words. Raises UserError with file and line for anything else.
    """
    topic = file.stem.rpartition("_")[0]
    context = topic_in_words(topic)
    pairs = []
    # Lines are split at \n only: the texts hold other characters that Python's splitlines() takes for line ends.
    for number, raw in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            line = raw.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{file}, line {number}: not UTF-8 ({error}). Get the file again.") from error
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.rstrip("\r").split("\t")
        if len(fields) != 4 or fields[1] not in ("a1", "a2"):
            raise UserError(
                f"{file}, line {number}: expected '#id label a1 a2', tab-separated with label a1 or a2. Get the file again."
            )
        first, second = (re.sub(r"\s*<br\s*/?>\s*", "\n", text).strip() for text in fields[2:])
        winner, loser = (first, second) if fields[1] == "a1" else (second, first)
        if winner != loser:
            pairs.append(TrainingPair(context, winner, loser, topic, fields[1] == "a1"))
    return pairs


def topic_in_words(topic: str) -> str:
    """'is-porn-wrong-' -> 'Is porn wrong?'; a trailing hyphen was a question mark."""
    text = re.sub(r"\s+", " ", topic.replace("-", " ")).strip()
    return text[:1].upper() + text[1:] + ("?" if topic.endswith("-") else "")


def join_pairs(pairs: Iterable[Pair], prompts: Iterable[Prompt], responses: Iterable[Response]) -> list[SampledPair]:
    """Pairs with their prompts and responses, in the order of `pairs`.

    Raises UserError where a pair names a prompt or response that is not there, or responses to another prompt.
    """
    prompt_of = {prompt.id: prompt for prompt in prompts}
    response_of = {response.id: response for response in responses}
    joined = []
    for pair in pairs:
        prompt, a, b = prompt_of.get(pair.prompt_id), response_of.get(pair.a), response_of.get(pair.b)
        if prompt is None or a is None or b is None or not a.prompt_id == b.prompt_id == prompt.id:
            raise UserError(f"pair {pair.id} names a prompt or a response that is not in the run. Run again with --redo sample.")
        joined.append(SampledPair(pair, prompt, a, b))
    return joined


def sampled_pairs(stage: StageContext) -> list[SampledPair]:
    """The run's own pairs, of both pools, among a stage's inputs."""
    return read_sampled_pairs(
        stage.input("sample", "pairs.jsonl"),
        stage.input("sample", "responses.jsonl"),
        [stage.input("pools", "rlaif.jsonl"), stage.input("pools", "rlhf.jsonl")],
    )


def read_sampled_pairs(pairs: Path, responses: Path, pools: Sequence[Path]) -> list[SampledPair]:
    """The run's pairs whose prompts are in these pool files (rows of Prompt); pairs of other pools are left out."""
    prompts = [prompt for pool in pools for prompt in read_rows(pool, Prompt)]
    known = {prompt.id for prompt in prompts}
    mine = [pair for pair in read_rows(pairs, Pair) if pair.prompt_id in known]
    return join_pairs(mine, prompts, read_rows(responses, Response))
