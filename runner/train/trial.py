"""Trials of the model and the data before the training: nothing of them stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from runner import shares
from runner.checkpoint import RandomState
from runner.data.stream import state_before


@contextmanager
def trial(model: nn.Module, loader: Any) -> Iterator[None]:
    """What goes through a model and is read from a loader inside leaves no trace: random states, the model's buffers
    and the state of the data set are put back. All processes enter together.

    Not after an error: that ends the training.
    """
    random, dataset = RandomState(), loader.dataset
    before = random.state_dict()
    there = [shares.own(buffer) for buffer in model.buffers() if not buffer.is_meta]
    buffers = [(buffer, buffer.detach().to("cpu", copy=True)) for buffer in there]
    state = state_before(dataset)
    yield
    with torch.no_grad():
        for buffer, value in buffers:
            # An expanded one cannot be written, and was not.
            if _differ(buffer, value):
                buffer.copy_(value)
    if state is not None:
        dataset.load_state_dict(state)
    random.load_state_dict(before)


def _differ(one: Tensor, other: Tensor) -> bool:
    """Whether any bit does, also of what is no number; taken for granted of sparse tensors."""
    if one.layout != torch.strided:
        return True
    first, second = (tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8) for tensor in (one, other))
    return not torch.equal(first, second)
