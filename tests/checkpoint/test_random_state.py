"""The random generators of every process go on where they were."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from processes import run_ranks

from runner import distributed
from runner.checkpoint import Checkpointer, RandomState

pytestmark = pytest.mark.usefixtures("quiet")


def draw() -> list[float]:
    return [
        torch.rand(1).item(),
        torch.randn(3).sum().item(),
        random.random(),
        random.gauss(0, 1),
        float(numpy.random.rand()),
        float(numpy.random.randn()),
    ]


def reseeded(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


def test_all_generators_go_on(tmp_path: Path) -> None:
    draw()  # so that Gaussian numbers are left over
    path = Checkpointer(tmp_path, {"random": RandomState()}).save(1)
    expected = [draw(), draw()]
    reseeded(5)
    Checkpointer(tmp_path, {"random": RandomState()}).load(path)
    assert [draw(), draw()] == expected


def test_keys_do_not_depend_on_the_machine() -> None:
    state = RandomState().state_dict()
    assert list(state) == ["torch", "cuda", "python", "numpy"]
    assert list(state["numpy"]) == ["words", "gauss"]


def test_another_generator_of_numpy_is_left_alone() -> None:
    before = numpy.random.get_bit_generator()
    numpy.random.set_bit_generator(numpy.random.PCG64(1))
    try:
        state = RandomState().state_dict()
        expected = numpy.random.rand()
        numpy.random.set_bit_generator(numpy.random.PCG64(1))
        RandomState().load_state_dict(state)
        assert numpy.random.rand() == expected
    finally:
        numpy.random.set_bit_generator(before)


def saved(folder: Path) -> list[list[float]]:
    reseeded(distributed.rank())
    draw()
    if distributed.rank() == 1:
        draw()
    Checkpointer(folder, {"random": RandomState()}).save(1)
    return [draw(), draw()]


def loaded(folder: Path) -> tuple[list[list[float]], list[str]]:
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logging.getLogger("runner").addHandler(Ear())
    logging.getLogger("runner").setLevel(logging.INFO)
    reseeded(9)
    checkpointer = Checkpointer(folder, {"random": RandomState()})
    path = checkpointer.latest()
    assert path is not None
    checkpointer.load(path)
    return [draw(), draw()], [line for line in heard if "random" in line]


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[list[float]]]]:
    """A folder in which two processes have saved, and what each drew next."""
    folder = tmp_path_factory.mktemp("by_two")
    return folder, run_ranks(saved, 2, folder)


def test_each_process_takes_back_its_own(by_two: tuple[Path, list[list[list[float]]]]) -> None:
    folder, expected = by_two
    assert expected[0] != expected[1]
    assert run_ranks(loaded, 2, folder) == [(numbers, []) for numbers in expected]


def test_they_do_not_follow_to_another_number_of_processes(by_two: tuple[Path, list[list[list[float]]]]) -> None:
    folder, _ = by_two
    reseeded(9)
    fresh = [draw(), draw()]
    numbers, heard = loaded(folder)
    assert numbers == fresh
    assert len(heard) == 1
    assert heard[0].startswith("random states of 2 processes cannot follow to 1")


def test_training_does_not_depend_on_them(job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from small import spec

    settings = {"train__epochs": 2, "model": spec("small.mlp", dropout=0.3)}
    watched = {"hooks": {"watch": spec("small.Watch")}}
    whole = job("whole", **settings, **watched)
    job("cut", **settings, hooks={**watched["hooks"], "stop": spec("small.Interrupt", step=5)})
    monkeypatch.setattr(RandomState, "load_state_dict", lambda self, state: reseeded(3))
    cut = job("cut", **settings, **watched)
    assert cut.watch.losses == whole.watch.losses[5:]
    assert all(torch.equal(cut.watch.weights[name], value) for name, value in whole.watch.weights.items())
