"""G17: augmentation depends on no number of workers and on no resume."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import CLASSES, FEATURES, Result, spec
from torch import Tensor

from guarantees.cases_g17 import KINDS, Case, Images, cases, run
from runner.data.loader import Loader
from runner.data.order import Order

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("case", cases(18, seed=17), ids=str)
def test_workers_and_resumes(case: Case) -> None:
    violated = run(case)
    assert violated is None, violated


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_goes_on_in_the_middle(kind: str) -> None:
    for first in (0, 3, 5, 8):
        violated = run(Case(kind, 0, first, 2))
        assert violated is None, violated


class Noisy:
    """Points that are moved each time."""

    def __init__(self, samples: int) -> None:
        made = torch.Generator().manual_seed(0)
        self.x = torch.randn(samples, FEATURES, generator=made)
        self.y = torch.randint(CLASSES, (samples,), generator=made)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] + 0.1 * torch.randn(FEATURES) * random.random(), self.y[index]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_training_that_stops_and_goes_on_with_other_workers(job: Callable[..., Result]) -> None:
    def settings(workers: int, **more: Any) -> dict[str, Any]:
        data = spec("guarantees.test_g17_augmentation.Noisy", samples=50)
        model = spec("small.mlp", dropout=0.2)
        return {"data__train": data, "data__num_workers": workers, "model": model, "accumulation__steps": 2, **more}

    whole = job("whole", **settings(0))
    stop = {"hooks": {"watch": spec("small.Watch"), "stop": spec("small.Interrupt", step=5)}}
    assert job("parts", **settings(2, **stop)).code == 75
    parts = job("parts", **settings(1))
    assert parts.losses == whole.losses[5:]
    assert all(torch.equal(whole.watch.weights[name], value) for name, value in parts.watch.weights.items())


def test_each_epoch_draws_anew_and_samples_draw_apart() -> None:
    made = Loader(Images(), Order(37, 37, 3), 37, collate=torch.stack)
    order = [made.order.indices(step) for step in (0, 1)]
    first, second = (step.batches[0] - indices[:, None] for step, indices in zip(made.steps(0, 2), order, strict=True))
    by_sample = [drawn[indices.argsort()] for drawn, indices in zip((first, second), order, strict=True)]
    assert not torch.isclose(by_sample[0], by_sample[1]).any()
    assert len({round(value, 4) for value in by_sample[0].flatten().tolist()}) > 100


def test_what_is_drawn_does_not_depend_on_the_micro_batch() -> None:
    def samples(micro: int) -> Tensor:
        steps = Loader(Images(), Order(37, 12, 3), micro, collate=torch.stack).steps(0, 4)
        return torch.cat([batch for step in steps for batch in step.batches])

    assert torch.equal(samples(12), samples(3))


def test_a_data_set_that_draws_nothing_is_fetched_once() -> None:
    class Counted(Images):
        fetched = 0

        def __getitem__(self, index: int) -> Tensor:
            self.fetched += 1
            return torch.tensor(index)

    data = Counted()
    for _ in Loader(data, Order(37, 8, 0), 4).steps(0, 5):
        pass
    assert data.fetched == 37
