"""How far the model that samples is from the model that was trained, in bf16: KL and log-probabilities a token.

    python benchmarks/precision.py --adapter runs/cmv-cpu/03-sft/adapter --responses runs/cmv-cpu/04-sample/responses.jsonl \\
        --prompts runs/cmv-cpu/02-pools/rlaif.jsonl

Ways to compute the same model, on the same sampled responses, all under bf16 autocast:

    trained     fp32 base weights with the live adapter: what the optimiser saw
    sampled     what stage `sample` decodes with: linear layers rounded to bf16 once, the newest adapter beside them
    merged      adapter merged in fp32, the sum rounded once: what `dpo` takes as reference
    folded      adapter added to base weights that are bf16 already, in bf16: what design decision 4 forbids, for comparison

KL(trained || other) a token is exact over the vocabulary. The bound is 1e-3 for `sampled`; the exit code is 1 where it is exceeded. fp32
is the trained model without autocast: how much of all this is bf16 itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

BOUND = 1e-3  # nats a token


def main() -> int:
    """Print the table as Markdown."""
    from peft import PeftModel

    from suasion.chat import Renderer
    from suasion.models import Compute, Lineage, load_base, load_to_sample, load_tokenizer, prepare_to_decode
    from suasion.records import Prompt, Response, read_rows
    from suasion.sections.training import ModelSection
    from suasion.training.prefix import pack, reply_logits, sum_logprobs, token_kl

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--responses", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--count", type=int, default=16, help="responses to compare on")
    parser.add_argument("--base", default=ModelSection().base)
    options = parser.parse_args()
    section = ModelSection(base=options.base)
    renderer = Renderer(load_tokenizer(section), section.system_prompt)
    prompts = {row.id: renderer.render(row.turns).ids for row in read_rows(options.prompts, Prompt)}
    responses = sorted(
        (row for row in read_rows(options.responses, Response) if row.prompt_id in prompts and row.tokens), key=lambda row: row.id
    )
    packed = [pack([(prompts[row.prompt_id], [row.tokens])]) for row in responses[: options.count] if row.tokens]
    half = Compute("cpu", "bfloat16", torch.get_num_threads())
    full = Compute("cpu", "float32", torch.get_num_threads())

    def adapted(base: Any) -> Any:
        return PeftModel.from_pretrained(base, str(options.adapter), autocast_adapter_dtype=False).eval()

    def logits_of(model: Any, hardware: Compute) -> list[torch.Tensor]:
        with torch.no_grad(), hardware.autocast():
            return [reply_logits(model, one) for one in packed]

    live = adapted(load_base(section))
    trained, exact = logits_of(live, half), logits_of(live, full)
    merged = logits_of(prepare_to_decode(live.merge_and_unload(), half), half)
    sampled = logits_of(load_to_sample(Lineage(section, (options.adapter,)), half), half)
    # An adapter in bf16 on a base in bf16, merged there: every sum is rounded to eight bits of mantissa.
    folded = logits_of(adapted(load_base(section).to(torch.bfloat16)).to(torch.bfloat16).merge_and_unload(), half)
    found = {}
    for name, others in (("sampled", sampled), ("merged", merged), ("folded", folded), ("fp32", exact)):
        kl = torch.cat([token_kl(a, b) for a, b in zip(trained, others, strict=True)])
        gaps = [
            abs(float(sum_logprobs(a, one)[0] - sum_logprobs(b, one)[0])) / len(one.targets)
            for a, b, one in zip(trained, others, packed, strict=True)
        ]
        found[name] = {
            "kl": float(kl.mean()),
            "kl_largest": float(kl.max()),
            "logprob": sum(gaps) / len(gaps),
            "logprob_largest": max(gaps),
        }
    tokens = sum(len(one.targets) for one in packed)
    print(f"{len(packed)} responses, {tokens} tokens; against the trained model under bf16 autocast, nats a token\n")
    print("| model | KL, mean | KL, largest | log-probability, mean difference a response | largest |\n|---|---|---|---|---|")
    for name, row in found.items():
        print(f"| {name} | {row['kl']:.2e} | {row['kl_largest']:.2e} | {row['logprob']:.2e} | {row['logprob_largest']:.2e} |")
    print(json.dumps(found), file=sys.stderr)
    return 0 if found["sampled"]["kl"] <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
