"""The bundled corpora: large enough, written text by text, messy like the real ones, and with no easy way to tell winners."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from suasion.corpora import cmv, p4g
from suasion.corpora.convokit import Tally, conversations, read_utterances
from suasion.corpora.stage import bundled_path
from suasion.errors import UserError
from suasion.records import read_json

THREADS, CHARITY = bundled_path("cmv"), bundled_path("p4g")


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower().replace("\u2019", "'").replace("&gt;", ">").replace("&amp;", "&"))


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """Every text of both corpora, titles included."""
    found = {f"t{u.id}": u.text for u in read_utterances(THREADS, Tally())} | {
        f"c{u.id}": u.text for u in read_utterances(CHARITY, Tally())
    }
    titles = {f"title {c.id}": str(c.meta["op-title"]) for c in conversations(THREADS, Tally())}
    return found | titles


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str, str]]:
    """(thread, winner, loser), as written."""
    sides: dict[str, dict[int, tuple[str, str]]] = defaultdict(dict)
    for utterance in read_utterances(THREADS, Tally()):
        for pair in utterance.meta["pair_ids"]:
            sides[pair][utterance.meta["success"]] = utterance.conversation_id, utterance.text
    return [(side[1][0], side[1][1], side[0][1]) for side in sides.values()]


def test_counts(pairs: list[tuple[str, str, str]]) -> None:
    threads = list(conversations(THREADS, Tally()))
    dialogues = list(conversations(CHARITY, Tally()))
    assert len(threads) == 126
    assert len(dialogues) == 42
    assert len(pairs) == 234
    two_losers = Counter(thread for thread, _, _ in pairs)
    assert Counter(two_losers.values()) == {2: 108, 1: 18}
    branches = [c for c in threads if any(u.reply_to not in (None, c.id) for u in c.utterances.values())]
    assert len(branches) == 36
    posters = {str(c.meta["op-userID"]) for c in threads}
    assert len(posters - {"[deleted]"}) == 118
    challengers = Counter((u.speaker, c.id) for c in threads for u in c.utterances.values() if u.speaker.startswith("challenger"))
    assert max(Counter(name for name, _ in challengers).values()) > 1  # somebody answers in several threads
    assert sum(bool(p4g.donation(c.meta["donation_ee"])) for c in dialogues) == 24
    assert len({c.meta["user_er"] for c in dialogues}) < 42


def test_lengths() -> None:
    for thread in conversations(THREADS, Tally()):
        post = re.split(r"\s*_{3,}", thread.utterances[thread.id].text)[0]
        assert 60 <= len(words(post)) <= 120, thread.id
        for utterance in thread.utterances.values():
            if utterance.meta["pair_ids"]:
                assert 40 <= len(words(utterance.text)) <= 90, utterance.id


def test_dialogues_alternate_and_are_labelled() -> None:
    for dialogue in conversations(CHARITY, Tally()):
        said = list(dialogue.utterances.values())
        assert len(said) >= 10
        assert [u.meta["role"] for u in said] == [n % 2 for n in range(len(said))]
        for utterance in said:
            assert utterance.speaker == dialogue.meta["user_er" if utterance.meta["role"] == 0 else "user_ee"]
            sentences = utterance.meta["text_by_sent"].split(" <s> ")
            assert len(sentences) == len(utterance.meta["label_1"]) == utterance.meta["n_sents"]
            assert " ".join(sentences) == utterance.text


def test_no_two_texts_share_six_words(texts: dict[str, str]) -> None:
    where: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for name, text in texts.items():
        said = words(text)
        for i in range(len(said) - 5):
            where[tuple(said[i : i + 6])].add(name)
    assert {" ".join(run): names for run, names in where.items() if len(names) > 1} == {}


def test_no_two_texts_are_near_duplicates(texts: dict[str, str]) -> None:
    """Exact Jaccard similarity of word sets, stricter than of word 5-grams, over all texts of at least 20 words."""
    from sklearn.feature_extraction.text import CountVectorizer

    long = [text for text in texts.values() if len(words(text)) >= 20]
    matrix = CountVectorizer(binary=True).fit_transform(long).astype(np.float32)
    shared = (matrix @ matrix.T).toarray()
    sizes = shared.diagonal()
    similarity = shared / (sizes[:, None] + sizes[None, :] - shared)
    np.fill_diagonal(similarity, 0)
    assert similarity.max() < 0.3


def test_length_does_not_tell_winners(pairs: list[tuple[str, str, str]]) -> None:
    longer = np.mean([len(words(winner)) > len(words(loser)) for _, winner, loser in pairs])
    assert 0.45 <= longer <= 0.55


@pytest.mark.parametrize("weights", ["presence", "counts", "tf-idf"])
def test_vocabulary_does_not_tell_winners(pairs: list[tuple[str, str, str]], weights: str) -> None:
    """Logistic regression on the difference of two bags of words, ten folds by thread, three divisions."""
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    threads, winners, losers = (np.array(column) for column in zip(*pairs, strict=True))
    vectorizer = TfidfVectorizer() if weights == "tf-idf" else CountVectorizer(binary=weights == "presence")
    right = []
    for division in range(3):
        for train, test in GroupKFold(10, shuffle=True, random_state=division).split(winners, groups=threads):
            vectorizer.fit([*winners[train], *losers[train]])
            difference = vectorizer.transform(winners) - vectorizer.transform(losers)
            rows, wins = vstack([difference[train], -difference[train]]), np.repeat([1, 0], len(train))
            model = LogisticRegression(C=1.0, fit_intercept=False, solver="liblinear").fit(rows, wins)
            right.extend(model.decision_function(difference[test]) > 0)
    assert np.mean(right) <= 0.65


def test_the_mess_of_real_data_is_there() -> None:
    said = list(read_utterances(THREADS, Tally()))
    everything = "\n".join(utterance.text for utterance in said)
    for mess in (
        "&amp;",
        "&gt;",
        "&lt;",
        "](https://",
        "EDIT:",
        "UPDATE",
        "!delta",
        "&#8710;",
        "\u2206",
        "[deleted]",
        "_____",
        "Hello, users of CMV!",
    ):
        assert mess in everything, mess
    assert sum("Hello, users of CMV!" in utterance.text for utterance in said) == 3
    assert sum(utterance.speaker == "DeltaBot" for utterance in said) == 2
    assert sum(utterance.text == "[deleted]" for utterance in said) == 1
    authors = Counter(utterance.speaker for utterance in said if utterance.text != "[deleted]")
    assert authors["[deleted]"] == 2  # a poster and a challenger
    first = {}
    for utterance in said:
        if utterance.meta["pair_ids"]:
            first.setdefault(utterance.conversation_id, utterance.meta["success"])
    assert 0.2 < np.mean(list(first.values())) < 0.6  # the winner is not always the first comment, nor ever the last


def test_nothing_outcome_revealing_is_left() -> None:
    tally = Tally()
    rows = [row for examples, pairs in cmv.extract(THREADS, tally) for row in [*examples, *pairs]]
    for row in rows:
        told = [turn.text for turn in row.turns] + [getattr(row, side, None) or "" for side in ("reply", "winner", "loser")]
        assert not any(cmv.leaks(text) for text in told), row.id
        assert not re.search(r"&\w+;|&#\d+;|https?:|\bEDIT\b|UPDATE|_____|/u/", "\n".join(told)), row.id
    assert len([row for row in rows if getattr(row, "reply", None)]) == 153
    assert tally.dropped["post that reveals the outcome"] == 0


def test_it_comes_with_its_licence() -> None:
    folder = THREADS.parent
    assert "CC0-1.0" in (folder / "LICENSE").read_text()
    assert "CC0-1.0" in (folder / "README.md").read_text()
    for corpus in (THREADS, CHARITY):
        assert {path.name for path in corpus.iterdir()} == {
            *("utterances.jsonl", "conversations.json", "speakers.json", "corpus.json", "index.json"),
        }
        speakers = set(read_json(corpus / "speakers.json"))
        assert speakers == {json.loads(line)["speaker"] for line in Path(corpus / "utterances.jsonl").read_text().splitlines()}


def test_there_is_no_other_bundled_corpus() -> None:
    with pytest.raises(UserError, match="no bundled corpus of kind jsonl"):
        bundled_path("jsonl")
