"""Which persuasion strategies a text uses: a classifier of sentences, trained on labelled PersuasionForGood dialogues.

Reads a corpus in ConvoKit's on-disk format whose persuader turns carry one label a sentence (Wang et al., ACL 2019: 300 dialogues;
the bundled charity corpus: 42 written for this project). Ten strategies and `none` for everything else (greetings, thanks, ...).
Features: TF-IDF of word 1-2-grams and character 2-4-grams, the embedding of the sentence and of the turn it answers, and its place.
Logistic regression with balanced classes. Its quality is measured by cross-validation over whole dialogues, beside TF-IDF alone.
It was taught on charity dialogues: on other texts its labels are a rough guide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from suasion.corpora.convokit import Tally, conversations, in_order
from suasion.corpora.stage import bundled_path
from suasion.evaluation.metrics import sentences
from suasion.grading.embedding import embedder
from suasion.records import Example, sha256_file
from suasion.seeding import generator

STRATEGIES = (
    "logical-appeal",
    "emotion-appeal",
    "credibility-appeal",
    "foot-in-the-door",
    "self-modeling",
    "personal-story",
    "donation-information",
    "source-related-inquiry",
    "task-related-inquiry",
    "personal-related-inquiry",
)
NONE = "none"
FOLDS = 5
FEWEST_DIALOGUES = 10
STRENGTH = 4.0  # inverse of the L2 penalty


@dataclass(frozen=True)
class Sentence:
    """A persuader's sentence. before: the turn that it answers; place: sentences of this turn before it; turn: persuader's turns before."""

    dialogue: str
    text: str
    before: str
    place: int
    turn: int
    label: str


def corpus_folder(path: str) -> Path:
    """Where labelled dialogues lie; 'bundled' is the charity corpus of this package."""
    return bundled_path("p4g") if path == "bundled" else Path(path)


def external_hashes(path: str) -> dict[str, str]:
    """sha256 of the file that the classifier learns from, under a name free of paths."""
    file = corpus_folder(path) / "utterances.jsonl"
    return {"strategies/utterances.jsonl": sha256_file(file)} if file.is_file() else {}


def read_sentences(folder: Path) -> list[Sentence]:
    """Every labelled sentence of a persuader. Turns whose labels do not match their sentences are left out. Raises UserError for a broken corpus."""
    found = []
    for conversation in conversations(folder, Tally()):
        before, turns = "", 0
        for utterance in in_order(conversation.utterances):
            if utterance.meta.get("role") != 0:
                before = utterance.text
                continue
            labels, parts = utterance.meta.get("label_1"), str(utterance.meta.get("text_by_sent") or "").split("<s>")
            if isinstance(labels, list) and len(labels) == len(parts):
                found += [
                    Sentence(conversation.id, part.strip(), before, place, turns, label if label in STRATEGIES else NONE)
                    for place, (part, label) in enumerate(zip(parts, labels, strict=True))
                ]
            turns += 1
    return found


class StrategyClassifier:
    """See the module's docstring. plain: TF-IDF of words alone, the baseline."""

    def __init__(self, rows: Sequence[Sentence], plain: bool = False):
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        self.plain = plain
        self.vectorizers = [TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)]
        if not plain:
            self.vectorizers.append(TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), min_df=4, sublinear_tf=True))
        for vectorizer in self.vectorizers:
            vectorizer.fit([row.text for row in rows])
        self.model = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=2000)
        self.model.fit(self._features(rows), [row.label for row in rows])

    def label(self, rows: Sequence[Sentence]) -> list[str]:
        """The likeliest class of each sentence."""
        return [str(label) for label in self.model.predict(self._features(rows))] if rows else []

    def _features(self, rows: Sequence[Sentence]) -> Any:
        texts = [row.text for row in rows]
        blocks: list[Any] = [vectorizer.transform(texts) for vectorizer in self.vectorizers]
        if not self.plain:
            place = [[min(row.place, 4) / 4, min(row.turn, 10) / 10, row.text.rstrip().endswith("?")] for row in rows]
            blocks += [sparse.csr_matrix(2.0 * embedder()(texts)), sparse.csr_matrix(embedder()([row.before for row in rows]))]
            blocks.append(sparse.csr_matrix(np.array(place, dtype=float)))
        return sparse.hstack(blocks).tocsr()


def folds(rows: Sequence[Sentence], seed: int) -> np.ndarray:
    """(n,) fold of each sentence: all of a dialogue in one, the same on every machine."""
    dialogues = sorted({row.dialogue for row in rows})
    order = generator(seed, "strategy-folds").permutation(len(dialogues))
    fold = {dialogues[index]: position % FOLDS for position, index in enumerate(order)}
    return np.array([fold[row.dialogue] for row in rows])


def quality(rows: Sequence[Sentence], seed: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Cross-validated quality beside TF-IDF's, and the classifier's F1 of each class."""
    from sklearn.metrics import accuracy_score, f1_score

    fold, truth = folds(rows, seed), np.array([row.label for row in rows])
    predicted = {plain: np.empty(len(rows), dtype=object) for plain in (False, True)}
    for number in range(FOLDS):
        training = [row for row, own in zip(rows, fold, strict=True) if own != number]
        held = [row for row, own in zip(rows, fold, strict=True) if own == number]
        for plain, found in predicted.items():
            found[fold == number] = StrategyClassifier(training, plain).label(held)
    classes = sorted(set(truth))
    each = f1_score(truth, predicted[False], labels=classes, average=None, zero_division=0.0)
    facts: dict[str, Any] = {"dialogues": len({row.dialogue for row in rows}), "sentences": len(rows), "folds": FOLDS, "classes": len(classes)}  # fmt: skip
    for prefix, found in (("", predicted[False]), ("tfidf_", predicted[True])):
        facts[f"{prefix}macro_f1"] = float(f1_score(truth, found, average="macro", zero_division=0.0))
        facts[f"{prefix}accuracy"] = float(accuracy_score(truth, found))
    return facts, dict(zip(classes, map(float, each), strict=True))


def compare(path: str, prompts: Sequence[Example], said: Mapping[str, Mapping[str, str]], seed: int) -> dict[str, Any]:
    """Share of each speaker's sentences in each class. said: speaker -> prompt id -> text; {} where there is too little to learn from."""
    rows = read_sentences(corpus_folder(path))
    if len({row.dialogue for row in rows}) < FEWEST_DIALOGUES:
        return {}
    facts, f1 = quality(rows, seed)
    classifier = StrategyClassifier(rows)
    speakers = {}
    for name, texts in said.items():
        own = [
            Sentence(example.conversation_id, text, example.turns[-1].text, place, sum(turn.role == "assistant" for turn in example.turns), "")
            for example in prompts
            for place, text in enumerate(sentences(texts.get(example.prompt().id, "")))
        ]  # fmt: skip
        counts = Counter(classifier.label(own))
        speakers[name] = {label: counts[label] / len(own) if own else None for label in (*STRATEGIES, NONE)}
    return {
        "classes": [*STRATEGIES, NONE],
        "quality": facts,
        "f1": f1,
        "speakers": speakers,
        "note": "Shares of sentences, by the likeliest class: they carry the classifier's errors. It learned from charity dialogues only.",
    }
