"""Streams with a state of their own: it counts between epochs too, goes back with a rollback, and is kept as a copy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import pytest
import torch
from small import Result, Stateful, config, spec

from runner.data.stream import StreamLoader, StreamOrder

Job = Callable[..., Result]

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


class Generated:
    """Draws each pass's order from a generator of its own; at the end of a pass its state is that of the next."""

    def __init__(self, samples: int) -> None:
        self.samples, self.place = samples, 0
        self.order: list[int] = []
        self.generator = torch.Generator().manual_seed(7)

    def __iter__(self) -> Iterator[int]:
        if not self.place:
            self.order = torch.randperm(self.samples, generator=self.generator).tolist()
        while self.place < self.samples:
            self.place += 1
            yield self.order[self.place - 1]
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "order": self.order, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place, self.order = state["place"], state["order"]
        self.generator.set_state(state["generator"])


class Counted:
    """Counts its passes when it is opened; loaded at the end of a pass it gives nothing. Its state is a live one."""

    def __init__(self, samples: int) -> None:
        self.samples, self.goes_on = samples, False
        self.state = {"pass": 0, "place": 0}

    def __iter__(self) -> Iterator[int]:
        if not self.goes_on:
            self.state |= {"pass": self.state["pass"] + 1, "place": 0}
        self.goes_on = False
        while self.state["place"] < self.samples:
            self.state["place"] += 1
            yield (self.state["place"] * 7 + self.state["pass"]) % self.samples

    def state_dict(self) -> dict[str, int]:
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        # The first pass is still to be counted where nothing was read.
        self.state, self.goes_on = state, state["pass"] > 0


class Told(Counted):
    """Is told its pass, keeps it in its state, and stands before the next sample: at the end before the next pass."""

    def set_epoch(self, epoch: int) -> None:
        self.state["pass"] = epoch

    def __iter__(self) -> Iterator[int]:
        for place in range(self.state["place"], self.samples):
            self.state["place"] = (place + 1) % self.samples
            yield (place * 7 + self.state["pass"]) % self.samples

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state = state


class SizedGenerated(Generated):
    def __len__(self) -> int:
        return self.samples


class SizedCounted(Counted):
    def __len__(self) -> int:
        return self.samples


class SizedTold(Told):
    def __len__(self) -> int:
        return self.samples


class SizedStateful(Stateful):
    """The rows of small.Stateful, and it says how many they are."""

    def __len__(self) -> int:
        return 50


class Shuffled(SizedGenerated):
    """50 rows in another order each pass."""

    def __init__(self, samples: int = 50) -> None:
        super().__init__(samples)
        self.data = Stateful().data

    def __iter__(self) -> Iterator[Any]:
        return (self.data[i] for i in super().__iter__())


KINDS = [Generated, Counted, SizedGenerated, SizedCounted, SizedTold]
SIZE, STEPS = 6, 13
#: Two epochs of whole steps; of a short last step; of a rest that is left out.
SHAPES = [(24, False), (27, False), (27, True)]


def loader(kind: Any, samples: int, drop_last: bool, *, size: int = SIZE, **how: Any) -> StreamLoader:
    length = samples if hasattr(kind, "__len__") else None
    return StreamLoader(kind(samples), StreamOrder(size, length, drop_last=drop_last), 2, **how)


def taken(steps: Iterator[Any], most: int = STEPS) -> list[list[int]]:
    """The samples of each step that one reader has."""
    found = []
    for _, step in zip(range(most), steps, strict=False):
        found.append([sample for batch in step.batches[: step.real] for sample in batch.tolist()])
    return found


def flat(steps: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(steps))


def saved(made: StreamLoader, at: int) -> Any:
    """The state after so many steps, as a checkpoint has it."""
    made._trained = lambda: at
    state = made.state_dict()
    own = state["dataset"]
    if own is not None and "generator" in own:
        own = {**own, "generator": own["generator"].clone()}
    return {**json.loads(json.dumps({**state, "dataset": None})), "dataset": own}


