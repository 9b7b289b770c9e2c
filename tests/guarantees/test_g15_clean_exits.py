"""G15: a run that is finished ends with code 0, says nothing of an abort, and leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from guarantees.cases_g15 import Case, cases, run


@pytest.mark.parametrize("case", cases(1, seed=0), ids=str)
def test_a_finished_run_ends_cleanly(case: Case, tmp_path: Path) -> None:
    assert run(case, tmp_path) is None
