"""SEMANTICS.md, lines 7 to 11: optimizer, scaler, scheduler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from api.scripts.data import mlp, points
from small import precision_config
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from contract.lines import BACKENDS, Together, backends, needs_deepspeed, trained_on
from contract.numbers import bare_state, gradient, state
from contract.training import settings, trained
from runner import Engine, distributed
from runner.errors import InputError

pytestmark = pytest.mark.usefixtures("quiet")

two = Together(2)

CLIPPED = ("ddp", "fsdp", "fsdp_keep", "hsdp", "zero0", "zero1", "zero2", "zero3")
HALVES = ("ddp", "fsdp", "fsdp_keep")


# --- 7: the scheduler's unit ------------------------------------------------------------------------------------------


def rates(backend: Any, accumulation: int, **options: Any) -> list[float]:
    """The rate of each of six optimizer steps of 12 points in a loop that steps the scheduler every micro-batch."""
    engine = Engine(backend=backend, accumulation_steps=accumulation, split_batches=True, **options)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=6)
    loader = DataLoader(points(72), batch_size=12 // accumulation)
    model, optimizer, plan, loader = engine.prepare(model, optimizer, plan, loader)
    seen = []
    for inputs, targets in loader:
        with engine.accumulate(model):
            engine.backward(cross_entropy(model(inputs), targets))
            if engine.sync_gradients:
                seen.append(plan.get_last_lr()[0])
            optimizer.step()
            if optimizer.taken < 6:
                plan.step()
            optimizer.zero_grad()
    return seen


def expected_rates(every: int = 1) -> list[Any]:
    optimizer = torch.optim.SGD(mlp().parameters(), lr=1.0)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=6)
    seen = []
    for _ in range(6):
        seen.append(plan.get_last_lr()[0])
        for _ in range(every):
            if plan.last_epoch + 1 < 6:
                optimizer.step()
                plan.step()
    return seen


@two.each("ddp", "fsdp", "zero2")
def rates_by_processes(name: str) -> dict[Any, list[float]]:
    found: dict[Any, list[float]] = {k: rates(BACKENDS[name], k) for k in (1, 2, 3)}
    return found


@backends("ddp", "fsdp", "zero2")
def test_07a_the_rates_over_steps_do_not_depend_on_processes_and_accumulation(backend: str) -> None:
    expected = expected_rates()
    for k in (1, 2, 3):
        assert rates("single", k) == expected
    for found in two(rates_by_processes, backend):
        assert all(curve == expected for curve in found.values())


@two.add
def rates_per_process() -> list[float]:
    engine = Engine(step_scheduler_per_process=True)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=6)
    model, optimizer, plan = engine.prepare(model, optimizer, plan)
    seen = []
    for _ in range(6):
        seen.append(plan.get_last_lr()[0])
        engine.backward(model(torch.ones(2, 4)).mean())
        optimizer.step()
        plan.step()
        optimizer.zero_grad()
    return seen


def test_07b_an_option_steps_as_often_as_there_are_processes() -> None:
    for found in two(rates_per_process):
        assert found == expected_rates(2)


@two.each("ddp", "fsdp", "zero2")
def rates_of_the_runner(name: str) -> list[list[float]]:
    return [trained_on(name, k, {"steps": 6})["rates"] for k in (1, 2, 3)]


@backends("ddp", "fsdp", "zero2")
def test_07c_nor_do_those_of_the_runners_loop(backend: str) -> None:
    expected = trained("single", 1, {"steps": 6})["rates"]
    assert len(set(expected)) == 6
    for found in two(rates_of_the_runner, backend):
        assert found == [expected] * 3


@two.add
def rates_around_a_skipped_step() -> list[float]:
    engine = Engine(precision="fp16", grad_scaler={"init_scale": 8.0})
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    plan = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    model, optimizer, plan = engine.prepare(model, optimizer, plan)
    seen = []
    for factor in (1.0, float("inf"), float("nan"), 1.0):
        engine.backward(model(torch.ones(2, 4)).mean() * factor)
        optimizer.step()
        plan.step()
        optimizer.zero_grad()
        seen.append(plan.get_last_lr()[0])
    return seen


def test_07d_a_skipped_step_moves_no_schedule() -> None:
    for found in two(rates_around_a_skipped_step):
        assert found == [0.5, 0.5, 0.5, 0.25]


PLATEAU: dict[str, Any] = {
    # A threshold that no loss reaches, and no patience: every evaluation but the first halves the rate.
    "scheduler": {
        "_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau",
        "factor": 0.5,
        "patience": 0,
        "threshold": 100.0,
        "threshold_mode": "abs",
    },
    "steps": 10,
    "eval__every": 3,
}


@two.each("ddp", "fsdp", "zero2")
def rates_by_a_metric(name: str) -> list[float]:
    return trained_on(name, 2, dict(PLATEAU))["rates"]


@backends("ddp", "fsdp", "zero2")
def test_07e_a_metric_scheduler_counts_evaluations(backend: str) -> None:
    curve = [1e-2] * 6 + [5e-3] * 3 + [2.5e-3]
    assert trained("single", 1, dict(PLATEAU))["rates"] == curve
    for found in two(rates_by_a_metric, backend):
        assert found == curve


# --- 8: fp16 ----------------------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """Tells in which type its layer computes, and its loss may be made to overflow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.types: set[torch.dtype] = set()

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x)
        self.types.add(found.dtype)
        return found


