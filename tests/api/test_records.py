"""What a loop leaves behind: records of scripts that are started again, states in the middle of a window, words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from runner import Engine


def test_saving_in_the_middle_of_a_window_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(accumulation_steps=2)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader: Any = DataLoader(TensorDataset(torch.ones(4, 1)))
    model, optimizer, loader = engine.prepare(model, optimizer, loader)
    warned = []
    for (x,) in loader:
        with engine.accumulate(model):
            engine.backward(-model(x).mean())
            optimizer.step()
            optimizer.zero_grad()
        caplog.clear()
        engine.save_state(tmp_path)
        warned.append("first 1 micro-batches" in caplog.text)
    assert warned == [True, False, True, False]
    for (x,) in loader:
        with engine.accumulate(model):
            engine.backward(-model(x).mean())
        break
    caplog.clear()
    engine.save_state(tmp_path)
    assert "window" not in caplog.text, "a loop that was left begins a new window anyway"


@pytest.mark.parametrize("first", ["trackers", "state"])
def test_records_of_a_script_that_is_started_again(tmp_path: Path, first: str) -> None:
    class Own:
        name = "own"

        def __init__(self) -> None:
            self.steps: list[int] = []

        def start(self, folder: Path, step: int, config: Any) -> None:
            self.steps.append(step)

        def log(self, record: Any) -> None: ...

        def close(self) -> None: ...

    def begun() -> tuple[Any, Own]:
        own = Own()
        return Engine(log_with=["jsonl", own], project_dir=tmp_path), own

    def kept() -> list[int]:
        return [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]

    engine, _ = begun()
    engine.init_trackers()
    for step in (10, 20):
        engine.log({"loss": 1.0}, step=step)
    engine.save_state()
    engine.log({"loss": 1.0}, step=30)
    engine.end_training()
    again, own = begun()
    again.init_trackers()
    again.log({"loss": 1.0}, step=40)
    assert kept() == [10, 20, 30, 40], "without load_state nothing is lost"
    again.end_training()
    resumed, own = begun()
    for word in (first, "trackers" if first == "state" else "state"):
        resumed.init_trackers() if word == "trackers" else resumed.load_state()
    assert kept() == [10, 20], "what lies after the state is recorded again"
    assert own.steps == [0 if first == "trackers" else 20]
    resumed.log({"loss": 1.0})
    assert kept() == [10, 20, 3], "calls are counted on"
    resumed.end_training()


def test_words_have_an_example() -> None:
    table = (Path(__file__).parents[2] / "docs" / "engine.md").read_text().split("## Words")[1].split("Each has")[0]
    words = re.findall(r"`(\w+)`", table.split("|---|---|")[1])
    words = [word for word in words if hasattr(Engine, word)]
    assert len(words) > 60
    assert [word for word in words if "Example:" not in (getattr(Engine, word).__doc__ or "")] == []
