"""batch.micro_size=auto: the size that is found, and that nothing else follows from the search."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_ranks
from small import CPU, FEATURES, run
from torch import Tensor, nn

from runner import distributed
from runner.data.loader import Loader
from runner.data.main import Remote
from runner.data.reading import Reading
from runner.data.synthetic import random_classification
from runner.engine.backend import Backend
from runner.engine.backends import backend_class
from runner.engine.engine import Engine
from runner.engine.mesh import Mesh
from runner.engine.precision import PRECISIONS
from runner.errors import InputError
from runner.train.fit import Fit, fit_micro_size, is_out_of_memory
from runner.train.loop import train
from runner.train.run import Run


class Bounded(nn.Module):
    """Runs out of memory above `most` samples; has running statistics and dropout."""

    def __init__(self, most: int, error: type[Exception] = torch.OutOfMemoryError, backward: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(16, 3)
        self.most, self.error, self.backward = most, error, backward
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        bad = torch.is_grad_enabled() and len(x) > self.most
        if torch.is_grad_enabled():
            self.sizes.append(len(x))
        if bad and not self.backward:
            raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB")
        hidden = self.drop(self.norm(self.first(x)).relu())
        if bad:
            hidden.register_hook(self._raise)
        return self.last(hidden)

    def _raise(self, gradient: Tensor) -> None:
        raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB")


def weights(made: Run) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in made.engine.model.state_dict().items()}


def trained(folder: Path, *, micro_size: int | None, most: int = 4, **parts: Any) -> tuple[Run, Fit | None]:
    size = parts.pop("global_size", 24)
    optimizer = parts.pop("optimizer", lambda m: torch.optim.AdamW(m.parameters(), lr=0.01))
    bounded = {key: parts.pop(key) for key in ("error", "backward") if key in parts}
    made = run(
        folder,
        global_size=size,
        samples=parts.pop("samples", 60),
        micro_size=micro_size or size,
        model=lambda: Bounded(most, **bounded),
        optimizer=optimizer,
        eval_set=None,
        steps=6,
        **parts,
    )
    made.engine.model.train()
    found = fit_micro_size(made) if micro_size is None else None
    train(made)
    return made, found


@pytest.mark.parametrize("backward", [False, True])
def test_the_largest_divisor_that_fits_is_found_and_trains_as_if_given(tmp_path: Path, backward: bool) -> None:
    given, _ = trained(tmp_path / "a", micro_size=3)
    draws = random.Random(0)
    random.seed(0)
    made, found = trained(tmp_path / "b", micro_size=None, backward=backward)
    # 24, 12, 6 run out of memory; 4 would fit too, but each size is at most half of the one before.
    assert found == Fit(3, 8, (24, 12, 6))
    assert made.train_data.micro_size == 3
    assert random.random() == draws.random()
    expected = weights(given)
    assert all(torch.equal(value, expected[name]) for name, value in weights(made).items())
    assert made.loss is not None
    assert given.loss is not None
    assert torch.equal(made.loss, given.loss)


def test_a_size_that_fits_at_once_is_tried_once(tmp_path: Path) -> None:
    made, found = trained(tmp_path, micro_size=None, most=100)
    assert found == Fit(24, 1)
    assert made.engine.model.sizes[:2] == [24, 24]  # the trial, then the first step


def test_several_micro_batches_are_tried_with_gradients_there(tmp_path: Path) -> None:
    made, _ = trained(tmp_path, micro_size=None, most=12)
    assert made.engine.model.sizes[:4] == [24, 12, 12, 12]


def test_the_longest_samples_are_tried_where_lengths_are_known(tmp_path: Path) -> None:
    class Words(torch.utils.data.Dataset[Any]):
        """Sample i has 1 + i // 6 vectors."""

        lengths = tuple(1 + i // 6 for i in range(60))

        def __len__(self) -> int:
            return 60

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return torch.ones(self.lengths[i], FEATURES), 0

    def padded(samples: list[tuple[Tensor, int]]) -> list[Tensor]:
        rows = nn.utils.rnn.pad_sequence([words for words, _ in samples], batch_first=True)
        return [rows, torch.zeros(len(samples), dtype=torch.long)]

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(FEATURES, 3)
            self.tried: list[list[int]] = []

        def forward(self, x: Tensor) -> Tensor:
            self.tried.append(list(x.shape[:2]))
            if len(x) * x.shape[1] > 40:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.last(x.mean(1))

    made = run(tmp_path, global_size=8, train_set=Words(), model=Mean, eval_set=None)
    made.train_data = Loader(made.train_data.dataset, made.train_data.order, 8, collate=padded)
    # 8 samples of 10 vectors are too many; 4 of them just fit, whatever the first step has.
    assert fit_micro_size(made) == Fit(4, 2, (8,))
    assert made.engine.model.tried == [[8, 10], [4, 10], [4, 10]]


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="out of memory"):
        trained(tmp_path, micro_size=None, error=ValueError)


