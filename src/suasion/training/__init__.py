"""Trainings: SFT on human replies, DPO on preferences. Both leave `adapter/` and `metrics.jsonl` in their stage folder."""
