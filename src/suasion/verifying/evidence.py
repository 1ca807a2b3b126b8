"""What the checks of `suasion verify` look at: the finished stages of a run whose artefacts are what their manifests say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from suasion.recipe import Recipe
from suasion.rundir import Manifest, RunDir
from suasion.sections.training import DpoArm


@dataclass(frozen=True)
class Evidence:
    """A run as far as it can be judged. manifests: stage -> manifest, only of stages that are finished and unchanged."""

    directory: RunDir
    recipe: Recipe
    manifests: dict[str, Manifest]

    def path(self, stage: str, file: str) -> Path:
        """Where a file of a stage lies."""
        return self.directory.folder(stage) / file

    def arms(self) -> list[tuple[DpoArm, Manifest]]:
        """The arms that are trained, with the manifests of their trainings."""
        known = [(arm, self.manifests.get(f"dpo-{arm.name}")) for arm in self.recipe.dpo]
        return [(arm, manifest) for arm, manifest in known if manifest is not None]

    def lines(self, stage: str, file: str) -> int:
        """Rows of a JSONL file: every row ends its line."""
        count = 0
        with self.path(stage, file).open("rb") as handle:
            while piece := handle.read(2**20):
                count += piece.count(b"\n")
        return count
