"""Precision fp8: what it needs, which layers it takes, and that they train (by emulation)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import nn

from runner.engine import fp8
from runner.errors import InputError

CPU = torch.device("cpu")
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))


def test_no_hardware() -> None:
    (problem,) = (p for p in fp8.check(CPU, emulate=False) if "torchao" not in p.why)
    assert problem.key == "precision"
    assert problem.value == "fp8"
    assert "cpu has no float8" in problem.why
    assert "precision=bf16" in problem.fix
    assert "precision.emulate=true" in problem.fix


def test_an_older_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    (problem,) = fp8.check(torch.device("cuda", 0), emulate=False)
    assert "NVIDIA A100 (compute capability 8.0)" in problem.why
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fp8.check(torch.device("cuda", 0), emulate=False) == []


def test_no_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (problem,) = fp8.check(CPU, emulate=True)
    assert "torchao, which is not installed" in problem.why
    assert problem.fix.startswith("pip install 'runner[fp8]'")


def test_checking_imports_no_torchao() -> None:
    code = "import sys, torch; from runner.engine import fp8; fp8.check(torch.device('cpu'), True)"
    found = subprocess.run([sys.executable, "-c", f"{code}; print('torchao' in sys.modules)"], capture_output=True)
    assert found.stdout.split() == [b"False"]


@needs_torchao
def test_layers_of_fitting_sizes_compute_in_float8() -> None:
    plain, model = mlp(), mlp()
    with torch.no_grad():
        model[0].weight.requires_grad_(False)
    assert fp8.convert(model, emulate=True) == ["0", "2"]
    assert [type(layer).__name__ for layer in model][::2] == ["Float8Linear", "Float8Linear", "Linear"]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert not model[0].weight.requires_grad
    x = torch.randn(7, 32)  # a number of samples that float8 products do not like
    losses = {}
    for found in (plain, model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = found(x).float().square().sum()
        loss.backward()
        losses[found] = loss.item()
    assert losses[model] != losses[plain]
    assert losses[model] == pytest.approx(losses[plain], rel=0.05)
    assert torch.allclose(model[2].weight.grad, plain[2].weight.grad, atol=0.1)


@needs_torchao
def test_nothing_to_convert() -> None:
    with pytest.raises(InputError) as caught:
        fp8.convert(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 16)), emulate=True)
    assert "3x5, 5x16" in caught.value.problems[0].why
    with pytest.raises(InputError, match=r"no nn\.Linear"):
        fp8.convert(nn.Sequential(nn.Conv1d(16, 16, 1)), emulate=True)
    with pytest.raises(InputError, match="single linear layer"):
        fp8.convert(nn.Linear(16, 16), emulate=True)


@pytest.mark.gpu
@needs_torchao
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="no float8 GPU"
)
def test_on_a_gpu() -> None:
    torch.manual_seed(0)
    plain, model = mlp().cuda(), mlp().cuda()
    assert fp8.convert(model) == ["0", "2"]
    x = torch.randn(7, 32, device="cuda")
    losses = []
    for found in (plain, model):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = found(x).float().square().sum()
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
