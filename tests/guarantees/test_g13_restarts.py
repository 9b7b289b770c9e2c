"""G13: after a failure all start again from the last commit; a step that fails three times is a crash loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from guarantees.cases_g13 import Case, cases, run


@pytest.mark.parametrize("case", cases(3, seed=0), ids=str)
def test_a_failed_run_starts_again_by_itself(case: Case, tmp_path: Path) -> None:
    assert run(case, tmp_path) is None
