"""ChangeMyView (ConvoKit's winning-args-corpus): replies that changed a poster's mind, and replies to the same post that did not.

An example is a challenger's comment in a winning branch; its context is title, post and the actual path of turns between. Never
the poster's own comments: most rows with `success` = 1 in the full corpus are the persuaded person's, often the very comment that
awards the delta. Outcome pairs are the corpus's own (`pair_ids`). Losing comments occur in pairs only.

The raw text gives the outcome away in many places: edits of the post, delta tokens, thanks, a bot's confirmation. `clean` takes
out what can be taken out without touching an argument; `leaks` finds what is left, and no row in which it finds anything is kept.
"""

from __future__ import annotations

import html
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from suasion.corpora.convokit import Conversation, Tally, Utterance, ancestors, conversations, gone, tidy
from suasion.records import Example, OutcomePair, Turn, example_id, outcome_pair_id

# The footnote that moderators append to busy posts, and variants of it: from its rule or quote mark to the end.
_FOOTNOTE = re.compile(
    r"(?:(?:_{3,}|-{3,}|\*{3,})\s*)?(?:>\s*)?\[?[*_]*\s*Hello, users of CMV!.*"
    r"|_{3,}\s*>?[^\n]{0,120}\byour moderators\b.*",
    re.DOTALL,
)
_RULE_AT_END = re.compile(r"\s*(?:_{3,}|-{3,}|\*{3,})\s*$")
_EDIT_WORDS = ("edit", "update", "eta:", "eta ", "addendum")
_EDIT = re.compile(
    r"(?:^|(?<=\n)|(?<=[ ]{2})|(?<=[.!?)\]*] ))[ \t]*[>*_#~\[(=/-]*[ \t]*"  # where a line or a sentence begins
    r"(?:(?:another|more|final|last|big|not-so|quick|small|second|first|third|late|important|decision|ninja|yet)[ \t]+)*"
    r"(?:edit(?:ed|s)?|update(?:d|s)?|eta|addendum)(?:\d|\[\d\])?(?!\w)(?![ \t]+(?:war|button|history|wikipedia|your|the|out|a)\b)"
    r"(?:[^\n:.,!?-]{0,30}(?:[*_\])]*[ \t]*[:.,!?*_–—\n-]|$)|[ \t]+(?:i|thanks?|thank you)\b)",
    re.IGNORECASE,
)
_EDIT_ASIDE = re.compile(r"[ \t]*[(\[][*_ ]*(?:edit(?:ed)?|update)\b[^()\[\]]*[)\]]", re.IGNORECASE)
_DELTA_TOKEN = re.compile(r"(?:[∆Δ△]|!\s?delta\b)", re.IGNORECASE)
_DELTA_LINE = re.compile(r"(?m)^[ \t>*_]*(?:[∆Δ△]|!\s?delta)[ \t.!*_]*$\n?", re.IGNORECASE)
_MARKDOWN_LINK = re.compile(r"\[([^\[\]]*)\](?: (?=\(https?:))?\((?:[^()\s]|\([^()\s]*\))*(?:\s+\"[^\"]*\")?\)")
_BARE_LINK = re.compile(r"<?\bhttps?://(?:www\.)?([^\s/>)\]]+)[^\s>)\]]*>?", re.IGNORECASE)
_USER = re.compile(r"(?<![\w/])/?u/[A-Za-z0-9_-]{2,}")
_BOT = re.compile(r"^(?:DeltaBot|AutoModerator|.*_bot)$", re.IGNORECASE)

