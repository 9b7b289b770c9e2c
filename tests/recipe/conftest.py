"""A directory of the user's own, with what the built-in files do not have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from runner.errors import Problem
from runner.recipe.compose import Composition, compose

#: A recipe that needs nothing else; tests add lines to it.
GOOD = """\
# A recipe of one's own.
name: own
model: {_target_: torch.nn.Linear, in_features: 4, out_features: 2}
task: classification
data:
  train: {_target_: runner.data.synthetic.random_classification, samples: 8}
train: {epochs: 1}
batch: {global_size: 8}
"""


@dataclass
class Project:
    folder: Path

    def write(self, name: str, text: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def compose(self, *overrides: str, config_dirs: tuple[Path, ...] = ()) -> Composition:
        return compose(list(overrides), directory=self.folder, config_dirs=config_dirs)

    def check(self, *overrides: str) -> list[Problem]:
        return self.compose(*overrides).check()

    def own(self, extra: str = "", *overrides: str) -> list[Problem]:
        """The problems of the recipe GOOD with more lines."""
        self.write("recipes/own.yaml", GOOD + extra)
        return self.check("+recipe=own", *overrides)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture
def good() -> str:
    return GOOD
