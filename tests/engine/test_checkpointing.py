"""Activation checkpointing: less is kept, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.blocks import Block, Transformer, batches, trained
from processes import run_ranks
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from runner import distributed
from runner.engine.checkpointing import checkpoint_activations
from runner.engine.compiling import compile_model
from runner.engine.engine import Engine
from runner.engine.mesh import Mesh
from runner.engine.precision import PRECISIONS
from runner.errors import InputError


def made(how: str, **options: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(**options)
    checkpoint_activations(model, how)
    return model


@pytest.mark.parametrize("how", ["full", "selective"])
def test_losses_gradients_and_statistics_are_the_same_bits(how: str) -> None:
    options = {"dropout": 0.3, "statistics": True}
    expected, got = trained(made("none", **options)), trained(made(how, **options))
    assert got[0] == expected[0]
    for mine, theirs in zip([*got[1], got[2]], [*expected[1], expected[2]], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert got[2]["blocks.0.statistics.num_batches_tracked"] == 3


def test_under_autocast_too() -> None:
    def gradient(how: str) -> Tensor:
        model = made(how)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(batches(1)[0]).float().square().mean()
        loss.backward()
        assert model.blocks[0].attention.weight.grad is not None
        return model.blocks[0].attention.weight.grad

    assert torch.equal(gradient("full"), gradient("none"))
    assert torch.equal(gradient("selective"), gradient("none"))


def flops(how: str) -> tuple[int, int]:
    """Of matrix products, in the forward and in the backward."""
    model = made(how)
    with FlopCounterMode(display=False) as forward:
        loss = model(batches(1)[0]).square().mean()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_full_computes_blocks_twice_and_selective_no_product_twice() -> None:
    forward, backward = flops("none")
    assert flops("selective") == (forward, backward)
    again = flops("full")
    assert again[0] == forward
    # The last operation of a block needs no repetition of its own: the repetition ends before it.
    assert backward + 0.5 * forward < again[1] <= backward + forward


def kept(how: str) -> int:
    """Bytes that the graph of a forward keeps, parameters left out."""
    model = made(how, layers=6)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batches(1)[0]).square().mean()
    return sum(found.values())


def test_less_is_kept() -> None:
    assert kept("full") < 0.3 * kept("none")


def test_names_classes_and_copies() -> None:
    plain, model = made("none"), made("full")
    assert list(model.state_dict()) == list(plain.state_dict())
    assert type(model.blocks[0]) is Block
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(twin(batches(1)[0]), plain(batches(1)[0]))
    again = pickle.loads(pickle.dumps(twin))
    assert torch.equal(again(batches(1)[0]), plain(batches(1)[0]))


def test_without_a_backward_it_is_the_plain_forward() -> None:
    model = made("selective", statistics=True).eval()
    with torch.no_grad():
        assert torch.equal(model(batches(1)[0]), made("none", statistics=True).eval()(batches(1)[0]))


def test_a_forward_of_the_instance_is_kept() -> None:
    model = made("none")
    model.blocks[0].forward = lambda x, scale: x * 2
    expected = model(batches(1)[0])
    checkpoint_activations(model, "full")
    assert torch.equal(model(batches(1)[0]), expected)


def test_blocks_by_class_are_the_outermost() -> None:
    model = made("none")
    assert checkpoint_activations(model, "full", ["Block", "Linear"]) == [
        "first", "blocks.0", "blocks.1", "blocks.2", "last",
    ]  # fmt: skip
    trained(model)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        checkpoint_activations(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), "full")
    problem = caught.value.problems[0]
    assert (problem.key, problem.value) == ("activation_checkpointing", "full")
    assert "no repeated blocks" in problem.why
    assert "Sequential" in problem.why
    with pytest.raises(InputError, match="no way to do it"):
        checkpoint_activations(made("none"), "some")


class InPlace(Block):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        product = x @ self.out.weight
        product += self.out.bias
        return product.tanh() * product


def test_a_product_that_is_changed_in_place_is_told_and_not_trained_wrongly() -> None:
    def model(how: str) -> Transformer:
        found = Transformer()
        found.blocks = nn.ModuleList(InPlace(0.0, False) for _ in range(2))
        checkpoint_activations(found, how)
        return found

    trained(model("full"))
    with pytest.raises(InputError, match="in place") as caught:
        trained(model("selective"))
    assert "activation_checkpointing=full" in caught.value.problems[0].fix


# --- with every backend, compiled or not ------------------------------------------------------------------------------

BLOCKWISE = {"backend": "aot_eager", "scope": "block"}
#: (activation_checkpointing, compile)
PAIRS: tuple[tuple[str, Any], ...] = (
    ("full", False),
    ("selective", False),
    ("full", {"backend": "aot_eager"}),
    ("selective", BLOCKWISE),
)


def gradients(engine: Engine, steps: int = 2) -> list[dict[str, Tensor]]:
    """Gradients of each step, by name, over all processes, without stepping."""
    found = []
    for inputs in batches(steps, engine.mesh.data_rank, engine.mesh.data_size):
        with engine.accumulate(True):
            loss = engine.forward(inputs).square().sum()
            engine.backward(loss, engine.factor(60))
        named = engine.model.named_parameters()
        found.append({name.removeprefix("module."): whole(p.grad) for name, p in named if p.grad is not None})
        engine.backend.handle.zero()
    return found


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def engine_of(name: str, how: str, options: Any, mesh: Mesh, **backend: Any) -> Engine:
    from runner.engine.backends import backend_class

    def build() -> nn.Module:
        model = Transformer()
        checkpoint_activations(model, how)
        compile_model(model, options)
        return model

    if options:
        torch._dynamo.reset()
    torch.manual_seed(0)
    kind: Any = backend_class(name, mesh.data_size)
    engine = Engine(kind(torch.device("cpu"), PRECISIONS["fp32"], mesh, **backend))
    engine.prepare(build, lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    return engine


def with_backend(name: str) -> float:
    """The largest difference to one process without any of it."""
    expected = gradients(engine_of("single", "none", False, Mesh()))
    worst = 0.0
    mesh = Mesh(distributed.rank(), distributed.world_size())
    for how, options in PAIRS:
        found = gradients(engine_of(name, how, options, mesh))
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.keys() == theirs.keys()
            worst = max(worst, *((mine[key] - theirs[key]).abs().max().item() for key in theirs))
    return worst


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp"])
def test_it_composes_with_backends_and_compilation(name: str) -> None:
    if name == "single":
        assert with_backend(name) < 1e-7
    else:
        assert max(run_ranks(with_backend, 2, name, timeout=100)) < 1e-7


def course(engine: Engine, steps: int = 3) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    found = []
    for inputs in batches(steps, engine.mesh.data_rank, engine.mesh.data_size):
        with engine.accumulate(True):
            loss = engine.forward(inputs).square().sum()
            share = engine.backward(loss, engine.factor(60))
        known = engine.exchange(share)
        update = engine.step(None, skip=known.skip, measure=True)
        assert update.grad_norm is not None
        found.append((known.loss.item(), update.grad_norm.item()))
    return found


def with_deepspeed(file: str) -> list[list[tuple[float, float]]]:
    mesh = Mesh(distributed.rank(), distributed.world_size())
    found = [course(engine_of("single", "none", False, Mesh()))]
    for stage, how, options in ((1, "selective", BLOCKWISE), (3, "full", BLOCKWISE), (3, "selective", False)):
        found.append(course(engine_of("deepspeed", how, options, mesh, stage=stage, config_file=file)))
    return found


def test_it_composes_with_deepspeed(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    # Its own linear layer adds the bias in place, which selective checkpointing refuses.
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"memory_efficient_linear": false}}')
    for expected, *others in run_ranks(with_deepspeed, 2, str(file), timeout=100):
        for found in others:
            assert [value for step in found for value in step] == pytest.approx(
                [value for step in expected for value in step], rel=1e-5
            )
