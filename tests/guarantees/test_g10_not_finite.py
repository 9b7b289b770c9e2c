"""G10: the policy for what is not finite, the same on all processes; nothing not finite is ever saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_ranks
from small import Result, config, engine, mlp, spec
from small import run as make_run
from torch import Tensor, nn

from guarantees.cases_g10 import _saved, cases, run_all
from runner import distributed
from runner.data.order import Order
from runner.engine.precision import PRECISIONS, LossScaling
from runner.errors import TrainingStopped
from runner.recipe.validate import validate
from runner.train.hook import Hook
from runner.train.loop import train
from runner.train.not_finite import MOST_IN_A_ROW
from runner.train.run import Run, SaveEvery

Job = Callable[..., Result]

pytestmark = pytest.mark.usefixtures("quiet")


#: Without it the long form does not begin; here the other backends are tried all the same.
DEEPSPEED = find_spec("deepspeed") is not None


def test_places_policies_and_backends(tmp_path: Path) -> None:
    chosen = cases(16, seed=10, deepspeed=DEEPSPEED)
    assert {case.policy for case in chosen} == {"stop", "skip", "rollback", "ignore"}
    found = run_all(chosen, tmp_path, timeout=100)
    assert {str(case): wrong for case, wrong in zip(chosen, found, strict=True) if wrong} == {}


@pytest.mark.skipif(not DEEPSPEED, reason="deepspeed is not installed: G10 is tried without its stages")
def test_deepspeed_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {case.backend for case in cases(16, seed=10)} > {f"deepspeed-z{stage}" for stage in range(4)}
    monkeypatch.setattr("guarantees.cases_g10.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="deepspeed is not installed"):
        cases(240, seed=0)
    assert not any("deepspeed" in case.backend for case in cases(100, seed=0, deepspeed=False))


# --- beyond the table: what one process shows ------------------------------------------------------------------------


class Nan(Hook):
    """Makes the given steps (from 1) not finite: always, or the first time only."""

    def __init__(self, *steps: int, once: bool = False) -> None:
        self.steps, self.once = set(steps), once
        self.seen: list[int] = []

    def on_gradients_ready(self, run: Run) -> None:
        step = run.progress.step + 1
        if step in self.steps and not (self.once and step in self.seen):
            self.seen.append(step)
            fill(run, math.nan)


def fill(run: Run, value: float) -> None:
    """Every element of the first gradient."""
    gradient = next(run.engine.model.parameters()).grad
    assert gradient is not None
    gradient.fill_(value)


class Seen(Hook):
    """A hook with state: what it was told, and what it goes on from."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_end(self, run: Run) -> None:
        self.steps.append(run.progress.step)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self.steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = list(state["steps"])


class Device(Hook):
    """Leaves the decision to the device, as on a GPU."""

    def on_run_start(self, run: Run) -> None:
        run.engine.backend.handle.device_decides = True


class Norm(nn.Module):
    """Its buffers take part of whatever goes through, also of what is not finite in the third forward pass."""

    def __init__(self, bad: int = 3) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.bad, self.calls = bad, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        bad = self.training and self.calls == self.bad
        return self.outer(self.norm(self.inner(x) * (math.nan if bad else 1.0)))


#: Dropout, accumulation, clipping, 7 steps an epoch, evaluations, checkpoints every 3 steps.
HARD: dict[str, Any] = {
    "model": spec("small.mlp", dropout=0.3),
    "accumulation__steps": 2,
    "grad_clip": 0.5,
    "checkpoint__every": {"steps": 3},
    "eval__every": 2,
}


def hooks(**more: Any) -> dict[str, Any]:
    return {**config()["hooks"], **more}


def nan(*steps: int, once: bool = False) -> dict[str, Any]:
    return spec("guarantees.test_g10_not_finite.Nan", _args_=list(steps), once=once)


def journal(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (result.path / "not_finite.jsonl").read_text().splitlines()]


def told(result: Result) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "time"} for record in result.records]


def same(one: Result, other: Result) -> None:
    assert told(one) == told(other)
    for name, value in one.watch.weights.items():
        assert torch.equal(other.watch.weights[name], value), name