def skipped_steps(backend: Any, bad_rank: int, bad: float, clip: bool) -> dict[str, Any]:
    """Steps of which the first is finite, two are not on one process, and two are again."""
    engine = Engine(backend=backend, precision="fp16", grad_scaler={"init_scale": 64.0})
    torch.manual_seed(0)
    own = Watched()
    optimizer = torch.optim.AdamW(own.parameters(), lr=0.1)
    model, optimizer = engine.prepare(own, optimizer)
    factors = (1.0, bad, bad, 1.0, 1.0)
    found: dict[str, Any] = {"skipped": [], "moved": [], "scales": []}
    for factor in factors:
        before = state(engine, model)
        outputs = model(torch.ones(2, 4))
        assert outputs.dtype == torch.float32
        engine.backward(outputs.mean() * (factor if engine.process_index == bad_rank else 1.0))
        if clip:
            engine.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found["skipped"].append(engine.optimizer_step_was_skipped)
        found["moved"].append(state(engine, model) != before)
        found["scales"].append(engine.scaler.value)
    found["types"] = own.types
    found["weights"] = state(engine, model)
    return found


@two.each(*HALVES)
def all_skipped_steps(name: str) -> list[dict[str, Any]]:
    return [
        skipped_steps(BACKENDS[name], rank, bad, clip)
        for rank in (0, 1)
        for bad in (float("inf"), float("nan"))
        for clip in (False, True)
    ]


def assert_skipped(found: dict[str, Any]) -> None:
    assert found["skipped"] == [False, True, True, False, False]
    assert found["moved"] == [True, False, False, True, True]
    assert found["scales"] == [64.0, 32.0, 16.0, 16.0, 16.0]
    assert found["types"] == {torch.float16}
    assert all(number == number for number in found["weights"])


@backends(*HALVES)
def test_08a_an_overflow_on_one_process_skips_the_step_on_all(backend: str) -> None:
    first, second = two(all_skipped_steps, backend)
    for one, other in zip(first, second, strict=True):
        assert_skipped(one)
        assert one == other


def test_08b_also_on_one_process() -> None:
    for bad in (float("inf"), float("nan")):
        for clip in (False, True):
            assert_skipped(skipped_steps("single", 0, bad, clip))


@needs_deepspeed
def test_08c_where_fp16_cannot_be_it_is_refused() -> None:
    with pytest.raises(InputError, match="DeepSpeed has no fp16 on a CPU"):
        Engine(backend="deepspeed", precision="fp16")


class Sensitive(nn.Module):
    """A model of the runner's that tells its type to a test."""

    types: set[torch.dtype] = set()

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x)
        Sensitive.types.add(found.dtype)
        return found


@two.each("ddp", "fsdp")
def types_of_the_runner(name: str) -> set[torch.dtype]:
    Sensitive.types = set()
    model = {"_target_": "contract.test_semantics_optimizer.Sensitive"}
    trained(name, 1, {"precision": "fp16", "steps": 2, "model": model})
    return Sensitive.types


@backends("ddp", "fsdp")
def test_08d_the_runners_fp16_is_fp16(backend: str) -> None:
    for found in two(types_of_the_runner, backend):
        assert found == {torch.float16}


# --- 9: several optimizers under one scaler ---------------------------------------------------------------------------


def two_optimizers(backend: Any) -> dict[str, Any]:
    """Three iterations; in the second the first optimizer's gradient overflows on one process."""
    engine = Engine(backend=backend, precision="fp16", grad_scaler={"init_scale": 8.0, "growth_interval": 2})
    torch.manual_seed(0)
    # float16 keeps these gradients exactly: the scale must not show in the weights.
    first, second = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    for layer in (first, second):
        nn.init.zeros_(layer.weight)
    one, other = torch.optim.SGD(first.parameters(), lr=1.0), torch.optim.SGD(second.parameters(), lr=1.0)
    first, second, one, other = engine.prepare(first, second, one, other)
    x = torch.ones(2, 2)
    found: dict[str, Any] = {"first": [], "second": [], "scales": [], "skipped": []}
    for iteration in range(4):
        bad = float("inf") if iteration == 1 and engine.is_last_process else 1.0
        engine.backward(first(x).mean() * bad)
        engine.backward(second(x).mean() * 0.5)
        if iteration == 2:
            engine.unscale_gradients()
            engine.clip_grad_norm_(second.parameters(), 100.0)  # nothing is unscaled a second time
        one.step()
        other.step()
        found["skipped"].append((one.step_was_skipped, other.step_was_skipped))
        one.zero_grad()
        other.zero_grad()
        found["first"].append(state(engine, first)[0])
        found["second"].append(state(engine, second)[0])
        found["scales"].append(engine.scaler.value)
    return found


