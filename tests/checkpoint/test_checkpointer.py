"""Named objects with state become a checkpoint and come back from it."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from runner.checkpoint import Checkpointer, SaveFailed, manifest, store
from runner.engine.model_state import ModelState, OptimizerState
from runner.errors import InputError, RunnerError


class Box:
    """Keeps whatever it is given."""

    def __init__(self, state: Any = None) -> None:
        self.state = {} if state is None else state
        self.loads = 0

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state
        self.loads += 1


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b) or (a != a and b != b)


NESTED = {
    "tensors": [torch.arange(3), (torch.tensor(1.5, dtype=torch.bfloat16), {"deep": torch.zeros(0, 2)})],
    "numbers": [1, -0.0, 0.1, math.nan, math.inf, 2**80, True, None],
    5: "an integer key",
    "words": {"a/b": "x", "": []},
}


def test_a_nested_state_comes_back(tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path / "c", {"box": Box(NESTED), "none": Box({}), "list": Box([torch.ones(2), 1])})
    path = saver.save(3, {"config": {"lr": 1e-3}, "nan": math.nan})
    assert path == tmp_path / "c" / "step_00000003"
    assert names(path) == ["manifest.json", "rank_0.safetensors", "state.json"]
    boxes = {"box": Box(), "none": Box(), "list": Box()}
    loader = Checkpointer(tmp_path / "c", boxes)
    assert loader.latest() == path
    extra = loader.load(path)
    assert equal(extra, {"config": {"lr": 1e-3}, "nan": math.nan})
    assert equal(boxes["box"].state, NESTED)
    assert equal(boxes["none"].state, {})
    assert equal(boxes["list"].state, [torch.ones(2), 1])


def test_what_was_loaded_shares_no_memory_with_the_file(tmp_path: Path) -> None:
    path = Checkpointer(tmp_path, {"box": Box({"w": torch.ones(4)})}).save(1)
    box = Box()
    Checkpointer(tmp_path, {"box": box}).load(path)
    before = (path / "rank_0.safetensors").read_bytes()
    box.state["w"].zero_()
    assert (path / "rank_0.safetensors").read_bytes() == before


# Failing saves --------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Checkpointer(tmp_path, {"box": Box({"w": torch.ones(4)})})
    first = saver.save(1)

    def fail(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SaveFailed, match="step_00000002 could not be saved: No space left") as caught:
        saver.save(2)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.path == tmp_path / "step_00000002"
    assert caught.value.needed is not None
    assert caught.value.free is not None
    assert f"it takes {caught.value.needed:,} bytes, {caught.value.free:,} are free" in str(caught.value)
    assert saver.latest() == first
    assert names(tmp_path) == ["step_00000001"]


@pytest.mark.parametrize("bad", [b"raw", object(), {1}, torch.ones(1, dtype=torch.complex128)])
def test_what_cannot_be_saved_is_named(tmp_path: Path, bad: Any) -> None:
    saver = Checkpointer(tmp_path, {"hooks": Box({"mine": {"memory": [0, bad]}})})
    with pytest.raises(RunnerError, match="cannot save `hooks/mine/memory/1`"):
        saver.save(1)
    assert saver.latest() is None
    assert not list(tmp_path.iterdir())
    with pytest.raises(RunnerError, match="cannot save `extra/x`"):
        Checkpointer(tmp_path, {}).save(1, {"x": b""})


_KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from runner.checkpoint import Checkpointer
from runner.checkpoint.manifest import Manifest
class Box:
    def state_dict(self): return {"w": torch.ones(1000)}
saver = Checkpointer(Path(sys.argv[1]), {"box": Box()})
saver.save(1)
Manifest.write = lambda self, folder: os.kill(os.getpid(), signal.SIGKILL)
saver.save(2)
"""


def test_a_killed_save_is_no_checkpoint_and_is_swept(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], timeout=60, capture_output=True)
    assert done.returncode == -9, done.stderr
    (leftover,) = tmp_path.glob(".tmp-step_00000002-*")
    assert names(leftover) == ["rank_0.safetensors", "state.json"]
    loader = Checkpointer(tmp_path, {"box": Box()})
    assert names(tmp_path) == ["step_00000001"]
    assert loader.latest() == tmp_path / "step_00000001"


# What does not fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["MOST_BYTES", "MOST_BRACKETS"])
def test_what_no_reader_would_take_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    keeper = Box([[0]])
    saver = Checkpointer(tmp_path, {"model": Box({"w": torch.ones(2)}), "hooks.keeper": keeper})
    good = saver.save(1)
    monkeypatch.setattr(manifest, limit, 1000)
    keeper.state = [[number] for number in range(1200)]
    with pytest.raises(SaveFailed, match=r"most of it is the state of hooks\.keeper"):
        saver.save(2)
    assert saver.latest() == good
    assert names(tmp_path) == [good.name]


def refusal(load: Any) -> str:
    with pytest.raises(InputError) as caught:
        load()
    (problem,) = caught.value.problems
    assert problem.key == "resume"
    assert problem.fix
    return problem.why


