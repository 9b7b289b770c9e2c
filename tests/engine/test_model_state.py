"""State by parameter name: any optimizer goes on bit for bit, and what does not fit is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from runner.engine.model_state import ModelState, OptimizerState
from runner.errors import InputError, RunnerError


class Net(nn.Module):
    """Tied weights, a buffer, a frozen parameter, one without gradient, a 0-d one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(x))) * self.scale


def train(net: nn.Module, optimizer: Optimizer, steps: int, scheduler: Any = None, seed: int = 0) -> None:
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randint(0, 6, (8,))).square().sum().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def through(saved: Any, state: Any) -> Any:
    """What the checkpoint does: the template's tensors filled with the saved values."""
    if isinstance(saved, Tensor):
        assert state.shape == saved.shape
        assert not state.requires_grad
        return state.copy_(saved)
    if isinstance(saved, dict):
        return {key: through(value, state[key]) for key, value in saved.items()}
    if isinstance(saved, list | tuple):
        return type(saved)(map(through, saved, state))
    return saved


def load(state: Any, saved: Any) -> None:
    state.load_state_dict(through(saved, state.template(saved)))


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW fused": lambda p: AdamW(p, lr=0.1, fused=True),
    "AdamW foreach": lambda p: AdamW(p, lr=0.1, foreach=True),
    "AdamW tensor lr": lambda p: AdamW(p, lr=torch.tensor(0.1)),
    "SGD momentum": lambda p: SGD(p, lr=0.001, momentum=0.9, nesterov=True),
    "SGD": lambda p: SGD(p, lr=0.001),
    "Adam amsgrad": lambda p: Adam(p, lr=0.1, amsgrad=True),
    "Adafactor": lambda p: Adafactor(p, lr=0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_fresh_optimizer_goes_on_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    nets = [Net().to(dtype) for _ in range(2)]
    optimizers = [OPTIMIZERS[name](net.parameters()) for net in nets]
    train(nets[0], optimizers[0], 3)
    load(ModelState(nets[1]), ModelState(nets[0]).state_dict())
    saved = OptimizerState(nets[0], optimizers[0]).state_dict()
    load(OptimizerState(nets[1], optimizers[1]), saved)
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, 3, seed=1)
    for (key, a), b in zip(nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    states = [OptimizerState(net, optimizer).state_dict() for net, optimizer in zip(nets, optimizers, strict=True)]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for parameter, entry in states[0]["state"].items():
        for key, value in entry.items():
            other = states[1]["state"][parameter][key]
            same = (
                value.dtype == other.dtype and torch.equal(value, other)
                if isinstance(value, Tensor)
                else value == other
            )
            assert same, (parameter, key)
    assert states[0]["groups"] == states[1]["groups"]


def test_the_model_is_saved_by_name_and_tied_weights_once() -> None:
    net = Net()
    state = ModelState(net).state_dict()
    assert "embed.weight" in state
    assert "head.weight" not in state
    assert {"norm.running_mean", "norm.num_batches_tracked", "frozen.weight", "unused", "scale"} <= state.keys()
    assert state["embed.weight"].data_ptr() == net.embed.weight.data_ptr()
    other = Net()
    ModelState(other).load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))
    assert other.head.weight is other.embed.weight


def test_the_optimizer_is_saved_by_name() -> None:
    net = Net()
    optimizer = AdamW(
        [{"params": [net.scale], "lr": 0.5}, {"params": [net.embed.weight, net.unused]}], betas=(0.8, 0.9)
    )
    train(net, optimizer, 1)
    state = OptimizerState(net, optimizer).state_dict()
    assert state["type"] == "AdamW"
    assert list(state["state"]) == ["scale", "embed.weight"]
    assert state["state"]["scale"].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert [group["params"] for group in state["groups"]] == [["scale"], ["embed.weight", "unused"]]
    assert state["groups"][0]["lr"] == 0.5
    assert state["groups"][1]["betas"] == (0.8, 0.9)


def test_wrappers_do_not_change_names() -> None:
    net = Net()
    names = ModelState(net).state_dict().keys()
    wrapped = torch.compile(net)
    assert ModelState(wrapped).state_dict().keys() == names
    inside = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"))
    assert list(ModelState(inside).state_dict()) == ["0.weight", "0.bias"]
    values = {name: torch.zeros_like(value) for name, value in ModelState(inside).state_dict().items()}
    ModelState(inside).load_state_dict(values)
    assert all(not p.any() for p in inside.parameters())
    optimizer = SGD(inside.parameters(), lr=0.1)
    assert OptimizerState(inside, optimizer).state_dict()["groups"][0]["params"] == ["0.weight", "0.bias"]


