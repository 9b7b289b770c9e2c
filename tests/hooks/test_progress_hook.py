"""The progress hook: a live line on a terminal, plain lines in a pipe."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small import run as make_run

from runner import console
from runner.hooks.evaluation import Evaluation
from runner.hooks.metrics_log import MetricsLog
from runner.hooks.progress import Progress
from runner.train.loop import train
from runner.train.run import Run

pytestmark = pytest.mark.usefixtures("quiet")

CLEAR = "\r\x1b[K"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def logger() -> Iterator[None]:
    """The program speaks, and is silent again afterwards."""
    log = logging.getLogger("runner")
    before = list(log.handlers), log.level, log.propagate
    console.speak()
    yield
    log.handlers[:], log.level, log.propagate = before


def shown(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    stream: io.StringIO,
    hook: Progress,
    terminal: str | None = "xterm",
    **parts: Any,
) -> str:
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("COLUMNS", "80")
    hooks = {"evaluation": Evaluation(), "log": MetricsLog(), "progress": hook, **parts.pop("hooks_after", {})}
    train(make_run(folder, hooks=hooks, terminal=terminal, **{"save": True, **parts}))
    return stream.getvalue()


def test_plain_lines_in_a_pipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = shown(monkeypatch, tmp_path, io.StringIO(), Progress(), settings={"log_every": 2})
    lines = text.splitlines()
    assert "\x1b" not in text
    assert "\r" not in text
    assert text.endswith("\n")
    assert [line.split("  ")[0] for line in lines if line.startswith("step")] == ["step 2/6", "step 4/6", "step 6/6"]
    assert len(lines) == 5
    assert re.fullmatch(r"step 2/6  epoch 0\.67/2  loss \d\.\d{4}  left \d+:\d\d", lines[0])
    assert re.fullmatch(r"evaluation at step 3: loss \d\.\d{4}  accuracy 0\.\d{4}  \(10 samples\)", lines[1])
    assert re.fullmatch(r"step 6/6  epoch 2\.00/2  loss \d\.\d{4}", lines[3])
    assert lines[4].startswith("evaluation at step 6: ")


def test_every_line_is_flushed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Buffered(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    stream = Buffered()
    text = shown(monkeypatch, tmp_path, stream, Progress())
    assert stream.flushed == text


def test_a_live_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = shown(monkeypatch, tmp_path, Terminal(), Progress(per_second=1e9))
    drawn = text.split(CLEAR)
    steps = [piece for piece in drawn if piece.startswith("step ")]
    assert [piece.split("  ")[0].split()[1] for piece in steps][:6] == [f"{step}/6" for step in range(1, 7)]
    assert all("\n" not in piece for piece in steps[:-1])
    assert steps[0].count("loss") == 1
    evaluations = [piece for piece in drawn if piece.startswith("evaluation at step ")]
    assert len(evaluations) == 2
    assert all(piece.endswith("\n") for piece in evaluations)
    assert any(piece.startswith("saved ") for piece in drawn)
    assert text.endswith("\n")


def test_the_live_line_is_cut_to_the_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Long(Progress):
        def _line(self, run: Run, live: bool = False) -> str:
            return super()._line(run, live) + "  x" * 60

    text = shown(monkeypatch, tmp_path, Terminal(), Long(per_second=1e9))
    live = [piece for piece in text.split(CLEAR) if piece.startswith(("step ", "saved ")) and not piece.endswith("\n")]
    assert len(live) >= 6
    assert max(map(len, live)) == 79


def test_the_live_line_is_drawn_seldom(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = shown(monkeypatch, tmp_path, Terminal(), Progress(per_second=1e-3), save=False, steps=6)
    live = [piece for piece in text.split(CLEAR) if piece.startswith("step ") and not piece.endswith("\n")]
    assert len(live) == 1


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hook = Progress(per_second=1e9)
    text = shown(monkeypatch, tmp_path, Terminal(), hook, terminal="dumb")
    assert "\x1b" not in text
    steps = [line for line in text.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in steps] == [f"step {step}/6" for step in range(1, 7)]


def test_lines_may_be_held_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = shown(monkeypatch, tmp_path, io.StringIO(), Progress(seconds=1000.0))
    steps = [line.split("  ")[0] for line in text.splitlines() if line.startswith("step ")]
    assert steps == ["step 1/6", "step 6/6"]


def test_one_line_for_each_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = shown(monkeypatch, tmp_path, io.StringIO(), Progress(), steps=7, settings={"log_every": 5}, samples=80)
    assert [line.split("  ")[0] for line in text.splitlines() if line.startswith("step")] == ["step 5/7", "step 7/7"]


def test_no_epochs_where_there_is_only_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = shown(monkeypatch, tmp_path, io.StringIO(), Progress(), steps=2, samples=80)
    assert "epoch" not in text


def test_gauges_are_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from runner.hooks.learning_rate import LearningRate
    from runner.hooks.throughput import Throughput

    monkeypatch.setattr("sys.stdout", io.StringIO())
    hooks = {"lr": LearningRate(), "speed": Throughput(), "log": MetricsLog(), "progress": Progress()}
    run = make_run(tmp_path, hooks=hooks, steps=1)
    train(run)
    assert re.search(r"samples/s \d+(\.\d)?  lr 0\.1", __import__("sys").stdout.getvalue())


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (61, "1:01"), (3599, "59:59"), (3661, "1:01:01"), (360000, "100:00:00")]
)
def test_time_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: float, text: str) -> None:
    run = make_run(tmp_path, steps=10)
    hook = Progress()
    hook._started, hook._first = 0.0, 2
    # Five steps made of eight: what is left takes three fifths of the time so far.
    monkeypatch.setattr("runner.hooks.progress.time.perf_counter", lambda: seconds * 5 / 3)
    assert hook._left(run, 7) == text
    assert hook._left(run, 2) is None
    assert hook._left(run, 10) is None


def test_the_last_live_line_stays_where_a_run_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from small import Crash

    stream = Terminal()
    with pytest.raises(RuntimeError):
        shown(monkeypatch, tmp_path, stream, Progress(per_second=1e9), hooks_after={"crash": Crash(2)})
    console.log.error("said after it")
    assert re.search(r"step 2/6 [^\r]*\n$", stream.getvalue())
