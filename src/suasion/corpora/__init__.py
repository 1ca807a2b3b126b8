"""Corpora: reading ConvoKit's on-disk format, and turning conversations into examples and outcome pairs."""
