"""determinism=canonical: the tree of sums, and the same bits on one, two and four processes."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from processes import run_ranks
from small import CLASSES, CPU, FEATURES, Watch, mlp
from small import run as make_run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from runner import distributed
from runner.data.reading import Reading
from runner.engine.canonical import Canonical, CanonicalEngine, folded, in_buckets, joined, mirrored
from runner.engine.mesh import Mesh
from runner.engine.precision import PRECISIONS
from runner.errors import InputError
from runner.metrics import MeanAbsoluteError
from runner.train.hook import Hook, events
from runner.train.loop import train
from runner.train.run import Run
from runner.train.task import Task

pytestmark = pytest.mark.usefixtures("quiet")

SHARDS, SIZE, LENGTH = 8, 24, 5


class Tokens(Task):
    """A label a token, and a weight of its own for each sample: sums of such weights are not exact."""

    def __init__(self) -> None:
        self.meters = {"error": MeanAbsoluteError()}

    def inputs(self, batch: Any) -> Any:
        return batch[0]

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        each = cross_entropy(outputs.flatten(0, 1), batch[1].flatten(), reduction="none", ignore_index=-100)
        return (each.view(batch[1].shape) * batch[2][:, None]).sum()

    def weight(self, batch: Any) -> Tensor:
        return ((batch[1] != -100) * batch[2][:, None]).sum()

    def predictions(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        return outputs.logsumexp(-1), batch[2][:, None].expand(outputs.shape[:2])


class Branches(nn.Module):
    """Some parameters get a gradient from some shards only, one from none; two are one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(FEATURES, 16), nn.Linear(16, 16)
        self.seldom, self.never = nn.Linear(16, 16), nn.Linear(3, 3)
        self.last, self.drop = nn.Linear(16, CLASSES), nn.Dropout(0.3)
        self.again = self.middle

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(torch.tanh(self.first(x)))
        if hidden[0, 0, 0] > 0.4:
            hidden = hidden + self.seldom(hidden)
        return self.last(self.again(torch.tanh(self.middle(hidden))))


def sequences(samples: int, seed: int = 0) -> TensorDataset:
    made = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (samples, LENGTH), generator=made)
    labels[torch.arange(LENGTH) >= torch.randint(1, LENGTH + 1, (samples, 1), generator=made)] = -100
    features = torch.randn(samples, LENGTH, FEATURES, generator=made)
    return TensorDataset(features, labels, torch.rand(samples, generator=made) + 0.1)


def an_engine(precision: str = "fp32", model: Any = Branches, **how: Any) -> CanonicalEngine:
    mesh = Mesh(distributed.rank(), distributed.world_size())
    made = CanonicalEngine(Canonical(CPU, PRECISIONS[precision], mesh, shards=SHARDS, **how))
    torch.manual_seed(0)
    made.prepare(model, lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1))
    return made


class Norms(Hook):
    def __init__(self) -> None:
        self.found: list[Any] = []

    def on_step_end(self, run: Run) -> None:
        self.found.append(None if run.grad_norm is None else run.grad_norm.item())
        self.found.append(torch.rand(1).item())


