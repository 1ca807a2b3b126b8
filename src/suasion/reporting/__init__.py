"""From `summary.json` to something a person reads: one HTML page, a Markdown paper, figures, tables, the terminal.

page turns the JSON of the stages into tables and paragraphs, once; making holds the tables of how the run was made; table is
the form of one; figures draws; stage writes the files of the report stage; publish makes the form that may be committed;
terminal prints the table at the end of a run. Nothing here computes a statistic: every number comes out of `summary.json`,
the corpus counts or the metrics of a training.
"""
