"""G12: a hang is found in time, the process that the others wait for is named, and all stacks are in one file.

What is slow and goes on is no hang.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from guarantees.cases_g12 import ALONE, Case, cases, run


@pytest.mark.parametrize("case", [*cases(5, seed=0), *ALONE[:2]], ids=str)
def test_a_hang_is_found_and_named(case: Case, tmp_path: Path) -> None:
    assert run(case, tmp_path) is None


def test_what_is_slow_is_no_hang(tmp_path: Path) -> None:
    assert run(Case("slow_evaluation", 0, 2, 1), tmp_path) is None
