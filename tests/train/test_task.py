"""The base of tasks: its defaults suit pairs, and what is missing says its name."""

from __future__ import annotations

import pytest
import torch

from runner.train.task import Task


class Bare(Task):
    pass


def test_defaults_suit_pairs() -> None:
    batch = [torch.zeros(3, 2), torch.ones(3)]
    task = Task()
    assert task.inputs(batch) is batch[0]
    assert task.weight(batch) == 3
    assert task.metrics(None, batch) == {}
    assert task.tokens(batch) is None
    assert task.check(None, "data.train") == []
    assert task.meters == {}


def test_what_is_missing_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"Bare has no loss\(outputs, batch\)"):
        Bare().loss(None, None)
    with pytest.raises(NotImplementedError, match="Bare has meters but no predictions"):
        Bare().predictions(None, None)
