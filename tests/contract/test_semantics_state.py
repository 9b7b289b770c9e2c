"""SEMANTICS.md, lines 26 to 33: state and wrapping, and asked is what you get."""

from __future__ import annotations

import gc
import itertools
import os
import pickle
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from api.scripts.data import mlp, points
from processes import run_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from contract.lines import BACKENDS, Together, backends, trained_on
from contract.numbers import bare_state, state
from contract.training import OPTIONS, Blocks, settings, trained
from runner import Engine, distributed
from runner.data.order import Order
from runner.errors import InputError
from runner.recipe.compose import compose

pytestmark = pytest.mark.usefixtures("quiet")

two = Together(2)

ALL = ("ddp", "fsdp", "fsdp_keep", "hsdp", "zero0", "zero1", "zero2", "zero3")
SEVERAL = ("ddp", "fsdp", "hsdp")


def step(engine: Engine, model: Any, optimizer: Any, rows: int = 8) -> None:
    """One step on points that all processes share out."""
    inputs, targets = points(rows).tensors
    size = rows // engine.num_processes
    own = slice(size * engine.process_index, size * engine.process_index + size)
    engine.backward(cross_entropy(model(inputs[own]), targets[own]))
    optimizer.step()
    optimizer.zero_grad()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)


def bare_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    inputs, targets = points(8).tensors
    cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    optimizer.zero_grad()


# --- 26: order, None, twice, several ----------------------------------------------------------------------------------


@two.each(*ALL)
def objects_in_order(name: str) -> list[float]:
    engine = Engine(backend=BACKENDS[name])
    model = mlp()
    optimizer = sgd(model)
    plan = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loader = DataLoader(points(8), batch_size=4)
    a, none, word, b, c, d = engine.prepare(plan, None, "word", loader, optimizer, model)
    assert (none, word) == (None, "word")
    assert a.scheduler is plan
    assert isinstance(b, DataLoader)
    assert c.optimizer is optimizer
    assert engine.unwrap_model(d) is model
    # Nothing is wrapped twice, whichever of both is given.
    assert engine.prepare(d, c, b, a) == (d, c, b, a)
    assert engine.prepare(model) is d
    assert engine.prepare(optimizer, plan) == (c, a)
    assert engine.prepare(loader) is b
    assert engine.prepare(None) is None
    step(engine, d, c)
    return state(engine, d)


@backends(*ALL)
def test_26a_objects_come_back_in_order_and_once(backend: str) -> None:
    model = mlp()
    bare_step(model, sgd(model))
    for found in two(objects_in_order, backend):
        assert found == pytest.approx(bare_state(model), abs=1e-6)


