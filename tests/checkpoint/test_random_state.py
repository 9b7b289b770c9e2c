"""The random generators go on where they were."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import torch

from runner.checkpoint import Checkpointer, RandomState


def draw() -> list[float]:
    return [
        torch.rand(1).item(),
        torch.randn(3).sum().item(),
        random.random(),
        random.gauss(0, 1),
        float(numpy.random.rand()),
        float(numpy.random.randn()),
    ]


def test_all_generators_go_on(tmp_path: Path) -> None:
    draw()
    path = Checkpointer(tmp_path, {"random": RandomState()}).save(1)
    expected = [draw(), draw()]
    torch.manual_seed(5)
    random.seed(5)
    numpy.random.seed(5)
    Checkpointer(tmp_path, {"random": RandomState()}).load(path)
    assert [draw(), draw()] == expected


def test_keys_do_not_depend_on_the_machine() -> None:
    assert list(RandomState().state_dict()) == ["torch", "cuda", "python", "numpy"]
