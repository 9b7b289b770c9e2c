"""SEMANTICS.md, lines 12 to 19: data."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from api.scripts.data import mlp, points
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from contract.lines import BACKENDS, Together, backends
from contract.numbers import bare_state, state
from contract.training import trained
from runner import Engine
from runner.data.loader import Loader
from runner.data.order import Order
from runner.errors import InputError, RunnerError

pytestmark = pytest.mark.usefixtures("quiet")

two = Together(2)
three = Together(3)


class Numbers(Dataset[int]):
    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self._length:
            raise IndexError(index)
        return index


class Stream(IterableDataset[int]):
    def __init__(self, length: int) -> None:
        self._length = length

    def __iter__(self) -> Iterator[int]:
        yield from range(self._length)


def lists(loader: Any) -> list[list[int]]:
    return [batch.tolist() if isinstance(batch, Tensor) else list(batch) for batch in loader]


def flat(parts: list[Any]) -> list[Any]:
    return [item for part in parts for item in part]


# --- 12: every index once, in the global order ------------------------------------------------------------------------


def indices_of(loaders: list[Loader], epoch: int) -> list[list[int]]:
    """The samples of each step of an epoch that some processes see together, put together by micro-batches in turn."""
    steps = loaders[0].order.steps_per_epoch
    found: list[list[int]] = []
    for together in zip(*(one.steps(epoch * steps, (epoch + 1) * steps) for one in loaders), strict=True):
        own = [[batch.tolist() for batch in step.batches[: step.real]] for step in together]
        assert len({len(step.batches) for step in together}) == 1  # as many forwards everywhere
        turns = max(len(batches) for batches in own)
        found.append([i for turn in range(turns) for batches in own for i in flat(batches[turn : turn + 1])])
    return found


def test_12a_together_they_see_every_index_once_in_the_global_order() -> None:
    draw = random.Random(0)
    for length, readers, workers in product((1, 7, 24, 53), (1, 2, 3), (0, 2)):
        if workers and length != 53:
            continue
        micro = draw.choice([1, 2, 4])
        size = micro * readers * draw.choice([1, 2])
        order = Order(length, size, seed=3)
        loaders = [
            Loader(Numbers(length), Order(length, size, seed=3), micro, num_workers=workers, reader=r, readers=readers)
            for r in range(readers)
        ]
        for epoch in (0, 1):
            steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
            found = indices_of(loaders, epoch)
            case = (length, readers, workers, micro, size)
            assert found == [order.indices(step).tolist() for step in steps], case
            assert sorted(flat(found)) == list(range(length)), case


def test_12b_the_global_order_depends_on_seed_data_and_global_size_alone() -> None:
    def order(readers: int, micro: int) -> list[list[int]]:
        made = [Loader(Numbers(50), Order(50, 12, seed=3), micro, reader=r, readers=readers) for r in range(readers)]
        return indices_of(made, 1)

    expected = order(1, 12)
    assert all(order(readers, micro) == expected for readers, micro in ((1, 3), (2, 6), (2, 2), (3, 4), (3, 1)))


def epochs_of_an_engine(workers: int) -> list[Any]:
    """The batches of this process in two epochs of a shuffled loader, by length and batch size."""
    found = []
    for length, size in ((1, 1), (7, 2), (12, 2), (13, 3)) if not workers else ((13, 3),):
        engine = Engine(seed=5, even_batches=False)
        loader = engine.prepare(DataLoader(Numbers(length), size, shuffle=True, num_workers=workers))
        found.append((length, size, [lists(loader), lists(loader)]))
    return found


@two.each("none", "workers")
@three.each("none", "workers")
def epochs_of_engines(kind: str) -> list[Any]:
    return epochs_of_an_engine(2 if kind == "workers" else 0)


@pytest.mark.parametrize("workers", ["none", "workers"])
@pytest.mark.parametrize("together", [two, three], ids=["two", "three"])
def test_12c_so_do_loaders_of_own_loops(together: Together, workers: str) -> None:
    ranks = together(epochs_of_engines, workers)
    for cases in zip(*ranks, strict=True):
        length, size, _ = cases[0]
        for epoch in (0, 1):
            loader = Engine(seed=5).prepare(DataLoader(Numbers(length), size, shuffle=True))
            loader.set_epoch(epoch)
            rounds = [batches[epoch] for _, _, batches in cases]
            turns = max(map(len, rounds))
            dealt = [batch for turn in range(turns) for batches in rounds for batch in batches[turn : turn + 1]]
            assert dealt == lists(loader)
            assert sorted(flat(dealt)) == list(range(length))


def test_12d_one_process_sees_what_the_users_loader_gives() -> None:
    for length, size, drop in product((1, 7, 8), (2, 3), (False, True)):
        source = DataLoader(Numbers(length), size, drop_last=drop)
        for option in ({}, {"split_batches": True}, {"dispatch_batches": True}, {"even_batches": False}):
            options: Any = option
            assert lists(Engine(**options).prepare(source)) == lists(source)


# --- 13: what a loader keeps, and the modes ---------------------------------------------------------------------------


class Odd(BatchSampler):
    """A batch sampler of a class of its own, which counts how often it was asked."""

    asked = 0

    def __iter__(self) -> Iterator[list[int]]:
        Odd.asked += 1
        yield from super().__iter__()


def joined(items: list[int]) -> tuple[int, ...]:
    return tuple(items)


def begin(worker: int) -> None:
    torch.utils.data.get_worker_info().dataset.worker = worker  # type: ignore[union-attr]


@two.add
def what_is_kept() -> list[Any]:
    engine = Engine()
    rank = engine.process_index
    # Every property of the user's loader.
    generator = torch.Generator().manual_seed(4)
    source = DataLoader(
        Numbers(23),
        batch_size=3,
        shuffle=True,
        num_workers=1,
        collate_fn=joined,
        pin_memory=False,
        drop_last=True,
        timeout=30,
        worker_init_fn=begin,
        prefetch_factor=3,
        persistent_workers=True,
        generator=generator,
    )
    loader = engine.prepare(source)
    assert isinstance(loader, DataLoader)
    names = ("dataset", "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "prefetch_factor")
    for name in (*names, "persistent_workers", "drop_last", "generator", "batch_size", "multiprocessing_context"):
        assert getattr(loader, name) == getattr(source, name), name
    found: list[Any] = []
    for _ in range(2):
        own = list(loader)
        assert all(type(batch) is tuple and len(batch) == 3 for batch in own)
        assert len(own) == len(loader) == 3  # 7 whole batches: 3 rounds of 2
        found.append(own)
    everyone = engine.gather_object([found])
    for epoch in (0, 1):
        seen = flat(flat([ranks[epoch] for ranks in everyone]))
        assert len(set(seen)) == 18, "the processes agree on the user's generator, and share its order out"
    assert found[0] != found[1]
    # Pinning is kept where there is a device to pin for.
    assert engine.prepare(DataLoader(Numbers(4), pin_memory=True)).pin_memory
    # A batch sampler of one's own class.
    batches = Odd(SequentialSampler(Numbers(10)), 2, drop_last=False)
    kept = engine.prepare(DataLoader(Numbers(10), batch_sampler=batches))
    assert lists(kept) == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [0, 1]]][rank]
    assert Odd.asked == 1
    # Samplers of one's own: drawn alike on all, then shared out.
    torch.manual_seed(rank)
    for sampler in (WeightedRandomSampler([1.0] * 12, 12), RandomSampler(Numbers(12), replacement=True)):
        drawn = flat(lists(engine.prepare(DataLoader(Numbers(12), 2, sampler=sampler))))
        assert len(drawn) == 6
    chosen = engine.prepare(DataLoader(Numbers(12), 2, sampler=[11, 3, 5, 7]))
    assert lists(chosen) == [[[11, 3]], [[5, 7]]][rank]
    # No batches at all.
    single = engine.prepare(DataLoader(Numbers(4), batch_size=None))
    assert list(single) == [[0, 2], [1, 3]][rank]
    return found


def test_13a_a_prepared_loader_keeps_what_the_users_has() -> None:
    first, second = two(what_is_kept)
    generator = torch.Generator().manual_seed(4)
    source = DataLoader(Numbers(23), 3, shuffle=True, drop_last=True, collate_fn=joined, generator=generator)
    assert [batch for pair in zip(first[0], second[0], strict=True) for batch in pair] == list(source)[:6]


@two.add
def modes() -> None:
    rank = Engine().process_index
    source = DataLoader(Numbers(10), batch_size=4)  # [0 1 2 3] [4 5 6 7] [8 9]

    def found(**options: Any) -> list[list[int]]:
        loader = Engine(**options).prepare(source)
        batches = lists(loader)
        assert len(loader) == len(batches), options
        return batches

    assert found() == [[[0, 1, 2, 3], [8, 9, 0, 1]], [[4, 5, 6, 7], [2, 3, 4, 5]]][rank]
    assert found(even_batches=False) == [[[0, 1, 2, 3], [8, 9]], [[4, 5, 6, 7]]][rank]
    split: Any = {"split_batches": True}
    assert found(**split) == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [0, 1]]][rank]
    assert found(**split, even_batches=False) == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7]]][rank]
    sent: Any = {"dispatch_batches": True}
    kinds: list[Any] = [{}, split, sent]
    assert found(**sent) == [[[0, 1, 2, 3], [8, 9]], [[4, 5, 6, 7], [0, 1, 2, 3]]][rank]
    assert found(**sent, even_batches=False) == [[[0, 1, 2, 3], [8, 9]], [[4, 5, 6, 7]]][rank]
    assert found(**sent, **split) == [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [9]]][rank]
    for options in kinds:
        engine = Engine(**options)
        assert engine.prepare(source).total_batch_size == (4 if options == split else 8)
    short = DataLoader(Numbers(10), batch_size=4, drop_last=True)
    assert lists(Engine().prepare(short)) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]][rank]
    with pytest.raises(InputError, match=r"3 % 2 = 1"):
        Engine(split_batches=True).prepare(DataLoader(Numbers(10), batch_size=3))


def test_13b_modes_of_sharing() -> None:
    two(modes)


# --- 14: uneven loaders -----------------------------------------------------------------------------------------------


UNEVEN = ("ddp", "fsdp", "fsdp_keep", "hsdp", "zero0", "zero1", "zero2", "zero3")


class Ragged(IterableDataset[Any]):
    """Points of which a loader knows no number."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __iter__(self) -> Iterator[Any]:
        for index in range(self._count):
            yield points(self._count)[index]


