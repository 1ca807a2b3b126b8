"""What is known of the corpora that can be fetched: where they are published, under what licence, and what makes a folder one of them.

Of an archive only those files are taken that the readers read; ConvoKit's pickled metadata is never unpacked. A folder is accepted
when the corpus's own reader has read it to the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from suasion.corpora import convokit
from suasion.corpora.archive import Limits, Member
from suasion.errors import UserError

CorpusName = Literal["cmv", "p4g", "ukp"]

UKP_FOLDER = "UKPConvArg1Strict-CSV"
CONVOKIT_FILES = (*convokit.FILES, "corpus.json")


@dataclass(frozen=True)
class Corpus:
    """What is known of a corpus. published: its counts, by its authors. sha256: of the archive at `url`, where it is known for sure."""

    title: str
    licence: str
    url: str
    size: str
    folder: str
    limits: Limits
    pick: Callable[[Sequence[Member]], dict[str, Member]]
    check: Callable[[Path], dict[str, int]]
    published: Mapping[str, int]
    sha256: str | None = None


def pick_convokit(members: Sequence[Member]) -> dict[str, Member]:
    """The files of the one ConvoKit corpus in an archive, wherever in it they lie. Raises UserError where there is none, or several."""
    members = [member for member in members if not _of_a_mac(member.path)]
    folders = {member.path.parent for member in members if member.path.name == "utterances.jsonl"}
    if len(folders) != 1:
        found = ", ".join(sorted(map(str, folders))) or "none"
        raise UserError(
            f"expected one folder with an utterances.jsonl, found {found}. Give a source that holds this corpus alone."
        )
    return {m.path.name: m for m in members if m.path.parent in folders and m.path.name in CONVOKIT_FILES}


def pick_ukp(members: Sequence[Member]) -> dict[str, Member]:
    """The csv files of UKPConvArg1Strict: those in its folder of the published repository, or all where they lie in one folder."""
    folders: dict[PurePosixPath, dict[str, Member]] = defaultdict(dict)
    for member in members:
        if member.path.suffix == ".csv" and not _of_a_mac(member.path):
            folders[member.path.parent][member.path.name] = member
    strict = [folder for folder in folders if folder.name == UKP_FOLDER] or list(folders)
    if len(strict) != 1:
        found = ", ".join(sorted(map(str, strict))) or "none"
        raise UserError(f"expected one folder {UKP_FOLDER} of csv files, found {found}. Give a source that holds it alone.")
    return folders[strict[0]]


def check_cmv(folder: Path) -> dict[str, int]:
    """Counts of a ChangeMyView folder that the reader accepts. Raises UserError for anything else."""
    return _check_convokit(folder, "success", "Winning Arguments")


def check_p4g(folder: Path) -> dict[str, int]:
    """Counts of a PersuasionForGood folder that the reader accepts. Raises UserError for anything else."""
    return _check_convokit(folder, "role", "PersuasionForGood")


def check_ukp(folder: Path) -> dict[str, int]:
    """Counts of a UKPConvArg1Strict folder that the reader accepts. Raises UserError for anything else."""
    from suasion.grading.pairs import load_training_pairs
    from suasion.sections.grading import PairData

    pairs = load_training_pairs(PairData(kind="ukp", path=str(folder)), None, None)
    return {"pairs": len(pairs), "topics": len({pair.group for pair in pairs})}


def _check_convokit(folder: Path, field: str, title: str) -> dict[str, int]:
    tally = convokit.Tally()
    convokit.read_outline(folder, tally)
    with_field = sum(field in utterance.meta for utterance in convokit.read_utterances(folder, tally))
    if not with_field:
        raise UserError(f"no utterance has '{field}', which those of {title} have: this is another corpus.")
    return {name: tally.read[name] for name in ("utterances", "conversations", "speakers")}


def _of_a_mac(path: PurePosixPath) -> bool:
    """What macOS adds to archives: a shadow of each file."""
    return "__MACOSX" in path.parts or path.name.startswith("._")


MB = 10**6
CONVOKIT = "https://zissou.infosci.cornell.edu/convokit/datasets"

# Addresses: ConvoKit's download_config.json (https instead of its http), and the last commit of UKPLab's repository that touched the
# data. Sizes are rounded from what others report; nobody publishes a SHA-256.
CORPORA: dict[CorpusName, Corpus] = {
    "cmv": Corpus(
        title="ChangeMyView (Winning Arguments; Tan et al., WWW 2016)",
        licence="Reddit users' text without a licence: research only, never redistribute",
        url=f"{CONVOKIT}/winning-args-corpus/winning-args-corpus.zip",
        size="73 MB, 350 MB unpacked",
        folder="winning-args-corpus",
        limits=Limits(packed=400 * MB, unpacked=2000 * MB),
        pick=pick_convokit,
        check=check_cmv,
        published={"utterances": 293_297, "conversations": 3_051, "speakers": 34_911},
    ),
    "p4g": Corpus(
        title="PersuasionForGood (Wang et al., ACL 2019)",
        licence="Apache-2.0",
        url=f"{CONVOKIT}/persuasionforgood-corpus/persuasionforgood.zip",
        size="2 MB, 10 MB unpacked",
        folder="persuasionforgood-corpus",
        limits=Limits(packed=100 * MB, unpacked=500 * MB),
        pick=pick_convokit,
        check=check_p4g,
        published={"utterances": 20_932, "conversations": 1_017, "speakers": 1_285},
    ),
    "ukp": Corpus(
        title="UKPConvArg1Strict (Habernal & Gurevych, ACL 2016)",
        licence="CC-BY 4.0",
        url="https://github.com/UKPLab/acl2016-convincing-arguments/archive/ca9d24e41b8805ff2e1d3585d552b49bb64a65f7.zip",
        size="the whole repository, tens of MB; 6 MB of it are kept",
        folder="ukpconvarg1",
        limits=Limits(packed=400 * MB, unpacked=2000 * MB),
        pick=pick_ukp,
        check=check_ukp,
        published={"pairs": 11_650, "topics": 16},
    ),
}