@two.each(*HALVES)
def optimizers_by_processes(name: str) -> dict[str, Any]:
    return two_optimizers(BACKENDS[name])


@backends(*HALVES)
def test_09_each_optimizer_is_unscaled_once_and_an_overflow_of_one_leaves_the_other_alone(backend: str) -> None:
    for found in two(optimizers_by_processes, backend):
        assert found["skipped"] == [(False, False), (True, False), (False, False), (False, False)]
        assert found["first"] == [-1.0, -1.0, -2.0, -3.0]
        assert found["second"] == [-0.5, -1.0, -1.5, -2.0]
        assert found["scales"] == [8.0, 4.0, 4.0, 8.0]  # once an iteration: two finite ones make it grow


# --- 10: clipping -----------------------------------------------------------------------------------------------------


def large_loss(model: Any, rows: slice) -> Tensor:
    """Gradients above 1, so that anything that clips unasked would show."""
    inputs, targets = points(8).tensors
    return 30 * cross_entropy(model(inputs[rows]), targets[rows])


def clipped(name: str, how: str, most: float, accumulation: int = 1) -> dict[str, Any]:
    """The norm returned and the weights after two steps of SGD over eight points."""
    engine = Engine(backend=BACKENDS[name])
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model, optimizer = engine.prepare(model, optimizer)
    norms = []
    size = 4 // accumulation
    for _ in range(2):
        for number in range(accumulation):
            start = 4 * engine.process_index + size * number
            with engine.accumulate(model, steps=accumulation):
                engine.backward(large_loss(model, slice(start, start + size)))
                if how == "norm":
                    norm = engine.clip_grad_norm_(model.parameters(), most)
                    if engine.sync_gradients:
                        norms.append(norm.item())
                    else:
                        assert norm.item() == 0.0
                elif how == "value":
                    engine.clip_grad_value_(model.parameters(), most)
                optimizer.step()
                optimizer.zero_grad()
    return {"norms": norms, "weights": state(engine, model)}


def clipped_bare(how: str, most: float) -> dict[str, Any]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    norms = []
    for _ in range(2):
        large_loss(model, slice(0, 8)).backward()
        if how == "norm":
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), most).item())
        elif how == "value":
            nn.utils.clip_grad_value_(model.parameters(), most)
        optimizer.step()
        optimizer.zero_grad()
    return {"norms": norms, "weights": bare_state(model)}


@two.each(*CLIPPED)
def all_clipped(name: str) -> dict[Any, Any]:
    cases = [("norm", 0.1, 1), ("norm", 0.1, 2), ("norm", 1e4, 1), ("value", 0.05, 1), ("value", 0.05, 2)]
    return {case: clipped(name, *case) for case in (*cases, ("nothing", 0.0, 1))}


@backends(*CLIPPED)
@pytest.mark.parametrize("how", ["norm", "value", "nothing"])
def test_10a_clipping_is_that_of_one_process(backend: str, how: str) -> None:
    for found in two(all_clipped, backend):
        for case, one in found.items():
            if case[0] == how:
                expected = clipped_bare(*case[:2])
                assert one["norms"] == pytest.approx(expected["norms"], rel=1e-5), case
                assert one["weights"] == pytest.approx(expected["weights"], abs=2e-6), case
    if how == "norm":
        assert clipped_bare("norm", 0.1)["norms"][0] > 1.0


@two.each("ddp", "fsdp")
def gradients_clipped(name: str) -> dict[str, Any]:
    """The gradients themselves after clipping, of the list from before prepare and for another norm."""
    engine = Engine(backend=BACKENDS[name])
    model = mlp()
    listed = list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model, optimizer = engine.prepare(model, optimizer)
    own = slice(4 * engine.process_index, 4 * engine.process_index + 4)
    found: dict[str, Any] = {}
    for kind in (2.0, 1.0, float("inf")):
        engine.backward(large_loss(model, own))
        norm = engine.clip_grad_norm_(listed, 0.5, kind)
        found[str(kind)] = (norm.item(), gradient(model))
        optimizer.zero_grad()
    return found


