"""Trackers: exact numbers, each step once, and a run that goes on when one of them fails."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from small import Result, spec

from runner.trackers import Trackers
from runner.trackers.jsonl import Jsonl
from runner.trackers.tensorboard import TensorBoard

Job = Callable[..., Result]


def record(step: int, split: str = "train", **more: Any) -> dict[str, Any]:
    return {"split": split, "step": step, **more}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def written(folder: Path, records: list[dict[str, Any]], step: int = 0) -> None:
    tracker = Jsonl()
    tracker.start(folder, step, {})
    for one in records:
        tracker.log(one)
    tracker.close()


# --- jsonl ------------------------------------------------------------------------------------------------------------


def test_floats_read_back_exactly(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, 0.6931471824645996, -0.0, 1e-5, 123456789012345678]
    written(tmp_path, [record(i, loss=value) for i, value in enumerate(values, 1)])
    found = [line["loss"] for line in lines(tmp_path)]
    assert found == values
    assert [math.copysign(1, value) for value in found] == [math.copysign(1, value) for value in values]


def test_what_json_does_not_have_is_null(tmp_path: Path) -> None:
    written(tmp_path, [record(1, loss=math.nan, norm=math.inf, inside=[-math.inf, {"a": math.nan}])])
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert lines(tmp_path) == [record(1, loss=None, norm=None, inside=[None, {"a": None}])]


def test_every_record_is_on_disk_at_once(tmp_path: Path) -> None:
    tracker = Jsonl()
    tracker.start(tmp_path, 0, {})
    tracker.log(record(1))
    assert lines(tmp_path) == [record(1)]
    tracker.close()


def test_after_a_resume_each_step_is_there_once(tmp_path: Path) -> None:
    written(tmp_path, [*(record(step) for step in range(1, 6)), record(5, "eval"), record(6)])
    written(tmp_path, [record(step, again=True) for step in (4, 5)], step=3)
    assert [(line["step"], "again" in line) for line in lines(tmp_path)] == [
        *((step, False) for step in (1, 2, 3)),
        *((step, True) for step in (4, 5)),
    ]


def test_the_evaluation_of_the_step_resumed_from_stays(tmp_path: Path) -> None:
    written(tmp_path, [record(2), record(2, "eval")])
    written(tmp_path, [record(3)], step=2)
    assert [(line["split"], line["step"]) for line in lines(tmp_path)] == [("train", 2), ("eval", 2), ("train", 3)]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path, cut: int) -> None:
    written(tmp_path, [record(1, loss=0.5), record(2, loss=0.25)])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-cut])
    written(tmp_path, [record(2, loss=0.75)], step=1)
    assert [line["loss"] for line in lines(tmp_path)] == [0.5, 0.75]


def test_a_last_line_without_its_end_does_not_swallow_the_next(tmp_path: Path) -> None:
    written(tmp_path, [record(1), record(2)])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    written(tmp_path, [record(3)], step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("damage", ["\x00\x00\x00\n", "5\n", "[1]\n", "null\n", '"word"\n', '{"step": null}\n', "\n"])
def test_lines_that_are_no_records_are_dropped(tmp_path: Path, damage: str) -> None:
    written(tmp_path, [record(1)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(damage)
    written(tmp_path, [record(2)], step=1)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_bytes_that_are_no_text_are_dropped_with_their_line(tmp_path: Path) -> None:
    written(tmp_path, [record(1)])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 1, "a": "\xff\xfe"}\n')
    written(tmp_path, [record(2)], step=1)
    assert [line["step"] for line in lines(tmp_path)][-1] == 2


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return {
        tag: {event.step: event.value for event in accumulator.Scalars(tag)} for tag in accumulator.Tags()["scalars"]
    }


def board(folder: Path, records: list[dict[str, Any]], step: int = 0) -> None:
    tracker = TensorBoard()
    tracker.start(folder, step, {})
    for one in records:
        tracker.log(one)
    tracker.close()


def test_tensorboard_reads_every_number(tmp_path: Path) -> None:
    board(tmp_path, [record(1, loss=0.5, word="x", nothing=None), record(2, loss=0.25), record(2, "eval", accuracy=1)])
    assert scalars(tmp_path) == {"train/loss": {1: 0.5, 2: 0.25}, "eval/accuracy": {2: 1.0}}


def test_tensorboard_after_a_resume_has_the_new_numbers(tmp_path: Path) -> None:
    board(tmp_path, [record(step, loss=float(step)) for step in range(1, 6)])
    board(tmp_path, [record(step, loss=10.0 * step) for step in range(4, 7)], step=3)
    assert scalars(tmp_path)["train/loss"] == {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0, 5: 50.0, 6: 60.0}


def test_tensorboard_without_a_record_writes_no_file_and_closes(tmp_path: Path) -> None:
    board(tmp_path, [])
    assert list((tmp_path / "tensorboard").iterdir()) == []
    TensorBoard().close()


def test_tensorboard_that_is_not_installed_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.trackers.tensorboard.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        TensorBoard().start(tmp_path, 0, {})


# --- all of them ------------------------------------------------------------------------------------------------------


class Fails:
    """Fails in one of its three methods; counts the calls of the others."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.where:
            raise ConnectionError("no route")

    def start(self, folder: Path, step: int, config: Mapping[str, Any]) -> None:
        self._call("start")

    def log(self, record: Mapping[str, Any]) -> None:
        self._call("log")

    def close(self) -> None:
        self._call("close")


@pytest.mark.parametrize(
    ("where", "calls", "words"),
    [
        ("start", ["start"], "tracker bad failed to start"),
        ("log", ["start", "log"], "tracker bad failed and"),
        ("close", ["start", "log", "log", "close"], "tracker bad failed to close"),
    ],
)
def test_a_tracker_that_fails_says_so_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, where: str, calls: list[str], words: str
) -> None:
    bad, good = Fails(where), Jsonl()
    trackers = Trackers({"bad": bad, "good": good})
    logging.getLogger("runner").propagate = True
    with caplog.at_level(logging.WARNING, "runner"):
        trackers.start(tmp_path, 0, {})
        trackers.log(record(1))
        trackers.log(record(2))
        trackers.close()
    assert bad.calls == calls
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    (message,) = [entry.getMessage() for entry in caplog.records]
    assert message.startswith(words)
    assert message.endswith("ConnectionError: no route")


def test_a_job_goes_on_without_a_tracker_that_does_not_start(job: Job) -> None:
    trackers = {
        "bad": spec("test_trackers.Fails", where="start"),
        "jsonl": spec("runner.trackers.jsonl.Jsonl"),
        "tensorboard": spec("runner.trackers.tensorboard.TensorBoard"),
    }
    result = job(trackers=trackers, train__epochs=1)
    assert result.code == 0
    assert [line["step"] for line in result.train] == list(range(1, 8))
    log = (result.path / "logs" / "main.log").read_text()
    assert log.count("tracker bad failed to start and is left out from here on; the run goes on") == 1
    assert scalars(result.path)["train/loss"] == pytest.approx({i + 1: v for i, v in enumerate(result.losses)})
