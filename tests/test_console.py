"""What the program says, where it goes, and a reader that leaves."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner import console


@pytest.fixture(autouse=True)
def logger() -> Iterator[None]:
    log = console.log
    before = list(log.handlers), log.level, log.propagate
    console.speak()
    yield
    log.handlers[:], log.level, log.propagate = before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_messages_are_plain_and_warnings_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    console.log.info("hello %d", 5)
    console.log.warning("careful")
    console.log.error("bad")
    console.log.debug("never")
    out, err = capsys.readouterr()
    assert out == "hello 5\nwarning: careful\n"
    assert err == "error: bad\n"


def test_speaking_twice_says_it_once(capsys: pytest.CaptureFixture[str]) -> None:
    console.speak()
    console.log.info("once")
    assert capsys.readouterr().out == "once\n"


def test_a_message_takes_the_place_of_a_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "10")
    console.log.info("a")
    console.live_line.draw("0123456789abc")
    console.log.info("b")
    console.log.info("c")
    console.live_line.draw("x")
    console.live_line.leave()
    console.log.info("d")
    clear = "\r\x1b[K"
    assert stream.getvalue() == f"a\n{clear}012345678{clear}b\nc\n{clear}x\nd\n"


def test_files_keep_messages_with_times_in_utc(tmp_path: Path) -> None:
    files = [tmp_path / "logs" / "a.log", tmp_path / "logs" / "b.log"]
    handlers = console.keep(*files)
    console.log.info("hello ü")
    console.close(handlers)
    console.log.info("later")
    for file in files:
        text = file.read_text("utf-8")
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ INFO hello ü\n", text)
    assert not any(isinstance(handler, logging.FileHandler) for handler in console.log.handlers)


def test_files_keep_what_is_no_text(tmp_path: Path) -> None:
    """Half a character, as a file's name may hold it; in a process of its own, for no report could carry it."""
    program = (
        "import pathlib, sys\nfrom runner import console\n"
        "handlers = console.keep(pathlib.Path(sys.argv[1]))\n"
        "console.log.warning('hello \\udcff')\nconsole.close(handlers)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.log")], check=True, timeout=60)
    assert (tmp_path / "a.log").read_text("utf-8").endswith("WARNING hello \\udcff\n")


def test_files_are_appended_to(tmp_path: Path) -> None:
    for word in ("one", "two"):
        handlers = console.keep(tmp_path / "a.log")
        console.log.info(word)
        console.close(handlers)
    assert [line.split()[-1] for line in (tmp_path / "a.log").read_text().splitlines()] == ["one", "two"]


def test_a_reader_that_leaves_does_not_end_the_program(tmp_path: Path) -> None:
    """`| head`: what is written later goes nowhere, and the exit is clean."""
    program = (
        "from runner import console\nimport pathlib, sys\nconsole.speak()\n"
        "for i in range(20000): console.log.info('line %d', i)\n"
        f"pathlib.Path({str(tmp_path / 'done')!r}).touch()\n"
    )
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert os.read(reader, 10)
    os.close(reader)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, b"")
    assert (tmp_path / "done").exists()