def trained(precision: str) -> dict[str, Any]:
    """What a training of 53 samples an epoch, 24 a step, has left: its last step has five samples, in two shards."""
    # Buckets of a few hundred bytes: parameters travel apart.
    engine, watch, norms = an_engine(precision, bucket_mb=0.001), Watch(), Norms()
    reading = Reading(reader=engine.mesh.data_rank, readers=engine.mesh.data_size)
    run = make_run(
        Path(mkdtemp()),
        engine=engine,
        task=Tokens(),
        train_data=reading.training(sequences(53), SIZE, SIZE // SHARDS, 0),
        eval_data=reading.evaluation(sequences(17, 1), 3),
        train_set=sequences(53),
        global_size=SIZE,
        steps=7,
        events=events([watch, norms]),
        settings={"grad_clip": 0.5},
        measures_norm=True,
    )
    train(run)
    state = engine.backend.state()
    return {
        "losses": watch.losses,
        "norms": norms.found,
        "evaluation": run.metrics,
        "model": state["model"].state_dict(),
        "optimizer": engine.optimizer.state_dict()["state"],
        "scaler": state["scaler"].state_dict(),
    }


KINDS = ("fp32", "bf16", "fp16", "bf16_full")


def trainings() -> list[dict[str, Any]]:
    return [trained(precision) for precision in KINDS]


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are the same bits."""
    if isinstance(one, Tensor):
        return (
            one.dtype == other.dtype and one.numpy(force=True).tobytes() == other.numpy(force=True).tobytes()
            if (one.dtype != torch.bfloat16)
            else torch.equal(one.view(torch.int16), other.view(torch.int16))
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_the_same_bits_on_any_number_of_processes() -> None:
    alone = trainings()
    assert alone[0]["losses"][0] > alone[0]["losses"][-1] > 0
    # What no shard used has no state, and was not decayed either.
    assert len(alone[0]["optimizer"]) == 8
    assert alone[0]["evaluation"]["samples"] == 17
    for world in (2, 4):
        for rank in run_ranks(trainings, world, timeout=100):
            for name, found, expected in zip(KINDS, rank, alone, strict=True):
                for part in expected:
                    assert same(found[part], expected[part]), (world, name, part, found[part], expected[part])


def test_close_to_what_is_trained_without_it() -> None:
    from small import engine

    def losses(made: Any, micro: int) -> list[float]:
        watch = Watch()
        train(
            make_run(Path(mkdtemp()), engine=made, samples=50, global_size=24, micro_size=micro, events=events([watch]))
        )
        return watch.losses

    def model() -> nn.Module:
        return mlp()

    def optimizer(model: nn.Module) -> Any:
        return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)

    expected = losses(engine(model, optimizer), 24)
    assert losses(an_engine(model=model), 3) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_leaves_come_in_the_order_of_the_tree(count: int) -> None:
    order = [mirrored(turn, count) for turn in range(count)]
    assert sorted(order) == list(range(count))
    for first, second in zip(order[::2], order[1::2], strict=False):
        assert second == first + count // 2


@pytest.mark.parametrize("readers", [1, 2, 4, 8])
def test_any_number_of_readers_adds_up_one_tree(readers: int) -> None:
    def tree(leaves: list[str]) -> str:
        while len(leaves) > 1:
            half = len(leaves) // 2
            leaves = [f"({a}{b})" for a, b in zip(leaves[:half], leaves[half:], strict=True)]
        return leaves[0]

    leaves = [str(number) for number in range(8)]
    assert tree([tree(leaves[reader::readers]) for reader in range(readers)]) == tree(leaves)


def test_folded_and_joined() -> None:
    values = torch.tensor([1e8, 1.0, -1e8, 1.0])
    assert folded(values).item() == 2.0
    assert folded(values[:1]).item() == 1e8
    assert folded(torch.arange(8.0).view(4, 2)).tolist() == [12.0, 16.0]
    ones, both = torch.ones(2), joined([torch.ones(1), None, torch.ones(2), None], [torch.ones(1), None, None, None])
    assert [None if x is None else x.tolist() for x in both] == [[2.0], None, ones.tolist(), None]


def test_to_add_minus_zero_changes_no_number() -> None:
    draw = random.Random(0)
    numbers = torch.tensor([0.0, -0.0, 1e-45, -1e-45, float("inf"), *(draw.uniform(-1, 1) for _ in range(100))])
    assert same(numbers + torch.full_like(numbers, -0.0), numbers)


def test_buckets_hold_one_type_and_so_many_bytes() -> None:
    tensors = [torch.zeros(n) for n in (3, 4, 100, 1)] + [torch.zeros(2, dtype=torch.bfloat16)]
    sizes = [[tensor.numel() for tensor in bucket] for bucket in in_buckets(tensors, 32)]
    assert sizes == [[3, 4], [100], [1], [2]]


def test_what_follows_every_forward_is_refused() -> None:
    with pytest.raises(InputError, match=r"1 \(BatchNorm1d\).*GroupNorm"):
        an_engine(model=lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    an_engine(model=lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)))

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(FEATURES, CLASSES)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return self.layer(x)

    with pytest.raises(InputError, match=r"\(seen\)"):
        train(make_run(Path(mkdtemp()), engine=an_engine(model=Counts), global_size=24, micro_size=3, steps=1))


def test_what_cannot_work_is_told_before_a_model_exists() -> None:
    def problems(processes: int, **how: Any) -> list[Any]:
        return Canonical(CPU, PRECISIONS["fp32"], Mesh(0, processes), shards=8, **how).check()

    assert not problems(1, kind="single")
    assert not problems(4)
    (three,) = problems(3)
    assert (three.key, three.fix) == ("determinism", "launch.nproc_per_node=2")
    assert problems(2, comm_hook="bf16")[0].key == "backend.comm_hook"
    assert problems(2, kind="single")[0].key == "backend"