def whole(kind: Any, samples: int, drop_last: bool) -> list[list[int]]:
    """In one go, and looked at without the loader: each epoch has all samples, in an order of its own."""
    found = taken(loader(kind, samples, drop_last).steps(0, STEPS))
    epoch = samples // SIZE if drop_last else -(-samples // SIZE)
    passes = [flat(found[first : first + epoch]) for first in (0, epoch)]
    if not drop_last:
        assert [sorted(one) for one in passes] == [list(range(samples))] * 2
    assert passes[0] != passes[1]
    return found


@pytest.mark.parametrize(("samples", "drop_last"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_process_goes_on_as_the_old_one_would_have(kind: Any, samples: int, drop_last: bool) -> None:
    """From every step, those included in which an epoch ends; one process has read no further, several one step."""
    expected = whole(kind, samples, drop_last)
    for stop in range(STEPS):
        states = []
        for ahead in (0, 1):
            first = loader(kind, samples, drop_last, trained=lambda: 0)
            taken(first.steps(0, STEPS), stop + ahead)
            states.append(saved(first, stop))
            again = [loader(kind, samples, drop_last, reader=reader, readers=1 + ahead) for reader in range(1 + ahead)]
            for one in again:
                one.load_state_dict(states[-1])
            parts = [taken(one.steps(stop, STEPS)) for one in again]
            rest = [sorted(flat(step)) for step in zip(*parts, strict=True)]
            assert rest == [sorted(step) for step in expected[stop:]], (stop, ahead)
        assert str(states[0]["dataset"]) == str(states[1]["dataset"])
        assert states[0].get("place") == states[1].get("place")


@pytest.mark.parametrize(("samples", "drop_last"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_process_goes_back(kind: Any, samples: int, drop_last: bool) -> None:
    """To every earlier step, the start included, from the middle of an epoch."""
    expected = whole(kind, samples, drop_last)
    for back_to in range(STEPS - 2):
        made = loader(kind, samples, drop_last, trained=lambda: 0)
        state = saved(made, 0)
        steps = made.steps(0, STEPS)
        taken(steps, back_to)
        if back_to:
            state = saved(made, back_to)
        taken(steps, 2)
        steps.close()  # type: ignore[attr-defined]
        for _ in range(2):
            made.load_state_dict(state)
            assert taken(made.steps(back_to, STEPS)) == expected[back_to:], back_to


@pytest.mark.parametrize("kind", [Generated, SizedCounted])
def test_workers_change_nothing(kind: Any) -> None:
    expected = whole(kind, 24, False)
    for stop in (0, 4, 6):
        made = loader(kind, 24, False, num_workers=2, trained=lambda: 0)
        steps = made.steps(0, STEPS)
        assert taken(steps, stop + 1) == expected[: stop + 1]
        steps.close()  # type: ignore[attr-defined]
        state = saved(made, stop)
        for workers in (0, 2):
            again = loader(kind, 24, False, num_workers=workers)
            again.load_state_dict(state)
            assert taken(again.steps(stop, STEPS), 5) == expected[stop : stop + 5]


def test_a_state_that_lives_on_is_kept_as_it_was() -> None:
    made = loader(Counted, 24, False, trained=lambda: 0)
    taken(made.steps(0, STEPS), 3)
    assert [saved(made, step)["dataset"]["place"] for step in (1, 2, 3)] == [6, 12, 18]
    again = loader(Counted, 24, False, trained=lambda: 0)
    state = saved(made, 2)
    again.load_state_dict(state)
    taken(again.steps(2, STEPS), 2)
    assert state["dataset"]["place"] == 12


@pytest.mark.parametrize("kind", [SizedGenerated, SizedCounted, Counted])
def test_every_evaluation_reads_the_same(kind: Any) -> None:
    """Also after one that was left at its first step, and where the last step is a whole one."""
    made = loader(kind, 24, False, repeat=False)
    first = taken(made.steps(0, 4))
    assert sorted(flat(first)) == list(range(24))
    taken(made.steps(0, 1))
    assert taken(made.steps(0, 4)) == taken(made.steps(0, 4)) == first


@pytest.mark.parametrize("size", [4, 12])
def test_another_global_size_goes_on_where_the_stream_stands(size: int) -> None:
    first = loader(SizedGenerated, 48, False)
    seen = flat(taken(first.steps(0, 2)))
    again = loader(SizedGenerated, 48, False, size=size)
    again.load_state_dict(saved(first, 2))
    rest = flat(taken(again.steps(2, 50), 84 // size))
    assert sorted(seen + rest[:36]) == list(range(48))
    assert sorted(rest[36:]) == list(range(48))


def test_states_of_older_checkpoints_are_taken() -> None:
    """They do not tell the place, and kept no state of the start."""
    for kind, samples, drop_last in [(SizedGenerated, 24, False), (Generated, 27, False), (SizedTold, 27, True)]:
        expected = whole(kind, samples, drop_last)
        for stop in (0, 1, 4, 5):
            made = loader(kind, samples, drop_last, trained=lambda: 0)
            taken(made.steps(0, STEPS), stop)
            state = {key: value for key, value in saved(made, stop).items() if key != "place"}
            again = loader(kind, samples, drop_last)
            again.load_state_dict(state if stop else {**state, "dataset": None})
            assert taken(again.steps(stop, STEPS)) == expected[stop:]


def test_one_that_can_tell_its_state_only_while_it_is_read() -> None:
    class Late(Counted):
        def state_dict(self) -> dict[str, int]:
            if not self.state["place"]:
                raise RuntimeError("not opened yet")
            return self.state

    made = loader(Late, 24, False)
    assert saved(made, 0)["dataset"] is None
    taken(made.steps(0, 2))
    assert saved(made, 2)["dataset"] == {"pass": 1, "place": 12}


# --- in a training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 10])
def test_a_job_that_is_killed_after_an_epoch_goes_on_with_the_next_order(job: Job, size: int) -> None:
    settings = {
        "data__train": spec("test_stream_state.Shuffled"),
        "batch": {"global_size": size, "micro_size": size},
        "checkpoint__every": {"epochs": 1},
        "train__epochs": 3,
    }
    an_epoch = -(-50 // size)
    crash = {**config()["hooks"], "crash": spec("small.Crash", step=an_epoch + 2)}
    expected = job("whole", **settings)
    assert job("cut", **settings, hooks=crash).code == 1
    found = job("cut", **settings)
    assert (expected.code, found.code) == (0, 0)
    assert found.losses == expected.losses
    for name, value in expected.watch.weights.items():
        assert torch.equal(found.watch.weights[name], value), name


@pytest.mark.parametrize(
    ("kind", "bad", "back_to"),
    [
        ("small.Stateful", 3, 0),
        ("test_stream_state.SizedStateful", 8, 5),
        ("test_stream_state.Shuffled", 3, 0),
        ("test_stream_state.Shuffled", 8, 5),
    ],
)
def test_a_rollback_loses_no_sample(job: Job, kind: str, bad: int, back_to: int) -> None:
    """To the start and to the end of an epoch of five whole steps: bit for bit what `skip` gives."""
    settings = {
        "data__train": spec(kind),
        "batch": {"global_size": 10, "micro_size": 10},
        "checkpoint__every": {"steps": 5},
        "train": {"epochs": None, "steps": 12},
        "hooks": {**config()["hooks"], "nan": spec("test_stream_state.bad_at", step=bad)},
    }
    back, skip = (job(policy, **settings, nan=policy) for policy in ("rollback", "skip"))
    assert (back.code, skip.code) == (0, 0)
    (line,) = [json.loads(line) for line in (back.path / "not_finite.jsonl").read_text().splitlines()]
    assert (line["step"], line["back_to"]) == (bad, back_to)
    assert back.losses[bad - 1] is None
    assert back.losses == [*skip.losses[: bad - 1], None, *skip.losses[bad:]]
    for name, value in skip.watch.weights.items():
        assert torch.equal(back.watch.weights[name], value), name


def bad_at(step: int) -> Any:
    from guarantees.test_g10_not_finite import Nan

    return Nan(step)
