"""Fixtures for all tests."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# For `import small`, here and where a configuration names small.Something.
sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from small import Result


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    """A program that ran in this process leaves the logger speaking to the terminal."""
    log = logging.getLogger("runner")
    before = (list(log.handlers), log.level, log.propagate)
    log.handlers, log.propagate = [], True
    yield
    log.handlers, log.level, log.propagate = before


@pytest.fixture(scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def quiet(_one_thread: None) -> Iterator[None]:
    """One thread, and torch's generator as it was afterwards."""
    import torch

    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture
def job(quiet: None, tmp_path: Path) -> Callable[..., Result]:
    """`job(run_dir, **changes)`: runs small.config(**changes) in this process, in a folder of the test's own."""
    from small import config, run_job

    def run(run_dir: str = "run", **changes: Any) -> Result:
        return run_job(tmp_path, config(**changes), run_dir)

    return run
