"""The engine on one process: options, wrapping, windows, words that need no other process, and what is freed."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import random
import socket
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from api.scripts.data import mlp, points, weights
from runner import DistributedType, Engine, set_seed
from runner.errors import InputError

# --- options ----------------------------------------------------------------------------------------------------------


def test_importing_the_package_does_not_import_torch() -> None:
    text = "import runner, sys; assert 'torch' not in sys.modules; runner.Engine; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", text], check=True, timeout=60)


def test_both_spellings() -> None:
    engine = Engine(gradient_accumulation_steps=3, mixed_precision="bf16", cpu=True)
    assert (engine.accumulation_steps, engine.precision, engine.mixed_precision) == (3, "bf16", "bf16")
    assert engine.device == torch.device("cpu")
    assert Engine(mixed_precision="no").precision == "fp32"
    assert Engine(accumulation_steps=2, gradient_accumulation_steps=2).gradient_accumulation_steps == 2
    assert Engine("single", "bf16_full").mixed_precision == "no"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"accumulation_steps": 2, "gradient_accumulation_steps": 4}, "contradicts accumulation_steps=2"),
        ({"precision": "fp32", "mixed_precision": "bf16"}, "contradicts precision=fp32"),
        ({"cpu": True, "device": "cuda"}, "contradicts device=cuda"),
        ({"acumulation_steps": 2}, r"^acumulation_steps = 2: is no option of Engine \(fix: did you mean accum.*\?\)$"),
        ({"kwargs_handlers": []}, "kwargs_handlers: is no option"),
        ({"backend": "horovod"}, "backend = horovod: is not known"),
        ({"backend": {"name": "ddp", "bucket": 3}}, "backend.bucket = 3: is no option of ddp"),
        ({"precision": "fp12"}, "precision = fp12: is not known"),
        ({"mixed_precision": "yes"}, "mixed_precision = yes: is not known"),
        ({"precision": "tf32", "device": "cpu"}, "cpu has no TF32"),
        ({"accumulation_steps": 0}, "accumulation_steps = 0: is not a whole number"),
        ({"grad_scaler": {"init_scale": 2.0}}, "fp32 scales no loss"),
        ({"precision": "fp16", "grad_scaler": {"scale": 2.0}}, "grad_scaler.scale: is no option"),
        ({"log_with": "wandbb"}, "no tracker"),
        ({"backend": True}, "backend: a bool is no backend|backend = True: a bool is no backend"),
        ({"seed": 1.5}, "seed = 1.5: is not a whole number"),
        ({"timeout": -1}, "timeout = -1: is no number of seconds above 0"),
        ({"split_batches": "yes"}, "split_batches = yes: is neither True nor False"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Engine(**options)


def test_a_close_name_is_offered() -> None:
    with pytest.raises(InputError) as caught:
        Engine(acumulation_steps=2)
    assert caught.value.problems[0].fix == "did you mean accumulation_steps?"


# --- wrapping ---------------------------------------------------------------------------------------------------------


def test_objects_come_back_in_order_and_once() -> None:
    engine = Engine()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    plan = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loader = DataLoader(points(4))
    a, none, word, b, c, d = engine.prepare(plan, None, "word", loader, optimizer, model)
    assert (none, word) == (None, "word")
    assert a.scheduler is plan
    assert c.optimizer is optimizer
    assert isinstance(c, torch.optim.Optimizer)
    assert engine.prepare(d, c, b, a) == (d, c, b, a)
    assert engine.prepare(model) is d
    assert engine.prepare(optimizer, plan) == (c, a)
    assert c.param_groups is optimizer.param_groups
    assert torch.optim.lr_scheduler.StepLR(c, 1).optimizer is c
    assert engine.prepare() == ()


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.word = "mine"

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        assert torch.is_autocast_enabled("cpu") == (self.word == "mine")
        return {"logits": self.layer(x), "count": torch.tensor(3), "none": None}

    def describe(self) -> str:
        return self.word


def test_a_prepared_model_is_the_users_own_in_all_but_its_call() -> None:
    engine = Engine(precision="bf16")
    own = Own()
    model = engine.prepare(own)
    assert model.describe() == "mine"
    assert model.layer is own.layer
    assert [name for name, _ in model.named_parameters()] == ["layer.weight", "layer.bias"]
    assert list(model.state_dict()) == ["layer.weight", "layer.bias"]
    found = model(torch.ones(2, 4))
    assert found["logits"].dtype == torch.float32
    assert found["count"].dtype == torch.int64
    assert engine.unwrap_model(model) is own
    assert not model.eval().layer.training
    with pytest.raises(AttributeError, match="Own"):
        model.nothing  # noqa: B018
    with engine.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_compiled_models_are_unwrapped_too() -> None:
    engine = Engine()
    own = Own()
    own.word = "compiled"
    before = torch.compile(own)
    model = engine.prepare(before)
    assert engine.unwrap_model(model) is own
    assert engine.unwrap_model(model, keep_torch_compile=True) is before
    after = torch.compile(engine.prepare(Own()))
    assert type(engine.unwrap_model(after)) is Own
    assert engine.prepare(after) is after


def test_an_optimizer_without_its_model_says_so() -> None:
    engine = Engine()
    model = mlp()
    optimizer = engine.prepare(torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(InputError, match="belong to no prepared model"):
        optimizer.step()
    model = engine.prepare(model)
    engine.backward(model(torch.ones(1, 4)).sum())
    before = weights(model)
    optimizer.step()
    assert weights(model) != before


def test_losses_that_cannot_be_meant() -> None:
    engine = Engine()
    model = engine.prepare(mlp())
    for loss, said in ((1.0, "float"), (model(torch.ones(2, 4)), r"\[2, 3\]"), (torch.tensor(1.0), "detached")):
        with pytest.raises(InputError, match=said):
            engine.backward(loss)  # type: ignore[arg-type]


def test_one_graph_twice() -> None:
    engine = Engine()
    model = engine.prepare(mlp())
    loss = model(torch.ones(1, 4)).sum()
    engine.backward(loss, retain_graph=True)
    once = model[0].weight.grad.clone()
    engine.backward(loss)
    assert torch.allclose(model[0].weight.grad, 2 * once)


def test_what_a_failed_prepare_leaves_behind() -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any) -> None:  # type: ignore[override]
            closure()

    engine = Engine()
    model = mlp()
    with pytest.raises(InputError, match=r"^optimizer = .*needs a closure"):
        engine.prepare(model, Odd(model.parameters(), 0.1))
    model, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    before = weights(model)
    engine.backward(model(torch.ones(1, 4)).sum())
    optimizer.step()
    assert weights(model) != before


def test_clipping_what_nobody_steps() -> None:
    engine = Engine()
    engine.prepare(mlp())
    with pytest.raises(InputError, match="none of these parameters is stepped by a prepared optimizer"):
        engine.clip_grad_norm_(mlp().parameters(), 1.0)
    assert engine.clip_grad_norm_([], 1.0) == 0


def test_words_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    engine = Engine(log_with="jsonl", project_dir=tmp_path)
    with pytest.raises(InputError, match="init_kwargs: trackers take their options where they are made"):
        engine.init_trackers("a", init_kwargs={"jsonl": {"file": "b"}})
    engine.init_trackers("a")
    with pytest.raises(InputError, match="nothing inside"):
        engine.get_tracker("jsonl", unwrap=True)
    with pytest.raises(TypeError):
        engine.log({"loss": 1.0}, log_kwargs={})  # type: ignore[call-arg]
    with pytest.raises(InputError, match="never by pickle"):
        engine.save_state(safe_serialization=False)
    with pytest.raises(InputError, match=r"profile\(record_shapes=True\)"), engine.profile(object()):  # type: ignore[arg-type]
        pass
    with pytest.raises(InputError, match="takes no gradient here"):
        engine.backward(torch.ones((), requires_grad=True), gradient=torch.ones(()))


def test_set_seed() -> None:
    found = []
    for _ in range(2):
        set_seed(3)
        found.append((torch.rand(2).tolist(), random.random()))
    assert found[0] == found[1]
    with pytest.raises(InputError, match="seed"):
        set_seed(1.5)  # type: ignore[arg-type]
    assert Engine().distributed_type == DistributedType.NO


def test_debug_tells_what_was_decided(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(debug=True, precision="bf16")
    engine.prepare(mlp())
    said = capsys.readouterr().err
    assert "debug: rank 0 of 1" in said
    assert "debug: precision bf16" in said


# --- windows ----------------------------------------------------------------------------------------------------------


def test_a_models_own_zero_grad_follows_the_window() -> None:
    engine = Engine(accumulation_steps=3)
    model, optimizer, loader = small(engine, 8)
    for (x,) in loader:
        with engine.accumulate(model):
            model.zero_grad()
            engine.backward(-model(x).mean())
            optimizer.step()
    assert model.weight.item() == pytest.approx(3.0)
    model.zero_grad()
    assert model.weight.grad is None


def small(engine: Engine, count: int, size: int = 1, rate: float = 1.0) -> Any:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    return engine.prepare(model, optimizer, DataLoader(TensorDataset(torch.ones(count, 1)), size))


def steps(engine: Engine, parts: Any, stop: int | None = None) -> list[bool]:
    model, optimizer, loader = parts
    seen = []
    for number, (x,) in enumerate(loader):
        with engine.accumulate(model):
            engine.backward(-model(x).mean())
            optimizer.step()
            optimizer.zero_grad()
        seen.append(engine.sync_gradients)
        if number == stop:
            break
    return seen


def test_the_number_of_micro_batches_may_change_between_steps() -> None:
    engine = Engine(accumulation_steps=2)
    parts = small(engine, 5)
    assert steps(engine, parts) == [False, True, False, True, True]
    engine.gradient_accumulation_steps = 3
    assert steps(engine, parts) == [False, False, True, False, True]
    assert parts[0].weight.item() == pytest.approx(5.0)  # every step is a mean of ones


def test_breaking_out_leaves_nothing_behind() -> None:
    engine = Engine(accumulation_steps=3)
    parts = small(engine, 7)
    assert steps(engine, parts, stop=1) == [False, False]
    assert steps(engine, parts) == [False, False, True, False, False, True, True]
    assert parts[0].weight.item() == pytest.approx(3.0)
    # A held iterator is closed by nobody; a loop that goes on afterwards is no worse for it.
    held = iter(parts[2])
    next(held)
    assert steps(engine, parts)[:3] == [False, False, True]
    again = Engine(accumulation_steps=2)
    assert steps(again, small(again, 2)) == [False, True]
    assert engine.gradient_accumulation_steps == 3


def test_an_error_in_a_block_begins_a_new_window() -> None:
    engine = Engine(accumulation_steps=2)
    model, optimizer, loader = small(engine, 4)
    with pytest.raises(KeyError), engine.accumulate(model):
        raise KeyError
    assert steps(engine, (model, optimizer, loader)) == [False, True, False, True]


def test_nested_loaders() -> None:
    engine = Engine(accumulation_steps=2)
    model, optimizer, loader = small(engine, 5)
    other = engine.prepare(DataLoader(range(2)))  # type: ignore[arg-type]
    seen = []
    for (x,) in loader:
        for _ in other:
            pass
        with engine.accumulate(model):
            engine.backward(-model(x).mean())
            optimizer.step()
            optimizer.zero_grad()
        seen.append(engine.sync_gradients)
        for _ in other:
            break
    assert seen == [False, True, False, True, True]
    assert model.weight.item() == pytest.approx(3.0)


def test_zeroing_first_keeps_the_window() -> None:
    """Both orders of words that bare loops have: zero_grad before backward, and after the step."""
    engine = Engine(accumulation_steps=3)
    model, optimizer, loader = small(engine, 8)
    for (x,) in loader:
        with engine.accumulate(model):
            optimizer.zero_grad()
            engine.backward(-model(x).mean())
            optimizer.step()
    assert model.weight.item() == pytest.approx(3.0)
    assert model.weight.grad is not None, "a gradient stays to be looked at until zero_grad"


@pytest.mark.parametrize("word", [0, 1])
def test_zeroing_outside_of_the_block_keeps_the_window_until_it_is_left(word: int) -> None:
    engine = Engine(accumulation_steps=3)
    parts = model, optimizer, loader = small(engine, 7)
    for _ in range(2):
        for number, (x,) in enumerate(loader):
            parts[word].zero_grad()
            with engine.accumulate(model):
                engine.backward(-model(x).mean())
                optimizer.step()
            if number == 4:
                break
    assert model.weight.item() == pytest.approx(2.0)
    parts[word].zero_grad()
    assert model.weight.grad is None


def test_windows_of_different_models_are_their_own() -> None:
    engine = Engine(accumulation_steps=2)
    one, first, loader = small(engine, 5)
    two, second, _ = small(engine, 1)
    seen = []
    for (x,) in loader:
        for model, optimizer in ((one, first), (two, second)):
            with engine.accumulate(model):
                engine.backward(-model(x).mean())
                optimizer.step()
                optimizer.zero_grad()
            seen.append(engine.sync_gradients)
    assert seen == [False, False, True, True, False, False, True, True, True, True]
    assert one.weight.item() == two.weight.item() == pytest.approx(3.0)


def test_steps_without_a_loader() -> None:
    engine = Engine(accumulation_steps=4)
    model, optimizer, _ = small(engine, 1)
    for _ in range(2):
        for number in range(3):
            with engine.accumulate(model, weight=6.0, steps=3):
                engine.backward(-model(torch.ones(2, 1)).sum())
                optimizer.step()
                optimizer.zero_grad()
            assert engine.sync_gradients == (number == 2)
    assert model.weight.item() == pytest.approx(2.0)


def test_schedulers_follow_steps_that_were_taken() -> None:
    engine = Engine(accumulation_steps=2)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    plan = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)],
        [2],
    )
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    model, optimizer, plan, plateau = engine.prepare(model, optimizer, plan, plateau)
    rates = []
    for _ in range(6):
        with engine.accumulate(model):
            engine.backward(model(torch.ones(1, 4)).sum())
            optimizer.step()
            plan.step()
            optimizer.zero_grad()
        rates.append(plan.get_last_lr()[0])
    assert rates == [1.0] * 5 + [0.5]  # three steps: the third is the second scheduler's first
    before = optimizer.param_groups[0]["lr"]
    plateau.step(1.0)
    plateau.step(2.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(before / 10)
    free = Engine(step_scheduler_with_optimizer=False)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    plan = free.prepare(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    plan.step()
    assert plan.get_last_lr() == [0.5]


# --- saving and records -----------------------------------------------------------------------------------------------


def test_weights_for_others(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    engine = Engine()
    own = Own()
    model = engine.prepare(own)
    engine.save_model(model, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert {name: t.tolist() for name, t in found.items()} == {n: t.tolist() for n, t in own.state_dict().items()}
    engine.save_model(model, tmp_path, max_shard_size=20)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 60},
        "weight_map": {
            "layer.bias": "model-00002-of-00002.safetensors",
            "layer.weight": "model-00001-of-00002.safetensors",
        },
    }
    assert not (tmp_path / "model.safetensors").exists()
    tied = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
    tied[1].weight = tied[0].weight
    engine.save_model(tied, tmp_path / "tied")
    assert list(load_file(tmp_path / "tied" / "model.safetensors")) == ["0.weight"]
    with pytest.raises(InputError, match="max_shard_size"):
        engine.save_model(model, tmp_path, max_shard_size="many")
    engine.save({"a": 1}, tmp_path / "any.pt")
    assert torch.load(tmp_path / "any.pt") == {"a": 1}
    engine.save({"a": torch.ones(2)}, tmp_path / "a.safetensors", safe_serialization=True)
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [1, 1]


def test_states_of_several_models(tmp_path: Path) -> None:
    def parts() -> Any:
        engine = Engine(project_dir=tmp_path, precision="fp16", grad_scaler={"init_scale": 4.0, "growth_interval": 1})
        one, two = mlp(1), mlp(2)
        both = torch.optim.Adam([*one.parameters(), *two.parameters()], 0.1)
        plan = torch.optim.lr_scheduler.MultiStepLR(both, [2])
        return engine, *engine.prepare(one, two, both, plan)

    def step(engine: Any, one: Any, two: Any, both: Any, plan: Any) -> None:
        engine.backward((one(torch.ones(1, 4)) + two(torch.ones(1, 4))).square().sum())
        both.step()
        plan.step()
        both.zero_grad()

    first = parts()
    step(*first)
    assert first[0].save_state() == str(tmp_path / "checkpoints")
    step(*first)
    second = parts()
    assert second[0].load_state().endswith("step_00000001")
    assert second[0].scaler.value == 8.0
    step(*second)
    assert weights(second[1]) == weights(first[1])
    assert weights(second[2]) == weights(first[2])
    assert second[4].get_last_lr() == first[4].get_last_lr()
    with pytest.raises(InputError, match="state_dict"):
        first[0].register_for_checkpointing(object())
    with pytest.raises(InputError, match="project_dir"):
        Engine().save_state()


def test_records(tmp_path: Path) -> None:
    engine = Engine(log_with=["jsonl"], project_dir=tmp_path)
    with pytest.raises(InputError, match="no tracker was started"):
        engine.log({"loss": 1.0})
    engine.init_trackers("first", config={"lr": 0.1})
    engine.log({"loss": torch.tensor(0.5)})
    engine.log({"accuracy": 0.25}, step=7, split="eval")
    assert engine.get_tracker("jsonl") is engine.trackers[0]
    engine.end_training()
    lines = [json.loads(line) for line in (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"split": "train", "step": 1, "loss": 0.5}, {"split": "eval", "step": 7, "accuracy": 0.25}]


# --- the engine as an object ------------------------------------------------------------------------------------------


def test_memory_is_really_freed() -> None:
    engine = Engine()
    model, optimizer, loader = small(engine, 3)
    own = engine.unwrap_model(model)
    watched = [weakref.ref(one) for one in (own, model, optimizer, optimizer.optimizer, loader)]
    del own
    model, optimizer, loader = engine.free_memory(model, optimizer, loader)
    assert (model, optimizer, loader) == (None, None, None)
    gc.collect()
    assert [ref() for ref in watched] == [None] * 5
    assert steps(engine, small(engine, 2)) == [True, True]


def test_pickles() -> None:
    engine = Engine(accumulation_steps=2, seed=1)
    model, optimizer, _ = small(engine, 3)
    plan = engine.prepare(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    again = pickle.loads(pickle.dumps(engine))
    assert (again.num_processes, again.device, again.gradient_accumulation_steps) == (1, engine.device, 2)
    loose = pickle.loads(pickle.dumps(optimizer))
    assert loose.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    loose.step()
    assert type(pickle.loads(pickle.dumps(model))) is nn.Linear
    averaged = copy.deepcopy(model)
    assert engine.unwrap_model(averaged) is not engine.unwrap_model(model)
    assert averaged(torch.ones(1, 1)).shape == (1, 1)
    assert pickle.loads(pickle.dumps(plan)).last_epoch == plan.last_epoch


def test_profile(tmp_path: Path) -> None:
    engine = Engine()
    with engine.profile(tmp_path) as profiler:
        torch.ones(3).sum()
    assert any("sum" in row.key for row in profiler.key_averages())
    assert (tmp_path / "profile_0.json").exists()


SCRIPT = """
import json
import torch
from torch.utils.data import DataLoader, TensorDataset
from runner import Engine