_OPINION = r"(?:views?|viewpoints?|minds?|opinions?|perspectives?|stances?|positions?|beliefs?|outlook)"
_CHANGED = r"(?:changed|shifted|altered|swayed|moved|flipped|reversed)"
_ADVERB = r"(?:(?:\w+ly|already|now|just|since|also|been|be|being|sort of|kind of|somewhat|quite|all|both|so|not|at least)\s+)"
_OPINION_WORDS = ("view", "mind", "opinion", "perspective", "stance", "position", "belief", "outlook")
_CHANGE_WORDS = ("chang", "shift", "alter", "sway", "moved", "flipped", "reversed")
# Kind, groups of words of each of which a text must hold one for the pattern to be worth trying, and the pattern. A pattern takes a
# hundred times as long as its words, and most texts hold "me", many "position" or "change", few both of a pattern's words.
_LEAKS = (
    (
        "delta",
        (("delta", "∆", "δ", "△"),),
        re.compile(
            r"[∆△]|(?<![\w])Δ|\bdelta ?(?:bot|log)\b|"
            r"(?<!nile )(?<!river )(?<!mississippi )(?<!niger )(?<!mekong )(?<!ganges )\bdeltas?\b"
            r"(?! (?:force|air|airlines?|flights?|blues|iv|ivs|rockets?|waves?|9|smelt|between|[vt]\b))",
            re.IGNORECASE,
        ),
    ),
    # "my view has been changed", "opinion slightly altered", "view changed"; not "I would like my view changed"
    (
        "view changed",
        (_OPINION_WORDS, _CHANGE_WORDS),
        re.compile(
            rf"\b{_OPINION}(?:\s+\w+){{0,3}}?\s+(?:has|have|had|was|were|is|are|got|'?s|'?ve)\s+{_ADVERB}*{_CHANGED}\b"
            rf"|\b{_OPINION}\s+{_ADVERB}*(?:has|have)\s+{_ADVERB}*{_CHANGED}\b"
            rf"|(?:^|[.!?:;*\n(,])[ \t]*(?:(?:my|your|his|her|their|ops?'?s?)\s+)?{_OPINION}\s+{_ADVERB}*(?:been\s+)?{_CHANGED}\b"
            rf"|\bview[- ]change:|\b(?:was|is) (?:my )?view changed\b"
            rf"|\b(?:had|gotten|got)\s+(?:my|your|his|her|their)\s+{_OPINION}\s+{_ADVERB}*{_CHANGED}\b",
            re.IGNORECASE,
        ),
    ),
    # "MODIFICATION OF MY VIEW", "I would like to amend my CMV", "after some discussion I now see": a view that changed in part
    (
        "view changed",
        (("modif", "amend", "revise", "now i ", "i now "),),
        re.compile(
            rf"\bmodif(?:ication|ications|ied version) (?:of|to) my {_OPINION}\b"
            rf"|\b(?:modif(?:y|ied)|amend(?:ed)?|revised?) my (?:\w+ )?(?:cmv|{_OPINION})\b"
            r"|\b(?:but|although|though|discussion,?) (?:now i|i now) (?:see|reali[sz]e|know|understand|believe|think)\b"
            r"|(?:^|\n)[ \t]*i now (?:see|reali[sz]e|understand|believe)\b",
            re.IGNORECASE,
        ),
    ),
    # "you changed my view", "this shifts my opinion", "thanks for changing my mind"
    (
        "changed my view",
        (_OPINION_WORDS, _CHANGE_WORDS),
        re.compile(
            rf"\b(?:{_CHANGED}|changes|shifts|alters)\s+(?:\w+\s+)?(?:of\s+)?(?:my|our)\s+(?:\w+\s+)?{_OPINION}\b"
            rf"|\b(?:thank\w*|thx|kudos|congrat\w*|props)\b[^.!?\n]{{0,60}}\bchanging\s+(?:my|our|his|her|their|ops?'?s?)\s+{_OPINION}\b"
            rf"|\b(?:has|have|had|'ve|already|successfully)\s+(?:\w+\s+)?{_CHANGED}\s+(?:your|his|her|their|ops?'?s?)\s+{_OPINION}\b",
            re.IGNORECASE,
        ),
    ),
    (
        "changed my view",
        (("cmv'", "cmved", "cmvd", "did cmv", "indeed cmv"),),
        re.compile(r"\bcmv'?e?d\b|\bdid(?: indeed)? cmv\b", re.IGNORECASE),
    ),
    (
        "persuaded",
        ((" me ",), ("won", "brought", "talked", "consider m")),
        re.compile(
            r"\b(?:won|brought|talked)\s+me\s+(?:over|round|around|down)\b"
            r"|\bconsider (?:me|my \w+) (?:convinced|persuaded|changed|converted)\b",
            re.IGNORECASE,
        ),
    ),
    (
        "persuaded",
        (("convinced", "persuaded", "swayed", "convert", "stand corrected", "come round", "come around"),),
        re.compile(
            r"\b(?:convinced|persuaded|swayed|converted)\s+me\b(?!\s+(?:not|to (?:buy|switch|post|try|join|go|move|take|see|come)))"
            r"|\bI(?:'ve| have|'m| am)?\s+(?:now\s+)?(?:been\s+)?(?:fully |totally |completely |pretty |somewhat |partially |now )?(?:persuaded|swayed)\b"
            r"|\bI(?:'ve| have) been (?:\w+ )?convinced\b|\bconsider (?:me|my \w+) (?:convinced|persuaded|changed|converted)\b"
            r"|\bI stand corrected\b|\bI(?:'ve| have) come (?:a)?round\b",
            re.IGNORECASE,
        ),
    ),
    # "thanks everyone", "you all made good points": words of a poster who looks back
    (
        "looking back",
        (("thank", "points", "credit to", "pointed out", "so many", "of you ", "replies"),),
        re.compile(
            r"\bthank(?:s|\s+you)\b[^.!?\n]{0,20} \[user\]|\bcredit to \[user\]"
            r"|\bthank(?:s|\s+you)(?:\s+so much)? for (?:the|my first) (?:reddit )?gold\b"
            r"|\bresponse to your (?:replies|comments)\b|\breplies so far\b|\bbecause so many (?:of you|people) have asked\b"
            r"|\b(?:some|many|most|a lot) of you (?:guys )?(?:have|'ve) (?:\w+ly )?(?:pointed out|had the best|made (?:\w+ ){0,2}points)\b|"
            r"\bthank(?:s|\s+you)(?:\s+so much|\s+again|\s+to)*\s+(?:all|everyone|everybody|y'?all|you\s+(?:all|guys)|those)\b(?![^.!?\n]*\badvance)"
            r"|\bthank(?:s|\s+you)(?:\s+so much)?\s+for\s+all\b(?![^.!?\n]*\badvance)"
            r"|\byou(?:'ve| guys|\s+have|\s+all)*\s+(?:made|raised|brought up|given me)\s+(?:\w+\s+){0,3}(?:good|great|excellent|compelling|valid)\s+points",
            re.IGNORECASE,
        ),
    ),
    (
        "moderation",
        (("moderators", "users of cmv", "confirmed:", "has been "),),
        re.compile(
            r"footnote from your moderators|users of CMV!|^confirmed: (?:\d+|one) delta|has been (?:awarded|removed) (?:a |by (?:the )?mod)",
            re.IGNORECASE | re.MULTILINE,
        ),
    ),
)


