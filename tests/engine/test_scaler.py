"""Loss scaling: overflows halve the scale down to a floor, and change no weight."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small import CPU, engine
from small import step as finish
from torch import nn

from runner.engine.engine import Engine
from runner.engine.precision import PRECISIONS, LossScaling
from runner.engine.scaler import Scaler

pytestmark = pytest.mark.usefixtures("quiet")


def fp16(**options: float) -> Engine:
    precision = dataclasses.replace(PRECISIONS["fp16"], loss_scaling=LossScaling(**options))  # type: ignore[arg-type]
    return engine(lambda: nn.Linear(2, 1), precision=precision)


def step(made: Engine, value: float, max_norm: float | None = None) -> tuple[bool, bool]:
    """A step whose loss is `value` times what the model gives."""
    made.backward(made.forward(torch.ones(1, 2)).sum() * value, made.factor(1))
    update = finish(made, max_norm)
    assert isinstance(update.skipped, bool)
    return update.skipped, update.overflow


def test_overflow_skips_and_halves_twice_running_and_then_steps() -> None:
    made = fp16(init_scale=1024.0)
    scaler, weight = made.backend.scaler, made.model.weight
    before = weight.detach().clone()
    assert step(made, 1e5) == (True, True)
    assert scaler.value == 512.0
    assert step(made, 1e5) == (True, True)
    assert scaler.value == 256.0
    assert torch.equal(weight, before)
    assert step(made, 1.0) == (False, False)
    assert not torch.equal(weight, before)
    assert scaler.value == 256.0


def test_the_scale_grows_again() -> None:
    made = fp16(init_scale=4.0, growth_interval=3)
    assert [(step(made, 1.0), made.backend.scaler.value)[1] for _ in range(7)] == [4.0, 4.0, 8.0, 8.0, 8.0, 16.0, 16.0]


def test_the_floor_holds_and_at_the_floor_an_overflow_is_no_excuse() -> None:
    made = fp16(init_scale=4.0, floor=1.0)
    before = made.model.weight.detach().clone()
    found = [(*step(made, float("inf")), made.backend.scaler.value) for _ in range(200)]
    assert found[:3] == [(True, True, 2.0), (True, True, 1.0), (True, False, 1.0)]
    assert set(found[3:]) == {(True, False, 1.0)}
    assert torch.equal(made.model.weight, before)
    assert step(made, 1.0) == (False, False)
    assert made.model.weight.isfinite().all()


@pytest.mark.parametrize("floor", [1.0, 3.0, 256.0])
def test_any_floor(floor: float) -> None:
    made = fp16(init_scale=1024.0, floor=floor)
    for _ in range(20):
        step(made, float("nan"))
    assert made.backend.scaler.value == floor


def test_the_gradient_is_the_true_one_whatever_the_scale() -> None:
    norms = []
    for scale in (1.0, 1024.0):
        made = fp16(init_scale=scale)
        made.backward(made.forward(torch.ones(1, 2)).sum() * 3.0, made.factor(2))
        norms.append(finish(made, 0.1).grad_norm)
    assert norms[0] is not None
    assert norms[0].item() == pytest.approx(1.5 * 3**0.5, rel=1e-3)
    assert norms[0] == norms[1]


def test_clipping_goes_by_the_true_gradient() -> None:
    made = fp16(init_scale=4096.0)
    before = made.model.weight.detach().clone()
    step(made, 3.0, max_norm=0.1)
    moved = torch.cat([made.model.weight.detach() - before, torch.zeros(1, 1)], 1)
    # SGD of rate 0.1, clipped to 0.1: two of three equal components of the gradient.
    assert moved.norm().item() == pytest.approx(0.1 * 0.1 * (2 / 3) ** 0.5, rel=1e-3)


def test_state_has_the_same_keys_with_and_without_scaling() -> None:
    off, on = Scaler(None, CPU), Scaler(LossScaling(init_scale=8.0), CPU)
    assert off.state_dict().keys() == on.state_dict().keys()
    assert (off.value, on.value) == (1.0, 8.0)
    off.load_state_dict(on.state_dict())
    assert off.value == 1.0
    on.load_state_dict(off.state_dict())
    assert on.value == 8.0


def test_state_comes_back() -> None:
    made = fp16(init_scale=64.0, growth_interval=4)
    step(made, float("inf"))
    step(made, 1.0)
    step(made, 1.0)
    fresh = fp16(init_scale=64.0, growth_interval=4)
    fresh.backend.scaler.load_state_dict(made.backend.scaler.state_dict())
    assert fresh.backend.scaler.value == 32.0
    for one in (made, fresh):
        step(one, 1.0)
        step(one, 1.0)
    assert made.backend.scaler.value == fresh.backend.scaler.value == 64.0
    assert made.backend.scaler.state_dict() == fresh.backend.scaler.state_dict()
