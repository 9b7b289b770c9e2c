"""The runner's loop over streams and over data that one process reads: the same training on one and two processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from processes import run_ranks
from small import CLASSES, CPU, FEATURES, Watch, mlp
from small import run as make_run
from torch.utils.data import IterableDataset

from runner import distributed
from runner.data.main import Remote
from runner.data.reading import Reading
from runner.data.synthetic import random_classification
from runner.engine.ddp import DDP
from runner.engine.engine import Engine
from runner.engine.mesh import Mesh
from runner.engine.precision import PRECISIONS
from runner.engine.single import Single
from runner.train.hook import events
from runner.train.loop import train
from runner.train.progress import Progress

pytestmark = pytest.mark.usefixtures("quiet")

INDEXED = random_classification(19, FEATURES, CLASSES)
STEPS = 8


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(INDEXED)


def an_engine() -> Engine:
    rank, world = distributed.rank(), distributed.world_size()
    backend = (DDP if world > 1 else Single)(CPU, PRECISIONS["fp32"], Mesh(rank, world))
    made = Engine(backend)
    torch.manual_seed(0)
    made.prepare(mlp, lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    return made


def trained(*, stream: bool, main: bool, stop: int = STEPS, goes_on: dict[str, Any] | None = None) -> dict[str, Any]:
    """Losses, samples seen and where the data stand after a training of 8 samples a step, in micro-batches of 2."""
    engine, progress, watch = an_engine(), Progress(), Watch()
    mesh = engine.mesh
    reading = Reading(reader=mesh.data_rank, readers=mesh.data_size, main=main)
    dataset: Any = Stream() if stream else INDEXED
    if main and mesh.data_rank:
        dataset = Remote.of(dataset)
    data = reading.training(dataset, 8, 2, 0, trained=lambda: progress.step)
    if goes_on is not None:
        data.load_state_dict(goes_on["data"])  # type: ignore[union-attr]
        progress.step = goes_on["data"]["step"]
        engine.model.load_state_dict(goes_on["weights"])
    run = make_run(
        Path(mkdtemp()),
        engine=engine,
        train_data=data,
        eval_set=None,
        progress=progress,
        steps=stop,
        events=events([watch]),
    )
    train(run)
    state = data.state_dict() if stream else None  # type: ignore[union-attr]
    return {"losses": watch.losses, "samples": progress.samples, "data": state, "weights": engine.model.state_dict()}


def trainings() -> list[dict[str, Any]]:
    found = [trained(stream=stream, main=main) for stream in (False, True) for main in (False, True)]
    for main in (False, True):
        half = trained(stream=True, main=main, stop=5)
        # What the first process saves is what all load.
        half = distributed.broadcast(half)
        found.append(trained(stream=True, main=main, goes_on=half))
    return found


def test_streams_and_a_single_reader_train_alike_on_two_processes() -> None:
    alone = trainings()
    together = run_ranks(trainings, 2, timeout=60)
    for number, expected in enumerate(alone):
        for found in (rank[number] for rank in together):
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
            assert found["samples"] == expected["samples"]
    # 19 samples, 8 a step: steps of 8, 8 and 3, and again.
    assert all(found["samples"] == 2 * 19 + 16 for found in alone)
    assert alone[0]["losses"] == alone[1]["losses"]
    assert alone[2]["losses"] == alone[3]["losses"]
    assert alone[2]["losses"][:2] != alone[2]["losses"][3:5]
    assert alone[4]["losses"] == alone[5]["losses"] == alone[2]["losses"][5:]
    assert alone[2]["data"] == {"step": 8, "ends": [[3, 5], [6, 5]], "dataset": None}