def test_not_even_one_sample(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        trained(tmp_path, micro_size=None, most=0)
    problem = caught.value.problems[0]
    assert problem.key == "batch.micro_size"
    assert "one sample" in problem.why
    assert "activation_checkpointing=full" in problem.fix


def test_it_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "runner"):
        trained(tmp_path, micro_size=None)
    told = [r.getMessage() for r in caplog.records if "micro_size" in r.getMessage()]
    assert told == [
        "batch.micro_size=auto: 3 (24, 12, 6 ran out of memory); accumulation.steps=8, batch.global_size=24"
    ]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (None, False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception | None, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_an_error_behind_an_error_counts() -> None:
    behind = ValueError("while compiling")
    behind.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(behind)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (lambda p: torch.optim.AdamW(p), 2),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
        (lambda p: torch.optim.Adam(p, amsgrad=True), 3),
        (lambda p: torch.optim.Adafactor(p), 0),
    ],
)
def test_room_for_the_optimizer(optimizer: Any, expected: int) -> None:
    from runner.train.fit import _room_for_state

    model = nn.Linear(5, 7)
    made = optimizer(model.parameters())
    assert sum(t.numel() for t in _room_for_state(made)) == expected * (5 * 7 + 7)
    made.state[model.weight]["there"] = torch.zeros(1)
    assert list(_room_for_state(made)) == []


