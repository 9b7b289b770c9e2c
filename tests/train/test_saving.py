"""Checkpoints in the background: nothing waits, everybody is told when one is complete, and of a failure at once."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from processes import run_ranks
from small import Interrupt, Late, Result, engine, mlp
from small import run as make_run

from runner import distributed
from runner.checkpoint import Checkpointer, storage
from runner.engine.ddp import DDP
from runner.engine.engine import Engine
from runner.engine.mesh import Mesh
from runner.engine.precision import PRECISIONS
from runner.errors import TrainingStopped
from runner.folder import Bystander, RunFolder
from runner.heartbeat import DATA, ENDING, EVALUATION, SAVING, TRAIN
from runner.train.hook import Hook
from runner.train.loop import train
from runner.train.run import Run, SaveEvery

pytestmark = pytest.mark.usefixtures("quiet")

Job = Callable[..., Result]
Write = Callable[..., Any]


class Told(Hook):
    """When the hooks heard of which checkpoint, and whether it was there."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int, bool]] = []

    def on_checkpoint_saved(self, run: Run, path: Path) -> None:
        self.found.append((run.progress.step, int(path.name[5:]), (path / "manifest.json").exists()))


def background(folder: Path, *hooks: Hook, on_error: str = "stop", **parts: Any) -> Run:
    """A run of 8 steps that saves every second one in the background."""
    settings = {"saves_async": True, "on_error": on_error, **parts.pop("settings", {})}
    run = make_run(
        folder, settings=settings, steps=8, samples=80, hooks=dict(zip("abc", hooks, strict=False)), save=True, **parts
    )
    run.save_every = SaveEvery(steps=2)
    return run


def slowly(monkeypatch: pytest.MonkeyPatch, held: dict[int, threading.Event]) -> None:
    """Writing the checkpoints of these steps waits for an event."""
    write: Write = storage.write_file

    def wait(file: Path, *rest: Any) -> Any:
        for step, event in held.items():
            if f"step_{step:08d}" in str(file):
                assert event.wait(30)
        return write(file, *rest)

    monkeypatch.setattr(storage, "write_file", wait)