def uneven_training(backend: Any, dataset: Any, accumulation: int, **options: Any) -> dict[str, Any]:
    """Two epochs of batches of 4 where processes have different numbers of them."""
    engine = Engine(backend=backend, even_batches=False, accumulation_steps=accumulation, **options)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model, optimizer, loader = engine.prepare(model, optimizer, DataLoader(dataset, batch_size=4))
    for _ in range(2):
        for inputs, targets in loader:
            with engine.accumulate(model):
                engine.backward(cross_entropy(model(inputs), targets))
                engine.clip_grad_norm_(model.parameters(), 100.0)
                optimizer.step()
                optimizer.zero_grad()
    return {"steps": optimizer.taken, "weights": state(engine, model)}


def uneven_bare(count: int, accumulation: int, processes: int = 2) -> dict[str, Any]:
    """Every batch that is there weighs the same in its step."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    inputs, targets = points(count).tensors
    batches = [slice(start, min(count, start + 4)) for start in range(0, count, 4)]
    together = processes * accumulation
    for _ in range(2):
        for first in range(0, len(batches), together):
            losses = [cross_entropy(model(inputs[b]), targets[b]) for b in batches[first : first + together]]
            torch.stack(losses).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"steps": 2 * -(-len(batches) // together), "weights": bare_state(model)}


#: (points, accumulation): 3 batches, then 5, the last one short; process 1 has one less.
RAGGED = [(12, 1), (18, 1), (18, 2), (18, 4), (4, 1)]


@two.each(*UNEVEN)
def uneven(name: str) -> list[Any]:
    found = []
    for count, k in RAGGED:
        kinds: list[tuple[Any, dict[str, Any]]] = [
            (points(count), {}),
            (Ragged(count), {"dispatch_batches": True}),
            (Ragged(count), {"dispatch_batches": False}),
        ]
        found.append([uneven_training(BACKENDS[name], data, k, **options) for data, options in kinds])
    return found


@backends(*UNEVEN)
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["indexed", "dispatched", "shared"])
def test_14a_training_over_uneven_loaders(backend: str, kind: int) -> None:
    for found in two(uneven, backend):
        for case, results in zip(RAGGED, found, strict=True):
            expected = uneven_bare(*case)
            assert results[kind]["steps"] == expected["steps"], case
            assert results[kind]["weights"] == pytest.approx(expected["weights"], abs=1e-6), case


@two.each("ddp", "fsdp")
def joined_uneven(name: str) -> tuple[int, int, list[float]]:
    """As a context around a loop, on an engine that is even otherwise."""
    engine = Engine(backend=BACKENDS[name])
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    model, optimizer, loader = engine.prepare(model, optimizer, DataLoader(points(12), batch_size=4))
    seen = 0
    with engine.join_uneven_inputs([model]):
        for _ in range(2):
            for inputs, targets in loader:
                seen += 1
                engine.backward(cross_entropy(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()
    assert engine.even_batches
    return optimizer.taken, seen, state(engine, model)


@backends("ddp", "fsdp")
def test_14b_join_uneven_inputs(backend: str) -> None:
    for taken, _, weights in two(joined_uneven, backend):
        expected = uneven_bare(12, 1)
        assert taken == expected["steps"]
        assert weights == pytest.approx(expected["weights"], abs=1e-6)


CASES: list[Any] = list(product((1, 4, 7, 8, 9, 13), (2, 4), *[(False, True)] * 4))


@two.add
def lengths() -> list[tuple[int, list[list[int]]]]:
    """`len` before a pass and what the pass gives, for each case."""
    found = []
    for count, size, drop, split, dispatch, even in CASES:
        engine = Engine(even_batches=even, split_batches=split, dispatch_batches=dispatch)
        loader = engine.prepare(DataLoader(Numbers(count), size, drop_last=drop))
        found.append((len(loader), lists(loader)))
    return found


def test_14c_len_is_the_true_number_of_batches() -> None:
    for case, (a, first), (b, second) in zip(CASES, *two(lengths), strict=True):
        count, _, drop, _, _, even = case
        assert (a, b) == (len(first), len(second)), case
        if even:
            assert a == b, case
        seen = flat(first + second)
        if not even:
            assert len(set(seen)) == len(seen), case
        if not drop:
            assert set(seen) == set(range(count)), case


def test_14d_the_runners_ragged_ends() -> None:
    """The last step of an epoch has a sample for one process only: covered for all backends by line 3."""
    found = trained("single", 3, {"steps": 9})
    assert found["samples"] == 100 + 96


# --- 15: iterable data sets -------------------------------------------------------------------------------------------


@two.each("none", "workers")
def streams(kind: str) -> None:
    engine = Engine()
    workers = 1 if kind == "workers" else 0
    for count, dispatch in product((0, 1, 3, 8, 11) if not workers else (11,), (True, False)):
        for drop in (False, True):
            source = DataLoader(Stream(count), batch_size=2, num_workers=workers, drop_last=drop)
            loose = lists(Engine(dispatch_batches=dispatch, even_batches=False).prepare(source))
            seen = flat(flat(engine.gather_object([loose])))
            assert len(set(seen)) == len(seen), "no element twice"
            if not drop:
                assert sorted(seen) == list(range(count)), "none lost"
            even = lists(Engine(dispatch_batches=dispatch).prepare(source))
            numbers = engine.gather_object([len(even)])
            assert numbers[0] == numbers[1], "equal numbers"
            if not drop:
                assert set(flat(flat(engine.gather_object([even])))) == set(range(count))


@pytest.mark.parametrize("kind", ["none", "workers"])
def test_15a_streams_lose_nothing_and_double_nothing(kind: str) -> None:
    two(streams, kind)


@two.add
def sharded_streams() -> list[list[str]]:
    datasets = pytest.importorskip("datasets")

    def rows(shards: list[str]) -> Iterator[Any]:
        for shard in shards:
            yield from ({"name": f"{shard}{i}"} for i in range(4))

    found = []
    for shards in (["a", "b"], ["a", "b", "c", "d"]):
        stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": shards})
        loader = Engine().prepare(DataLoader(stream, batch_size=2))
        found.append([name for batch in loader for name in batch["name"]])
    return found


def test_15b_data_sets_that_shard_themselves_keep_doing_so() -> None:
    pytest.importorskip("datasets")
    first, second = two(sharded_streams)
    assert first[0] == [f"a{i}" for i in range(4)]
    assert second[0] == [f"b{i}" for i in range(4)]
    assert sorted(first[1] + second[1]) == [f"{shard}{i}" for shard in "abcd" for i in range(4)]


class Batch(NamedTuple):
    ids: Tensor
    names: list[str]
    rest: Any


@dataclass
class Tagged:
    mask: Tensor
    tag: str | None


class Texts(IterableDataset[Any]):
    def __init__(self, bad: int | None = None) -> None:
        self._bad = bad

    def __iter__(self) -> Iterator[Any]:
        for index in range(9):
            if index == self._bad:
                raise ValueError(f"text {index} cannot be read")
            yield torch.full((index % 4 + 1,), index), f"text {index}"


def padded(items: list[Any]) -> Batch:
    ids = nn.utils.rnn.pad_sequence([ids for ids, _ in items], batch_first=True, padding_value=-1)
    names = [name for _, name in items]
    return Batch(ids, names, {"tagged": Tagged(ids >= 0, names[0]), "none": None, "pair": (1.5, {"x": ids.float()})})


@two.each("whole", "split")
def nested_dispatch(kind: str) -> list[str]:
    engine = Engine(dispatch_batches=True, split_batches=kind == "split")
    loader = engine.prepare(DataLoader(Texts(), batch_size=2, collate_fn=padded))
    names, numbers = [], []
    for batch in loader:
        assert type(batch) is Batch
        assert type(batch.rest["tagged"]) is Tagged
        assert type(batch.rest["pair"]) is tuple
        assert batch.rest["none"] is None
        assert batch.rest["pair"][0] == 1.5
        assert torch.equal(batch.rest["pair"][1]["x"], batch.ids.float())
        assert torch.equal(batch.rest["tagged"].mask, batch.ids >= 0)
        assert [f"text {int(row[0])}" for row in batch.ids] == batch.names
        names += engine.gather_for_metrics(batch.names)
        numbers += engine.gather_for_metrics(batch.ids[:, 0]).tolist()
    assert numbers == list(range(9))
    broken = engine.prepare(DataLoader(Texts(5), batch_size=2, collate_fn=padded))
    with pytest.raises((ValueError, RunnerError), match="text 5 cannot be read"):
        list(broken)
    return names


@pytest.mark.parametrize("kind", ["whole", "split"])
def test_15c_dispatch_of_dynamic_padding_nested_structures_and_other_fields(kind: str) -> None:
    for names in two(nested_dispatch, kind):
        assert names == [f"text {i}" for i in range(9)]


# --- 16: gather_for_metrics -------------------------------------------------------------------------------------------


def evaluation(engine: Engine, count: int, skip: int, workers: int, **options: Any) -> None:
    """An evaluation of `count` samples in batches of 3, without its first `skip` rounds."""
    source = DataLoader(TensorDataset(torch.arange(count)), batch_size=3, num_workers=workers)
    loader = Engine(**options) if options else engine
    prepared = loader.prepare(source)
    if skip:
        prepared = loader.skip_first_batches(prepared, skip)
    tensors: list[int] = []
    nested: list[int] = []
    objects: list[Any] = []
    for (x,) in prepared:
        tensors += loader.gather_for_metrics(x).tolist()
        found = loader.gather_for_metrics({"a": (x * 2, [x.float()[:, None].expand(-1, 2)])})
        nested += found["a"][0].tolist()
        assert found["a"][1][0].shape == (len(found["a"][0]), 2)
        objects += loader.gather_for_metrics([{"text": str(i)} for i in x.tolist()], use_gather_object=True)
    per_round = 3 if options.get("split_batches") else 3 * engine.num_processes
    expected = list(range(min(count, skip * per_round), count))
    case = (count, skip, workers, options)
    assert tensors == expected, (case, tensors)
    assert nested == [2 * i for i in expected], case
    assert [one["text"] for one in objects] == [str(i) for i in expected], case


@two.add
@three.add
def evaluations() -> None:
    engine = Engine()
    # Below one batch, below one round, at and off the multiples of both.
    for count in (1, 2, 3, 4, 5, 6, 9, 12, 13, 17, 18, 19):
        for skip in (0, 1):
            evaluation(engine, count, skip, 0)
            evaluation(engine, count, skip, 0, even_batches=True, dispatch_batches=True)
    if engine.num_processes == 3:
        for count in (1, 2, 3, 7, 8):
            evaluation(engine, count, 0, 0, split_batches=True)
    for skip in (0, 1):
        evaluation(engine, 13, skip, 1)


@pytest.mark.parametrize("together", [two, three], ids=["two", "three"])
def test_16_gather_for_metrics_returns_exactly_the_samples(together: Together) -> None:
    together(evaluations)


@two.add
def streamed_evaluations() -> None:
    for count, dispatch in product((1, 3, 5, 6, 7, 11, 12), (True, False)):
        engine = Engine(dispatch_batches=dispatch)
        found: list[int] = []
        for batch in engine.prepare(DataLoader(Stream(count), batch_size=3)):
            found += engine.gather_for_metrics(batch).tolist()
        assert found == list(range(count)), (count, dispatch)


def test_16b_also_over_streams() -> None:
    two(streamed_evaluations)


# --- 17: skip_first_batches -------------------------------------------------------------------------------------------


@two.add
def skipping() -> None:
    engine = Engine(seed=3)
    source: Any = DataLoader(
        Numbers(30), 3, shuffle=True, collate_fn=joined, num_workers=1, timeout=30, worker_init_fn=begin, drop_last=True
    )
    loader = engine.prepare(source)
    first, second = list(loader), list(loader)
    assert first != second
    loader.set_epoch(0)
    rest: Any = engine.skip_first_batches(loader, 2)
    assert issubclass(type(rest), DataLoader)
    names = ("dataset", "num_workers", "collate_fn", "timeout", "worker_init_fn", "drop_last", "batch_size")
    for name in (*names, "prefetch_factor", "persistent_workers", "pin_memory", "total_batch_size"):
        assert getattr(rest, name) == getattr(loader, name), name
    assert len(rest) == 3
    assert list(rest) == first[2:]
    assert len(rest) == 5
    assert loader.epoch == rest.epoch == 1
    assert list(loader) == second  # the next epoch, whole
    loader.set_epoch(0)
    assert list(rest) == first, "skips once"
    # A custom batch sampler, a stream, a loader that was dispatched, one of the user's own.
    batches = Odd(SequentialSampler(Numbers(20)), 2, drop_last=False)
    kept = engine.prepare(DataLoader(Numbers(20), batch_sampler=batches))
    own = lists(kept)
    again = engine.skip_first_batches(kept, 3)
    assert lists(again) == own[3:]
    for dispatch in (True, False):
        stream = Engine(dispatch_batches=dispatch).prepare(DataLoader(Stream(20), 2))
        whole = lists(stream)
        assert lists(engine.skip_first_batches(stream, 2)) == whole[2:]
        assert lists(stream) == whole
    plain = DataLoader(Numbers(7), 2, collate_fn=joined)
    left = engine.skip_first_batches(plain, 1)
    assert left.collate_fn is joined
    assert list(left) == [(2, 3), (4, 5), (6,)]
    assert list(left) == list(plain) == [(0, 1), (2, 3), (4, 5), (6,)]
    assert list(engine.skip_first_batches(loader, 50)) == []


def test_17_skipping_keeps_everything_skips_once_and_leaves_epochs_alone() -> None:
    two(skipping)


# --- 18: order is a function of (seed, epoch) -------------------------------------------------------------------------


@two.add
def orders() -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for seed in (1, 2):
        engine = Engine(seed=seed, split_batches=True)
        torch.manual_seed(17 * seed + engine.process_index)  # the order asks no generator
        loader = engine.prepare(DataLoader(Numbers(24), 4, shuffle=True))
        for epoch in (0, 1, 2):
            found[seed, epoch] = lists(loader)
        loader.set_epoch(1)
        found[seed, "again"] = lists(loader)
    return found


def test_18_order_is_a_function_of_seed_and_epoch() -> None:
    """Saving in one process and going on in another: with checkpoints of the whole run."""
    first, second = two(orders)
    alone = {}
    for seed in (1, 2):
        loader = Engine(seed=seed).prepare(DataLoader(Numbers(24), 4, shuffle=True))
        for epoch in (2, 0, 1):
            loader.set_epoch(epoch)
            alone[seed, epoch] = lists(loader)
    for seed in (1, 2):
        assert first[seed, "again"] == first[seed, 1]
        for epoch in (0, 1, 2):
            whole = [a + b for a, b in zip(first[seed, epoch], second[seed, epoch], strict=True)]
            assert whole == alone[seed, epoch]
    assert len({str(order) for order in alone.values()}) == 6


# --- 19: workers, prefetching and pinning -----------------------------------------------------------------------------


class Noisy(Dataset[Any]):
    """Points that carry what a dropout of the model draws along."""

    def __len__(self) -> int:
        return 44

    def __getitem__(self, index: int) -> Any:
        return points(44)[index]


@two.add
def by_workers() -> list[list[float]]:
    found = []
    for options in ({}, {"num_workers": 1}, {"num_workers": 2, "prefetch_factor": 4}, {"pin_memory": True}):
        engine = Engine(seed=2)
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.Linear(16, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        loader = DataLoader(Noisy(), 4, shuffle=True, **options)  # type: ignore[arg-type]
        model, optimizer, loader = engine.prepare(model, optimizer, loader)
        for _ in range(2):
            for inputs, targets in loader:
                engine.backward(cross_entropy(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()
        found.append(state(engine, model))
    return found


def test_19a_workers_prefetching_and_pinning_change_nothing() -> None:
    for found in two(by_workers):
        assert all(weights == found[0] for weights in found)


@two.each("ddp", "fsdp")
def runner_by_workers(name: str) -> list[list[float]]:
    return [trained(name, 2, {"steps": 6, "data__num_workers": workers})["losses"] for workers in (0, 1, 2)]


@backends("ddp", "fsdp")
def test_19b_nor_in_the_runners_loop(backend: str) -> None:
    for found in two(runner_by_workers, backend):
        assert found[1] == found[2] == found[0]
