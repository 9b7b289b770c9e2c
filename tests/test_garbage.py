"""Garbage is looked for seldom while the program starts, and as ever when a user's own code trains."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import begin, end

from runner import garbage


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    garbage.released()
    gc.set_threshold(*before)


def test_seldom_and_as_ever() -> None:
    gc.set_threshold(500, 11, 12)
    garbage.seldom()
    garbage.seldom()
    first, *others = gc.get_threshold()
    assert first > 10_000
    assert others == [11, 12]
    garbage.as_ever()
    assert gc.get_threshold() == (500, 11, 12)
    garbage.as_ever()
    assert gc.get_threshold() == (500, 11, 12)


@pytest.mark.parametrize("first", [0, 1_000_000])
def test_who_looks_even_more_seldom_is_left_alone(first: int) -> None:
    gc.set_threshold(first, 10, 10)
    garbage.seldom()
    assert gc.get_threshold() == (first, 10, 10)
    garbage.as_ever()
    assert gc.get_threshold() == (first, 10, 10)


def test_what_a_user_has_set_since_stays() -> None:
    gc.set_threshold(700, 10, 10)
    garbage.seldom()
    gc.set_threshold(900, 10, 10)
    garbage.as_ever()
    assert gc.get_threshold() == (900, 10, 10)


def test_released_leaves_nothing_frozen() -> None:
    garbage.imported()
    assert gc.get_freeze_count() > 0
    garbage.released()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_looks_as_ever_from_the_first_step_on(tmp_path: Path, processes: int) -> None:
    (tmp_path / "mine.py").write_text(
        "import gc\n"
        "from runner import distributed\n"
        "from runner.train.hook import Hook\n"
        "built = gc.get_threshold()[0]\n\n\n"
        "class Tell(Hook):\n"
        "    def on_run_start(self, run):\n"
        "        with open(f'{distributed.rank()}.txt', 'w') as file:\n"
        "            file.write(f'{built} {gc.get_threshold()} {gc.get_freeze_count() > 100_000}')\n"
    )
    words = ["+recipe=smoke", "run_dir=r", "train.steps=1", "hooks.tell={_target_: mine.Tell}"]
    if processes > 1:
        words += ["backend=ddp", f"launch.nproc_per_node={processes}"]
    told = end(begin(tmp_path, *words), tmp_path / "r")
    assert told.code == 0, told.err
    for rank in range(processes):
        said = (tmp_path / f"{rank}.txt").read_text()
        assert said == f"{garbage._SELDOM} {gc.get_threshold()} True"
