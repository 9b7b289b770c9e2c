"""One process: what a step does to weights, gradients and optimizer."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from small import CLASSES, FEATURES, engine, mlp, step
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from runner.engine.engine import Engine
from runner.engine.mesh import Mesh

pytestmark = pytest.mark.usefixtures("quiet")


def batch(samples: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(samples, FEATURES, generator=made), torch.randint(CLASSES, (samples,), generator=made)


def gradients(made: Engine, parts: list[tuple[Tensor, Tensor]], weight: Any) -> Tensor:
    """Forward and backward of the parts; the sum of their losses times the factor."""
    total = torch.zeros(())
    for i, (x, y) in enumerate(parts):
        with made.accumulate(i == len(parts) - 1):
            loss = cross_entropy(made.forward(x), y, reduction="sum")
            made.backward(loss, made.factor(weight))
        total += loss.detach() * made.factor(weight)
    return total


def weights(made: Engine) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in made.model.parameters()]


def adamw(model: nn.Module, **how: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, **how)


@pytest.mark.parametrize("micro", [1, 3, 4, 8])
@pytest.mark.parametrize("weight", [8, torch.tensor(8)])
def test_micro_batches_make_the_step_of_one_batch(micro: int, weight: Any) -> None:
    x, y = batch()
    one, other = engine(build_optimizer=adamw), engine(build_optimizer=adamw)
    for _ in range(3):
        whole = gradients(one, [(x, y)], 8)
        parts = gradients(other, list(zip(x.split(micro), y.split(micro), strict=True)), weight)
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
        first, second = step(one, 1.0), step(other, 1.0)
        torch.testing.assert_close(first.grad_norm, second.grad_norm, rtol=1e-5, atol=0)
    for a, b in zip(weights(one), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_step_is_that_of_plain_torch() -> None:
    x, y = batch()
    made = engine(build_optimizer=adamw)
    torch.manual_seed(0)
    model = mlp()
    optimizer = adamw(model)
    for _ in range(5):
        gradients(made, [(x, y)], 8)
        norm = step(made, 0.5).grad_norm
        cross_entropy(model(x), y).backward()
        expected = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for a, b in zip(made.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_the_norm_is_the_one_before_clipping_and_nothing_is_clipped_unasked() -> None:
    x, y = batch()
    norms, moved = [], []
    for limit in (None, 1e-3, 1e3):
        made = engine()
        before = weights(made)
        gradients(made, [(x, y)], 8)
        norms.append(step(made, limit, measure=True).grad_norm)
        moved.append(torch.cat([(a - b).flatten() for a, b in zip(weights(made), before, strict=True)]).norm())
    assert norms[0] == norms[1] == norms[2]
    torch.testing.assert_close(moved[0], 0.1 * norms[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(moved[1], torch.tensor(0.1 * 1e-3), rtol=1e-2, atol=0)
    assert moved[2] == moved[0]


def test_no_norm_where_nobody_needs_it() -> None:
    made = engine()
    gradients(made, [batch()], 8)
    update = step(made, None)
    assert update.grad_norm is None
    assert update.skipped is False


def test_gradients_are_gone_after_a_step_and_unscale_acts_once() -> None:
    made = engine(precision="fp16")
    gradients(made, [batch()], 8)
    made.unscale()
    first = [parameter.grad.clone() for parameter in made.model.parameters()]
    made.unscale()
    assert all(torch.equal(p.grad, g) for p, g in zip(made.model.parameters(), first, strict=True))
    step(made)
    assert all(parameter.grad is None for parameter in made.model.parameters())
    gradients(made, [batch()], 8)
    made.unscale()
    assert step(made).skipped is False


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_the_guard_leaves_weights_and_optimizer_as_they_were(bad: float, where: str) -> None:
    made = engine(build_optimizer=adamw)
    gradients(made, [batch()], 8)
    step(made)
    before, state = weights(made), copy.deepcopy(made.optimizer.state_dict())
    loss = gradients(made, [batch()], 8)
    if where == "gradient":
        next(made.model.parameters()).grad[0, 0] = bad
    else:
        loss.fill_(bad)
    update = step(made, 1.0, loss=loss)
    assert update.skipped is True
    assert update.overflow is False
    assert all(torch.equal(a, b) for a, b in zip(weights(made), before, strict=True))
    assert str(made.optimizer.state_dict()) == str(state)
    gradients(made, [batch()], 8)
    assert step(made, 1.0).skipped is False


def test_without_the_guard_nothing_is_held_back() -> None:
    made = engine()
    gradients(made, [batch()], 8)
    next(made.model.parameters()).grad[0, 0] = float("nan")
    assert step(made, None, guard=False).skipped is False
    assert weights(made)[0][0, 0].isnan()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
def test_the_device_can_decide(kind: Any) -> None:
    """As on a GPU: the answer is a tensor that nobody has looked at, and a bad step changes nothing."""
    made = engine(build_optimizer=lambda model: kind(model.parameters(), lr=0.01, fused=True))
    made.backend.handle.device_decides = True
    plain = engine(build_optimizer=lambda model: kind(model.parameters(), lr=0.01, fused=True))
    for bad in (False, True, True, False):
        before = weights(made)
        for one in (made, plain):
            gradients(one, [batch()], 8)
            if bad:
                next(one.model.parameters()).grad[0, 0] = float("inf")
        update = step(made, 1.0)
        step(plain, 1.0)
        assert isinstance(update.skipped, Tensor)
        assert bool(update.skipped) is bad
        assert all(torch.equal(a, b) for a, b in zip(weights(made), before, strict=True)) is bad
    assert all(torch.equal(a, b) for a, b in zip(weights(made), weights(plain), strict=True))
    assert str(made.optimizer.state_dict()["state"]) == str(plain.optimizer.state_dict()["state"])


def test_frozen_and_unused_parameters() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(FEATURES, CLASSES), nn.Linear(2, 2)
            self.frozen = nn.Linear(FEATURES, FEATURES).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(self.frozen(x))

    made = engine(Net)
    before = copy.deepcopy(made.model.state_dict())
    gradients(made, [batch()], 8)
    assert step(made, 1.0).skipped is False
    changed = {name for name, value in made.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"used.weight", "used.bias"}


def test_the_ways_to_call_a_model() -> None:
    class Net(nn.Linear):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x[0] if isinstance(x, list) else x) * scale

    made = engine(lambda: Net(FEATURES, CLASSES))
    x, _ = batch()
    expected = made.model(x)
    assert torch.equal(made.forward(x), expected)
    assert torch.equal(made.forward((x, 2.0)), expected * 2)
    assert torch.equal(made.forward({"x": x, "scale": 3.0}), expected * 3)
    assert torch.equal(made.forward([x]), expected)


def test_the_factor_is_kept_and_follows_the_weight() -> None:
    made = engine()
    assert made.factor(8) is made.factor(8)
    assert made.factor(4).item() == 0.25
    assert made.factor(torch.tensor(5)).item() == pytest.approx(0.2)
    assert made.factor(8).item() == 0.125


def test_randomness_is_a_function_of_seed_step_and_reader() -> None:
    def draw(seed: int, step: int, reader: int = 0) -> list[float]:
        made = engine(mesh=Mesh(reader, 2))
        made.seed(seed, step)
        return torch.rand(3).tolist()

    assert draw(1, 5) == draw(1, 5)
    places = [(1, 5), (1, 6), (2, 5), (1, 5, 1), (5, 1), (0, 0)]
    assert len({tuple(draw(*place)) for place in places}) == len(places)


PROGRAM = """
import sys, torch
from runner.engine.engine import Engine
from runner.engine.mesh import Mesh
from runner.engine.optimizer import fused_by_default, parameter_groups
from runner.engine.precision import PRECISIONS
from runner.engine.single import Single
from runner.train.schedules import Schedule, cosine
made = Engine(Single(torch.device("cpu"), PRECISIONS["{precision}"], Mesh()))
fused = fused_by_default(torch.optim.{kind}, [], made.device)
made.prepare(
    lambda: torch.nn.Linear(2, 2),
    lambda m: torch.optim.{kind}(parameter_groups(m, ["bias"]), lr=0.1, **fused),
)
schedule = Schedule(cosine(made.optimizer, 3))
for _ in range(2):
    made.backward(made.forward(torch.ones(1, 2)).sum(), made.factor(8))
    made.unscale()
    assert made.step(1.0, skip=made.exchange(torch.zeros(())).skip).skipped is False
    schedule.step()
assert "torch._dynamo" not in sys.modules, "the compiler was imported"
"""


@pytest.mark.parametrize(("kind", "precision"), [("AdamW", "fp32"), ("SGD", "fp16"), ("Adagrad", "bf16")])
def test_no_step_imports_the_compiler(kind: str, precision: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", PROGRAM.format(kind=kind, precision=precision)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