def leaks(text: str) -> list[str]:
    """Kinds of outcome-revealing words in a text, [] where there are none. It errs on the side of finding too much."""
    return list(_leaks(text))


@lru_cache(maxsize=1024)  # as for `clean`
def _leaks(text: str) -> tuple[str, ...]:
    plain = text.replace("’", "'")
    lower = plain.lower()
    found = {
        kind: None
        for kind, groups, pattern in _LEAKS
        if all(any(word in lower for word in words) for words in groups) and pattern.search(plain)
    }
    return tuple(found)


@lru_cache(maxsize=1024)  # a comment is read for its example and again for each of its pairs
def clean(text: str) -> str:
    """A post or comment without footnotes, edits, delta lines and addresses; entities decoded, links as their text, quotes kept."""
    for _ in range(3):  # "&amp;gt;" occurs: text that was escaped twice
        decoded = html.unescape(text)
        if decoded == text:
            break
        text = decoded
    text = tidy(text)
    if "Hello, users" in text or "your moderators" in text:
        text = _FOOTNOTE.sub("", text)
    text = _MARKDOWN_LINK.sub(r"\1", text)
    if "http" in text.lower():
        text = _BARE_LINK.sub(r"\1", text)
    if "u/" in text:
        text = _USER.sub("[user]", text)
    if any(word in text.lower() for word in _EDIT_WORDS):
        text = _without_edits(_EDIT_ASIDE.sub("", text))
    text = _DELTA_LINE.sub("", text)
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).rstrip()
    return (_RULE_AT_END.sub("", text) if text.endswith(("___", "---", "***")) else text).strip()


def clean_post(text: str) -> str:
    """As `clean`, and without the short lines in which the poster says that the view changed."""
    lines = clean(text).split("\n")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line for line in lines if len(line.split()) > 25 or not leaks(line))).strip()


def extract(folder: Path, tally: Tally, corpus: str = "cmv") -> Iterator[tuple[list[Example], list[OutcomePair]]]:
    """Yield examples and outcome pairs of each conversation; its last example is the bare post, with reply and outcome None.

    The bare post is for pools of prompts, where none of its replies is kept. Raises UserError for a broken corpus.
    """
    for conversation in conversations(folder, tally):
        thread = _thread(conversation, tally, corpus)
        if thread is not None:
            yield thread.examples(), thread.pairs()


