"""Number formats: what runs in which type, and what a device cannot do."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from small import CPU, engine, step
from torch import Tensor, nn

from runner.engine.precision import PRECISIONS
from runner.places import BUILTIN

pytestmark = pytest.mark.usefixtures("quiet")


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


@dataclass
class Plain:
    logits: Tensor
    count: int = 3


class ModelOutput(OrderedDict):
    """As in transformers: a dataclass that is an OrderedDict of its fields that are not None."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not None:
                super().__setitem__(field.name, value)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self) -> Any:
        kind, _, *rest = super().__reduce__()
        return (kind, tuple(getattr(self, field.name) for field in fields(self)), *rest)  # type: ignore[arg-type]


@dataclass
class Output(ModelOutput):
    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None
    loss: Tensor | None = None


class Net(nn.Linear):
    """Gives its output in a container, and remembers its type inside."""

    inside: torch.dtype

    def __init__(self, wrap: Any) -> None:
        super().__init__(4, 3)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        self.inside = y.dtype
        return self.wrap(y)


WRAPS = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, y),
    "list": lambda y: [y, 3],
    "dict": lambda y: {"logits": y, "ids": y.argmax(-1), "none": None},
    "namedtuple": lambda y: Pair(y, y),
    "output": lambda y: Output(y, hidden=(y, y)),
    "dataclass": lambda y: Plain(y),
}


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors(item)]
    if isinstance(value, Plain):
        return [value.logits]
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, (list, tuple)) else []


@pytest.mark.parametrize("wrap", list(WRAPS))
@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16_full"])
def test_outputs_are_float32_in_the_class_that_the_model_gave(precision: str, wrap: str) -> None:
    made = engine(lambda: Net(WRAPS[wrap]), precision=precision)
    found = made.forward(torch.ones(2, 4))
    expected = WRAPS[wrap](torch.zeros(2, 3))
    assert type(found) is type(expected)
    assert made.model.inside == PRECISIONS[precision].compute_dtype
    floats = [tensor for tensor in tensors(found) if tensor.is_floating_point()]
    assert floats
    assert all(tensor.dtype == torch.float32 and tensor.requires_grad for tensor in floats)
    if wrap == "output":
        assert found.logits is found["logits"]
        assert found.hidden[0].dtype == torch.float32
        assert found.loss is None
        assert list(found) == ["logits", "hidden"]
    if wrap == "dict":
        assert found["ids"].dtype == torch.int64


def test_what_goes_into_a_model_is_not_changed_for_others() -> None:
    """A task may give the batch itself to the model; its targets stay in their type."""
    made = engine(lambda: nn.Bilinear(4, 4, 1), precision="bf16_full")
    batch = OrderedDict(input1=torch.ones(2, 4), input2=torch.ones(2, 4))
    assert made.forward(batch).dtype == torch.float32
    assert batch["input1"].dtype == torch.float32


def test_fp32_outputs_are_the_models_own() -> None:
    made = engine(lambda: Net(WRAPS["dict"]))
    found = made.forward(torch.ones(2, 4))
    assert made.model.inside == torch.float32
    assert found["logits"].grad_fn is not None


@pytest.mark.parametrize(
    ("precision", "weights"),
    [("fp32", torch.float32), ("bf16", torch.float32), ("fp16", torch.float32), ("bf16_full", torch.bfloat16)],
)
def test_weights_are_in_the_type_that_the_precision_says(precision: str, weights: torch.dtype) -> None:
    made = engine(lambda: nn.Linear(4, 3), lambda m: torch.optim.AdamW(m.parameters(), fused=True), precision)
    assert {parameter.dtype for parameter in made.model.parameters()} == {weights}
    made.backward(made.forward(torch.ones(2, 4)).sum(), made.factor(20))
    assert step(made, 1.0).skipped is False
    assert {parameter.dtype for parameter in made.model.parameters()} == {weights}
    assert all(parameter.isfinite().all() for parameter in made.model.parameters())


def test_integer_inputs_stay_integers_under_full_bfloat16() -> None:
    made = engine(lambda: nn.Embedding(5, 3), precision="bf16_full")
    assert made.forward(torch.tensor([1, 2])).dtype == torch.float32


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_is_close_to_float32(precision: str) -> None:
    from small import mlp
    from torch.nn.functional import cross_entropy

    x, y = torch.randn(8, 8), torch.randint(3, (8,))
    losses = {}
    for name in ("fp32", precision):
        made = engine(mlp, precision=name)
        losses[name] = []
        for _ in range(5):
            loss = cross_entropy(made.forward(x), y, reduction="sum")
            losses[name].append(loss.item() / 8)
            made.backward(loss, made.factor(8))
            step(made)
    assert losses[precision] == pytest.approx(losses["fp32"], rel=2e-2)
    assert losses[precision] != losses["fp32"]


def test_tf32_and_fp8_need_a_gpu_and_the_others_run_on_a_cpu() -> None:
    lacks = {"tf32": "cpu has no TF32", "fp8": "cpu has no float8 matrix products"}
    for name, precision in PRECISIONS.items():
        problems = precision.check(CPU)
        if name not in lacks:
            assert problems == []
            continue
        problem = problems[-1]
        assert (problem.key, problem.value, problem.why) == ("precision", name, lacks[name])
        assert ("fp32, bf16, fp16, bf16_full" if name == "tf32" else "precision=bf16") in problem.fix


@pytest.mark.parametrize("name", list(PRECISIONS))
def test_the_named_precisions_are_those_of_the_configuration(name: str) -> None:
    said = yaml.safe_load((BUILTIN / "conf" / "precision" / f"{name}.yaml").read_text())
    known, default = PRECISIONS[name], PRECISIONS["fp32"]
    for key in ("param_dtype", "compute_dtype", "reduce_dtype"):
        value = said.get(key)
        assert (getattr(default, key) if value is None else getattr(torch, value)) == getattr(known, key), key
    assert said["name"] == known.name == name
    assert said.get("tf32", False) == known.tf32
    assert said.get("loss_scaling") == (None if known.loss_scaling is None else vars(known.loss_scaling))
