"""The long forms: what is run and written down, which results count in the table, and what the exit code says."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
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


def test_writing_keeps_the_rows_of_other_results(survive: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr(survive, "TABLE", page)
    head = ["| | guarantee |", "|---|---|"]
    page.write_text("\n".join(["before", survive.BEGIN, *head, "| G3 | old |", "| G10 | old |", survive.END, "after"]))
    survive.write([*head, "| G3 | new |", "| G4 | new |"])
    rows = ["| G3 | new |", "| G4 | new |", "| G10 | old |"]
    assert page.read_text().split("\n") == ["before", survive.BEGIN, *head, *rows, survive.END, "after"]


# --- starts, with guarantees that are made up -------------------------------------------------------------------------

MADE_UP = {
    # A whole fails that cannot be done again: no case by itself does.
    "g90": """\
AT_ONCE = 3
def cases(count, seed): return list(range(6))
def run(case, folder): return None
def run_all(cases, folder): os._exit(9)
""",
    # A whole fails because one case does.
    "g91": """\
AT_ONCE = 3
def cases(count, seed): return list(range(6))
def run(case, folder): return "it is bad" if case == 4 else None
def run_all(cases, folder): assert 4 not in cases, "some case"; return [None] * len(cases)
""",
    "g92": """\
def cases(count, seed): raise ModuleNotFoundError("deepspeed is not installed: install it")
""",
    "g93": """\
def cases(count, seed): raise RuntimeError("no idea")
""",
    "g94": """\
def cases(count, seed): return []
""",
    "g95": """\
def cases(count, seed): return list(range(3))
def run(case, folder): return None
""",
}  # fmt: skip

#: Stands for the interpreter: `-m benchmarks.survive` with another folder of tests.
STARTER = """\
import sys
from pathlib import Path
import benchmarks.survive as survive
survive.TESTS = Path(sys.argv.pop(1))
words = sys.argv[1:]
sys.exit(survive.serve() if words == ["--serve"] else survive.describe(words[1], int(words[2]), int(words[3])))
"""


@pytest.fixture
def start(survive: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`start(words)`: the exit code of a start with the guarantees above."""
    (tmp_path / "guarantees").mkdir()
    for name, text in MADE_UP.items():
        (tmp_path / "guarantees" / f"cases_{name}.py").write_text(f"import os\n{text}")
    (tmp_path / "starter.py").write_text(STARTER)
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\nshift 2\nPYTHONPATH="{ROOT}" exec "{sys.executable}" "{tmp_path}/starter.py" "{tmp_path}" "$@"\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(survive, "PYTHON", str(python))
    monkeypatch.setattr(survive, "TESTS", tmp_path)

    def started(*words: str) -> int:
        from benchmarks.__main__ import main

        given = ["benchmarks", "survive", "--results", str(tmp_path / "results"), *words]
        monkeypatch.setattr(sys, "argv", given)
        return main()

    return started


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results").read_text().splitlines()]


def test_what_fails_at_once_and_not_one_by_one_stays_a_failure(
    start: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("--only", "g90") == 1
    out = capsys.readouterr().out
    assert "| 6/8 |" in out
    assert "the process that ran it ended with 9" in out
    bad = [result for result in results(tmp_path) if not result["held"]]
    assert [result["at_once"] for result in bad] == [[0, 1, 2], [3, 4, 5]]
    # Nothing is left to run, and nothing is forgotten.
    assert start("--only", "g90") == 1
    assert "6 cases, 0 to run" in (out := capsys.readouterr().out)
    assert "| 6/8 |" in out


def test_a_case_that_fails_by_itself_carries_the_failure(
    start: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("--only", "g91") == 1
    assert "| 5/6 |" in (out := capsys.readouterr().out)
    assert "g91: 1 of 6 cases did not hold" in out
    assert [result["why"].partition(" (")[0] for result in results(tmp_path) if not result["held"]] == [
        "AssertionError: some case",
        "it is bad",
    ]


def test_a_failure_at_once_counts_where_the_start_ended_before_its_cases(
    start: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("--only", "g90") == 1
    kept = [line for line in (tmp_path / "results").read_text().splitlines() if "at_once" in line]
    (tmp_path / "results").write_text("\n".join(kept) + "\n")
    capsys.readouterr()
    assert start("--table") == 1
    assert "| 0/2 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("g92", "g92: its cases cannot be made: deepspeed is not installed: install it"),
        ("g93", "g93: its cases cannot be made: RuntimeError: no idea"),
        ("g94", "g94: there is no case"),
    ],
)
def test_no_case_is_no_success(start: Any, capfd: pytest.CaptureFixture[str], name: str, told: str) -> None:
    assert start("--only", f"{name},g95") == 1
    out, err = capfd.readouterr()
    assert told in out
    assert f"no figure is reached: {name}" in out
    assert "| 3/3 |" in out
    assert ("Traceback" in err) == (name == "g93")


def test_time_that_was_too_short_is_no_success(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("--only", "g91,g95", "--minutes", "0") == 75
    assert "--minutes ended with 9 cases not begun, of g91, g95\n" in capsys.readouterr().out
    assert start("--only", "g95", "--minutes", "5") == 0
    assert start("--only", "g95", "--minutes", "0") == 0  # all have a result


def test_no_process_is_no_success(start: Any) -> None:
    with pytest.raises(SystemExit, match="--jobs is 0"):
        start("--only", "g95", "--jobs", "0")


def test_the_exit_codes_are_told(start: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        start("--help")
    assert "75 where --minutes ended before all were run" in " ".join(capsys.readouterr().out.split())


# --- what results depend on, and how many there are -------------------------------------------------------------------


def imported(path: Path) -> Iterator[Path]:
    """The files below tests/ that a file imports, or names as targets such as small.mlp."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
        elif isinstance(node, ast.Import):
            names = [name.name for name in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isascii():
            names = [node.value.rpartition(".")[0]]
        for name in names:
            file = ROOT / "tests" / f"{name.replace('.', '/')}.py"
            if name and len(name) < 100 and file.is_file():
                yield file


def test_the_code_is_all_that_the_cases_use() -> None:
    from benchmarks.survive import code, sources

    hashed = set(sources())
    waiting, used = sorted((ROOT / "tests" / "guarantees").glob("cases_*.py")), set[Path]()
    while waiting:
        path = waiting.pop()
        if path not in used:
            used.add(path)
            waiting += imported(path)
    assert {path.name for path in used} >= {"small.py", "programs.py", "processes.py", "training.py", "kills.py"}
    assert used <= hashed
    for folder in ("runner", "conf", "recipes", "plugins"):
        there = [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        assert there, folder
        assert {path for path in there if not path.name.startswith(".")} <= hashed, folder
    assert code() == code()
    assert not [path for path in hashed if path.name.startswith("test_")]


@pytest.mark.parametrize("name", ["g19", "g24"])
def test_the_long_form_of_a_list_has_all_of_it(name: str) -> None:
    import importlib

    from benchmarks.survive import FIGURES

    module = importlib.import_module(f"guarantees.cases_{name}")
    everything = {str(case) for case in module.every()}
    count = FIGURES[name][0]
    assert len(module.every()) == len(everything) == count
    assert {str(case) for case in module.cases(count, 0)} == everything
