"""An LLM grader in this process: no text is sampled, the probability is read from the verdict's tokens.

The model is asked for one letter, and P(first) = p(A) / (p(A) + p(B)) at the place where it would write it (as Lee et al. 2023, arXiv
2309.00267, read their labeller). Both orders; the two log-probabilities of each stand in `raw`. A small model has next to no judgement,
and the bench shows it: canaries and accuracy say whether its verdicts mean anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from suasion.errors import UserError
from suasion.grading.base import Comparison, Judgement, bradley_terry, rule
from suasion.grading.llm import combine
from suasion.grading.rubric import Rubric
from suasion.progress import progress
from suasion.records import canonical_json, content_id
from suasion.sections.grading import LlmGrader
from suasion.sections.training import ModelSection

BATCH_TOKENS = 4096
VERDICTS = ("A", "B")
DECIMALS = 5  # absorbs rounding that depends on how texts were batched


class LocalLlmGrader:
    """See the module's docstring."""

    kind = "llm"

    def __init__(self, spec: LlmGrader, rubric: Rubric, seed: int):
        from suasion.models import base_hash

        self.spec, self.rubric, self.seed = spec, rubric, seed
        self.section = ModelSection(base=spec.model, system_prompt=rubric.system)
        self.template_hash = rubric.hash
        settings = spec.model_dump(mode="json", exclude={*LlmGrader.TRANSPORT, "model"})
        self.fingerprint = content_id("grader", canonical_json(settings), rubric.hash, base_hash(self.section), seed)

    def grade(self, items: Sequence[Comparison]) -> list[Judgement]:
        """One judgement a comparison, both orders combined. Equal comparisons are read once."""
        ruled = [rule(item) for item in items]
        asked = list(dict.fromkeys(item for item, known in zip(items, ruled, strict=True) if known is None))
        shown = list(dict.fromkeys(one for item in asked for one in (item, item.swapped())))
        single = dict(zip(shown, self._read(shown), strict=True))
        judged = {}
        for item in asked:
            first = single[item]
            both = combine(first, single[item.swapped()].swapped(), self.spec.flips)
            judged[item] = first if self.spec.orders == "given" else both
        return [judged[item] if known is None else known for item, known in zip(items, ruled, strict=True)]

    def estimate(self, items: Sequence[Comparison]) -> None:
        """Nothing is paid for here."""

    @cached_property
    def _loaded(self) -> tuple[Any, Any, tuple[int, int], Any]:
        from suasion.chat import Renderer
        from suasion.models import Lineage, compute, load_merged, load_tokenizer

        hardware = compute(self.section)
        renderer = Renderer(load_tokenizer(self.section), self.rubric.system)
        ids = [renderer.encode(letter) for letter in VERDICTS]
        if any(len(one) != 1 for one in ids):
            raise UserError(f"the tokenizer of {self.spec.model} has no single token for A or for B. Choose another model.")
        return load_merged(Lineage(self.section), hardware.device), renderer, (ids[0][0], ids[1][0]), hardware

    def _read(self, shown: Sequence[Comparison]) -> list[Judgement]:
        import torch

        from suasion.records import Turn

        if not shown:
            return []
        model, renderer, letters, hardware = self._loaded
        prompts = [renderer.render([Turn(role="user", text=self.rubric.pair(one, self.seed, "local"))]).ids for one in shown]
        longest = int(getattr(model.config, "max_position_embeddings", 0)) or None
        scores: dict[int, tuple[float, float]] = {}
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), shown[i].context, shown[i].a))
        with progress("read verdict tokens", len(shown), "verdicts") as advance:
            while order:
                width = len(prompts[order[0]])
                batch, order = order[: max(1, BATCH_TOKENS // width)], order[max(1, BATCH_TOKENS // width) :]
                if longest is not None and width > longest:
                    advance(len(batch))
                    continue
                # Padded at the right: a causal model's logits at a row's last token do not see what follows it.
                tokens = torch.zeros((len(batch), width), dtype=torch.long)
                for row, i in enumerate(batch):
                    tokens[row, : len(prompts[i])] = torch.tensor(prompts[i])
                lengths = torch.tensor([len(prompts[i]) for i in batch])
                mask = torch.arange(width)[None, :] < lengths[:, None]
                with torch.no_grad(), hardware.autocast():
                    hidden = model.base_model(
                        input_ids=tokens.to(model.device), attention_mask=mask.to(model.device)
                    ).last_hidden_state
                    last = hidden[torch.arange(len(batch)), lengths - 1]
                    logprobs = model.lm_head(last).float().log_softmax(-1)[:, list(letters)].cpu().double()
                for i, (a, b) in zip(batch, logprobs.tolist(), strict=True):
                    scores[i] = (round(a, DECIMALS), round(b, DECIMALS))
                advance(len(batch))
        return [self._judgement(scores.get(i)) for i in range(len(shown))]

    @staticmethod
    def _judgement(read: tuple[float, float] | None) -> Judgement:
        if read is None:
            return Judgement(None, "none", "the texts do not fit into the model's context")
        p = float(bradley_terry(np.array([read[0]]), np.array([read[1]]))[0])
        return Judgement(
            p, "tie" if read[0] == read[1] else "a" if p > 0.5 else "b", "", canonical_json({"A": read[0], "B": read[1]})
        )
