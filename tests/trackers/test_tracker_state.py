"""The state of trackers in checkpoints: it outlives one that fails, and never ends a training."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from small import Result, config, spec

from runner.trackers import Trackers

Job = Callable[..., Result]


class Service:
    """Knows its run by a name; `fails` says where it does, and `given` what it was told to go on with."""

    fails = ""
    given: Any = None

    def __init__(self) -> None:
        self._call("init")
        Service.given = None

    def _call(self, name: str) -> None:
        if name in self.fails.split():
            raise ConnectionError("no route")

    def start(self, folder: Path, step: int, config: Mapping[str, Any]) -> None:
        self._call("start")
        self.run = {"id": (Service.given or {"id": f"from {step}"})["id"], "records": 0}

    def log(self, record: Mapping[str, Any]) -> None:
        self._call("log")
        self.run["records"] += 1

    def close(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        self._call("state_dict")
        return {**self.run, "key": b""} if self.fails == "bytes" else self.run

    def load_state_dict(self, state: dict[str, Any]) -> None:
        Service.given = state
        self._call("load_state_dict")


@pytest.fixture(autouse=True)
def _works() -> Iterator[None]:
    Service.fails, Service.given = "", None
    yield
    Service.fails, Service.given = "", None


def saved(result: Result) -> Any:
    path = sorted((result.path / "checkpoints").glob("step_*"))[-1]
    return json.loads((path / "state.json").read_text())["state"]["trackers.service"]


def going(job: Job, fails: str, stop: int | None, **changes: Any) -> Result:
    """The run up to a step, or to its end, with a service that fails somewhere."""
    Service.fails = fails
    end = {} if stop is None else {"stop": spec("small.Interrupt", step=stop)}
    trackers = {**config()["trackers"], "service": spec("test_tracker_state.Service")}
    return job(trackers=trackers, hooks={**config()["hooks"], **end}, checkpoint__every={"steps": 2}, **changes)


def said(result: Result) -> list[str]:
    lines = (result.path / "logs" / "main.log").read_text().splitlines()
    return [line for line in lines if "tracker service failed" in line and "is left out from here on" in line]


@pytest.mark.parametrize("fails", ["start", "init", "state_dict", "bytes", "load_state_dict"])
def test_a_run_goes_on_without_a_tracker_and_keeps_what_is_known_of_it(job: Job, fails: str) -> None:
    """Known in the first process, failing in the second, there again in the third."""
    assert going(job, "", 3).code == 75
    result = going(job, fails, 7)
    assert result.code == 75
    kept = saved(result)
    assert kept["id"] == "from 0"
    # What could not be built was told before the run's log was there.
    assert len(said(result)) == (0 if fails == "init" else 1)
    assert [line["step"] for line in result.train] == list(range(1, 8))
    last = going(job, "", None)
    assert last.code == 0
    assert Service.given["id"] == "from 0"
    assert saved(last)["records"] > kept["records"]


@pytest.mark.parametrize("fails", ["start", "init", "bytes"])
def test_of_one_that_never_was_there_nothing_is_known(job: Job, fails: str) -> None:
    first = going(job, fails, 3)
    assert first.code == 75
    assert saved(first) is None
    last = going(job, "", None)
    assert last.code == 0
    assert Service.given is None
    assert saved(last)["id"] == "from 3"


def test_after_a_rollback_it_has_the_state_of_the_checkpoint(job: Job) -> None:
    hooks = {**config()["hooks"], "nan": spec("test_tracker_state.bad_at", step=4)}
    Service.fails = "log"
    trackers = {**config()["trackers"], "service": spec("test_tracker_state.Service")}
    assert job(trackers=trackers, hooks=hooks, checkpoint__every={"steps": 3}, nan="rollback").code == 0
    Service.fails = ""
    assert job("other", trackers=trackers, hooks=hooks, checkpoint__every={"steps": 3}, nan="rollback").code == 0
    assert Service.given == {"id": "from 0", "records": 3}


def test_what_a_failing_tracker_told_before_is_kept_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("runner").propagate = True
    service = Service()
    trackers = Trackers({"service": service}, ["absent"])
    parts = trackers.stateful
    assert list(parts) == ["service", "absent"]
    trackers.start(Path(), 0, {})
    assert parts["service"].state_dict() == {"id": "from 0", "records": 0}
    trackers.log({"step": 1})
    Service.fails = "log"
    with caplog.at_level(logging.WARNING, "runner"):
        trackers.log({"step": 2})
        assert parts["service"].state_dict() == {"id": "from 0", "records": 0}
    (message,) = [entry.getMessage() for entry in caplog.records]
    assert message.endswith("ConnectionError: no route")
    parts["absent"].load_state_dict({"id": "before"})
    assert parts["absent"].state_dict() == {"id": "before"}
    assert Trackers({"plain": object()}).stateful == {}  # type: ignore[dict-item]


def bad_at(step: int) -> Any:
    from guarantees.test_g10_not_finite import Nan

    return Nan(step)