def test_names_that_differ_are_said_at_once_and_nothing_is_touched(tmp_path: Path) -> None:
    path = Checkpointer(tmp_path, {"box": Box({"a": 1}), "old": Box(), "scaler": Box()}).save(1)
    boxes = {name: Box() for name in ("box", "new", "ema")}
    why = refusal(lambda: Checkpointer(tmp_path, boxes).load(path))
    assert why == "the checkpoint does not fit: it lacks new, ema; nothing here takes old, scaler"
    assert all(box.loads == 0 for box in boxes.values())
    optional = Checkpointer(tmp_path, boxes, optional=["new", "ema", "old", "scaler"])
    optional.load(path)
    assert boxes["box"].state == {"a": 1}
    assert [box.loads for box in boxes.values()] == [1, 0, 0]


def test_another_model_is_refused_with_the_first_five_names_each_way(tmp_path: Path) -> None:
    path = Checkpointer(tmp_path, {"model": ModelState(nn.Linear(2, 3)), "box": Box()}).save(1)
    other, box = nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)]), Box()
    before = [p.clone() for p in other.parameters()]
    why = refusal(lambda: Checkpointer(tmp_path, {"model": ModelState(other), "box": box}).load(path))
    assert "it lacks model/0.weight, model/0.bias, model/1.weight, model/1.bias, model/2.weight and 3 more" in why
    assert "nothing here takes model/weight, model/bias" in why
    assert box.loads == 0
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), before, strict=True))


def test_other_shapes_and_types_are_refused(tmp_path: Path) -> None:
    path = Checkpointer(tmp_path, {"model": ModelState(nn.Linear(2, 3))}).save(1)
    wide = Checkpointer(tmp_path, {"model": ModelState(nn.Linear(2, 4))})
    assert "it differs in model/weight (shape [3, 2] in the checkpoint, [4, 2] here)" in refusal(
        lambda: wide.load(path)
    )
    low = nn.Linear(2, 3).bfloat16()
    narrow = Checkpointer(tmp_path, {"model": ModelState(low)})
    assert "model/bias (float32 in the checkpoint, bfloat16 here)" in refusal(lambda: narrow.load(path))


def test_floating_types_are_converted_when_asked(tmp_path: Path) -> None:
    high, low = nn.Linear(2, 3), nn.Linear(2, 3).bfloat16()
    path = Checkpointer(tmp_path, {"model": ModelState(high)}).save(1)
    Checkpointer(tmp_path, {"model": ModelState(low)}).load(path, convert=True)
    assert low.weight.dtype == torch.bfloat16
    assert torch.equal(low.weight, high.weight.bfloat16())
    path = Checkpointer(tmp_path, {"box": Box({"w": torch.ones(2, dtype=torch.int64)})}).save(2)

    class Wants(Box):
        def template(self, saved: Any) -> Any:
            return {"w": torch.ones(2)}

    assert "int64" in refusal(lambda: Checkpointer(tmp_path, {"box": Wants()}).load(path, convert=True))


def test_problems_of_several_objects_come_together(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    adam = torch.optim.Adam(model.parameters())
    path = Checkpointer(tmp_path, {"optimizer": OptimizerState(model, adam), "old": Box()}).save(1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError) as caught:
        Checkpointer(tmp_path, {"optimizer": OptimizerState(model, sgd)}).load(path)
    assert [problem.key for problem in caught.value.problems] == ["optimizer", "resume"]


def test_damage_is_refused_in_words(tmp_path: Path) -> None:
    path = Checkpointer(tmp_path, {"box": Box({"w": torch.ones(4)})}).save(1)
    box = Box()
    loader = Checkpointer(tmp_path, {"box": box})
    for name in ("state.json", "rank_0.safetensors"):
        data = (path / name).read_bytes()
        for harmed in (bytes(len(data)), data[:-1] + bytes([data[-1] ^ 1])):
            (path / name).write_bytes(harmed)
            assert name in refusal(lambda: loader.load(path))
        (path / name).write_bytes(data)
    assert box.loads == 0
    loader.load(path)


# Retention ------------------------------------------------------------------------------------------------------------


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path, {"box": Box()}, keep=2, best=("loss", "min"))
    assert saver.best is None
    losses = {1: 3.0, 2: 0.5, 3: math.nan, 4: 0.5, 5: 2.0}
    for step, loss in losses.items():
        assert saver.improves({"loss": loss}) is (step in (1, 2))
        saver.save(step, metrics={"loss": loss, "split": "eval"})
    saver.save(6)
    assert names(tmp_path) == ["step_00000002", "step_00000005", "step_00000006"]
    best = {"metric": "loss", "value": 0.5, "step": 2, "checkpoint": str(tmp_path / "step_00000002")}
    assert saver.best == best
    resumed = Checkpointer(tmp_path, {"box": Box()}, keep=2, best=("loss", "min"))
    assert resumed.best == best
    assert json.dumps(best)
    resumed.save(7, metrics={"loss": 0.4})
    assert names(tmp_path) == ["step_00000006", "step_00000007"]
    assert resumed.best["step"] == 7


