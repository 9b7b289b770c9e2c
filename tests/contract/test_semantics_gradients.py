"""SEMANTICS.md, lines 1 to 6: gradients and accumulation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from api.scripts import tokens
from api.scripts.data import mlp, points
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from contract.lines import BACKENDS, Together, backends, trained_on
from contract.numbers import bare_state, gradient, state
from contract.training import by_hand, trained
from runner import Engine

pytestmark = pytest.mark.usefixtures("quiet")

two = Together(2)

ALL = ("ddp", "fsdp", "fsdp_keep", "hsdp", "zero0", "zero1", "zero2", "zero3")


def bare_gradient(*parts: tuple[int, int]) -> list[float]:
    """The sum of the gradients of the mean losses of some rows of eight points."""
    alone = mlp()
    inputs, targets = points(8).tensors
    for start, stop in parts:
        cross_entropy(alone(inputs[start:stop]), targets[start:stop]).backward()
    return gradient(alone)


# --- 1: no_sync -------------------------------------------------------------------------------------------------------


def test_01a_no_sync_changes_nothing_on_one_process() -> None:
    engine = Engine()
    model = engine.prepare(mlp())
    inputs, targets = points(8).tensors
    with engine.no_sync(model):
        engine.backward(cross_entropy(model(inputs), targets))
    assert gradient(model) == bare_gradient((0, 8))
    engine.backward(cross_entropy(model(inputs), targets))
    assert gradient(model) == bare_gradient((0, 8), (0, 8))


@two.each("ddp", "fsdp", "fsdp_keep")
def gradients_of_no_sync(name: str) -> dict[str, Any]:
    """Gradients after a backward inside of the block, after one outside, and after both; what travelled inside."""
    engine = Engine(backend=BACKENDS[name])
    model = engine.prepare(mlp())
    inputs, targets = points(8).tensors
    own = slice(4 * engine.process_index, 4 * engine.process_index + 4)

    def backward() -> None:
        engine.backward(cross_entropy(model(inputs[own]), targets[own]))

    found: dict[str, Any] = {}
    with engine.no_sync(model):
        loss = cross_entropy(model(inputs[own]), targets[own])
        with CommDebugMode() as travelled:
            engine.backward(loss)
    found["reductions"] = [str(op) for op in travelled.get_comm_counts() if "reduce" in str(op)]
    if name == "ddp":
        found["inside"] = gradient(model)
    backward()
    found["both"] = gradient(model)
    model.zero_grad()
    backward()
    found["outside"] = gradient(model)
    return found


@backends("ddp", "fsdp", "fsdp_keep")
def test_01b_gradients_stay_local_inside_no_sync_and_are_those_of_the_gathered_batch_outside(backend: str) -> None:
    for rank, found in enumerate(two(gradients_of_no_sync, backend)):
        assert found["reductions"] == []
        if backend == "ddp":
            assert found["inside"] == pytest.approx(bare_gradient((4 * rank, 4 * rank + 4)), abs=1e-7)
        assert found["outside"] == pytest.approx(bare_gradient((0, 8)), abs=1e-7)
        assert found["both"] == pytest.approx(bare_gradient((0, 8), (0, 8)), abs=1e-7)


@two.each("zero0", "zero1", "zero2", "zero3", "fsdp", "ddp")
def step_after_no_sync(name: str) -> list[float]:
    """Weights after a step of two micro-batches, the first of them inside of no_sync."""
    engine = Engine(backend=BACKENDS[name])
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model, optimizer = engine.prepare(model, optimizer)
    inputs, targets = points(8).tensors
    first = slice(2 * engine.process_index, 2 * engine.process_index + 2)
    second = slice(first.start + 4, first.stop + 4)
    with engine.no_sync(model):
        engine.backward(cross_entropy(model(inputs[first]), targets[first]))
    engine.backward(cross_entropy(model(inputs[second]), targets[second]))
    optimizer.step()
    optimizer.zero_grad()
    return state(engine, model)


@backends("zero0", "zero1", "zero2", "zero3", "fsdp", "ddp")
def test_01c_a_step_over_no_sync_is_that_of_all_its_batches(backend: str) -> None:
    alone = mlp()
    step = torch.optim.SGD(alone.parameters(), lr=0.3)
    inputs, targets = points(8).tensors
    (cross_entropy(alone(inputs[:4]), targets[:4]) + cross_entropy(alone(inputs[4:]), targets[4:])).backward()
    step.step()
    for found in two(step_after_no_sync, backend):
        assert found == pytest.approx(bare_state(alone), abs=1e-6)


# --- 2, 3: micro-batches and processes --------------------------------------------------------------------------------


def steps_of(backend: Any, accumulation: int, size: int, samples: int, optimizer_class: Any, lr: float) -> Any:
    """Weights after each step over `samples` points, `size` of them in a micro-batch of all processes."""
    engine = Engine(backend=backend, accumulation_steps=accumulation, split_batches=True)
    model = mlp()
    optimizer = optimizer_class(model.parameters(), lr=lr)
    model, optimizer, loader = engine.prepare(model, optimizer, DataLoader(points(samples), batch_size=size))
    seen = []
    for inputs, targets in loader:
        with engine.accumulate(model):
            engine.backward(cross_entropy(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
        if engine.sync_gradients:
            seen.append(state(engine, model))
    return seen


@cache
def bare_steps(samples: int, size: int, optimizer_class: Any, lr: float) -> list[list[float]]:
    """The same with whole batches of `size` on a bare model."""
    model = mlp()
    optimizer = optimizer_class(model.parameters(), lr=lr)
    seen = []
    for inputs, targets in DataLoader(points(samples), batch_size=size):
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(bare_state(model))
    return seen


def close(found: list[list[float]], expected: list[list[float]], tolerance: float = 1e-6) -> None:
    assert len(found) == len(expected)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one == pytest.approx(other, abs=tolerance), f"step {step + 1}"


@two.each(*ALL)
def equal_batches(name: str) -> dict[int, Any]:
    return {k: steps_of(BACKENDS[name], k, 48 // k, 144, torch.optim.SGD, 0.5) for k in (1, 2, 4)}


@backends(*ALL)
def test_02a_micro_batches_on_processes_are_one_batch_on_a_bare_model(backend: str) -> None:
    for found in two(equal_batches, backend):
        for steps in found.values():
            close(steps, bare_steps(144, 48, torch.optim.SGD, 0.5))


def test_02b_also_on_one_process() -> None:
    for k in (1, 2, 4):
        found = steps_of("single", k, 48 // k, 144, torch.optim.SGD, 0.5)
        close(found, bare_steps(144, 48, torch.optim.SGD, 0.5))


@two.each(*ALL)
def short_windows(name: str) -> list[Any]:
    """Loaders that end inside of a window, with a length and as a stream without one."""
    return [
        steps_of(BACKENDS[name], 3, 8, 40, torch.optim.SGD, 0.5),  # windows of 3 and 2 micro-batches
        steps_of(BACKENDS[name], 4, 8, 72, torch.optim.SGD, 0.5),  # of 4, 4 and 1
        streamed(BACKENDS[name], 3, 8, 40),
    ]


class Stream(IterableDataset[Any]):
    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __iter__(self) -> Iterator[Any]:
        for index in range(self._samples):
            yield points(self._samples)[index]


def streamed(backend: Any, accumulation: int, size: int, samples: int) -> Any:
    engine = Engine(backend=backend, accumulation_steps=accumulation, split_batches=True)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer, loader = engine.prepare(model, optimizer, DataLoader(Stream(samples), batch_size=size))
    seen = []
    for inputs, targets in loader:
        with engine.accumulate(model):
            engine.backward(cross_entropy(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
        if engine.sync_gradients:
            seen.append(state(engine, model))
    return seen


def assert_short_windows(found: list[Any]) -> None:
    close(found[0], bare_steps(40, 24, torch.optim.SGD, 0.5))
    close(found[1], bare_steps(72, 32, torch.optim.SGD, 0.5))
    close(found[2], bare_steps(40, 24, torch.optim.SGD, 0.5))


@backends(*ALL)
def test_03a_a_short_last_window_is_scaled_by_its_true_size(backend: str) -> None:
    for found in two(short_windows, backend):
        assert_short_windows(found)


def test_03b_also_on_one_process() -> None:
    assert_short_windows(
        [
            steps_of("single", 3, 8, 40, torch.optim.SGD, 0.5),
            steps_of("single", 4, 8, 72, torch.optim.SGD, 0.5),
            streamed("single", 3, 8, 40),
        ]
    )


#: 24 samples a step of 100: the last step of each epoch has 4, less than the micro-batches of two processes.
@two.each("ddp", "fsdp", "zero2", "zero3")
def short_steps_of_the_runner(name: str) -> dict[str, Any]:
    return trained_on(name, 4)


@backends("ddp", "fsdp", "zero2", "zero3")
def test_03c_the_runners_short_last_step_is_exact(backend: str) -> None:
    expected = by_hand()
    for found in two(short_steps_of_the_runner, backend):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)


# --- 4: losses that count tokens --------------------------------------------------------------------------------------


@two.each(*ALL)
def token_windows(name: str) -> dict[str, Any]:
    """The script of tests/api, but for reading its weights, which stage 3 keeps in parts."""
    engine = Engine(backend=BACKENDS[name], accumulation_steps=3, split_batches=True)
    model = tokens.language_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loader: Any = DataLoader(tokens.texts(), batch_size=2, collate_fn=tokens.padded)  # type: ignore[arg-type]
    model, optimizer, loader = engine.prepare(model, optimizer, loader)
    totals = []
    for window in tokens.windows(loader, 3):
        total = engine.reduce(sum((ids > 0).sum() for ids in window))
        for ids in window:
            with engine.accumulate(model, weight=total):
                engine.backward(tokens.loss_sum(model(ids), ids))
                optimizer.step()
                optimizer.zero_grad()
        totals.append(int(total))
    return {"totals": totals, "weights": state(engine, model)}


@backends(*ALL)
def test_04a_every_token_of_a_window_and_of_all_processes_counts_the_same(backend: str) -> None:
    model = tokens.language_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    totals = []
    for start in range(0, 20, 6):
        ids = tokens.padded(tokens.texts()[start : start + 6])
        totals.append(int((ids > 0).sum()))
        (tokens.loss_sum(model(ids), ids) / totals[-1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for found in two(token_windows, backend):
        assert found["totals"] == totals
        assert found["weights"] == pytest.approx(bare_state(model), abs=1e-6)


#: A text of 12 tokens: of sample i the first `1 + 5 * i % 12` count, the rest is masked.
def texts(samples: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 11, (samples, 12), generator=generator)
    lengths = 1 + 5 * torch.arange(samples) % 12
    return TensorDataset(ids, ids.masked_fill(torch.arange(12) >= lengths[:, None], -100))


def next_words(embedded: int = 6) -> nn.Module:
    return nn.Sequential(nn.Embedding(11, embedded), nn.Linear(embedded, 11))


TOKENS: dict[str, Any] = {
    "model": {"_target_": "contract.test_semantics_gradients.next_words"},
    "task": {"_target_": "contract.words.Words"},
    "data__train": {"_target_": "contract.test_semantics_gradients.texts", "samples": 100},
    "data__eval": {"_target_": "contract.test_semantics_gradients.texts", "samples": 21, "seed": 1},
    "steps": 10,
    "grad_clip": None,
}


@two.each("ddp", "fsdp", "zero2", "zero3")
def tokens_in_the_runners_loop(name: str) -> list[dict[str, Any]]:
    return [trained_on(name, k, dict(TOKENS)) for k in (1, 4)]


def tokens_by_hand() -> dict[str, list[float]]:
    from runner.data.order import Order

    torch.manual_seed(0)
    model = next_words()
    decayed = [p for n, p in model.named_parameters() if not n.endswith("bias")]
    free = [p for n, p in model.named_parameters() if n.endswith("bias")]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    ids, labels = texts(100).tensors
    order = Order(100, 24, 0)
    found: dict[str, list[float]] = {"losses": [], "norms": []}
    for step in range(10):
        chosen = order.indices(step)
        loss = cross_entropy(model(ids[chosen]).flatten(0, 1), labels[chosen].flatten())  # a mean over tokens
        loss.backward()
        found["losses"].append(loss.item())
        found["norms"].append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())  # type: ignore[misc]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return found


@backends("ddp", "fsdp", "zero2", "zero3")
def test_04b_the_runners_loop_counts_tokens_by_itself(backend: str) -> None:
    expected = tokens_by_hand()
    for each in two(tokens_in_the_runners_loop, backend):
        for found in each:
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
            assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)


def test_04c_also_on_one_process() -> None:
    expected = tokens_by_hand()
    for k in (1, 4):
        found = trained("single", k, dict(TOKENS))
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)


# --- 5: what may be called every micro-batch --------------------------------------------------------------------------


def every_micro_batch(backend: Any) -> dict[str, Any]:
    """Windows of 2, of 3 from the second epoch on, a loop that is left in the middle of one, a loader inside of one."""
    engine = Engine(backend=backend, accumulation_steps=2, split_batches=True)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    plan = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    loader, other = DataLoader(points(40), batch_size=8), DataLoader(points(24), batch_size=4)
    model, optimizer, plan, loader, other = engine.prepare(model, optimizer, plan, loader, other)
    acted: list[str] = []

    def epoch(stop: int | None = None, nested: bool = False) -> None:
        acted.append("")
        for number, (inputs, targets) in enumerate(loader):
            if nested:
                for _ in other:
                    pass
            before = optimizer.taken
            with engine.accumulate(model):
                engine.backward(cross_entropy(model(inputs), targets))
                optimizer.step()
                plan.step()
                optimizer.zero_grad()
            assert engine.sync_gradients == (optimizer.taken > before)
            acted[-1] += "S" if engine.sync_gradients else "."
            if nested:
                for _ in other:
                    break
            if number == stop:
                break

    epoch()
    engine.gradient_accumulation_steps = 3
    epoch(stop=3)  # one micro-batch of the second window is left
    epoch(nested=True)
    second = Engine(backend=backend, accumulation_steps=1)
    found = {"acted": acted, "epochs": plan.scheduler.last_epoch, "weights": state(engine, model)}
    return {**found, "second": (second.gradient_accumulation_steps, second.sync_gradients)}


def every_micro_batch_bare() -> list[float]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    plan = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    inputs, targets = points(40).tensors
    for start, stop in ((0, 16), (16, 32), (32, 40), (0, 24), (0, 24), (24, 40)):
        cross_entropy(model(inputs[start:stop]), targets[start:stop]).backward()
        optimizer.step()
        plan.step()
        optimizer.zero_grad()
    return bare_state(model)


def assert_every_micro_batch(found: dict[str, Any]) -> None:
    assert found["acted"] == [".S.SS", "..S.", "..S.S"]
    assert found["epochs"] == 6
    assert found["weights"] == pytest.approx(every_micro_batch_bare(), abs=1e-6)
    assert found["second"] == (1, True)


@two.each(*ALL)
def words_every_micro_batch(name: str) -> dict[str, Any]:
    return every_micro_batch(BACKENDS[name])


@backends(*ALL)
def test_05a_words_act_when_gradients_are_synchronised_and_no_loop_leaves_anything_behind(backend: str) -> None:
    for found in two(words_every_micro_batch, backend):
        assert_every_micro_batch(found)


def test_05b_also_on_one_process() -> None:
    assert_every_micro_batch(every_micro_batch("single"))


# --- 6: communication hooks -------------------------------------------------------------------------------------------


HOOKS = ("fp16", "bf16", "powersgd")


def square(seed: int = 0) -> nn.Module:
    """Wide enough that PowerSGD compresses its matrices."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))


