"""An LLM grader in this process: no text is sampled, the probability is read from the verdict's tokens.

The model is asked for one letter, and P(first) = p(A) / (p(A) + p(B)) at the place where it would write it (as Lee et al. 2023, arXiv
2309.00267, read their labeller). Both orders; the two log-probabilities of each stand in `raw`. A small model has next to no judgement,
and the bench shows it: canaries and accuracy say whether its verdicts mean anything. With `processes.count` above 1 the batches are read
by as many processes, one a GPU (workers.py). Batches that were read are kept in $SUASION_CACHE/verdict-tokens: an interrupted stage reads the
rest, in the batches in which it would have read all, so that it ends with the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from suasion.errors import UserError
from suasion.grading.base import UNREADABLE, Comparison, Judgement, bradley_terry, rule
from suasion.grading.llm import combine
from suasion.grading.rubric import Rubric
from suasion.progress import progress
from suasion.records import Turn, canonical_json, content_id
from suasion.sections.grading import LlmGrader, settings_of
from suasion.sections.training import ModelSection

BATCH_TOKENS = 4096
VERDICTS = ("A", "B")
DECIMALS = 5  # absorbs rounding that depends on how texts were batched
Reader = Callable[[Sequence[Sequence[int]]], list[list[float]]]


class ReadBatches:
    """What models said of whole batches of prompts, one JSON line a batch; a line that a kill tore is passed over. May be deleted."""

    def __init__(self, path: Path | None):
        """path: None keeps nothing."""
        self.path, self.known = path, dict[str, list[list[float]]]()
        text = path.read_text(encoding="utf-8", errors="replace") if path is not None and path.is_file() else ""
        self._torn = bool(text) and not text.endswith("\n")  # what is added must not join it
        for line in text.split("\n"):
            try:
                row = json.loads(line)
                self.known[row["key"]] = [[float(a), float(b)] for a, b in row["read"]]
            except (ValueError, TypeError, KeyError):
                continue

    def add(self, key: str, read: list[list[float]]) -> None:
        """Keep a batch; one write, so that processes may share the file."""
        self.known[key] = read
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write("\n" * self._torn + canonical_json({"key": key, "read": read}) + "\n")
            self._torn = False


class LocalLlmGrader:
    """See the module's docstring. kept: folder of read batches; None keeps none."""

    kind = "llm"

    def __init__(self, spec: LlmGrader, rubric: Rubric, seed: int, processes: int = 1, kept: Path | None = None):
        from suasion.models import base_hash

        self.spec, self.rubric, self.seed, self.processes, self.kept = spec, rubric, seed, processes, kept
        self._reader: Reader | None = None
        self.section = ModelSection(base=spec.model, system_prompt=rubric.system)
        self.template_hash = rubric.hash
        self._known: dict[Comparison, Judgement] = {}
        settings = {key: value for key, value in settings_of(spec).items() if key not in ("model", "template")}
        self.fingerprint = content_id("grader", canonical_json(settings), rubric.hash, base_hash(self.section), seed)

    def grade(self, items: Sequence[Comparison]) -> list[Judgement]:
        """One judgement a comparison, both orders combined. Equal comparisons are read once."""
        ruled = [rule(item) for item in items]
        asked = list(dict.fromkeys(item for item, known in zip(items, ruled, strict=True) if known is None))
        both = (True, False) if self.spec.orders == "both" else (True,)
        shown = list(dict.fromkeys(item if given else item.swapped() for item in asked for given in both))
        single = dict(zip(shown, self._read(shown), strict=True))
        judged = {
            item: single[item]
            if self.spec.orders == "given"
            else combine(single[item], single[item.swapped()].swapped(), self.spec.flips)
            for item in asked
        }
        return [judged[item] if known is None else known for item, known in zip(items, ruled, strict=True)]

    def _read(self, shown: Sequence[Comparison]) -> list[Judgement]:
        """One order each, told as of the texts in the order shown. Each order is read once a process."""
        missing = [one for one in shown if one not in self._known]
        if missing:
            scores = self._scores(missing)
            self._known |= {one: self._judgement(scores.get(i)) for i, one in enumerate(missing)}
        return [self._known[one] for one in shown]

    def _scores(self, shown: Sequence[Comparison]) -> dict[int, tuple[float, float]]:
        """log p(A), log p(B) of each comparison's prompt by its place; prompts that do not fit are left out."""
        from transformers import AutoConfig

        from suasion.bases import base_folder
        from suasion.chat import Renderer
        from suasion.models import load_tokenizer

        renderer = Renderer(load_tokenizer(self.section), self.rubric.system)
        letters = [renderer.encode(letter) for letter in VERDICTS]
        if any(len(one) != 1 for one in letters):
            raise UserError(f"the tokenizer of {self.spec.model} has no single token for A or for B. Choose another model.")
        prompts = [renderer.render([Turn(role="user", text=self.rubric.pair(one, self.seed, "local"))]).ids for one in shown]
        config = AutoConfig.from_pretrained(base_folder(self.section), trust_remote_code=False).get_text_config()
        longest = int(getattr(config, "max_position_embeddings", 0)) or max(map(len, prompts))
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), shown[i].context, shown[i].a))
        batches: list[list[int]] = []
        order = [i for i in order if len(prompts[i]) <= longest]
        while order:
            count = max(1, BATCH_TOKENS // len(prompts[order[0]]))
            batches.append(order[:count])
            order = order[count:]
        scores: dict[int, tuple[float, float]] = {}
        setup = {"model": self.section.model_dump(mode="json"), "letters": [one[0] for one in letters]}
        store = ReadBatches(self._store())
        asked = ",".join(str(one[0]) for one in letters)
        names = [content_id("verdict-batch", asked, *(",".join(map(str, prompts[i])) for i in batch)) for batch in batches]

        def take(number: int, read: list[list[float]]) -> None:
            scores.update({i: (a, b) for i, (a, b) in zip(batches[number], read, strict=True)})

        for number, name in enumerate(names):
            if name in store.known:
                take(number, store.known[name])
        left = [number for number, name in enumerate(names) if name not in store.known]
        with progress("read verdict tokens", sum(map(len, batches)), "verdicts", len(scores)) as advance:

            def keep(key: str, read: list[list[float]]) -> None:
                store.add(names[int(key)], read)
                take(int(key), read)
                advance(len(read))

            work = [(str(number), [prompts[i] for i in batches[number]]) for number in left]
            if self.processes > 1 and len(work) > 1:
                from suasion.models import compute
                from suasion.workers import spread

                maker = "suasion.grading.local_llm:verdict_reader"
                spread(maker, setup, work, keep, self.processes, compute(self.section).device)
            elif work:
                self._reader = self._reader or verdict_reader(setup)
                for key, batch in work:
                    keep(key, self._reader(batch))
        return scores

    def _store(self) -> Path | None:
        """The file of this model on this kind of machine: others round otherwise."""
        import torch

        from suasion.models import base_hash, compute

        how = content_id(
            "verdict-tokens", base_hash(self.section), canonical_json(compute(self.section).as_dict()), torch.__version__
        )
        return None if self.kept is None else self.kept / f"{how}.jsonl"

    @staticmethod
    def _judgement(read: tuple[float, float] | None) -> Judgement:
        if read is None:
            return Judgement(None, "none", UNREADABLE)
        p = float(bradley_terry(np.array([read[0]]), np.array([read[1]]))[0])
        return Judgement(
            p, "tie" if read[0] == read[1] else "a" if p > 0.5 else "b", "", canonical_json({"A": read[0], "B": read[1]})
        )


def verdict_reader(setup: dict[str, Any]) -> Reader:
    """Load the model; what comes back reads one batch of prompts (token ids): log p(A), log p(B) of each, at the prompt's end.

    In fp32 whatever the hardware: in bf16 a logit of 16 moves in steps of .06, so that two letters can tie and what stands beside a
    prompt decides.
    """
    import torch

    from suasion.models import Lineage, compute, load_merged

    section = ModelSection.model_validate(setup["model"])
    model = load_merged(Lineage(section), compute(section).device)

    @torch.no_grad()
    def read(prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        # Padded at the left, so that every row's next token stands in the last column: the model's own head is asked for that one only.
        width = max(map(len, prompts))
        tokens = torch.zeros((len(prompts), width), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
        places = torch.arange(width)[None, :] - torch.tensor([width - len(prompt) for prompt in prompts])[:, None]
        logits = model(
            input_ids=tokens.to(model.device), attention_mask=(places >= 0).long().to(model.device),
            position_ids=places.clamp(min=0).to(model.device), logits_to_keep=1, use_cache=False,
        ).logits[:, -1]  # fmt: skip
        logprobs = logits.float().log_softmax(-1)[:, setup["letters"]].cpu().double()
        return [[round(value, DECIMALS) for value in pair] for pair in logprobs.tolist()]

    return read
