"""G2: `determinism: canonical` gives the same bits on any sequence of world sizes; without it, the same to 1e-6."""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from processes import run_ranks
from small import CPU, FEATURES, Watch, mlp
from small import run as make_run

from guarantees.cases_g02 import Case, cases, run
from runner import distributed
from runner.data.reading import Reading
from runner.data.synthetic import random_classification
from runner.engine.ddp import DDP
from runner.engine.engine import Engine
from runner.engine.mesh import Mesh
from runner.engine.precision import PRECISIONS
from runner.engine.single import Single
from runner.train.hook import events
from runner.train.loop import train

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("case", cases(2, seed=32), ids=str)
def test_bits_follow_no_number_of_processes(case: Case, tmp_path: Path) -> None:
    violated = run(case, tmp_path)
    assert violated is None, violated


def fifty_steps() -> list[float]:
    """The losses of an ordinary run: 131 samples an epoch, 16 a step."""
    rank, world = distributed.rank(), distributed.world_size()
    engine = Engine((DDP if world > 1 else Single)(CPU, PRECISIONS["fp32"], Mesh(rank, world)))
    torch.manual_seed(0)
    engine.prepare(mlp, lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3))
    data = random_classification(131, FEATURES, 3)
    loader = Reading(reader=rank, readers=world).training(data, 16, 16 // world, 0)
    watch = Watch()
    train(make_run(Path(mkdtemp()), engine=engine, train_data=loader, eval_set=None, steps=50, events=events([watch])))
    return watch.losses


def test_without_it_losses_agree() -> None:
    alone = fifty_steps()
    assert len(alone) == 50
    for world in (2, 4):
        for losses in run_ranks(fifty_steps, world):
            assert losses == pytest.approx(alone, rel=1e-6, abs=0)
