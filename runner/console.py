"""What the program says: the logger `runner` to the terminal, plain, and to files, with times."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from typing import TextIO

#: Goes to the start of the line and clears it: whatever a live line has drawn is gone.
CLEAR_LINE = "\r\x1b[K"

log = logging.getLogger("runner")


class _Terminal(logging.Handler):
    """Writes to today's sys.stdout, errors to sys.stderr, over a live line where one may stand."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        clear = CLEAR_LINE if stream.isatty() else ""
        say(f"{clear}{prefix}{record.getMessage()}\n", stream)


def say(text: str, stream: TextIO) -> None:
    """Writes and flushes. A reader that has gone (`| head`) does not end a run: the files have everything."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        # The descriptor itself: Python flushes it once more at exit.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def speak() -> None:
    """Sends the program's messages to the terminal."""
    log.setLevel(logging.INFO)
    log.propagate = False
    if not any(isinstance(handler, _Terminal) for handler in log.handlers):
        log.addHandler(_Terminal())


def keep(*files: Path) -> list[logging.Handler]:
    """Also appends the messages to files; give the result to `close`."""
    handlers: list[logging.Handler] = []
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
        formatter = logging.Formatter("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
        log.addHandler(handler)
        handlers.append(handler)
    return handlers


def close(handlers: list[logging.Handler]) -> None:
    """Ends what `keep` began."""
    for handler in handlers:
        log.removeHandler(handler)
        handler.close()