engine = Engine(cpu=True)
torch.manual_seed(0)
data = TensorDataset(torch.randn(12, 3), torch.randn(12, 1))
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
model, optimizer, loader = engine.prepare(model, optimizer, DataLoader(data, 12 // engine.num_processes))
for inputs, targets in loader:
    loss = torch.nn.functional.mse_loss(model(inputs), targets)
    engine.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
engine.print(json.dumps([engine.num_processes, engine.reduce(model.weight, "mean").flatten().tolist()]))
"""


def test_the_same_script_by_python_and_by_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = []
    for words in ([], torchrun):
        done = subprocess.run(
            [sys.executable, *words, str(script)], capture_output=True, text=True, timeout=100, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    assert [count for count, _ in found] == [1, 2]
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-6)


LEAVING = """
import sys
import time
import torch
from runner import Engine

engine = Engine(cpu=True)
model = torch.nn.Linear(2, 1)
model, optimizer = engine.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
for number in range(4):
    engine.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    optimizer.zero_grad()
    if number == 2 and engine.is_main_process and sys.argv[1] == "alone":
        sys.exit(3)
time.sleep(0.5 * engine.is_main_process)
"""


@pytest.mark.parametrize(("how", "codes"), [("alone", (3, 1)), ("together", (0, 0))])
def test_leaving_without_a_word(tmp_path: Path, how: str, codes: tuple[int, int]) -> None:
    """A process that ends alone is not held up by a barrier that nobody else comes to."""
    (tmp_path / "leave.py").write_text(LEAVING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "leave.py"), how],
            env={**os.environ, **where, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
        )
        for rank in ("0", "1")
    ]
    try:
        assert tuple(process.wait(60) for process in started) == codes
    finally:
        for process in started:
            process.kill()
            process.wait()
