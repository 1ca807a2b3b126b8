"""Graders: which of two responses to one context is more persuasive, and how far to trust the answer.

`base` holds the interface, the rules that bind every grader, the baselines and the canaries; `pairs` what graders learn from;
`embedding` (and `readable`, its features alone; both on the fit in `linear`) and `ngram` the two families; `measure` their
cross-validated accuracy; `stage` the ai-labels stage. A grader trained on outcomes is called an outcome-trained grader, never "an LLM's feedback".
"""
