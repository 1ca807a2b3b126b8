"""From model responses and a grader's verdicts to an answer with its uncertainty.

statistics (intervals, tests), ranking (Bradley-Terry, rank score), metrics (what the text looks like) and power are pure
mathematics; summary turns rows into the one dictionary, `summary.json`, from which every table, figure and sentence comes;
wording writes its sentences. The stage that samples responses and asks the grader is `evaluation.stage`.
"""
