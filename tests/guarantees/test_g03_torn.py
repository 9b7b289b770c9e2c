"""G3: a torn checkpoint is never taken, a committed one never lost, wherever in a save the process is killed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from guarantees.cases_g03 import Case, cases, left, run
from guarantees.store_children import run_children


@pytest.mark.parametrize("case", cases(12, seed=0), ids=str)
def test_killed_while_saving(case: Case, tmp_path: Path) -> None:
    assert run(case, tmp_path) is None


def test_some_die_with_a_file_of_which_a_part_is_written(tmp_path: Path) -> None:
    """The cases above would prove little if all files were written at once."""
    sizes = []
    for at in range(4, 16, 3):
        place = tmp_path / str(at)
        codes, said = run_children("guarantees.cases_g03:save_and_die", [str(place), [0, at], True, False], kill=[0])
        assert codes == [-signal.SIGKILL], said
        sizes += [path.stat().st_size for path in place.glob(".tmp-*/rank_0.safetensors")]
        assert left(place, 3) is None
    whole = (tmp_path / "4" / "step_00000003" / "rank_0.safetensors").stat().st_size
    assert any(0 < size < whole for size in sizes), sizes
