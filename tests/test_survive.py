"""The table of the long forms: which results count, and what the exit code says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def survive(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    import benchmarks.survive as module

    monkeypatch.setattr(module, "code", lambda: "new")
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    return module


def line(code: str, index: int, held: bool) -> str:
    why = None if held else "it did not"
    common = {"guarantee": "g03", "seed": 0, "seconds": 1.0, "date": "2026-01-01", "machine": "m", "torch": "t"}
    return json.dumps({**common, "code": code, "index": index, "case": str(index), "held": held, "why": why})


@pytest.mark.parametrize(
    ("old", "new", "row", "code"),
    [
        ([True] * 10, [True] * 3, "10/10", 0),
        ([True] * 10, [True] * 10, "10/10", 0),
        ([True] * 10, [True, False, True], "2/3", 1),
        ([True] * 9 + [False], [True] * 3, "3/3", 0),
    ],
)
def test_a_row_is_of_one_state_and_hides_nothing_newer(
    survive: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    old: list[bool], new: list[bool], row: str, code: int,
) -> None:  # fmt: skip
    lines = [line("old", i, held) for i, held in enumerate(old)] + [line("new", i, held) for i, held in enumerate(new)]
    (tmp_path / "results").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "survive", "--table", "--results", str(tmp_path / "results")])
    from benchmarks.__main__ import main

    assert main() == code
    out = capsys.readouterr().out
    assert f"| {row} |" in out
    assert ("g03: 1 of 3 cases did not hold with the code as it is now" in out) == bool(code)