class Deep(nn.Module):
    """Bounded inside of repeated blocks, which backends shard as units."""

    def __init__(self, most: int, backward: bool) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, FEATURES)
        self.blocks = nn.ModuleList(Bounded(1000) for _ in range(3))
        self.blocks[1].most, self.blocks[1].backward = most, backward
        self.back = nn.Linear(3, FEATURES)
        self.last = nn.Linear(FEATURES, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + self.back(block(x))
        return self.last(x)


def backend(name: str, mesh: Mesh) -> Backend:
    if name.startswith("zero"):
        from runner.engine.deepspeed import DeepSpeed

        return DeepSpeed(CPU, PRECISIONS["fp32"], mesh, stage=int(name[-1]))
    return backend_class(name, mesh.data_size)(CPU, PRECISIONS["fp32"], mesh)


#: Which ranks run out of memory, and whether in the backward.
Cases = list[tuple[tuple[int, ...], bool]]


def on_two_ranks(folder: str, name: str, cases: Cases) -> list[tuple[Fit | None, list[str]]]:
    """What is found where ranks run out of memory above 3 samples, and which weights differ from a given size's."""
    found = []
    for number, (failing, backward) in enumerate(cases):
        _, expected = trained_by(f"{folder}/given{number}", name, (), False, 3)
        fit, got = trained_by(f"{folder}/searched{number}", name, failing, backward, None)
        assert expected.keys() == got.keys()
        found.append((fit, [key for key, value in got.items() if not torch.equal(value, expected[key])]))
    return found


def trained_by(
    folder: str, name: str, failing: tuple[int, ...], backward: bool, micro_size: int | None
) -> tuple[Fit | None, dict[str, Tensor]]:
    rank, size = distributed.rank(), distributed.world_size()
    engine = Engine(backend(name, Mesh(rank, size)))
    torch.manual_seed(0)
    most = 3 if rank in failing else 1000
    engine.prepare(lambda: Deep(most, backward), lambda m: torch.optim.AdamW(m.parameters(), lr=0.01))
    data = random_classification(60, FEATURES, 3)
    made = run(Path(folder) / str(rank), engine=engine, train_set=data, global_size=24, eval_set=None, steps=4)
    made.train_data = Loader(data, made.train_data.order, micro_size or 12, reader=rank, readers=size)
    made.engine.model.train()
    found = fit_micro_size(made) if micro_size is None else None
    train(made)
    values = engine.state()["model"].state_dict()
    whole = {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in values.items()}
    return found, {key: value.clone() for key, value in whole.items()}


@pytest.mark.parametrize(
    ("name", "cases"),
    [
        # Gradients stay at home in a trial, so one rank may fail alone.
        ("ddp", [((1,), False), ((0,), True)]),
        ("fsdp", [((0, 1), False), ((0, 1), True)]),
        ("zero2", [((1,), True)]),
        ("zero3", [((0, 1), False)]),
    ],
)
def test_all_ranks_agree_and_train_as_if_given(tmp_path: Path, name: str, cases: Cases) -> None:
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    for found in run_ranks(on_two_ranks, 2, str(tmp_path), name, cases, timeout=100):
        assert found == [(Fit(3, 4, (12, 6)), [])] * len(cases)


class Ragged(torch.utils.data.Dataset[Any]):
    """Sample i has 1 + i // 6 vectors."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, i: int) -> Tensor:
        return torch.ones(1 + i // 6, FEATURES)


class Told(Ragged):
    lengths = tuple(1 + i // 6 for i in range(60))


class Widest(nn.Module):
    """Keeps the shapes of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(FEATURES, 3)
        self.tried: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.tried.append(tuple(x.shape[:2]))
        return self.last(x.mean(1))


def padded_until(most: int) -> Any:
    """A collate that has no memory for more than so many samples."""

    def collate(samples: list[Tensor]) -> list[Tensor]:
        if len(samples) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [nn.utils.rnn.pad_sequence(samples, batch_first=True), torch.zeros(len(samples), dtype=torch.long)]

    return collate


#: What is found, and the shapes that the forward passes of the trials had.
Found = tuple[Fit, list[tuple[int, ...]]]


def fitted(folder: str, dataset: Any, main: bool, collate: Any) -> Found:
    rank, size = distributed.rank(), distributed.world_size()
    made_engine = Engine(backend("ddp", Mesh(rank, size)))
    made_engine.prepare(Widest, lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    made = run(Path(folder) / str(rank), engine=made_engine, train_set=dataset, eval_set=None)
    reading = Reading(collate, reader=rank, readers=size, main=main)
    known = Remote.of(dataset) if main and rank else dataset
    made.train_data = reading.training(known, 24, 12, 0)  # type: ignore[assignment]
    return fit_micro_size(made), next(m for m in made_engine.model.modules() if isinstance(m, Widest)).tried


def of_uneven_ranks(folder: str) -> dict[str, Found]:
    always, here = padded_until(24), padded_until(3 if distributed.rank() == 0 else 24)
    return {
        "lengths": fitted(folder, Told(), True, always),
        "ragged": fitted(folder, Ragged(), False, always),
        "memory": fitted(folder, Ragged(), False, here),
        "memory of the reader": fitted(folder, Ragged(), True, here),
    }


def test_ranks_with_uneven_data_agree(tmp_path: Path) -> None:
    first, second = run_ranks(of_uneven_ranks, 2, str(tmp_path), timeout=60)
    assert first == second
    # The last six samples have ten vectors; twelve of them are the longest that any step may have.
    assert first["lengths"] == (Fit(12, 1), [(12, 10)])
    assert first["ragged"][0] == Fit(12, 1)
    assert len(first["ragged"][1]) == 1
    assert first["memory"][0] == first["memory of the reader"][0] == Fit(3, 4, (12, 6))
    assert len(first["memory"][1]) == len(first["memory of the reader"][1]) == 2  # only what could be made is tried