def hooked(hook: str | None, rank: int = 2, different: int = 2, steps: int = 20) -> dict[str, Any]:
    """Of a training whose gradients travel through a hook: the loss before each step, and how far its gradient is off.

    That is the largest difference of an element from the gradient that a bare model with the same weights has. Of the
    16 points `different` differ, so that gradients are matrices of that rank at most: PowerSGD of a lower rank sends
    an approximation, whose error is no one's mistake.
    """
    engine = Engine(backend={"name": "ddp", "comm_hook": hook, "powersgd_rank": rank})
    model = square()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    model, optimizer = engine.prepare(model, optimizer)
    inputs, targets = (tensor[torch.arange(16) % different] for tensor in points(16).tensors)
    own = slice(8 * engine.process_index, 8 * engine.process_index + 8)
    found: dict[str, Any] = {"losses": [], "off": []}
    for _ in range(steps):
        alone = square()
        alone.load_state_dict(model.state_dict())
        whole = cross_entropy(alone(inputs), targets)
        whole.backward()
        engine.backward(cross_entropy(model(inputs[own]), targets[own]))
        pairs = zip(model.parameters(), alone.parameters(), strict=True)
        found["off"].append(max((p.grad - q.grad).abs().max().item() for p, q in pairs))
        found["losses"].append(whole.item())
        optimizer.step()
        optimizer.zero_grad()
    return {**found, "weights": state(engine, model)}


@two.add
def with_hooks() -> dict[str | None, Any]:
    return {hook: hooked(hook) for hook in (None, *HOOKS)} | {"lossy": hooked("powersgd", 1, 16)}


@pytest.mark.parametrize("hook", HOOKS)
def test_06_communication_hooks_stay_within_a_hundredth(hook: str) -> None:
    ranks = two(with_hooks)
    assert ranks[0][hook] == ranks[1][hook]
    plain, found = ranks[0][None], ranks[0][hook]
    assert max(plain["off"]) < 1e-7
    assert max(found["off"]) <= 1e-2
    assert found["weights"] != plain["weights"]  # the hook does something
    assert found["losses"] == pytest.approx(plain["losses"], abs=1e-2)
    assert plain["losses"][0] - plain["losses"][-1] > 0.05  # it trains


def test_06b_powersgd_of_a_low_rank_compresses_and_still_trains_alike_on_all_processes() -> None:
    ranks = two(with_hooks)
    assert ranks[0]["lossy"] == ranks[1]["lossy"]
    found = ranks[0]["lossy"]
    assert max(found["off"]) > 1e-2
    assert found["losses"][0] - found["losses"][-1] > 0.05
