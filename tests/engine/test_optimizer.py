"""How optimizers are made and called."""

from __future__ import annotations

import subprocess
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from runner.engine import optimizer as room
from runner.engine.optimizer import fused_by_default, parameter_groups, plain_step
from runner.errors import InputError
from runner.train.schedules import Schedule, linear

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not imported the compiler: another test may have done so here."""
    monkeypatch.setattr(room, "sys", SimpleNamespace(modules={}))


KINDS = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (torch.optim.SGD, {"lr": 0.1, "fused": True}),
    (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}),
    (torch.optim.Adam, {"lr": 0.1, "fused": True}),
    (torch.optim.AdamW, {"lr": 0.1}),
    (torch.optim.AdamW, {"lr": 0.1, "fused": True}),
    (torch.optim.AdamW, {"lr": 0.1, "foreach": True}),
    (torch.optim.Adagrad, {"lr": 0.1}),
    (torch.optim.Adagrad, {"lr": 0.1, "fused": True}),
    (torch.optim.RMSprop, {"lr": 0.01, "centered": True}),
]


@pytest.mark.parametrize(
    ("kind", "options"), KINDS, ids=lambda value: "-".join(value) if isinstance(value, dict) else value.__name__
)
def test_a_plain_step_is_the_optimizers_step_bit_for_bit(no_compiler: None, kind: Any, options: dict[str, Any]) -> None:
    def trained(plain: bool) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        optimizer = kind(
            parameter_groups(model, ["bias"]) if "AdamW" in kind.__name__ else model.parameters(), **options
        )
        step = plain_step(optimizer) if plain else optimizer.step
        for i in range(5):
            model(torch.full((2, 4), float(i))).square().sum().backward()
            with torch.no_grad():
                step()
            optimizer.zero_grad()
        return model, optimizer

    (one, first), (other, second) = trained(True), trained(False)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first.state.values(), second.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in b if b[key] is not None)


def sgd() -> torch.optim.Optimizer:
    model = nn.Linear(2, 2)
    model.weight.grad = torch.ones(2, 2)
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_step_hooks_are_called(no_compiler: None) -> None:
    optimizer = sgd()
    step = torch.no_grad()(plain_step(optimizer))
    calls: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *about: calls.append("before")),
        optimizer.register_step_post_hook(lambda *about: calls.append("after")),
    ]
    step()
    assert calls == ["before", "after"]
    for handle in handles:
        handle.remove()
    step()
    assert calls == ["before", "after"]


def test_step_hooks_for_all_optimizers_are_called(no_compiler: None) -> None:
    optimizer = sgd()
    step = torch.no_grad()(plain_step(optimizer))
    calls: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *about: calls.append("before")),
        register_optimizer_step_post_hook(lambda *about: calls.append("after")),
    ]
    try:
        step()
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["before", "after"]


@pytest.mark.parametrize("compiler", [False, True])
def test_a_scheduler_gives_no_warning(monkeypatch: pytest.MonkeyPatch, compiler: bool) -> None:
    monkeypatch.setattr(room, "sys", SimpleNamespace(modules={"torch._dynamo": None} if compiler else {}))
    optimizer = sgd()
    step = plain_step(optimizer)
    schedule = Schedule(linear(optimizer, 4))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.075)


class Own(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})
        self.steps = 0

    def step(self, closure: Any = None) -> None:
        self.steps += 1


class Heir(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.param_groups[0]["params"][0].fill_(7.0)


def test_other_peoples_optimizers_are_stepped_as_they_are(no_compiler: None) -> None:
    weight = nn.Parameter(torch.zeros(1))
    own, heir = Own([weight]), Heir([weight], lr=0.1)
    plain_step(own)()
    assert own.steps == 1
    with torch.no_grad():
        plain_step(heir)()
    assert weight.item() == 7.0


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        plain_step(torch.optim.LBFGS([nn.Parameter(torch.zeros(1))]))
    (problem,) = caught.value.problems
    assert (problem.key, problem.value) == ("optimizer", "torch.optim.lbfgs.LBFGS")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(3, 2)
        self.layer = nn.Linear(2, 2)
        self.layer_norm = nn.LayerNorm(2)
        self.batch_norm = nn.BatchNorm1d(2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.bias_table = nn.Parameter(torch.zeros(2))


def names(model: nn.Module, words: list[str]) -> list[list[str]]:
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [sorted(known[id(p)] for p in group["params"]) for group in parameter_groups(model, words)]


def test_parameter_groups() -> None:
    everything = sorted(name for name, _ in Net().named_parameters() if not name.startswith("frozen"))
    assert names(Net(), []) == [everything]
    biases = ["batch_norm.bias", "layer.bias", "layer_norm.bias"]
    assert names(Net(), ["bias"]) == [sorted(set(everything) - set(biases)), biases]
    norms = ["batch_norm.bias", "batch_norm.weight", "layer_norm.bias", "layer_norm.weight"]
    assert names(Net(), ["norm"])[1] == norms
    assert names(Net(), ["bias", "norm", "embeddings.*", "bias_*"]) == [
        ["layer.weight"],
        sorted([*norms, "layer.bias", "embeddings.weight", "bias_table"]),
    ]
    groups = parameter_groups(Net(), ["bias"])
    assert "weight_decay" not in groups[0]
    assert groups[1]["weight_decay"] == 0.0


def test_a_group_that_would_be_empty_is_not_made() -> None:
    assert [len(group["params"]) for group in parameter_groups(nn.LayerNorm(2), ["norm"])] == [2]
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), ["bias"])) == 1


def test_a_root_module_that_is_a_norm() -> None:
    assert names(nn.LayerNorm(2), ["norm"]) == [["bias", "weight"]]


@pytest.mark.parametrize(
    ("kind", "given", "device", "fused"),
    [
        (torch.optim.AdamW, ["lr"], "cpu", True),
        (torch.optim.SGD, [], "cuda", True),
        (torch.optim.AdamW, ["fused"], "cpu", False),
        (torch.optim.AdamW, ["foreach"], "cpu", False),
        (torch.optim.AdamW, ["capturable"], "cuda", False),
        (torch.optim.RMSprop, [], "cpu", False),
        (torch.optim.AdamW, [], "xpu", False),
        (Own, [], "cpu", False),
    ],
)
def test_fused_where_torch_has_it_and_nobody_chose(kind: Any, given: list[str], device: str, fused: bool) -> None:
    assert fused_by_default(kind, given, torch.device(device)) == ({"fused": True} if fused else {})


def test_without_compiler_goes_on_working_beside_it() -> None:
    """In a process of its own: what was held off works as well once the compiler is there."""
    program = (
        "import sys, torch\n"
        "from runner.engine.optimizer import without_compiler\n"
        "without_compiler()\n"
        "o = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters(), lr=0.1)\n"
        "o.zero_grad(); o.state_dict(); o.load_state_dict(o.state_dict())\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "import torch._dynamo\n"
        "without_compiler()\n"
        "o.zero_grad(); o.add_param_group({'params': [torch.nn.Parameter(torch.ones(1))]})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_is_changed_where_the_compiler_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "sys", SimpleNamespace(modules={"torch._dynamo": None}))
    plain = torch.optim.Optimizer.zero_grad.__wrapped__
    kept = plain.__dict__.pop("__dynamo_disable", None)
    try:
        room.without_compiler()
        assert "__dynamo_disable" not in plain.__dict__
    finally:
        if kept is not None:
            plain.__dict__["__dynamo_disable"] = kept
