"""What `suasion verify` asks of the rows of a run once their bytes are known to be unchanged.

`evidence.py` says what may be looked at, `counts.py` compares numbers of rows, `meaning.py` pools, seal and lineages, `losses.py` what
every arm's first step must have shown.
"""
