"""One optimizer step: exact for any split, and what happens where it is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import FEATURES, Records, config, run_job, spec
from small import run as make_run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from runner.errors import InputError, TrainingStopped
from runner.tasks.classification import Classification
from runner.train.hook import Hook
from runner.train.loop import train
from runner.train.run import Run
from runner.train.step import forward_backward
from runner.train.task import Task

pytestmark = pytest.mark.usefixtures("quiet")


class Tokens(Task):
    """Each sample has a label a token; -100 counts for nothing."""

    def inputs(self, batch: Any) -> Tensor:
        return batch[0]

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return cross_entropy(outputs.flatten(0, 1), batch[1].flatten(), reduction="sum", ignore_index=-100)

    def weight(self, batch: Any) -> Tensor:
        return (batch[1] != -100).sum()

    def tokens(self, batch: Any) -> int:
        return batch[1].numel()


def token_set(samples: int = 24, length: int = 5) -> torch.utils.data.TensorDataset:
    """Sequences with uneven numbers of counted tokens."""
    made = torch.Generator().manual_seed(3)
    labels = torch.randint(3, (samples, length), generator=made)
    counted = torch.randint(1, length + 1, (samples, 1), generator=made)
    labels[torch.arange(length) >= counted] = -100
    return torch.utils.data.TensorDataset(torch.randn(samples, length, FEATURES, generator=made), labels)


@pytest.mark.parametrize("micro", [1, 2, 3, 8])
def test_a_step_in_micro_batches_is_the_step_in_one(tmp_path: Path, micro: int) -> None:
    """Weighted by tokens: gradient and loss are those of the mean over all tokens of the step."""
    run = make_run(tmp_path, train_set=token_set(), task=Tokens(), micro_size=micro, global_size=8, counts_tokens=True)
    made = next(run.train_data.steps(0, 1))
    batches = made.batches
    assert len(batches) == made.real == -(-8 // micro)
    loss = forward_backward(run, made, sum(run.task.weight(batch) for batch in batches))
    found = [parameter.grad.clone() for parameter in run.engine.model.parameters() if parameter.grad is not None]
    assert run.tokens == 40

    inputs, labels = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
    run.engine.model.zero_grad()
    expected = cross_entropy(run.engine.model(inputs).flatten(0, 1), labels.flatten(), ignore_index=-100)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=1e-7)
    for got, parameter in zip(found, run.engine.model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-5, atol=1e-7)


def test_the_short_last_step_is_the_mean_over_its_own_samples(tmp_path: Path) -> None:
    run = make_run(tmp_path, samples=20, global_size=8, micro_size=3)
    made = next(run.train_data.steps(2, 3))
    batches = made.batches
    assert [len(batch[0]) for batch in batches] == [3, 1]
    loss = forward_backward(run, made, 4)
    inputs, labels = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
    torch.testing.assert_close(loss, cross_entropy(run.engine.model(inputs), labels).detach(), rtol=1e-6, atol=0)


class Poison(nn.Module):
    """Gives NaN in the given forward passes (from 0)."""

    def __init__(self, *bad: int, value: float = float("nan")) -> None:
        super().__init__()
        self.layer, self.bad, self.calls, self.value = nn.Linear(FEATURES, 3), bad, 0, value

    def forward(self, x: Tensor) -> Tensor:
        factor = self.value if self.training and self.calls in self.bad else 1.0
        self.calls += self.training
        return self.layer(x) * factor


class Weights(Hook):
    """The weights after every step."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_run_start(self, run: Run) -> None:
        self.found.append(run.engine.model.layer.weight.detach().clone())

    def on_step_end(self, run: Run) -> None:
        self.on_run_start(run)


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_stop_names_step_and_loss_and_the_last_good_checkpoint(tmp_path: Path, value: float) -> None:
    weights = Weights()
    run = make_run(tmp_path, model=lambda: Poison(2, value=value), hooks={"w": weights}, save=True)
    run.save_every.steps = 1
    with pytest.raises(TrainingStopped) as caught:
        train(run)
    text = str(caught.value)
    assert "step 3: not finite (loss nan" in text
    assert "step_00000002" in text
    assert run.progress.step == 2
    assert torch.equal(run.engine.model.layer.weight, weights.found[2])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000001", "step_00000002"]


def test_stop_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match="no checkpoint was saved before"):
        train(make_run(tmp_path, model=lambda: Poison(0)))


def test_skip_leaves_weights_and_schedule_and_counts(tmp_path: Path) -> None:
    weights = Weights()
    run = make_run(
        tmp_path, model=lambda: Poison(1, 2), hooks={"w": weights}, settings={"nan": "skip"}, scheduler=halving, steps=5
    )
    rates: list[float] = []
    run.events["on_step_end"] += (lambda run: rates.append(run.lr),)
    train(run)
    assert run.progress.skipped == 2
    assert run.progress.overflows == 0
    assert rates == [0.1, 0.05, 0.05, 0.05, 0.025]
    assert torch.equal(weights.found[1], weights.found[2])
    assert torch.equal(weights.found[2], weights.found[3])
    assert not torch.equal(weights.found[3], weights.found[4])
    assert weights.found[-1].isfinite().all()