def test_the_order_of_parameters_does_not_matter() -> None:
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizers = [AdamW([a.weight, a.bias], lr=0.1), AdamW([{"params": [b.bias]}, {"params": [b.weight]}], lr=0.1)]
    a(torch.ones(2, 3)).sum().backward()
    optimizers[0].step()
    load(OptimizerState(b, optimizers[1]), OptimizerState(a, optimizers[0]).state_dict())
    assert torch.equal(optimizers[1].state[b.weight]["exp_avg"], optimizers[0].state[a.weight]["exp_avg"])
    assert torch.equal(optimizers[1].state[b.bias]["exp_avg"], optimizers[0].state[a.bias]["exp_avg"])


def test_a_template_changes_nothing_and_takes_the_tensors_that_are_there() -> None:
    net = Net()
    optimizer = AdamW(net.parameters())
    source = OptimizerState(net, optimizer)
    train(net, optimizer, 2)
    saved = source.state_dict()
    fresh = AdamW(net.parameters())
    template = OptimizerState(net, fresh).template(saved)
    assert not fresh.state
    assert template["state"].keys() == saved["state"].keys()
    assert source.template(saved)["state"]["scale"]["exp_avg"] is optimizer.state[net.scale]["exp_avg"]
    strided = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    adam = AdamW(strided.parameters())
    strided(torch.randn(1, 3, 4, 4)).sum().backward()
    adam.step()
    copy = OptimizerState(strided, AdamW(strided.parameters())).template(OptimizerState(strided, adam).state_dict())
    assert copy["state"]["weight"]["exp_avg"].stride() == strided.weight.stride()


# What the configuration changed ---------------------------------------------------------------------------------------


def resumed(before: dict[str, Any], after: dict[str, Any], kind: Any = AdamW) -> Optimizer:
    """An optimizer made with `after` that took the state of one made with `before`, whose rate was then halved."""
    model = nn.Linear(2, 2)
    old = kind(model.parameters(), **before)
    state = OptimizerState(model, old)
    model(torch.ones(1, 2)).sum().backward()
    old.step()
    old.param_groups[0]["lr"] *= 0.5
    new = kind(model.parameters(), **after)
    load(OptimizerState(model, new), state.state_dict())
    return new


def test_the_same_configuration_goes_on_with_what_it_had_become() -> None:
    assert resumed({"lr": 0.1}, {"lr": 0.1}).param_groups[0]["lr"] == 0.05


def test_what_was_changed_on_purpose_applies() -> None:
    before = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.99), "foreach": True}
    group = resumed(before, {"lr": 0.2, "weight_decay": 0.0, "betas": (0.9, 0.99), "fused": True}).param_groups[0]
    assert group["lr"] == 0.1
    assert group["weight_decay"] == 0.0
    assert group["betas"] == (0.9, 0.99)
    assert group["fused"] is True
    assert group["foreach"] is None
    assert len(group["params"]) == 2


def test_a_tensor_as_learning_rate_stays_one() -> None:
    group = resumed({"lr": torch.tensor(0.5)}, {"lr": torch.tensor(0.5)}).param_groups[0]
    assert isinstance(group["lr"], Tensor)
    assert group["lr"].item() == 0.25
    assert resumed({"lr": 0.5}, {"lr": 0.5}).param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("first", ["state", "scheduler"])
@pytest.mark.parametrize(
    ("name", "lr"), [("cosine", 0.1), ("cosine", 0.2), ("lambda", 0.1), ("lambda", 0.2), ("one cycle", 0.1)]
)
def test_a_schedule_goes_on_at_its_place(name: str, lr: float, first: str) -> None:
    """As torch's schedulers move: cosine from the current rate, lambda from the base, one cycle also the momentum."""

    def make(lr: float) -> tuple[Optimizer, Any, OptimizerState]:
        optimizer = SGD(net.parameters(), lr=lr, momentum=0.9)
        early = OptimizerState(net, optimizer)
        scheduler = {
            "cosine": lambda: CosineAnnealingLR(optimizer, 10),
            "lambda": lambda: LambdaLR(optimizer, lambda step: (step + 1) / 10),
            "one cycle": lambda: OneCycleLR(optimizer, lr, 10),
        }[name]()
        return optimizer, scheduler, early if first == "state" else OptimizerState(net, optimizer)

    net = nn.Linear(2, 2)
    torch.manual_seed(0)
    reference, schedule, _ = make(lr)
    old, old_schedule, state = make(0.1)
    for _ in range(4):
        for optimizer, scheduler in ((reference, schedule), (old, old_schedule)):
            optimizer.step()
            scheduler.step()
    new, new_schedule, new_state = make(lr)
    load(new_state, state.state_dict())
    new_schedule.last_epoch = old_schedule.last_epoch
    for _ in range(4):
        a, b = reference.param_groups[0], new.param_groups[0]
        tolerance = 0 if lr == 0.1 else 1e-12
        assert b["lr"] == pytest.approx(a["lr"], rel=tolerance, abs=0)
        assert b["momentum"] == a["momentum"]
        for optimizer, scheduler in ((reference, schedule), (new, new_schedule)):
            optimizer.step()
            scheduler.step()


