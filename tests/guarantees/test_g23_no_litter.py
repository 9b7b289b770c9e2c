"""G23: ten seconds after any kill no process is left, and no file outside of the run's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from guarantees.cases_g23 import Case, cases, run


@pytest.mark.parametrize("case", cases(4, seed=0), ids=str)
def test_nothing_is_left_after_a_kill(case: Case, tmp_path: Path) -> None:
    assert run(case, tmp_path) is None
