"""G1 and G23: killed anywhere, the same command gives the bits of the run that nobody killed, and nothing is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from guarantees.cases_g01 import Case, cases, run


@pytest.mark.parametrize("case", cases(27, seed=0), ids=str)
def test_a_killed_run_comes_to_the_same_bits(case: Case, tmp_path: Path) -> None:
    assert run(case, tmp_path) is None
