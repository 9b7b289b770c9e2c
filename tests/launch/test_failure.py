"""An error in one line: those of data workers, of several lines, without words, and of a system that allows no more."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from torch._utils import ExceptionWrapper

from runner.errors import RunnerError, TrainingStopped
from runner.launch.failure import gone, raised_by, worded

ADVICE = (
    "the system allows no more processes or threads: raise `ulimit -u`, or ask for fewer data.num_workers, "
    "launch.threads or launch.nproc_per_node"
)


class Own(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


class Wordless(Exception):
    """Says nothing, and cannot be made with a text."""

    def __init__(self) -> None:
        super().__init__()


def chained() -> None:
    try:
        raise KeyError("first")
    except KeyError as error:
        raise ValueError("second") from error


def several() -> None:
    raise ExceptionGroup("many", [ValueError("a"), raised(KeyError("b"))])  # type: ignore[type-var, list-item]


def unraised() -> None:
    raise ValueError("second") from KeyError("first")


def nested() -> None:
    raise ValueError("it said:\nTraceback (most recent call last):\n  File 'x', line 1\nOSError: not this one\n\nend")


def raised(what: Any) -> BaseException:
    try:
        if callable(what) and not isinstance(what, type):
            what()
        raise what
    except BaseException as error:
        return error


def sent(error: BaseException) -> BaseException:
    """As torch raises what a worker met."""
    try:
        wrapper = ExceptionWrapper((type(error), error, error.__traceback__), "in DataLoader worker process 0")
        wrapper.reraise()
    except BaseException as again:
        return again
    raise AssertionError


@pytest.mark.parametrize(
    ("what", "line"),
    [
        (ValueError("bad sample 3"), "ValueError: bad sample 3"),
        (ValueError("one\ntwo\n"), "ValueError: one two"),
        (KeyError("name"), "KeyError: 'name'"),
        (FileNotFoundError(2, "No such file", "a.png"), "FileNotFoundError: [Errno 2] No such file: 'a.png'"),
        (Own(1, 2), "Own: 1 and 2"),
        (chained, "ValueError: second"),
        (unraised, "ValueError: second"),
        (several, "ExceptionGroup: many (2 sub-exceptions)"),
        (
            nested,
            "ValueError: it said: Traceback (most recent call last): File 'x', line 1 OSError: not this one end",
        ),
        (TrainingStopped("as it must"), "as it must"),
    ],
)
def test_an_error_of_a_data_worker(what: Any, line: str) -> None:
    error = raised(what)
    key = "" if isinstance(error, RunnerError) else " (in data.train)"
    assert worded(sent(error), "data.train") == line + key
    assert worded(error, "data.train") == line + key  # as without workers


def test_what_torch_says_in_other_words() -> None:
    error = ValueError(
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback and so on\nof another kind"
    )
    assert "\n" not in worded(error)
    error = ValueError(
        "Caught Odd in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\ny"
    )
    assert worded(error) == "Odd: y"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("line one\nline two\n", "line one line two"),
        ("\n\n  first\n\n  second  \r\n", "first second"),
        ("bad\n" + "more words " * 100, "bad more words"),
        ("x" * 400 + "\nmore", "x" * 400 + " ..."),
        ("x" * 400, "x" * 400),
    ],
)
def test_several_lines_become_one(text: str, line: str) -> None:
    said = worded(ValueError(text), "model")
    assert said.startswith(f"ValueError: {line}")
    assert said.endswith(" (in model)")
    assert len(said.splitlines()) == 1
    assert len(said) <= max(350, len(line) + 40)
    assert worded(RunnerError("a\nb\n")) == "a b"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError, AssertionError, Wordless])
def test_an_error_without_words_says_where(kind: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    assert worded(kind()) == kind.__name__
    error = raised(kind)
    place = f"test_failure.py:{raised.__code__.co_firstlineno + 4}"
    assert worded(error, "model") == f"{kind.__name__} at {place} (in model)"
    assert worded(sent(error), "model") == f"{kind.__name__} at {place} (in model)"


def test_where_is_a_place_in_the_users_own_code() -> None:
    error = raised(lambda: threading.Barrier(0).wait(-1))  # a BrokenBarrierError of the library, without words
    assert worded(error).startswith("BrokenBarrierError at ")
    assert Path(__file__).name in worded(error)


def because(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


TORCH = "DataLoader worker (pid {}) exited unexpectedly with exit code {}. Details are lost due to multiprocessing."


def test_a_data_worker_that_ended_itself() -> None:
    error = RuntimeError(TORCH.format(7, 3))
    line = "a data worker ended itself with exit code 3"
    assert worded(error, "data.train") == f"{line} (in data.train)"
    assert worded(because(RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), error)) == line
    assert gone(error) == [7]
    assert gone(RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly")) == [7, 8]
    assert gone(RuntimeError("boom")) == []


LIMITED = """
import multiprocessing, os, resource, subprocess, sys, threading, traceback, time
import encodings.idna, multiprocessing.popen_fork
from runner.launch.failure import worded

resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
if os.geteuid() == 0:
    os.setgroups([])
    os.setresuid(54321, 54321, 54321)
if sys.argv[1] == "thread":
    begin = threading.Thread(target=time.sleep, args=(1,)).start
elif sys.argv[1] == "worker":
    begin = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1,)).start
else:
    begin = lambda: subprocess.Popen(["true"], preexec_fn=lambda: None)
try:
    begin()
except Exception as error:
    print(worded(error))
else:
    print("allowed")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize("what", ["thread", "worker", "program"])
def test_a_system_that_allows_no_more_processes(what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, what],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=Path(__file__).parents[2],
    )
    if done.stdout == "allowed\n":
        pytest.skip("the limit does not hold for this user")
    assert done.returncode == 0, done.stderr
    first, _, rest = done.stdout.partition(": the system")
    assert first in (
        "RuntimeError: can't start new thread",
        "BlockingIOError: [Errno 11] Resource temporarily unavailable",
    )
    assert f"the system{rest}" == f"{ADVICE}\n"


def test_other_words_for_it() -> None:
    line = f"RuntimeError: Resource temporarily unavailable: {ADVICE}"
    error = RuntimeError(os.strerror(11))  # all that is left of a std::system_error
    assert worded(error, "task") == f"{line} (in task)"
    assert worded(sent(raised(error))) == line
    # what is read has not come yet: another thing that the system has this word for
    assert "ulimit" not in worded(BlockingIOError(11, os.strerror(11)))
    assert raised_by(error).afar is False
