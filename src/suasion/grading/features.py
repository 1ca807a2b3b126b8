"""Readable features of a reply in its context, each one a number that a person can check by hand.

After Tan et al. 2016 (arXiv 1602.01103): what the reply is made of, and its interplay with what the poster said. Counts enter
as ln(1 + n). Three things are deliberately absent, because the simulated annotator (labeling/annotator.py) scores by them and
must share no feature with a grader: compressibility, the share of long words, the variation of sentence lengths.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from itertools import islice

import numpy as np

WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
NUMBER = re.compile(r"(?<![^\W\d_])\d[\d.,]*")
# Cleaned texts keep of an address its domain only (suasion.corpora.cmv).
LINK = re.compile(
    r"\b(?:https?://|www\.)?\w[\w-]*(?:\.[\w-]+)*\.(?:com|org|net|edu|gov|info|io|uk|de|ca|au)\b(?:/\S*)?", re.IGNORECASE
)
_QUOTE = re.compile(r"^\s*(?:>|&gt;)|[\"“][^\"”]{8,}[\"”]", re.MULTILINE)
_LIST = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)
_EXAMPLE = re.compile(r"\b(?:for (?:example|instance)|e\.g\.|such as|imagine|suppose|let's say)", re.IGNORECASE)
_NOT_WORD = re.compile(r"n['’]t\b", re.IGNORECASE)


def _lexicon(text: str) -> frozenset[str]:
    return frozenset(text.split())


HEDGES = _lexicon(
    "maybe perhaps might may could seem seems seemed probably possibly likely somewhat generally usually often sometimes mostly "
    "tend tends appear appears suggest suggests assume guess suppose think believe"
)
FIRST_PERSON = _lexicon("i me my mine myself i'm i've i'd i'll")
FIRST_PLURAL = _lexicon("we us our ours ourselves we're we've we'd we'll")
SECOND_PERSON = _lexicon("you your yours yourself you're you've you'd you'll")
NEGATIONS = _lexicon("no not never none nothing nobody neither nor without cannot")
CONNECTIVES = _lexicon(
    "because since therefore thus hence so however but although though while whereas unless if then instead yet despite "
    "moreover furthermore otherwise consequently"
)
# Frequent function words: overlap in them says nothing about whether a reply takes up the poster's reasons.
STOP_WORDS = (
    _lexicon(
        "a about above after again against all also am an and any are as at be been before being below between both by can did do does doing "
        "don't down during each few for from further get had has have having he her here hers him his how in into is isn't it its it's itself "
        "just like lot many more most much of off on once one only or other out over own people really same she should some than that that's "
        "the their theirs them themselves there these they they're thing things this those through to too under until up very was wasn't were "
        "what when where which who whom why will with won't would"
    )
    | FIRST_PERSON
    | FIRST_PLURAL
    | SECOND_PERSON
    | NEGATIONS
    | CONNECTIVES
)

NAMES = (
    "log_words",
    "paragraphs",
    "questions",
    "exclamations",
    "quotes",
    "links",
    "numbers",
    "list_items",
    "examples",
    "hedges",
    "first_person",
    "first_plural",
    "second_person",
    "negations",
    "connectives",
    "shouting",
    "type_token_ratio",
    "words_shared",
    "content_shared",
    "share_of_reply",
    "share_of_context",
    "jaccard",
    "stop_shared",
    "stop_share_of_reply",
    "stop_share_of_context",
    "stop_jaccard",
    "all_share_of_reply",
    "all_share_of_context",
    "all_jaccard",
)
# The rest of Tan et al.'s interplay (their table 2): the same overlaps in stop words alone and in all words.
INTERPLAY = frozenset(name for name in NAMES if name.startswith(("stop_", "all_")))


def words(text: str) -> list[str]:
    """Lower-case words, apostrophes kept inside them and made straight."""
    return [word.lower().replace("’", "'") for word in WORD.findall(text)]


def word_count(text: str) -> int:
    """Length of a text as every length statistic of the graders counts it."""
    return len(WORD.findall(text))


def first_words(text: str, count: int) -> str:
    """The text up to the end of its word number `count`, with everything that stands between; '' for none."""
    if count <= 0:
        return ""
    ends = islice((match.end() for match in WORD.finditer(text)), count - 1, count + 1)
    end, further = next(ends, None), next(ends, None)
    return text if end is None or further is None else text[:end]


@lru_cache(maxsize=2**17)
def readable(context: str, reply: str) -> np.ndarray:
    """[len(NAMES)] float64, finite for every text, the empty one too. Computed once a process for each text; read-only."""
    said, own = words(context), words(reply)
    said_set, own_set = set(said), set(own)
    said_content, own_content = said_set - STOP_WORDS, own_set - STOP_WORDS
    said_stop, own_stop = said_set & STOP_WORDS, own_set & STOP_WORDS
    shared = len(said_content & own_content)
    capitals = sum(1 for word in WORD.findall(reply) if len(word) > 3 and word.isupper())

    def occurrences(lexicon: frozenset[str]) -> float:
        return math.log1p(sum(word in lexicon for word in own))

    values = {
        "log_words": math.log1p(len(own)),
        "paragraphs": math.log1p(sum(1 for part in re.split(r"\n\s*\n", reply) if part.strip())),
        "questions": math.log1p(reply.count("?")),
        "exclamations": math.log1p(reply.count("!")),
        "quotes": math.log1p(len(_QUOTE.findall(reply))),
        "links": math.log1p(len(LINK.findall(reply))),
        "numbers": math.log1p(len(NUMBER.findall(reply))),
        "list_items": math.log1p(len(_LIST.findall(reply))),
        "examples": math.log1p(len(_EXAMPLE.findall(reply))),
        "hedges": occurrences(HEDGES),
        "first_person": occurrences(FIRST_PERSON),
        "first_plural": occurrences(FIRST_PLURAL),
        "second_person": occurrences(SECOND_PERSON),
        "negations": math.log1p(sum(word in NEGATIONS for word in own) + len(_NOT_WORD.findall(reply))),
        "connectives": occurrences(CONNECTIVES),
        "shouting": math.log1p(capitals),
        "type_token_ratio": len(own_set) / len(own) if own else 0.0,
        "words_shared": math.log1p(len(said_set & own_set)),
        "content_shared": math.log1p(shared),
        "share_of_reply": _share(shared, len(own_content)),
        "share_of_context": _share(shared, len(said_content)),
        "jaccard": _share(shared, len(said_content | own_content)),
        "stop_shared": math.log1p(len(said_stop & own_stop)),
        "stop_share_of_reply": _share(len(said_stop & own_stop), len(own_stop)),
        "stop_share_of_context": _share(len(said_stop & own_stop), len(said_stop)),
        "stop_jaccard": _share(len(said_stop & own_stop), len(said_stop | own_stop)),
        "all_share_of_reply": _share(len(said_set & own_set), len(own_set)),
        "all_share_of_context": _share(len(said_set & own_set), len(said_set)),
        "all_jaccard": _share(len(said_set & own_set), len(said_set | own_set)),
    }
    row = np.array([values[name] for name in NAMES], dtype=np.float64)
    row.setflags(write=False)
    return row


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