class Odd(SGD):
    """State of other types and shapes than the parameters', nested, with words and integers."""

    def step(self, closure: Any = None) -> None:
        for number, p in enumerate(self.param_groups[0]["params"]):
            exact = p.detach().float() + 2**-20 + number
            nest = {"codes": exact + 1, "list": [exact + 2, (exact.sum(), None)]}
            self.state[p] = {"codes": exact.to(torch.uint8), "master": exact, "word": "x", "step": 3, "nest": nest}


def test_odd_state_stays_as_it_is() -> None:
    """torch's own load_state_dict turns all of it into the parameter's type."""
    model = nn.Linear(2, 2).bfloat16()
    old = Odd(model.parameters(), lr=1)
    old.step()
    expected = OptimizerState(model, old).state_dict()["state"]
    again, fresh = OptimizerState(model, old), Odd(model.parameters(), lr=1)
    for optimizer, state in ((old, again), (fresh, OptimizerState(model, fresh))):
        load(state, copy.deepcopy(OptimizerState(model, old).state_dict()))
        for p, name in ((model.weight, "weight"), (model.bias, "bias")):
            assert tensors_equal(optimizer.state[p], expected[name])


def tensors_equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(tensors_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(tensors_equal, a, b))
    return type(a) is type(b) and bool(a == b)


def test_state_follows_its_parameter_into_another_type() -> None:
    high = nn.Linear(2, 2)
    low = nn.Linear(2, 2).bfloat16()
    adam = AdamW(high.parameters())
    high(torch.ones(1, 2)).sum().backward()
    adam.step()
    new = AdamW(low.parameters())
    load(OptimizerState(low, new), OptimizerState(high, adam).state_dict())
    entry = new.state[low.weight]
    assert entry["exp_avg"].dtype == torch.bfloat16
    assert entry["step"].dtype == torch.float32
    low(torch.ones(1, 2).bfloat16()).sum().backward()
    new.step()


# What does not fit ----------------------------------------------------------------------------------------------------


def refusal(act: Callable[[], Any]) -> Any:
    with pytest.raises(InputError) as caught:
        act()
    return caught.value.problems[0]


def test_another_optimizer_is_refused() -> None:
    model = nn.Linear(2, 2)
    saved = OptimizerState(model, Adam(model.parameters())).state_dict()
    for other in (AdamW(model.parameters()), SGD(model.parameters(), lr=0.1)):
        state = OptimizerState(model, other)
        for act in (state.template, state.load_state_dict):
            problem = refusal(lambda act=act: act(saved))
            assert problem.key == "optimizer"
            assert problem.value == type(other).__name__
            assert "Adam" in problem.why


def test_other_parameters_are_refused() -> None:
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(4)])
    saved = OptimizerState(model, SGD(model[:3].parameters(), lr=0.1)).state_dict()
    problem = refusal(lambda: OptimizerState(model, SGD(model[3].parameters(), lr=0.1)).template(saved))
    assert (
        "it lacks 3.weight, 3.bias; nothing here takes 0.weight, 0.bias, 1.weight, 1.bias, 2.weight and 1 more"
        in problem.why
    )
    why = refusal(lambda: ModelState(model).load_state_dict({"0.weight": torch.ones(1, 1), "x": 1})).why
    assert "it lacks 0.bias, 1.weight" in why
    assert "nothing here takes x" in why


def test_a_parameter_of_nobody_is_refused() -> None:
    problem = refusal(OptimizerState(nn.Linear(2, 2), SGD([nn.Parameter(torch.ones(7))], lr=0.1)).state_dict)
    assert problem.key == "optimizer"
    assert "[7]" in problem.why


def test_state_that_belongs_to_no_parameter_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.state["global"] = {"step": 1}  # type: ignore[index]
    with pytest.raises(RunnerError, match="belongs to no parameter"):
        OptimizerState(model, optimizer).state_dict()