def test_ignore_lets_it_happen(tmp_path: Path) -> None:
    run = make_run(tmp_path, model=lambda: Poison(1), settings={"nan": "ignore"}, steps=3, scheduler=halving)
    train(run)
    assert run.progress.step == 3
    assert run.progress.skipped == 0
    assert run.engine.model.layer.weight.isnan().all()
    assert run.engine.optimizer.param_groups[0]["lr"] == 0.1 * 0.5**3


def test_skipped_steps_are_in_record_and_summary(tmp_path: Path) -> None:
    settings = config(model=spec("test_step.Poison", _args_=[1, 2]), nan="skip", train__epochs=1)
    result = run_job(tmp_path, settings)
    assert result.code == 0
    assert [record["skipped_steps"] for record in result.train] == [0, 1, 2, 2, 2, 2, 2]
    assert result.train[1]["loss"] is None
    assert result.summary["skipped_steps"] == 2
    assert result.summary["steps"] == 7
    rates = [record["lr"] for record in result.train]
    assert rates[1] == rates[2] == rates[3] != rates[4]


def test_a_stopped_job_fails_and_its_summary_has_the_error(tmp_path: Path) -> None:
    result = run_job(tmp_path, config(model=spec("test_step.Poison", _args_=[3]), checkpoint__every={"steps": 2}))
    assert result.code == 1
    assert result.summary["status"] == "failed"
    assert "step 4: not finite (loss nan" in result.summary["error"]
    assert "step_00000002" in result.summary["error"]
    assert result.summary["steps"] == 3
    assert len(result.train) == 3


class Device(Hook):
    """Leaves the decision to the device, as on a GPU."""

    def on_run_start(self, run: Run) -> None:
        run.engine.backend.handle.device_decides = True


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def test_where_the_device_decides_the_host_hears_of_it_a_step_later(tmp_path: Path) -> None:
    weights = Weights()
    run = make_run(
        tmp_path,
        model=lambda: Poison(1),
        optimizer=fused,
        hooks={"d": Device(), "w": weights},
        settings={"nan": "skip", "log_every": 100},
        scheduler=halving,
        steps=4,
        samples=80,
    )
    counted: list[int] = []
    rates: list[float] = []
    run.events["on_step_end"] += (lambda run: (counted.append(run.progress.skipped), rates.append(run.lr)),)
    train(run)
    # The last step is logged, so it is settled at once.
    assert counted == [0, 0, 1, 1]
    assert rates == [0.1, 0.05, 0.05, 0.025]
    assert torch.equal(weights.found[1], weights.found[2])
    assert weights.found[-1].isfinite().all()
    assert run.engine.optimizer.param_groups[0]["lr"] == 0.1 * 0.5**3
    steps = {int(state["step"]) for state in run.engine.optimizer.state.values()}
    assert steps == {3}


def test_the_device_and_the_host_skip_alike(tmp_path: Path) -> None:
    found = []
    for hooks in ({}, {"d": Device()}):
        run = make_run(
            tmp_path, model=lambda: Poison(1, 3), optimizer=fused, hooks=hooks, settings={"nan": "skip"}, steps=6
        )
        train(run)
        found.append(run.engine.model.layer.weight.detach().clone())
        assert run.progress.skipped == 2
    assert torch.equal(*found)


def test_stop_where_the_device_decides_names_the_step_that_was_wrong(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        model=lambda: Poison(1),
        optimizer=fused,
        hooks={"d": Device()},
        settings={"log_every": 100},
        samples=80,
    )
    with pytest.raises(TrainingStopped, match=r"step 2: not finite \(loss nan"):
        train(run)
    assert run.engine.model.layer.weight.isfinite().all()


def test_a_checkpoint_waits_for_what_the_device_has_decided(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        model=lambda: Poison(1),
        optimizer=fused,
        hooks={"d": Device()},
        settings={"log_every": 100},
        samples=80,
        save=True,
    )
    run.save_every.steps = 2
    with pytest.raises(TrainingStopped):
        train(run)
    assert not (tmp_path / "checkpoints" / "step_00000002").exists()


class Odd(Classification):
    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result

    def loss(self, outputs: Any, batch: Any) -> Any:
        loss = super().loss(outputs, batch)
        return {
            "tuple": (loss, outputs),
            "number": loss.item(),
            "vector": loss[None],
            "detached": loss.detach(),
        }[self.result]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("tuple", "returned a tuple"),
        ("number", "returned a float"),
        ("vector", "has shape (1,)"),
        ("detached", "is detached"),
    ],
)
def test_a_loss_that_cannot_be_used_is_the_users_error(tmp_path: Path, kind: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        train(make_run(tmp_path, task=Odd(kind)))
    (problem,) = caught.value.problems
    assert problem.key == "task"
    assert problem.why.startswith("Odd.loss")
    assert words in problem.why
    assert problem.fix


def test_fp16_overflow_is_counted_apart_and_does_not_move_the_schedule(tmp_path: Path) -> None:
    tracker = Records()
    run = make_run(tmp_path, precision="fp16", model=lambda: Poison(0, 1, value=1e5), scheduler=halving, steps=4)
    run.trackers._trackers["records"] = tracker
    train(run)
    assert (run.progress.skipped, run.progress.overflows) == (2, 2)
    assert run.engine.backend.scaler.value == 65536.0 / 4
    assert run.engine.optimizer.param_groups[0]["lr"] == 0.1 * 0.5**2
