"""The buckets of ddp over interruptions: taken over before the first step, by all processes together or by none."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from processes import run_ranks
from torch import nn

from runner import distributed
from runner.engine.bucket_order import BucketOrder
from runner.engine.ddp import DDP
from runner.engine.mesh import Mesh
from runner.engine.precision import Precision

WIDTHS = (300, 700, 900, 10)


class Net(nn.Module):
    """Layers that are called in another order than they are registered in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in [*pairwise(WIDTHS)][::-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[::-1]:  # type: ignore[attr-defined]
            x = layer(x).tanh()
        return x


def backend(**options: Any) -> tuple[DDP, nn.Module, torch.optim.Optimizer]:
    world = distributed.world_size()
    made = DDP(torch.device("cpu"), Precision("fp32"), Mesh(distributed.rank(), world), bucket_mb=1, **options)
    model = Net()
    made.prepare(lambda: model, lambda placed: torch.optim.SGD(placed.parameters(), lr=0.05))
    return made, made.model, made.optimizer


def train(made: DDP, first: int, last: int) -> None:
    for step in range(first, last):
        draw = torch.Generator().manual_seed(100 * step + distributed.rank())
        loss = (made.model(torch.randn(7, WIDTHS[0], generator=draw)) ** 2).mean()
        made.backward(loss, None)
        made.handle.step()


def bits(model: nn.Module) -> list[bytes]:
    return [parameter.detach().numpy().tobytes() for parameter in model.parameters()]


def of_three() -> dict[str, Any]:
    whole, model, _ = backend()
    train(whole, 0, 3)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    saved = whole.extras()["buckets"].state_dict()
    train(whole, 3, 6)
    found: dict[str, Any] = {"order": saved["models"][0], "unlearnt": backend()[0].extras()["buckets"].state_dict()}
    for name, state in (("taken", saved), ("anew", {"models": [None]}), ("of another", {"models": [["a", "b"]]})):
        made, again, _ = backend()
        again.load_state_dict(weights)
        made.extras()["buckets"].load_state_dict(state)
        found[f"{name} left"] = [p.grad is None for p in again.parameters()]
        train(made, 3, 6)
        found[name] = bits(again) == bits(model)
        found[f"{name} order"] = made.extras()["buckets"].state_dict()["models"][0]
    return found


def test_three_processes_that_take_over_the_buckets_have_the_same_bits() -> None:
    results = run_ranks(of_three, 3)
    for found in results:
        # As gradients come, and not as parameters were registered.
        assert found["order"] == [f"layers.{n}.{kind}" for n in range(3) for kind in ("bias", "weight")]
        assert found["unlearnt"] == {"models": [None]}
        assert found["taken"]
        assert not found["anew"]
        assert not found["of another"]
        assert found["taken order"] == found["anew order"] == found["of another order"] == found["order"]
        assert all(found["taken left"])


def of_two() -> dict[str, Any]:
    made, model, _ = backend()
    order = [f"layers.{n}.{kind}" for n in range(3) for kind in ("bias", "weight")]
    hook = next(model.parameters()).register_post_accumulate_grad_hook(lambda p: None) if distributed.rank() else None
    made.extras()["buckets"].load_state_dict({"models": [order]})  # one cannot, so none does
    unknown = made.extras()["buckets"].unknown
    if hook is not None:
        hook.remove()
    train(made, 0, 2)
    # Buckets are made once: another order changes nothing then.
    made.extras()["buckets"].load_state_dict({"models": [order[::-1]]})
    train(made, 2, 4)
    return {"unknown": unknown, "bits": bits(model), "order": made.extras()["buckets"].state_dict()["models"][0]}


def test_all_take_it_over_or_none() -> None:
    first, second = run_ranks(of_two, 2)
    assert (first["unknown"], second["unknown"]) == (False, True)
    assert first["bits"] == second["bits"]
    assert first["order"] == second["order"] == [f"layers.{n}.{kind}" for n in range(3) for kind in ("bias", "weight")]


@pytest.mark.parametrize("options", [{"find_unused_parameters": True}, {"static_graph": True}])
def test_buckets_that_stay_or_are_learnt_otherwise_have_no_order(options: dict[str, Any]) -> None:
    made = DDP(torch.device("cpu"), Precision("fp32"), Mesh(), **options)
    assert made.extras()["buckets"].state_dict() == {"models": []}
    made.extras()["buckets"].load_state_dict({"models": [["weight"]]})
    assert BucketOrder().state_dict() == {"models": []}