@two.each(*SEVERAL)
def several_in_any_order(name: str) -> list[list[float]]:
    """Two models with an optimizer each and one for both, in every order and in one or several calls."""
    found = []
    for number, order in enumerate(itertools.permutations(range(5))):
        if number % 17:
            continue
        for calls in (1, 2, 5):
            engine = Engine(backend=BACKENDS[name])
            one, other = mlp(1), mlp(2)
            both = torch.optim.SGD([*one.parameters(), *other.parameters()], lr=0.1)
            objects = [one, other, sgd(one), sgd(other), both]
            made: dict[int, Any] = {}
            size = -(-5 // calls)
            for start in range(0, 5, size):
                chosen = order[start : start + size]
                results = engine.prepare(*(objects[i] for i in chosen))
                made |= dict(zip(chosen, results if len(chosen) > 1 else [results], strict=True))
            step(engine, made[0], made[2])
            step(engine, made[1], made[3])
            inputs, targets = points(8).tensors
            half = slice(4 * engine.process_index, 4 * engine.process_index + 4)
            engine.backward(cross_entropy(made[0](inputs[half]) + made[1](inputs[half]), targets[half]))
            made[4].step()
            made[4].zero_grad()
            found.append(state(engine, made[0]) + state(engine, made[1]))
    return found


@backends(*SEVERAL)
def test_26b_several_models_and_optimizers_in_any_order_and_number_of_calls(backend: str) -> None:
    one, other = mlp(1), mlp(2)
    bare_step(one, sgd(one))
    bare_step(other, sgd(other))
    both = torch.optim.SGD([*one.parameters(), *other.parameters()], lr=0.1)
    inputs, targets = points(8).tensors
    both.zero_grad()
    cross_entropy(one(inputs) + other(inputs), targets).backward()
    both.step()
    for results in two(several_in_any_order, backend):
        assert len(results) == 24
        for found in results:
            assert found == pytest.approx(bare_state(one) + bare_state(other), abs=1e-6)


@two.each("zero1", "zero3")
def what_deepspeed_takes(name: str) -> None:
    """One model with its optimizer in one call, and models that train nothing beside it."""
    one, other = mlp(1), mlp(2)
    for call in (
        lambda engine, a, b: engine.prepare(a, b, sgd(a), sgd(b)),
        lambda engine, a, b: engine.prepare(a, sgd(a), sgd(a)),
        lambda engine, a, b: (engine.prepare(a), engine.prepare(sgd(a))),
        lambda engine, a, b: (engine.prepare(a, sgd(a)), engine.prepare(b, sgd(b))),
    ):
        with pytest.raises(InputError, match="DeepSpeed needs one model and its optimizer in one call"):
            call(Engine(backend=BACKENDS[name]), mlp(1), mlp(2))
    engine = Engine(backend=BACKENDS[name])
    teacher, optimizer, model = engine.prepare(other, sgd(one), one)
    step(engine, model, optimizer)
    assert engine.unwrap_model(teacher) is other
    assert state(engine, teacher) == bare_state(mlp(2))


@backends("zero1", "zero3")
def test_26c_deepspeed_takes_one_model_and_says_so(backend: str) -> None:
    two(what_deepspeed_takes, backend)


# --- 27: unwrap, names ------------------------------------------------------------------------------------------------


@two.each(*ALL)
def exported(name: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    engine = Engine(backend=BACKENDS[name])
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as mine:
        folder = engine.broadcast(mine)
        for kind in ("plain", "compiled"):
            torch.manual_seed(0)
            own = Blocks(features=4)
            given: Any = torch.compile(own, backend="eager") if kind == "compiled" else own
            engine = Engine(backend=BACKENDS[name])
            if kind == "compiled" and name == "zero3":
                with pytest.raises(InputError, match=r"cannot divide what torch\.compile has wrapped"):
                    engine.prepare(given, sgd(own))
                engine = Engine(backend=BACKENDS[name])
                own.compile(backend="eager")
                given = own
            model, optimizer = engine.prepare(given, sgd(own))
            unwrapped = engine.unwrap_model(model)
            assert unwrapped is own
            assert issubclass(type(unwrapped), Blocks)  # FSDP2 makes a subclass in place
            assert isinstance(unwrapped.blocks[0], nn.Sequential)
            names = [n for n, _ in unwrapped.named_parameters()]
            assert names == [n for n, _ in model.named_parameters()] == [n for n, _ in Blocks(4).named_parameters()]
            step(engine, model, optimizer)
            assert list(engine.get_state_dict(model)) == list(Blocks(4).state_dict())
            engine.save_model(model, f"{folder}/{kind}")
            found[kind] = load_file(f"{folder}/{kind}/model.safetensors")
            engine.wait_for_everyone()
        after: Any = torch.compile(engine.prepare(mlp()), backend="eager")
        assert isinstance(engine.unwrap_model(after), nn.Sequential)
    return found


@backends(*ALL)
def test_27_models_are_unwrapped_and_exported_under_their_own_names(backend: str) -> None:
    torch.manual_seed(0)
    model = Blocks(features=4)
    bare_step(model, sgd(model))
    expected = model.state_dict()
    for found in two(exported, backend):
        for weights in found.values():
            assert set(weights) == set(expected)
            assert all(torch.allclose(value, expected[name], atol=1e-6) for name, value in weights.items())


# --- 28: one recipe, one numerics -------------------------------------------------------------------------------------


class Kinds(nn.Module):
    """Outputs of several kinds, and the type that its layer computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.types: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> dict[str, Any]:
        logits = self.layer(x)
        self.types.add(logits.dtype)
        return {"logits": logits, "more": (logits * 2, [logits.argmax(-1)]), "none": None}


@two.each("ddp", "fsdp", "fsdp_keep", "hsdp", "zero1", "zero2", "zero3")
def outputs(name: str) -> dict[str, Any]:
    found = {}
    for precision in ("bf16", "fp16", "bf16_full"):
        if name.startswith("zero") and precision != "bf16":
            continue
        engine = Engine(backend=BACKENDS[name], precision=precision)
        own = Kinds()
        model, _ = engine.prepare(own, sgd(own))
        made = model(torch.ones(2, 4))
        types = [made["logits"].dtype, made["more"][0].dtype, made["more"][1][0].dtype]
        model.eval()
        with torch.no_grad():
            types.append(model(torch.ones(2, 4))["logits"].dtype)
        found[precision] = (types, own.types, made["none"])
    return found


@backends("ddp", "fsdp", "fsdp_keep", "hsdp", "zero1", "zero2", "zero3")
def test_28a_outputs_are_fp32_to_the_user(backend: str) -> None:
    inside = {"bf16": torch.bfloat16, "fp16": torch.float16, "bf16_full": torch.bfloat16}
    for found in two(outputs, backend):
        for precision, (types, computed, none) in found.items():
            assert types == [torch.float32, torch.float32, torch.int64, torch.float32], precision
            assert computed == {inside[precision]}, precision
            assert none is None


BF16 = ("ddp", "fsdp", "fsdp_keep", "hsdp")


@two.each("ddp", "fsdp")
def bf16_of_the_runner(name: str) -> dict[str, Any]:
    return trained_on(name, 2, {"precision": "bf16"})


def test_28b_ddp_and_fsdp_in_bf16_agree_over_20_steps() -> None:
    ddp, fsdp = two(bf16_of_the_runner, "ddp")[0], two(bf16_of_the_runner, "fsdp")[0]
    alone = trained("single", 1, {"precision": "bf16"})
    exact = trained("single", 1)
    assert len(ddp["losses"]) == 20
    for key in ("losses", "norms"):
        assert fsdp[key] == pytest.approx(ddp[key], rel=5e-3)
        assert ddp[key] == pytest.approx(alone[key], rel=5e-3)
    assert alone["losses"] != exact["losses"]  # bf16 it is


@two.each(*BF16)
def bf16_of_own_loops(name: str) -> list[float]:
    engine = Engine(backend=BACKENDS[name], precision="bf16", split_batches=True)
    torch.manual_seed(0)
    model = Blocks(features=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = engine.prepare(model, optimizer, DataLoader(points(160), batch_size=8))
    losses = []
    for inputs, targets in loader:
        loss = cross_entropy(model(inputs), targets)
        engine.backward(loss)
        engine.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(engine.reduce(loss, "mean").item())
    return losses


@pytest.mark.parametrize("backend", BF16[1:])
def test_28c_also_in_own_loops(backend: str) -> None:
    ddp = two(bf16_of_own_loops, "ddp")[0]
    assert len(ddp) == 20
    assert two(bf16_of_own_loops, backend)[0] == pytest.approx(ddp, rel=5e-3)


# --- 29: models of all kinds ------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A weight that is used twice, a frozen layer, buffers that are saved and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("unsaved", torch.ones(4), persistent=False)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(torch.tanh(self.frozen(self.first(x)))) * self.scale + self.unsaved)


class Partly(nn.Module):
    """A layer that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Tiny(nn.Module):
    """Parameters of one element, so that some processes have no part of them."""

    def __init__(self, shape: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.factor = nn.Parameter(torch.tensor(0.5) if shape == () else torch.full(shape, 0.5))

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer(x[:, :1])
        return torch.cat([first, first * self.factor, -first], dim=1)


class Scalar(Tiny):
    """A parameter of shape ()."""

    def __init__(self) -> None:
        super().__init__(())


class Buffers(nn.Module):
    """No parameters at all."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3] + self.table


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(4)
    return kind()


KINDS: dict[str, type[nn.Module]] = {"tied": Tied, "partly": Partly, "tiny": Tiny, "scalar": Scalar}


@two.each(*ALL)
def models_of_all_kinds(name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, make in KINDS.items():
        options = BACKENDS[name]
        if kind == "partly" and name == "ddp":
            engine, own = Engine(backend="ddp"), made(make)
            model, optimizer = engine.prepare(own, sgd(own))
            with pytest.raises(InputError, match=r"no gradient in the first step: unused\.weight, unused\.bias"):
                step(engine, model, optimizer)
            options = {"name": "ddp", "find_unused_parameters": True}
        engine = Engine(backend=options)
        own = made(make)
        if kind == "scalar" and name.startswith("zero"):
            with pytest.raises(InputError, match=r"its parameter factor has shape \(\)"):
                engine.prepare(own, sgd(own))
            continue
        model, optimizer = engine.prepare(own, sgd(own))
        for _ in range(3):
            step(engine, model, optimizer)
        whole = engine.get_state_dict(model)
        found[kind] = {name: value.detach().clone() for name, value in whole.items()}
        if kind == "tied":
            assert own.second.weight is own.first.weight  # type: ignore[union-attr]
            assert not own.frozen.weight.requires_grad  # type: ignore[union-attr]
    engine = Engine(backend=BACKENDS[name])
    model = engine.prepare(Buffers())
    assert model(torch.zeros(1, 4)).tolist() == [[0.0, 1.0, 2.0]]
    found["buffers"] = engine.get_state_dict(model)
    return found


@backends(*ALL)
@pytest.mark.parametrize("kind", [*KINDS, "buffers"])
def test_29_models_of_all_kinds(backend: str, kind: str) -> None:
    if kind == "buffers":
        expected = Buffers().state_dict()
    else:
        model = made(KINDS[kind])
        optimizer = sgd(model)
        for _ in range(3):
            bare_step(model, optimizer)
        expected = model.state_dict()
    for ranks in two(models_of_all_kinds, backend):
        if kind == "scalar" and backend.startswith("zero"):
            assert kind not in ranks  # it was said why
            continue
        found = ranks[kind]
        assert set(found) == set(expected)
        for name, value in found.items():
            assert value.shape == expected[name].shape, name
            assert torch.allclose(value, expected[name], atol=1e-6), name


# --- 30: memory, one run after another, pickles -----------------------------------------------------------------------


@two.each(*ALL)
def freed(name: str) -> dict[str, Any]:
    """What is still there after free_memory, and two trainings, one after the other."""
    engine = Engine(backend=BACKENDS[name])
    found: dict[str, Any] = {"left": [], "bytes": [], "weights": []}
    for _ in range(2):
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        loader = DataLoader(points(8), batch_size=4)
        watched = [weakref.ref(one) for one in (model, optimizer, loader, *model.parameters())]
        model, optimizer, loader = engine.prepare(model, optimizer, loader)
        watched += [weakref.ref(one) for one in (model, optimizer, loader)]
        for _ in range(2):
            step(engine, model, optimizer)
        found["weights"].append(state(engine, model))
        model, optimizer, loader = engine.free_memory(model, optimizer, loader)
        assert (model, optimizer, loader) == (None, None, None)
        gc.collect()
        left = [one for ref in watched if (one := ref()) is not None]
        found["left"].append(len(left))
        found["bytes"].append(sum(one.untyped_storage().nbytes() for one in left if isinstance(one, torch.Tensor)))
    again = pickle.loads(pickle.dumps(engine))
    found["pickled"] = (again.backend, again.num_processes, again.process_index == engine.process_index)
    return found


@backends(*ALL)
def test_30a_free_memory_frees_and_another_training_follows(backend: str) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        bare_step(model, optimizer)
    name = "deepspeed" if backend.startswith("zero") else "ddp" if backend == "ddp" else "fsdp"
    for found in two(freed, backend):
        assert found["bytes"] == [0, 0]
        if backend != "zero3":  # of which the library keeps modules and parameters without contents
            assert found["left"] == [0, 0]
        assert found["weights"][0] == found["weights"][1]
        assert found["weights"][0] == pytest.approx(bare_state(model), abs=1e-5)
        assert found["pickled"] == (name, 2, True)


def groups_one_after_another() -> list[Any]:
    """Runs with process groups of their own, of different backends, in one interpreter."""
    distributed.leave()
    found = []
    names = ["fsdp", "single", "fsdp", *(["zero2", "fsdp", "zero3"] if _have_deepspeed() else [])]
    for name in names:
        engine = Engine(backend=BACKENDS.get(name, name))
        model = mlp()
        optimizer = sgd(model)
        model, optimizer = engine.prepare(model, optimizer)
        for _ in range(2):
            step(engine, model, optimizer)
        weights = state(engine, model)
        engine.end_training()
        del engine, model, optimizer
        found.append((weights, distributed.joined()))
    return found


def _have_deepspeed() -> bool:
    from contract.lines import HAVE_DEEPSPEED

    return HAVE_DEEPSPEED


def test_30b_engines_with_groups_of_their_own_one_after_another() -> None:
    model = mlp()
    optimizer = sgd(model)
    for _ in range(2):
        bare_step(model, optimizer)
    (found,) = run_ranks(groups_one_after_another, 1)
    for weights, joined in found:
        assert weights == pytest.approx(bare_state(model), abs=1e-6)
        assert not joined


def test_30c_objects_can_be_pickled() -> None:
    engine = Engine(accumulation_steps=2, precision="bf16")
    model = mlp()
    optimizer = sgd(model)
    plan = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    model, optimizer, plan = engine.prepare(model, optimizer, plan)
    for one in (engine, model, optimizer, plan):
        pickle.loads(pickle.dumps(one))
    again = pickle.loads(pickle.dumps(engine))
    assert (again.precision, again.gradient_accumulation_steps, again.device) == ("bf16", 2, engine.device)
    assert bare_state(pickle.loads(pickle.dumps(model))) == bare_state(mlp())
    assert pickle.loads(pickle.dumps(plan)).get_last_lr() == [0.3]


# --- 31: the micro-batch that fits ------------------------------------------------------------------------------------


class Bounded(nn.Module):
    """Runs out of memory above some samples, on some ranks only."""

    def __init__(self, most: int, ranks: list[int], error: str = "memory") -> None:
        super().__init__()
        self.inner = Blocks()
        self._most = most if distributed.rank() in ranks else 10**6
        self._error: Any = torch.OutOfMemoryError if error == "memory" else ValueError

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and len(x) > self._most:
            raise self._error("out of memory")
        return self.inner(x)


def fitted(name: str, most: int, ranks: list[int], error: str = "memory") -> dict[str, Any]:
    from runner.assemble import assemble, check
    from runner.folder import Bystander, RunFolder
    from runner.train.loop import train

    rank, world = distributed.rank(), distributed.world_size()
    model = {"_target_": "contract.test_semantics_state.Bounded", "most": most, "ranks": ranks, "error": error}
    plain = settings(name, world, 1, model=model, steps=5)
    plain["batch"] = {"global_size": 24, "micro_size": "auto"}
    plain["accumulation"] = {"steps": None}
    here = distributed.Ranks(rank, world, rank, world)
    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder(Path(path)) if rank == 0 else Bystander(Path(path))
        run = assemble(plain, check(plain, here), folder, resume=None)
        train(run)
        order = run.train_data.order
        curves = run.hooks["curves"]
        assert isinstance(order, Order)
        found = {"size": run.train_data.micro_size, "fit": run.fit, "global": order.global_size}
        return {**found, "losses": curves.losses, "samples": run.progress.samples}


@two.add
def searches() -> dict[str, Any]:
    return {
        "one": fitted("ddp", 5, [1]),
        "other": fitted("ddp", 3, [0]),
        "none": fitted("ddp", 1, []),
        "fsdp": fitted("fsdp", 5, [0, 1]),
    }


def test_31a_all_ranks_agree_on_the_micro_batch_and_the_global_batch_stays() -> None:
    first, second = two(searches)
    assert first == second
    expected = trained("single", 1, {"steps": 5})
    for case, size in (("one", 3), ("other", 3), ("none", 12), ("fsdp", 3)):
        found = first[case]
        assert (found["size"], found["fit"].micro_size) == (size, size), case
        assert found["fit"].accumulation * size * 2 == found["global"] == 24, case
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5), case
        assert found["samples"] == 100, case


def other_error() -> None:
    fitted("ddp", 3, [0, 1], "value")


def test_31b_other_errors_pass_through() -> None:
    with pytest.raises(AssertionError, match="ValueError: out of memory"):
        run_ranks(other_error, 2)


# --- 32: asked is what you get ----------------------------------------------------------------------------------------


@two.each(*ALL)
def what_runs(name: str) -> dict[str, Any]:
    """What an engine says it is, what its model is, and how many processes take part."""
    from torch.distributed.tensor import DTensor

    engine = Engine(backend=BACKENDS[name])
    own = mlp()
    model, _ = engine.prepare(own, sgd(own))
    inside = type(model.module).__name__
    return {
        "backend": engine.backend,
        "type": str(engine.distributed_type),
        "processes": (engine.num_processes, len(engine.gather_object([engine.process_index]))),
        "inside": inside,
        "sharded": all(isinstance(p, DTensor) for p in own.parameters()),
        "divided": [p.numel() for p in own.parameters()],
    }


@backends(*ALL)
def test_32a_the_backend_that_was_asked_for_runs(backend: str) -> None:
    for found in two(what_runs, backend):
        assert found["processes"] == (2, 2)
        if backend == "ddp":
            assert (found["backend"], found["type"]) == ("ddp", "MULTI_CPU")
            assert found["inside"] == "DistributedDataParallel"
        elif backend.startswith("zero"):
            assert (found["backend"], found["type"]) == ("deepspeed", "DEEPSPEED")
            assert found["inside"] == "DeepSpeedEngine"
            assert (0 in found["divided"]) == (backend == "zero3")
        else:
            assert (found["backend"], found["type"]) == ("fsdp", "FSDP")
            assert found["inside"].startswith("FSDP")
            assert found["sharded"]


@two.add
def what_is_refused() -> list[str]:
    cases: list[dict[str, Any]] = [
        {"backend": "single"},
        {"precision": "tf32"},
        {"precision": "fp8"},
        {"device": "cuda"} if not torch.cuda.is_available() else {"device": "mps"},
        {"backend": {"name": "fsdp", "replicas": 3}},
        {"backend": {"name": "fsdp", "cpu_offload": True}},
        {"backend": {"name": "ddp", "bucket": 3}},
        {"cpu": True, "device": "cuda"},
    ]
    if _have_deepspeed():
        cases += [
            {"backend": "deepspeed", "precision": "fp16"},
            {"backend": "deepspeed", "precision": "bf16_full"},
            {"backend": {"name": "deepspeed", "stage": 4}},
            {"backend": {"name": "deepspeed", "stage": 0}, "precision": "bf16"},
        ]
    told = []
    for options in cases:
        with pytest.raises(InputError) as caught:
            Engine(**options)
        assert all(problem.why for problem in caught.value.problems), options
        told.append("; ".join(f"{problem.key}: {problem.why}" for problem in caught.value.problems))
    return told


def test_32b_what_cannot_run_stops_with_the_reason() -> None:
    first, second = two(what_is_refused)
    assert first == second
    assert first[0] == "backend: trains in one process, and there are 2"
    assert len(set(first)) == len(first)


@two.add
def runs_of_the_runner() -> dict[str, Any]:
    """Backend, precision and processes of assembled runs, by what was asked."""
    from runner.assemble import check

    rank, world = distributed.rank(), distributed.world_size()
    found: dict[str, Any] = {}
    for name in ("auto", "ddp", "fsdp"):
        for precision in ("fp32", "bf16", "fp16", "bf16_full"):
            plain = settings("ddp", world, 1, precision=precision)
            plain["backend"] = {"name": name, **OPTIONS.get(name, {})}
            backend = check(plain, distributed.Ranks(rank, world, rank, world)).backend
            found[f"{name} {precision}"] = (backend.name, backend.precision.name, backend.mesh.data_size)
    return found


def test_32c_so_it_is_with_the_runner() -> None:
    for found in two(runs_of_the_runner):
        for asked, (name, precision, size) in found.items():
            assert asked.split() == ["auto" if asked.startswith("auto") else name, precision]
            assert (name, size) == ("ddp" if asked.startswith("auto") else name, 2)


def alone_in_fsdp() -> list[str]:
    found = []
    for name in ("fsdp", "ddp", *(["zero2"] if _have_deepspeed() else [])):
        engine = Engine(backend=BACKENDS[name])
        model = mlp()
        model, optimizer = engine.prepare(model, sgd(model))
        step(engine, model, optimizer)
        found.append(type(model.module).__name__)
    return found


def test_32d_one_process_is_no_reason_to_run_something_else() -> None:
    (found,) = run_ranks(alone_in_fsdp, 1)
    assert found[:2] == ["FSDPSequential", "DistributedDataParallel"]
    assert found[2:] == ["DeepSpeedEngine"] * _have_deepspeed()


# --- 33: precedence ---------------------------------------------------------------------------------------------------


OWN = """\
name: own
model: {_target_: torch.nn.Linear, in_features: 4, out_features: 2}
task: classification
data:
  train: {_target_: runner.data.synthetic.random_classification, samples: 8}
train: {epochs: 1}
batch: {global_size: 8}
optimizer: {lr: 0.5}
grad_clip: 2.0
log: {every: 3}
"""


def test_33a_one_precedence(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "own.yaml").write_text(OWN)

    def found(*words: str) -> dict[str, Any]:
        composition = compose(["+recipe=own", *words], directory=tmp_path)
        assert composition.check() == []
        return composition.config

    built_in = found()
    assert built_in["optimizer"]["_target_"] == "torch.optim.AdamW"
    assert (built_in["optimizer"]["lr"], built_in["grad_clip"], built_in["log"]["every"]) == (0.5, 2.0, 3)
    decay = built_in["optimizer"]["weight_decay"]
    (tmp_path / "conf" / "optimizer").mkdir(parents=True)
    own = "_target_: torch.optim.AdamW\nlr: 0.25\nweight_decay: 0.125\n"
    (tmp_path / "conf" / "optimizer" / "adamw.yaml").write_text(own)
    assert decay != 0.125
    assert found()["optimizer"]["weight_decay"] == 0.125  # the user's conf before the built-in one
    assert found()["optimizer"]["lr"] == 0.5  # the recipe before the user's conf
    assert found("optimizer.lr=0.75", "log.every=4")["optimizer"]["lr"] == 0.75  # the command line before all
    assert found("optimizer.lr=0.75", "log.every=4")["log"]["every"] == 4
    assert found("grad_clip=1.5", "optimizer.weight_decay=0.0")["optimizer"]["weight_decay"] == 0.0


#: Variables by which other programs are told such things.
VARIABLES = {
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_CPU": "false",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "FSDP_SHARDING_STRATEGY": "NO_SHARD",
    "PL_GLOBAL_SEED": "99",
    "SEED": "99",
    "LR": "7",
    "RUNNER_BACKEND": "fsdp",
    "RUNNER_SEED": "99",
    "BATCH_SIZE": "1",
    "MIXED_PRECISION": "fp16",
}


@two.add
def environment_changes_nothing() -> list[Any]:
    found = []
    for variables in ({}, VARIABLES):
        os.environ.update(variables)
        try:
            engine = Engine()
            model = mlp()
            model, optimizer = engine.prepare(model, sgd(model))
            step(engine, model, optimizer)
            own = (engine.backend, engine.precision, engine.gradient_accumulation_steps, state(engine, model))
            found.append((trained("ddp", 2, {"steps": 4})["losses"], own))
        finally:
            for name in variables:
                os.environ.pop(name, None)
    return found


def test_33b_environment_variables_change_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for plain, told in two(environment_changes_nothing):
        assert plain == told
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "own.yaml").write_text(OWN)
    before = compose(["+recipe=own"], directory=tmp_path).config
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    assert compose(["+recipe=own"], directory=tmp_path).config == before


def test_33c_the_precedence_is_documented() -> None:
    text = " ".join((Path(__file__).parents[2] / "docs" / "configuration.md").read_text().split())
    line = text[text.index("Layers, later ones win") :]
    places = [line.index(word) for word in ("schema's defaults", "group options", "the recipe,", "the command line")]
    assert places == sorted(places)
