"""G3: a torn checkpoint is never taken, a committed one never lost, wherever in a save the process is killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from guarantees.cases_g03 import Case, cases, run


@pytest.mark.parametrize("case", cases(12, seed=0), ids=str)
def test_killed_while_saving(case: Case, tmp_path: Path) -> None:
    assert run(case, tmp_path) is None