def test_rollback_is_the_training_without_that_step(job: Job) -> None:
    """Bit for bit what `skip` gives: with dropout, momentum and a schedule; hooks with state go back as well."""
    seen = spec("guarantees.test_g10_not_finite.Seen")
    back = job("back", **HARD, nan="rollback", hooks=hooks(nan=nan(8), ema=EMA, seen=seen))
    skip = job("skip", **HARD, nan="skip", hooks=hooks(nan=nan(8), ema=EMA, seen=seen))
    assert (back.code, skip.code) == (0, 0)
    assert back.summary["skipped_steps"] == skip.summary["skipped_steps"] == 1
    assert [record["step"] for record in back.train] == list(range(1, 15))
    for one, other in zip(back.train, skip.train, strict=True):
        if one["step"] != 8:
            assert without(one) == without(other)
    assert back.train[7]["loss"] is None
    assert [without(one) for one in back.eval] == [without(other) for other in skip.eval]
    for name, value in skip.watch.weights.items():
        assert torch.equal(back.watch.weights[name], value), name
    (line,) = journal(back)
    assert (line["step"], line["back_to"], line["policy"], line["grad_norm"]) == (8, 6, "rollback", "nan")
    assert line["samples"] == Order(50, 8).indices(7).tolist()
    seen_steps = extra(back)["hooks.seen"]["steps"]
    assert seen_steps == list(range(1, 15))


def without(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("time", "samples_per_second")}


def extra(result: Result) -> dict[str, Any]:
    """The plain values of the last checkpoint's state."""
    path = sorted((result.path / "checkpoints").glob("step_*"))[-1]
    return json.loads((path / "state.json").read_text())["state"]


EMA = spec("runner.hooks.ema.EMA", decay=0.5)


@pytest.mark.parametrize(("kind", "workers"), [("rows", 1), ("stream", 0), ("stream", 1)])
def test_rollback_goes_back_in_the_data(job: Job, kind: str, workers: int) -> None:
    data = {**config()["data"], "num_workers": workers}
    if kind == "stream":
        data["train"] = spec("small.Stateful")
    settings = {**HARD, "data": data, "train": {"epochs": None, "steps": 9}}
    back = job("back", **settings, nan="rollback", hooks=hooks(nan=nan(5, 8)))
    skip = job("skip", **settings, nan="skip", hooks=hooks(nan=nan(5, 8)))
    assert (back.code, skip.code) == (0, 0)
    for name, value in skip.watch.weights.items():
        assert torch.equal(back.watch.weights[name], value), name
    if kind == "stream":
        assert [line["positions"] for line in journal(back)] == [[0, 32, 40], [1, 0, 8]]


def test_rollback_begins_with_a_checkpoint_of_the_start(job: Job) -> None:
    result = job(train__epochs=1, nan="rollback", hooks=hooks(nan=nan(1, 2)))
    assert result.code == 0
    assert [line["back_to"] for line in journal(result)] == [0, 0]
    assert result.summary["skipped_steps"] == 2


@pytest.mark.parametrize(("ended", "step"), [("crash", 7), ("crash", 8), ("signal", 8), ("crash", 10)])
def test_an_interrupted_run_passes_over_the_same_step(job: Job, ended: str, step: int) -> None:
    """Also where the step would be good now: after the rollback, before and after the next checkpoint."""
    settings = {**HARD, "nan": "rollback"}
    whole = job("whole", **settings, hooks=hooks(nan=nan(8, once=True)))
    kind = "Crash" if ended == "crash" else "Interrupt"
    first = job("cut", **settings, hooks=hooks(nan=nan(8, once=True), end=spec(f"small.{kind}", step=step)))
    if step == 7:
        assert not (first.path / "not_finite.jsonl").exists()
        then = job("cut", **settings, hooks=hooks(nan=nan(8, once=True)))
    else:
        assert len(journal(first)) == 1
        then = job("cut", **settings)
    assert (whole.code, first.code, then.code) == (0, 1 if ended == "crash" else 75, 0)
    same(whole, then)