def outcome_pairs(folder: Path) -> list[OutcomePair]:
    """Every clean outcome pair of a corpus, of any length: what a grader is trained on outside of a run."""
    return [pair for _, pairs in extract(folder, Tally()) for pair in pairs]


def _thread(conversation: Conversation, tally: Tally, corpus: str) -> _Thread | None:
    meta, root = conversation.meta, conversation.utterances.get(conversation.id)
    if root is None:
        tops = [utterance for utterance in conversation.utterances.values() if utterance.reply_to is None]
        root = tops[0] if len(tops) == 1 else None
    title, body = (clean(value) if isinstance(value := meta.get(key), str) else "" for key in ("op-title", "op-text-body"))
    if root is not None and not gone(root.text):
        body = root.text
    title, body = "" if gone(title) else title, "" if gone(body) else clean_post(body)
    poster = meta.get("op-userID")
    poster = tidy(poster) if isinstance(poster, str) and tidy(poster) else (root.speaker if root is not None else "[deleted]")
    post = "\n\n".join(part for part in (title, body) if part)
    thread = _Thread(conversation, tally, corpus, post, poster, root.id if root is not None else conversation.id)
    tally.read["posts"] += root is not None
    tally.read["comments without an outcome"] += len(conversation.utterances) - (root is not None) - thread.labelled
    tally.read["posts without title"] += not title
    tally.read["posts without body"] += not body
    tally.read["posts that nobody answered"] += len(conversation.utterances) == 1
    tally.read["winning comments"] += len(thread.winning)
    tally.read["losing comments"] += len(thread.losing)
    tally.read["outcome pairs"] += len(thread.sides)
    if post and not leaks(post):
        return thread
    tally.dropped["post that reveals the outcome" if post else "post without title and body"] += 1
    tally.dropped["winning comment under a dropped post"] += len(thread.winning)
    tally.dropped["pair under a dropped post"] += len(thread.sides)
    return None


