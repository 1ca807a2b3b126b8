"""Execute the notebook and store its outputs, free of whatever differs between machines and runs.

    python notebooks/refresh.py

Needs the packages of the extra `test`. The test suite executes the notebook the same way and compares the outputs with the
stored ones, so that they cannot go stale.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

from suasion.models import load_tokenizer
from suasion.sections.training import ModelSection

NOTEBOOK = Path(__file__).with_name("exploratory_analysis.ipynb")


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs. Raises nbclient's CellExecutionError where a cell fails."""
    load_tokenizer(ModelSection())  # makes the bundled model's cache, which would otherwise be announced in the first cell
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}}, record_timing=False).execute()
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    return notebook


if __name__ == "__main__":
    nbformat.write(execute(NOTEBOOK), NOTEBOOK)