def test_tensorboard_has_each_step_once_after_a_rollback(job: Job) -> None:
    trackers = {**config()["trackers"], "tensorboard": spec("runner.trackers.tensorboard.TensorBoard", seconds=0.0)}
    result = job(**HARD, nan="rollback", hooks=hooks(nan=nan(5, 9, once=True)), trackers=trackers)
    assert result.code == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(result.path / "tensorboard"))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("train/lr")] == list(range(1, 15))
    assert [event.step for event in accumulator.Scalars("eval/loss")] == list(range(2, 15, 2))


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_the_device_may_decide_and_the_host_hears_of_it_later(tmp_path: Path, policy: str) -> None:
    found: list[list[Tensor]] = []
    for more in ({}, {"device": Device()}):
        run = make_run(
            tmp_path / str(len(found)),
            optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, fused=True),
            hooks={"nan": Nan(5, 9, once=True), **more},
            settings={"nan": policy, "log_every": 100},
            samples=80,
            steps=12,
            save=True,
            save_every=SaveEvery(steps=4),
        )
        run.folder.path.mkdir()
        train(run)
        found.append([p.detach().clone() for p in run.engine.model.parameters()])
        assert run.progress.skipped == 2
        assert run.progress.passed_over == ({5, 9} if policy == "rollback" else set())
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_training_that_is_not_finite_for_good_ends(tmp_path: Path, policy: str) -> None:
    run = make_run(
        tmp_path,
        hooks={"nan": Nan(*range(4, 500))},
        settings={"nan": policy},
        steps=400,
        save=True,
        save_every=SaveEvery(steps=3),
    )
    with pytest.raises(TrainingStopped, match=f"step 103: not finite .*the {MOST_IN_A_ROW}th such step in a row"):
        train(run)
    assert all(p.isfinite().all() for p in run.engine.model.parameters())


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_a_permanent_overflow_in_fp16_ends_at_the_floor_of_the_scale(tmp_path: Path, policy: str) -> None:
    precision = replace(PRECISIONS["fp16"], loss_scaling=LossScaling(init_scale=2.0**24))
    run = make_run(
        tmp_path,
        engine=engine(precision=precision),
        hooks={"nan": Nan(*range(1, 2000))},
        settings={"nan": policy},
        steps=2000,
        save=True,
    )
    before = [p.detach().clone() for p in run.engine.model.parameters()]
    with pytest.raises(TrainingStopped, match="not finite"):
        train(run)
    assert run.engine.backend.scaler is not None
    assert run.engine.backend.scaler.value == LossScaling().floor > 0
    for one, other in zip(before, run.engine.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("policy", ["stop", "skip", "ignore"])
def test_buffers_that_have_taken_a_nan_are_not_saved(tmp_path: Path, policy: str) -> None:
    run = make_run(tmp_path, model=Norm, settings={"nan": policy}, samples=80, save=True, save_every=SaveEvery(steps=2))
    if policy == "ignore":
        train(run)
    else:
        with pytest.raises(TrainingStopped):
            train(run)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_rollback_mends_buffers(tmp_path: Path) -> None:
    run = make_run(
        tmp_path, model=Norm, settings={"nan": "rollback"}, samples=80, save=True, save_every=SaveEvery(steps=2)
    )
    train(run)
    assert run.progress.passed_over == {3}
    assert all(value.isfinite().all() for value in run.engine.model.state_dict().values())


def test_an_optimizer_state_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    """Squares overflow where gradients and weights do not."""

    def large(run: Run) -> None:
        if run.progress.step == 1:
            fill(run, 1e25)

    run = make_run(
        tmp_path,
        optimizer=lambda model: torch.optim.Adam(model.parameters()),
        steps=4,
        save=True,
        save_every=SaveEvery(2),
    )
    run.events["on_gradients_ready"] += (large,)
    with pytest.raises(TrainingStopped, match="step 2: weights or optimizer state are not finite; they were not saved"):
        train(run)


def test_rollback_needs_checkpoints() -> None:
    values = config(nan="rollback", checkpoint=None)
    (problem,) = [found for found in validate(values, {}, partial=True) if found.key == "nan"]
    assert "checkpoint=none" in problem.why


def test_early_stopping_after_a_rollback_counts_the_evaluations_that_are_left(job: Job) -> None:
    stop = spec("runner.hooks.early_stop.EarlyStop", patience=3, min_delta=100.0)
    settings = {**HARD, "eval__every": 1}
    back = job("back", **settings, nan="rollback", hooks=hooks(nan=nan(3), stop=stop))
    skip = job("skip", **settings, nan="skip", hooks=hooks(nan=nan(3), stop=stop))
    assert back.summary["steps"] == skip.summary["steps"] == 4
    assert [line["step"] for line in back.eval] == [line["step"] for line in skip.eval] == [1, 2, 3, 4]


# --- hooks that come later ------------------------------------------------------------------------------------------


def test_rollback_puts_back_a_hook_that_was_added_on_resume(job: Job) -> None:
    """The checkpoint that the run goes on from has no state of it; one is saved that has, before the first step."""
    settings = {**HARD, "checkpoint__every": None, "nan": "rollback"}
    assert job(**settings, hooks=hooks(end=spec("small.Interrupt", step=4))).code == 75
    added = {"ema": EMA, "seen": spec("guarantees.test_g10_not_finite.Seen")}
    result = job(**settings, hooks=hooks(**added, nan=nan(8)))
    assert result.code == 0
    assert [line["back_to"] for line in journal(result)] == [4]
    assert extra(result)["hooks.seen"]["steps"] == list(range(5, 15))


def test_rollback_refuses_a_checkpoint_that_lacks_a_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, hooks={"nan": Nan(5)}, settings={"nan": "rollback"}, save=True)
    assert run.checkpointer is not None
    load = run.checkpointer.load

    def lacking(*arguments: Any, **more: Any) -> Any:
        found = load(*arguments, **more)
        run.checkpointer.lacked = ("hooks.new", "trackers.new")  # type: ignore[union-attr]
        return found

    monkeypatch.setattr(run.checkpointer, "load", lacking)
    with pytest.raises(TrainingStopped, match=r"step_00000000, the last good .*has no state of hooks\.new: all cannot"):
        train(run)


