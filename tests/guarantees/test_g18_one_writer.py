"""G18: of several that want a run's folder one gets it; the others hear who has it; a dead holder's lock is free."""

from __future__ import annotations

from pathlib import Path

import pytest

from guarantees.cases_g18 import Case, cases, run, second_start


@pytest.mark.parametrize("case", cases(3, seed=0), ids=str)
def test_one_gets_the_folder(case: Case, tmp_path: Path) -> None:
    assert run(case, tmp_path) is None


def test_a_second_start_names_the_first(tmp_path: Path) -> None:
    assert second_start(tmp_path) is None