def test_the_largest_is_the_best_where_asked(tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path, {}, best=("accuracy", "max"))
    for step, accuracy in enumerate((0.1, 0.9, 0.3, math.inf, 0.2, 0.3)):
        saver.save(step, metrics={"accuracy": accuracy})
    assert saver.best is not None
    assert saver.best["value"] == math.inf
    assert names(tmp_path) == ["step_00000003", "step_00000004", "step_00000005"]


def test_protected_and_foreign_and_damaged_folders_stay(tmp_path: Path) -> None:
    for name in ("step_00000000", "notes"):
        (tmp_path / name).mkdir(parents=True)
    saver = Checkpointer(tmp_path, {}, protected=[tmp_path / "x" / ".." / "step_00000001"])
    for step in range(1, 6):
        saver.save(step)
    assert names(tmp_path) == ["notes", "step_00000000", "step_00000001", "step_00000004", "step_00000005"]


def test_a_best_metric_that_nobody_reports(tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path, {}, best=("acuracy", "max"))
    with pytest.raises(InputError) as caught:
        saver.save(1, metrics={"loss": 1.0, "accuracy": 0.5})
    assert caught.value.problems[0].key == "checkpoint.best.metric"
    assert "accuracy, loss" in caught.value.problems[0].fix
    assert names(tmp_path) == ["step_00000001"]
    saver.save(2)


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    for options, key in (({"keep": 1}, "checkpoint.keep"), ({"best": ("loss", "least")}, "checkpoint.best.mode")):
        with pytest.raises(InputError) as caught:
            Checkpointer(tmp_path, {}, **options)
        assert caught.value.problems[0].key == key


# A training -----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 8))
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = nn.Parameter(self.head.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def test_who_only_reads_changes_nothing(tmp_path: Path) -> None:
    """What lies beside a checkpoint may be a save that another process is just making."""
    from runner.api import state

    path = Checkpointer(tmp_path, {"box": Box({"w": torch.ones(4)})}).save(1)
    (tmp_path / ".tmp-step_00000002-ab12").mkdir()
    for place in (tmp_path, path):
        assert state.load(place, {"box": (box := Box({"w": torch.zeros(4)}))}) == path
        assert torch.equal(box.state["w"], torch.ones(4))
    assert {child.name for child in tmp_path.iterdir()} == {path.name, ".tmp-step_00000002-ab12"}


@pytest.mark.parametrize("waits", [True, False])
def test_a_saved_checkpoint_counts_where_older_ones_cannot_be_looked_at(
    tmp_path: Path, waits: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    saver = Checkpointer(tmp_path, {"box": Box({"w": torch.ones(4)})})
    monkeypatch.setattr(store, "expired", broken)
    saver.save(1, wait=waits)
    assert saver.finish() == ([] if waits else [tmp_path / "step_00000001"])
    assert saver.latest() == tmp_path / "step_00000001"
    assert "older checkpoints could not be looked at: Input/output error" in caplog.text


def test_pruning_says_where_older_checkpoints_cannot_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    saver = Checkpointer(tmp_path, {"box": Box({"w": torch.ones(4)})})
    monkeypatch.setattr(store, "candidates", broken)
    assert saver.prune() == []
    assert "older checkpoints could not be looked at: Input/output error" in caplog.text


def test_what_a_checkpoint_lacked_is_known(tmp_path: Path) -> None:
    box, new = Box({"w": torch.ones(4)}), Box({"v": torch.ones(2)})
    one = Checkpointer(tmp_path, {"box": box}).save(1)
    saver = Checkpointer(tmp_path, {"box": box, "hooks.new": new}, optional=["hooks.*"])
    assert (saver.loaded, saver.lacked) == (None, ())
    saver.load(one)
    assert (saver.loaded, saver.lacked) == (one, ("hooks.new",))
    assert saver.save(1) == one
    saver.load(one)
    assert (saver.loaded, saver.lacked) == (one, ())


def test_a_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    from runner.checkpoint import RandomState

    def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Mapping[str, Any]]:
        torch.manual_seed(seed)
        net = Net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
        state = {"model": ModelState(net), "optimizer": OptimizerState(net, optimizer), "random": RandomState()}
        return net, optimizer, state

    def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = net(torch.randn(4, 8)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    net, optimizer, state = make(0)
    train(net, optimizer, 5)
    path = Checkpointer(tmp_path, state).save(5)
    expected = train(net, optimizer, 5)
    other, other_optimizer, other_state = make(1)
    Checkpointer(tmp_path, other_state).load(path)
    assert train(other, other_optimizer, 5) == expected
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_importing_the_room_does_not_import_dcp() -> None:
    code = (
        "import sys, runner.checkpoint; print([m for m in sys.modules if m.startswith('torch.distributed.checkpoint')])"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