@backends("ddp", "fsdp")
def test_10b_gradients_after_clipping_for_any_norm(backend: str) -> None:
    for found in two(gradients_clipped, backend):
        for kind in (2.0, 1.0, float("inf")):
            model = mlp()
            large_loss(model, slice(0, 8)).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5, kind).item()
            assert found[str(kind)][0] == pytest.approx(norm, rel=1e-5)
            assert found[str(kind)][1] == pytest.approx(gradient(model), abs=1e-6)


@two.each("ddp", "fsdp", "zero1", "zero2", "zero3")
def norms_of_the_runner(name: str) -> dict[Any, Any]:
    return {clip: trained_on(name, 2, {"steps": 4, "grad_clip": clip}) for clip in (None, 0.05)}


@backends("ddp", "fsdp", "zero1", "zero2", "zero3")
def test_10c_the_runners_norms_are_those_before_clipping(backend: str) -> None:
    expected = {clip: trained("single", 1, {"steps": 4, "grad_clip": clip}) for clip in (None, 0.05)}
    assert expected[None]["losses"] != expected[0.05]["losses"]
    assert min(expected[0.05]["norms"]) > 0.1
    for found in two(norms_of_the_runner, backend):
        for clip in (None, 0.05):
            assert found[clip]["norms"] == pytest.approx(expected[clip]["norms"], rel=1e-5)
            assert found[clip]["losses"] == pytest.approx(expected[clip]["losses"], rel=1e-5)


# --- 11: options of the scaler ----------------------------------------------------------------------------------------


SCALING = {"init_scale": 256.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 3, "floor": 16.0}


def scales(backend: Any) -> list[float]:
    engine = Engine(backend=backend, precision="fp16", grad_scaler=SCALING)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model, optimizer = engine.prepare(model, optimizer)
    found = [engine.scaler.value]
    for factor in (1.0, 1.0, 1.0, float("inf"), float("inf"), float("inf"), float("inf"), 1.0):
        engine.backward(model(torch.ones(1, 2)).mean() * factor)
        optimizer.step()
        optimizer.zero_grad()
        found.append(engine.scaler.value)
    return found


@two.each(*HALVES)
def scales_by_processes(name: str) -> list[float]:
    return scales(BACKENDS[name])


@backends(*HALVES)
def test_11a_options_reach_the_scaler(backend: str) -> None:
    # Three finite steps make it grow, each overflow shrinks it, and it stays above the floor.
    curve = [256.0, 256.0, 256.0, 1024.0, 256.0, 64.0, 16.0, 16.0, 16.0]
    assert scales("single") == curve
    for found in two(scales_by_processes, backend):
        assert found == curve


@two.each("ddp", "fsdp")
def scaler_of_the_runner(name: str) -> dict[str, Any]:
    from runner.assemble import check

    ranks = distributed.Ranks(distributed.rank(), distributed.world_size(), distributed.rank(), 2)
    precision = {**precision_config("fp16"), "loss_scaling": SCALING}
    plain = {**settings(name, 2, 1), "precision": precision}
    backend: Any = check(plain, ranks).backend
    return vars(backend.precision.loss_scaling) | {"scale": backend.scaler.value}


@backends("ddp", "fsdp")
def test_11b_also_from_a_configuration(backend: str) -> None:
    for found in two(scaler_of_the_runner, backend):
        assert found == {**SCALING, "scale": 256.0}


@needs_deepspeed
def test_11c_and_deepspeeds_own() -> None:
    from dataclasses import replace

    from runner.engine.deepspeed import DeepSpeed
    from runner.engine.mesh import Mesh
    from runner.engine.precision import PRECISIONS, LossScaling

    precision = replace(PRECISIONS["fp16"], loss_scaling=LossScaling(256.0, growth_interval=3, floor=16.0))
    fp16 = DeepSpeed(torch.device("cuda"), precision, Mesh())._config()["fp16"]
    assert fp16["enabled"]
    assert 2 ** fp16["initial_scale_power"] == 256
    assert fp16["loss_scale_window"] == 3
    assert fp16["min_loss_scale"] == 16.0


@needs_deepspeed
def test_11d_options_that_deepspeed_does_not_have_are_refused() -> None:
    from dataclasses import replace

    from runner.engine.deepspeed import DeepSpeed
    from runner.engine.mesh import Mesh
    from runner.engine.precision import PRECISIONS, LossScaling

    for option, value in (("growth_factor", 4.0), ("backoff_factor", 0.25), ("init_scale", 100.0)):
        scaling = replace(LossScaling(), **{option: value})  # type: ignore[arg-type]
        precision = replace(PRECISIONS["fp16"], loss_scaling=scaling)
        problems = DeepSpeed(torch.device("cuda"), precision, Mesh()).check()
        assert [problem.key for problem in problems] == [f"precision.loss_scaling.{option}"]