def failing(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Writing the checkpoints of these steps fails, as on a full disk."""
    write: Write = storage.write_file

    def fail(file: Path, *rest: Any) -> Any:
        if any(f"step_{step:08d}" in str(file) for step in steps):
            raise OSError(28, "No space left on device", str(file))
        return write(file, *rest)

    monkeypatch.setattr(storage, "write_file", fail)


def test_the_same_checkpoints_and_training(tmp_path: Path) -> None:
    weights = []
    for name in ("background", "before"):
        told = Told()
        run = background(tmp_path / name, told, settings={"saves_async": name == "background"})
        run.folder.path.mkdir()
        train(run)
        assert [step for _, step, _ in told.found] == [2, 4, 6, 8]
        assert all(there for *_, there in told.found)
        assert sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir()) == [
            "step_00000006",
            "step_00000008",
        ]
        fresh = make_run(tmp_path / name, save=True)
        assert fresh.checkpointer is not None
        fresh.checkpointer.load(tmp_path / name / "checkpoints" / "step_00000006")
        assert fresh.progress.step == 6
        weights.append([p.detach().clone() for p in fresh.engine.model.parameters()])
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)


def test_nobody_waits_and_nobody_hears_before_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event, told = threading.Event(), Told()
    slowly(monkeypatch, {2: event})

    class At(Hook):
        def on_step_end(self, run: Run) -> None:
            if run.progress.step == 4:
                assert run.checkpointer is not None
                assert told.found == []
                assert run.checkpointer.newest is None
                event.set()

    train(background(tmp_path, told, At()))
    assert [step for _, step, _ in told.found] == [2, 4, 6, 8]
    assert told.found[0][0] >= 4


def test_a_signal_waits_for_the_one_in_flight_and_saves_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event, told = threading.Event(), Told()
    slowly(monkeypatch, {2: event})
    threading.Timer(0.3, event.set).start()
    train(background(tmp_path, told, Interrupt(3)))
    assert told.found == [(3, 2, True), (3, 3, True)]


def test_a_failure_ends_the_run_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, 4)
    told = Told()
    run = background(tmp_path, told)
    with pytest.raises(TrainingStopped, match=r"step_00000004 could not be saved: No space left") as caught:
        train(run)
    assert "last good checkpoint is" in str(caught.value)
    assert "step_00000002" in str(caught.value)
    assert run.progress.step in (4, 5, 6)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]
    assert [step for _, step, _ in told.found] == [2]


@pytest.mark.parametrize("in_background", [True, False])
def test_a_run_that_bears_a_failure_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, in_background: bool
) -> None:
    failing(monkeypatch, 4)
    told = Told()
    with caplog.at_level(logging.WARNING, "runner"):
        train(background(tmp_path, told, on_error="continue", settings={"saves_async": in_background}))
    assert [step for _, step, _ in told.found] == [2, 6, 8]
    warnings = [record.message for record in caplog.records if "could not be saved" in record.message]
    assert len(warnings) == 1
    assert "the run goes on" in warnings[0]


@pytest.mark.parametrize("in_background", [True, False])
def test_without_its_last_checkpoint_a_run_has_failed(
    job: Job, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    failing(monkeypatch, 14)
    result = job(checkpoint__on_error="continue", checkpoint__async=in_background, checkpoint__every={"steps": 5})
    assert result.code == 1
    assert "step_00000014 could not be saved: No space left on device" in result.summary["error"]
    assert "step_00000010" in result.summary["error"]
    assert result.summary["checkpoint"].endswith("step_00000010")
    monkeypatch.undo()
    assert job(checkpoint__on_error="continue").code == 0


@pytest.mark.parametrize("step", [4, 5])
def test_a_signal_in_the_save_of_a_step_makes_it_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Of step 4 the save has begun in the background; step 5 is saved because of the signal."""
    failing(monkeypatch, step)
    run = background(tmp_path, on_error="continue")
    assert run.checkpointer is not None
    save = run.checkpointer.save

    def interrupted(number: int, *rest: Any, **more: Any) -> Path | None:
        path = save(number, *rest, **more)
        if number == 4:
            run.signal = 15
        return path

    monkeypatch.setattr(run.checkpointer, "save", interrupted)
    if step == 5:
        run.events["on_step_end"] += (Interrupt(5).on_step_end,)
        monkeypatch.setattr(run.checkpointer, "save", save)
    with pytest.raises(TrainingStopped, match=f"step_{step:08d} could not be saved"):
        train(run)
    assert run.progress.step == step


def test_what_is_in_flight_when_a_hook_fails_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event, told = threading.Event(), Told()
    slowly(monkeypatch, {2: event})

    class Fail(Hook):
        def on_step_end(self, run: Run) -> None:
            if run.progress.step == 3:
                event.set()
                raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        train(background(tmp_path, told, Fail()))
    assert told.found == [(3, 2, True)]


def test_what_is_in_flight_is_told_where_the_next_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event, told = threading.Event(), Told()
    slowly(monkeypatch, {2: event})

    class Spoil(Hook):
        def on_step_end(self, run: Run) -> None:
            if run.progress.step == 4:
                threading.Timer(0.3, event.set).start()
                with torch.no_grad():
                    next(run.engine.model.parameters()).fill_(torch.nan)

    with pytest.raises(TrainingStopped, match="they were not saved"):
        train(background(tmp_path, told, Spoil()))
    assert told.found == [(4, 2, True)]


def test_the_best_is_told_while_one_is_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event = threading.Event()
    slowly(monkeypatch, {2: event})
    run = background(tmp_path)
    state = {**run.engine.state(), "scheduler": run.schedule, "progress": run.progress}
    run.checkpointer = saver = Checkpointer(tmp_path / "checkpoints", state, 2, ("loss", "min"))
    found: list[Any] = []

    def look(run: Run) -> None:
        if run.progress.step in (1, 2):
            run.evaluate_soon()
        if run.progress.step == 3:
            found.append((saver.best, saver.improves({"loss": 0.0}), run.in_flight))
            found.append(saver.improves({"loss": 1e9}))
            event.set()

    run.events["on_step_end"] += (look,)
    train(run)
    assert found[0][1:] == (True, True)
    assert found[1] is False
    assert json.loads(json.dumps(saver.best))["step"] in (1, 2, 3, 4, 8)


# --- several processes ------------------------------------------------------------------------------------------------


def of_two(on_error: str) -> list[Any]:
    """Rank 1 cannot write its part of step 4; what each heard, and where it stopped."""
    rank = distributed.rank()
    folder = Path(distributed.broadcast(mkdtemp()))
    attempt = storage._attempt

    def fail(task: Any, part: Any, peers: Any) -> Any:
        if rank == 1 and "step_00000004" in str(task[0]):
            from runner.checkpoint.failure import Failure

            return Failure.of(OSError(28, "No space left on device"), rank, 2)
        return attempt(task, part, peers)

    storage._attempt = fail  # type: ignore[assignment]
    told = Told()
    made = Engine(DDP(torch.device("cpu"), PRECISIONS["fp32"], Mesh(rank, 2)))
    torch.manual_seed(0)
    made.prepare(mlp, lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    run = background(folder, told, on_error=on_error, engine=made, micro_size=4)
    run.folder = RunFolder(folder) if rank == 0 else Bystander(folder)
    run.train_data._reader, run.train_data._readers = rank, 2
    stopped = None
    try:
        train(run)
    except TrainingStopped as error:
        stopped = str(error).partition(";")[0].rpartition("/")[2]
    return [told.found, stopped, run.progress.step]


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_two_processes_hear_of_everything_at_the_same_step(on_error: str) -> None:
    one, other = run_ranks(of_two, 2, on_error)
    assert one == other
    told, stopped, step = one
    steps = [saved for _, saved, _ in told]
    assert all(there for *_, there in told)
    if on_error == "stop":
        assert steps == [2]
        assert stopped is not None
        assert stopped.startswith("step_00000004 could not be saved: rank 1: No space left on device")
        assert step in (4, 5, 6)
    else:
        assert (steps, stopped, step) == ([2, 6, 8], None, 8)


class TwoInARow(Hook):
    """Saves after steps 1 and 2; the first is written when step 2 asks, the second only once step 4 is made."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def on_gradients_ready(self, run: Run) -> None:
        if run.progress.step == 1:
            assert run.checkpointer is not None
            assert run.checkpointer._flight is not None
            assert run.checkpointer._flight.thread is not None
            run.checkpointer._flight.thread.join()

    def on_step_end(self, run: Run) -> None:
        if run.progress.step <= 2:
            run.save_soon()
        if run.progress.step == 4:
            self.event.set()


def two_in_a_row() -> list[Any]:
    rank = distributed.rank()
    folder, event, told = Path(distributed.broadcast(mkdtemp())), threading.Event(), Told()
    write: Write = storage.write_file

    def wait(file: Path, *rest: Any) -> Any:
        if "step_00000002" in str(file):
            event.wait(5)
        return write(file, *rest)

    storage.write_file = wait  # type: ignore[assignment]
    made = Late(DDP(torch.device("cpu"), PRECISIONS["fp32"], Mesh(rank, 2)))
    made.prepare(mlp, lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    hook = TwoInARow(event)
    run = background(folder, told, hook, engine=made, micro_size=4)
    run.save_every = SaveEvery()
    run.folder = RunFolder(folder) if rank == 0 else Bystander(folder)
    run.train_data._reader, run.train_data._readers = rank, 2
    started = time.monotonic()
    train(run)
    return [[saved for _, saved, _ in told.found], told.found[1][0] >= 4, time.monotonic() - started < 4]


def test_flags_of_the_save_before_do_not_make_anybody_wait_for_the_next() -> None:
    assert run_ranks(two_in_a_row, 2) == [[[1, 2, 8], True, True]] * 2


# --- signs of life ----------------------------------------------------------------------------------------------------


def test_the_loop_says_what_it_is_doing(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=2, samples=24, save=True)
    beats: list[tuple[int, int]] = []
    run.heartbeat.beat = lambda phase, step: beats.append((phase, step))  # type: ignore[method-assign]
    run.save_every = SaveEvery(steps=1)
    train(run)
    step = [(DATA, 1), (TRAIN, 1), (SAVING, 1), (DATA, 2), (TRAIN, 2), (EVALUATION, 2), (EVALUATION, 2), (SAVING, 2)]
    assert beats == [*step, (ENDING, 2)]


def test_an_engine_of_one_process_exchanges_nothing() -> None:
    made = engine()
    assert made.exchange(torch.zeros(()), 0, ()).flags == ()
