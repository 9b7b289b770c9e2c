"""What the program says: the logger `runner` to the terminal, plain, and to files, with times."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

log = logging.getLogger("runner")


#: What stands for a secret that somebody else's text holds.
REDACTED = "<redacted>"

#: Shorter secrets are not looked for: they stand in words that are none.
_SHORTEST = 6


class _Secrets:
    """The secret texts of this process's run."""

    pattern: re.Pattern[str] | None = None


def hide(secrets: Collection[str]) -> None:
    """From now on these texts are taken out of messages, and of what goes through `scrub`."""
    forms = {
        form
        for secret in secrets
        if len(secret) >= _SHORTEST
        for form in (secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], repr(secret)[1:-1])
    }
    ordered = sorted(forms, key=len, reverse=True)
    _Secrets.pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None


def scrub(text: str) -> str:
    """A text without the secrets of this process's run: an error's may hold anything."""
    return text if _Secrets.pattern is None else _Secrets.pattern.sub(REDACTED, text)


class _LiveLine:
    """The line at the bottom of a terminal that is drawn anew again and again, where one stands."""

    stands = False

    def draw(self, line: str) -> None:
        """Draws it, cut to the terminal's width."""
        self.stands = True
        say(_CLEAR + scrub(line)[: shutil.get_terminal_size().columns - 1], sys.stdout)

    def clear(self) -> None:
        if self.stands:
            self.stands = False
            say(_CLEAR, sys.stdout)

    def leave(self) -> None:
        """Lets it stand for good and goes on below it."""
        if self.stands:
            self.stands = False
            say("\n", sys.stdout)


#: Goes to the start of the line and clears it.
_CLEAR = "\r\x1b[K"

live_line = _LiveLine()


class _Terminal(logging.Handler):
    """Writes to today's sys.stdout, errors to sys.stderr, in the place of a live line where one stands."""

    aside = False

    def emit(self, record: logging.LogRecord) -> None:
        live_line.clear()
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        stream = sys.stderr if self.aside or record.levelno >= logging.ERROR else sys.stdout
        say(f"{prefix}{scrub(record.getMessage())}\n", stream)


def say(text: str, stream: TextIO | None) -> None:
    """Writes and flushes. A stream that is closed, full or gone (`| head`) ends no run: the files have everything."""
    if stream is None or stream.closed:
        return
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            stream.write(text.encode("ascii", "backslashreplace").decode("ascii"))
        stream.flush()
    except OSError:
        # The descriptor itself: Python flushes it once more at exit.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def speak(*, aside: bool = False) -> None:
    """Sends the program's messages to the terminal; `aside` to stderr, where stdout is for machines."""
    _Terminal.aside = aside
    log.setLevel(logging.INFO)
    log.propagate = False
    if not any(isinstance(handler, _Terminal) for handler in log.handlers):
        log.addHandler(_Terminal())


class _Scrubbed(logging.Formatter):
    """Lines without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return scrub(super().format(record))


class _File(logging.FileHandler):
    """Flushes at most once a second, and at warnings and the end: a write for each line is felt in short steps."""

    _flushed = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self._flushed = 0.0
        super().emit(record)

    def flush(self) -> None:
        now = time.monotonic()
        if now - self._flushed >= 1.0:
            self._flushed = now
            super().flush()

    def handleError(self, record: logging.LogRecord) -> None:
        """A disk that is full ends no run, and needs no traceback for each line: who can write something says so."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


def keep(*files: Path) -> list[logging.Handler]:
    """Also appends the messages to files; give the result to `close`."""
    handlers: list[logging.Handler] = []
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = _File(file, encoding="utf-8", errors="backslashreplace")
        formatter = _Scrubbed("%(asctime)sZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
        log.addHandler(handler)
        handlers.append(handler)
    return handlers


@contextmanager
def muted() -> Iterator[None]:
    """Keeps messages from the terminal; the files have them."""
    terminals = [handler for handler in log.handlers if isinstance(handler, _Terminal)]
    for handler in terminals:
        log.removeHandler(handler)
    try:
        yield
    finally:
        for handler in terminals:
            log.addHandler(handler)


def close(handlers: list[logging.Handler]) -> None:
    """Ends what `keep` began."""
    for handler in handlers:
        log.removeHandler(handler)
        handler.close()