# --- what hooks keep of the weights ---------------------------------------------------------------------------------


class SpoilAverages(Hook):
    """Writes a value into the averages that this process has, once; only the last process does."""

    def __init__(self, step: int, value: float = math.nan) -> None:
        self.step, self.value, self.done = step, value, False

    def on_step_end(self, run: Run) -> None:
        if run.progress.step == self.step and not self.done and distributed.rank() == distributed.world_size() - 1:
            self.done = True
            next(part for part in run.hooks["ema"]._averages if part.numel()).view(-1)[0] = self.value


class Keeps(Hook):
    """What is not finite for good reasons: no best loss yet, losses of steps that were left out, no lowest weights."""

    def placed(self, engine: Any) -> None:
        self.lowest = {name: torch.full_like(value, math.inf) for name, value in engine.backend.weights().items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": torch.tensor(math.inf),
            "losses": torch.tensor([1.0, math.nan]),
            "0.bias": torch.tensor(-math.inf),
            "lowest": self.lowest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def spoilt_averages(**arguments: Any) -> dict[str, Any]:
    return hooks(ema=EMA, spoil=spec("guarantees.test_g10_not_finite.SpoilAverages", **arguments))


def not_finite_in(result: Path) -> list[str]:
    return [name for name in _saved(result / "checkpoints")[0] if "hooks.ema" in name]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("policy", ["stop", "skip", "rollback", "ignore"])
def test_averages_that_are_not_finite_are_not_saved(job: Job, policy: str, value: float) -> None:
    result = job(**HARD, nan=policy, hooks=spoilt_averages(step=5, value=value))
    assert not_finite_in(result.path) == []
    steps = _saved(result.path / "checkpoints")[1]
    if policy == "rollback":
        assert (result.code, steps) == (0, [12, 14])
        (line,) = journal(result)
        assert (line["step"], line["back_to"], line["weights_finite"], line["hooks"]) == (6, 3, True, ["hooks.ema"])
    elif policy == "ignore":
        assert (result.code, steps) == (0, [3])
    else:
        assert (result.code, steps) == (1, [3])
        assert "step 6: hooks.ema is not finite; they were not saved" in result.summary["error"]
        assert "Look at what writes the state of hooks.ema, or" in result.summary["error"]
        assert "amples" not in result.summary["error"]


def test_hooks_may_hold_what_is_not_finite_and_is_no_average(job: Job) -> None:
    result = job(**HARD, hooks=hooks(keeps=spec("guarantees.test_g10_not_finite.Keeps")))
    assert (result.code, _saved(result.path / "checkpoints")[1]) == (0, [12, 14])


def of_two(folder: Path) -> Any:
    """FSDP, the last process's part of an average spoilt: what became of it, and what is in the checkpoints."""
    from contract.training import OPTIONS

    from runner.assemble import assemble, check
    from runner.distributed import Ranks
    from runner.folder import Bystander, RunFolder

    rank = distributed.rank()
    plain = config(
        backend={"name": "fsdp", **OPTIONS["fsdp"], "replicas": 1},
        train={"epochs": None, "steps": 6},
        batch={"global_size": 8, "micro_size": 4},
        checkpoint__every={"steps": 2},
        hooks=spoilt_averages(step=3),
    )
    made = assemble(
        plain, check(plain, Ranks(rank, 2, rank, 2)), RunFolder(folder) if rank == 0 else Bystander(folder), resume=None
    )
    made.trackers.start(folder, 0, {})
    try:
        train(made)
    except TrainingStopped as error:
        return str(error).partition(";")[0], _saved(folder / "checkpoints")
    finally:
        made.engine.backend.close()


def test_a_part_of_an_average_on_one_process_is_enough(tmp_path: Path) -> None:
    assert run_ranks(of_two, 2, tmp_path) == [("step 4: hooks.ema is not finite", ([], [2]))] * 2


# --- what the words say ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_weights_that_were_spoilt_from_the_start_name_where_they_come_from(
    job: Job, tmp_path: Path, policy: str
) -> None:
    from safetensors.torch import save_file

    weights = {name: value.clone() for name, value in mlp().state_dict().items()}
    weights["0.weight"][0, 0] = math.nan
    save_file(weights, tmp_path / "bad.safetensors")
    result = job(**HARD, nan=policy, init_from=str(tmp_path / "bad.safetensors"))
    error = result.summary["error"]
    assert result.code == 1
    assert error.endswith(f"They were so before the first step: they come from init_from={tmp_path}/bad.safetensors.")
    assert result.summary["steps"] == 0
    assert not list((result.path / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_a_checkpoint_that_is_spoilt_is_named(tmp_path: Path, policy: str) -> None:
    before = make_run(tmp_path, save=True)
    before.progress.step = 2
    fill_weight(before)
    assert before.checkpointer is not None
    path = before.checkpointer.save(2)
    run = make_run(tmp_path, save=True, settings={"nan": policy})
    assert run.checkpointer is not None
    run.checkpointer.load(path)
    with pytest.raises(TrainingStopped, match=f"step 3: .*before the first step: they come from the checkpoint {path}"):
        train(run)


def fill_weight(run: Run) -> None:
    with torch.no_grad():
        next(run.engine.model.parameters()).fill_(math.nan)


class SpoilWeight(Hook):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run: Run) -> None:
        if run.progress.step == self.step:
            fill_weight(run)


@pytest.mark.parametrize("step", [2, 3])
def test_no_samples_are_blamed_for_weights_that_an_update_has_spoilt(job: Job, step: int) -> None:
    """Found in the loss of the step after it, or before a checkpoint."""
    spoil = spec("guarantees.test_g10_not_finite.SpoilWeight", step=step)
    result = job(**HARD, hooks=hooks(spoil=spoil))
    error = result.summary["error"]
    assert error.endswith("Lower optimizer.lr, set grad_clip, or leave such steps out with nan=rollback.")
    assert "amples" not in error


def test_samples_are_named_where_they_may_be_to_blame(job: Job) -> None:
    error = job(**HARD, hooks=hooks(nan=nan(2))).summary["error"]
    assert "Samples " in error
    assert error.endswith("look at those samples, or leave such steps out with nan=skip or nan=rollback.")


# --- a signal under ignore ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [5, 6])
def test_a_signal_without_its_checkpoint_is_a_failure(job: Job, step: int) -> None:
    """75 says that there is one; step 6 is also one at which a checkpoint is due."""
    spoil = spec("guarantees.test_g10_not_finite.SpoilWeight", step=4)
    result = job(**HARD, nan="ignore", hooks=hooks(spoil=spoil, end=spec("small.Interrupt", step=step)))
    assert result.code == 1
    assert (
        f"step {step}: weights or optimizer state are not finite, so the run that a signal" in result.summary["error"]
    )
    assert "step_00000003" in result.summary["error"]


def test_a_signal_after_the_last_step_changes_nothing_under_ignore(tmp_path: Path) -> None:
    run = make_run(tmp_path, settings={"nan": "ignore"}, steps=4, save=True)
    run.events["on_step_end"] += (SpoilWeight(2).on_step_end,)

    def interrupt(run: Run, metrics: Any) -> None:
        run.signal = 15

    run.events["on_step_end"] += (lambda run: run.progress.step == 4 and run.evaluate_soon(),)
    run.events["on_eval_end"] += (interrupt,)
    train(run)
    assert run.complete