class _Thread:
    """One conversation while it is taken apart."""

    def __init__(self, conversation: Conversation, tally: Tally, corpus: str, post: str, poster: str, root: str):
        self.id, self.utterances, self.tally, self.corpus = conversation.id, conversation.utterances, tally, corpus
        self.post, self.poster, self.root = post, poster, root
        self.author = conversation.id if gone(poster) else poster  # everybody who deleted an account is called [deleted]
        self.labelled = 0  # comments with an outcome, whoever wrote them
        self.winning, self.losing = self._comments(1), self._comments(0)
        self.sides: dict[str, tuple[list[Utterance], list[Utterance]]] = defaultdict(lambda: ([], []))
        for side, comments in enumerate((self.winning, self.losing)):
            for comment in comments:
                for pair in sorted(set(_pair_ids(comment))):
                    self.sides[pair][side].append(comment)

    def examples(self) -> list[Example]:
        """One for each winning comment that is kept, then the bare post."""
        found: dict[str, Example] = {}
        for comment in self.winning:
            (turns, fault), (reply, reply_fault) = self._context(comment), self._reply(comment)
            if turns is None or reply is None:
                self.tally.dropped[fault or reply_fault] += 1
                continue
            example = self._example(turns, reply)
            self.tally.dropped["comment that occurs twice"] += example.id in found
            found[example.id] = example
        return [*found.values(), self._example((Turn(role="user", text=self.post),), None)]

    def pairs(self) -> list[OutcomePair]:
        """The corpus's pairs whose two comments are kept. A pair that names a whole branch stands for its first comment."""
        found: dict[str, OutcomePair] = {}
        for pair in sorted(self.sides):
            winners, losers = self.sides[pair]
            if not winners or not losers:
                self.tally.dropped["pair with one side only"] += 1
                continue
            winner, loser = min(winners, key=self._depth), min(losers, key=self._depth)
            turns, won, lost = self._context(winner)[0], self._reply(winner)[0], self._reply(loser)[0]
            if winner.reply_to != loser.reply_to:
                self.tally.dropped["pair with two contexts"] += 1
            elif turns is None or won is None or lost is None:
                self.tally.dropped["pair with a comment that is not kept"] += 1
            elif won == lost:
                self.tally.dropped["pair of equal comments"] += 1
            else:
                row = self._pair(turns, won, lost)
                self.tally.dropped["pair that occurs twice"] += row.id in found
                found[row.id] = row
        return list(found.values())

    def _comments(self, success: int) -> list[Utterance]:
        """Challengers' comments of one outcome, by id; the poster's own and bots' are tallied and left out."""
        kept = []
        for comment in sorted(self.utterances.values(), key=lambda utterance: utterance.id):
            value = comment.meta.get("success")
            if comment.id == self.root or isinstance(value, bool) or value != success:
                continue
            self.labelled += 1
            if _BOT.match(comment.speaker):
                self.tally.dropped[f"bot's comment with success {success}"] += 1
            elif comment.speaker != self.poster:
                kept.append(comment)
            elif gone(self.poster):  # any other [deleted] may be the poster too: never train on the persuaded person
                self.tally.dropped[f"comment with success {success} whose author may be the poster"] += 1
            else:
                self.tally.dropped[f"poster's own comment with success {success}"] += 1
        return kept

    def _context(self, comment: Utterance) -> tuple[tuple[Turn, ...] | None, str]:
        """Post and path up to a comment's parent as turns; None and the reason where it is broken or tells how it ended."""
        path, fault = ancestors(self.utterances, comment.id)
        if path and path[0].id == self.root:
            path = path[1:]
        elif not fault:
            fault = "missing parent"  # a second root: what it answers is not in the corpus
        path = [utterance for utterance in path if not _BOT.match(utterance.speaker)]
        challengers = list(dict.fromkeys(u.speaker for u in [*path, comment] if u.speaker != self.poster))
        turns = [Turn(role="user", text=self.post)]
        for utterance in path:
            text = "" if gone(utterance.text) else clean(utterance.text)
            if not text:
                fault = fault or "turn without text in the context"
            elif leaks(text) or _DELTA_TOKEN.search(html.unescape(utterance.text)):
                fault = fault or "context that reveals the outcome"
            if utterance.speaker == self.poster:
                turns.append(Turn(role="user", text=text))
            else:
                name = f"Challenger {challengers.index(utterance.speaker) + 1}" if len(challengers) > 1 else None
                turns.append(Turn(role="assistant", text=text, name=name))
        return (None if fault else tuple(turns)), fault

    def _reply(self, comment: Utterance) -> tuple[str | None, str]:
        """The cleaned comment; None and the reason where nothing is left of it or it tells how it ended."""
        text = "" if gone(comment.text) else clean(comment.text)
        if gone(text):
            return None, "comment without text"
        return (None, "comment that reveals the outcome") if leaks(text) else (text, "")

    def _depth(self, comment: Utterance) -> tuple[int, str]:
        return len(ancestors(self.utterances, comment.id)[0]), comment.id

    def _example(self, turns: tuple[Turn, ...], reply: str | None) -> Example:
        return Example(
            id=example_id(self.corpus, self.id, turns, reply),
            corpus=self.corpus,
            conversation_id=self.id,
            author=self.author,
            turns=turns,
            reply=reply,
            outcome=None if reply is None else 1.0,
        )

    def _pair(self, turns: tuple[Turn, ...], winner: str, loser: str) -> OutcomePair:
        return OutcomePair(
            id=outcome_pair_id(self.corpus, self.id, turns, winner, loser),
            corpus=self.corpus,
            conversation_id=self.id,
            group=self.author,
            turns=turns,
            winner=winner,
            loser=loser,
        )


def _pair_ids(comment: Utterance) -> Iterable[str]:
    pairs = comment.meta.get("pair_ids")
    return [pair for pair in pairs if isinstance(pair, str)] if isinstance(pairs, list) else []


def _without_edits(text: str) -> str:
    """The text without EDIT and UPDATE paragraphs.

    Edits stand at the end as a rule, and go on over several paragraphs: after the first quarter of a text everything goes. Before
    it only the paragraph goes, to its end or, in texts whose line breaks were lost, to the next two blanks.
    """
    while match := _EDIT.search(text):
        bare = not text[match.end() :].split("\n\n")[0].strip(" *_-.:\n")
        if match.start() >= len(text) / 4 or (bare and match.start() > 0):
            return text[: match.start()].rstrip()
        end = re.compile(r"\n\s*\n|(?<=\S)  (?=\S)").search(text, match.end() + 1)
        text = text[: match.start()] + (text[end.end() :] if end else "")
    return text
