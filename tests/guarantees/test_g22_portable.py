"""G22, short: what each backend saves, each other loads, on 1, 2 and 4 processes, in each precision."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from itertools import combinations, product
from pathlib import Path

import pytest

from guarantees.cases_g22 import Cell, cases, cells, run_all, usable

#: Enough for each two of (backend, processes, precision) of the two cells to meet.
COUNT = 64
#: Without it the long form does not begin; here the other backends are tried all the same.
DEEPSPEED = find_spec("deepspeed") is not None


@pytest.mark.skipif(not DEEPSPEED, reason="deepspeed is not installed: G22 is tried without its stages")
def test_the_square_is_all_that_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = cases(10**6, 1)
    assert len(set(everything)) == len(everything) == len(cells()) ** 2
    assert {cell.world for cell in cells()} == {1, 2, 4}
    assert Cell("hybrid", 4, "fp16") in cells()
    assert not any(cell.backend == "single" and cell.world > 1 for cell in cells())
    assert not any(cell.backend.startswith("z") and cell.precision == "fp16" for cell in cells())
    assert cases(30, 5) == cases(30, 5) != cases(30, 6)
    monkeypatch.setattr("guarantees.cases_g22.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="deepspeed is not installed"):
        cases(30, 5)


def test_a_sample_has_every_pair() -> None:
    def met(pairs: Iterable[tuple[Cell, Cell]]) -> set[object]:
        return {two for save, load in pairs for two in combinations(enumerate([*save, *load]), 2)}

    there = usable(deepspeed=DEEPSPEED)
    assert met(cases(COUNT, 0, deepspeed=DEEPSPEED)) == met(product(there, repeat=2))


def test_any_cell_loads_what_any_other_saved(tmp_path: Path) -> None:
    chosen = cases(COUNT, 0, deepspeed=DEEPSPEED)
    found = run_all(chosen, tmp_path, timeout=240)
    assert {str(case): why for case, why in zip(chosen, found, strict=True) if why} == {}
