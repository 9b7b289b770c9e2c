"""Prepared loaders on one process: passes at the same time, orders that can be had again, and inputs that are split."""

from __future__ import annotations

import collections
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from runner import Engine


@pytest.mark.parametrize("options", [{}, {"seed": 3}])
@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "persistent_workers": True}])
def test_passes_at_the_same_time_have_a_state_each(options: dict[str, Any], workers: dict[str, Any]) -> None:
    engine = Engine(**options)
    loader = engine.prepare(DataLoader(range(10), 3, shuffle=True, **workers))  # type: ignore[arg-type]
    everything = list(range(10))

    def seen(found: Any) -> list[int]:
        return sorted(i for batch in found for i in batch.tolist())

    outer: list[Any] = []
    for batch in loader:
        if not outer or not workers:
            inner = list(loader)
            assert seen(inner) == everything
        outer.append(engine.gather_for_metrics(batch))
    assert seen(outer) == everything
    first, second = zip(*zip(loader, loader, strict=True), strict=True)
    assert seen(first) == seen(second) == everything
    assert [a.tolist() for a in first] != [b.tolist() for b in second]
    one = iter(loader)
    head = [next(one)]
    two = iter(engine.skip_first_batches(loader, 2))
    rest = list(two)
    assert len(rest) == 2
    assert seen([*head, *one]) == everything
    before = loader.epoch
    assert seen(loader) == everything
    assert loader.epoch == before + 1


def orders(loader: Any, count: int) -> list[list[int]]:
    return [[i for batch in loader for i in batch.tolist()] for _ in range(count)]


def test_without_a_seed_one_process_has_the_order_of_a_bare_loader() -> None:
    source: Any = DataLoader(range(20), 3, shuffle=True)  # type: ignore[arg-type]
    torch.manual_seed(4)
    expected = orders(source, 2), torch.rand(1).item()
    torch.manual_seed(4)
    assert (orders(Engine().prepare(source), 2), torch.rand(1).item()) == expected


@pytest.mark.parametrize("kind", ["plain", "seeded", "workers"])
def test_an_interrupted_epoch_goes_on_with_what_was_not_seen(tmp_path: Path, kind: str) -> None:
    def parts() -> Any:
        engine = Engine(seed=2 if kind == "seeded" else None)
        data: Any = range(20)
        return engine, engine.prepare(DataLoader(data, 3, shuffle=True, num_workers=int(kind == "workers")))

    for stop, start in ((2, 1), (7, 2)):  # in the middle of an epoch, and at its last batch
        torch.manual_seed(1)
        engine, loader = parts()
        list(loader)
        whole = []
        for number, batch in enumerate(loader, 1):
            torch.rand(1)
            whole += batch.tolist()
            if number == stop:
                engine.save_state(tmp_path / str(stop))
                done = len(whole)
        expected = whole[done:], orders(loader, 2), torch.rand(1).item()

        again, other = parts()
        torch.manual_seed(77)
        again.load_state(tmp_path / str(stop))
        assert other.epoch == start
        rest = []
        if stop < 7:
            for batch in again.skip_first_batches(other, stop):
                torch.rand(1)
                rest += batch.tolist()
        assert (rest, orders(other, 2), torch.rand(1).item()) == expected


def test_an_order_that_cannot_be_had_again_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weighted = torch.utils.data.WeightedRandomSampler([1.0] * 9, 9)
    for seed, times in ((None, 1), (3, 0)):
        engine = Engine(seed=seed)
        loader = engine.prepare(DataLoader(range(9), 3, sampler=weighted))  # type: ignore[arg-type]
        for _ in loader:
            engine.save_state(tmp_path / str(seed))
            break
        caplog.clear()
        engine.load_state(tmp_path / str(seed))
        assert caplog.text.count("Engine(seed=...)") == times


@pytest.mark.parametrize("padding", [False, True])
def test_what_can_be_split(padding: bool) -> None:
    import numpy

    from runner.api.control import split

    def parts(value: Any) -> list[Any]:
        return [split(value, rank, 2, padding) for rank in range(2)]

    last = [3, 4, 4] if padding else [3, 4]
    assert [list(part) for part in parts(range(5))] == [[0, 1, 2], last]
    arrays = parts(numpy.arange(5)[:, None])
    assert [part[:, 0].tolist() for part in arrays] == [[0, 1, 2], last]
    assert all(isinstance(part, numpy.ndarray) for part in arrays)
    found = parts(collections.OrderedDict(a=[0, 1, 2, 3, 4], b=numpy.arange(5)))
    assert [type(part) for part in found] == [collections.OrderedDict] * 2
    assert [part["a"] for part in found] == [part["b"].tolist() for part in found] == [[0, 1, 2], last]
    assert [len(part) for part in parts(numpy.empty((0, 2)))] == [0, 0]
    frozen = parts(types.MappingProxyType({"a": "abcde"}))
    assert frozen[0]["a"] == "abc"
