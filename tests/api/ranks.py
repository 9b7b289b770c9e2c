"""What the tests of this folder do in each of two processes: one start, many assertions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset

from api.scripts.data import mlp, points, weights
from runner import Engine
from runner.errors import InputError, RunnerError

# --- loaders ----------------------------------------------------------------------------------------------------------


class Numbers(IterableDataset[int]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        yield from range(self.count)


def batches(loader: Any) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def flat(lists: list[Any]) -> list[Any]:
    return [item for part in lists for item in part]


def prepared(source: DataLoader[Any], **options: Any) -> Any:
    return Engine(**options).prepare(source)


def check_lengths_and_indices() -> None:
    """Every sample once, in the global order; `len` is what comes."""
    rank = Engine().process_index
    for count in (1, 2, 3, 7, 8, 12, 13):
        for size in (1, 2, 3):
            for drop in (False, True):
                source = DataLoader(range(count), batch_size=size, drop_last=drop)  # type: ignore[arg-type]
                wanted = batches(source)
                uneven = prepared(source, even_batches=False)
                found = batches(uneven)
                assert len(found) == len(uneven), (count, size, drop)
                rounds = len(wanted) - (len(wanted) % 2 if drop else 0)
                assert found == wanted[:rounds][rank::2], (count, size, drop, found, wanted)
                even = prepared(source)
                again = batches(even)
                assert len(again) == len(even)
                everyone = Engine().gather_object([again])
                assert len(everyone[0]) == len(everyone[1])
                if not drop:
                    assert all(len(batch) == size for batch in again)
                    order = [i for pair in zip(*everyone, strict=True) for batch in pair for i in batch]
                    assert order[:count] == list(range(count))


def check_modes() -> None:
    engine = Engine()
    rank = engine.process_index
    source: Any = DataLoader(range(10), batch_size=4)  # type: ignore[arg-type]
    split = prepared(source, split_batches=True)
    assert batches(split) == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [0, 1]]][rank]
    assert split.total_batch_size == 4
    assert (
        batches(prepared(source, split_batches=True, even_batches=False))
        == [
            [[0, 1], [4, 5], [8, 9]],
            [[2, 3], [6, 7]],
        ][rank]
    )
    assert len(prepared(source, split_batches=True, even_batches=False)) == 3 - rank
    with pytest.raises(InputError, match=r"3 % 2 = 1"):
        prepared(DataLoader(range(10), batch_size=3), split_batches=True)  # type: ignore[arg-type]
    sent = prepared(source, dispatch_batches=True)
    assert batches(sent) == [[[0, 1, 2, 3], [8, 9]], [[4, 5, 6, 7], [0, 1, 2, 3]]][rank]
    assert len(sent) == 2
    assert (
        batches(prepared(source, dispatch_batches=True, even_batches=False))
        == [
            [[0, 1, 2, 3], [8, 9]],
            [[4, 5, 6, 7]],
        ][rank]
    )
    assert batches(prepared(source, dispatch_batches=True, split_batches=True))[-1] == [[8], [9]][rank]


def check_streams() -> None:
    engine = Engine()
    rank = engine.process_index
    for count in (1, 3, 8, 11):
        for dispatch in (True, False):
            for workers in (0, 1):
                if workers and count != 11:
                    continue
                source = DataLoader(Numbers(count), batch_size=2, num_workers=workers)
                loose = batches(prepared(source, dispatch_batches=dispatch, even_batches=False))
                everything = [i for part in engine.gather_object([loose]) for batch in part for i in batch]
                assert sorted(everything) == list(range(count)), (count, dispatch, workers)
                even = batches(prepared(source, dispatch_batches=dispatch))
                lengths = engine.gather_object([len(even)])
                assert lengths[0] == lengths[1]
                seen = {i for part in engine.gather_object([even]) for batch in part for i in batch}
                assert seen == set(range(count))
    assert (
        batches(prepared(DataLoader(Numbers(8), batch_size=4), split_batches=True, dispatch_batches=False))
        == [
            [[0, 1], [4, 5]],
            [[2, 3], [6, 7]],
        ][rank]
    )


def check_streams_that_shard_themselves() -> None:
    datasets = pytest.importorskip("datasets")

    def rows(shards: list[str]) -> Iterator[Any]:
        for shard in shards:
            yield from ({"name": f"{shard}{i}"} for i in range(3 if shard == "a" else 2))

    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": ["a", "b"]})
    engine = Engine()
    own = [name for batch in engine.prepare(DataLoader(stream, batch_size=2)) for name in batch["name"]]
    expected = [["a0", "a1", "a2"], ["b0", "b1"]][engine.process_index]
    assert own[: len(expected)] == expected
    names = []
    for batch in engine.prepare(DataLoader(stream, batch_size=2)):
        names += engine.gather_for_metrics(batch["name"], use_gather_object=True)
    assert sorted(names) == ["a0", "a1", "a2", "b0", "b1"]


class Named(Dataset[Any]):
    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Any:
        return torch.full((index % 3 + 1,), index), f"text {index}"


class Batch(NamedTuple):
    ids: Tensor
    names: list[str]
    rest: Any


@dataclass
class Tagged:
    ids: Tensor
    tag: str


def collate(items: list[Any]) -> Batch:
    ids = nn.utils.rnn.pad_sequence([ids for ids, _ in items], batch_first=True)
    return Batch(ids, [name for _, name in items], {"tagged": Tagged(ids.clone(), items[0][1]), "none": None})


def check_dispatch_of_nested_batches() -> None:
    engine = Engine(dispatch_batches=True)
    loader = engine.prepare(DataLoader(Named(), batch_size=2, collate_fn=collate))
    names, numbers = [], []
    for batch in loader:
        assert type(batch) is Batch
        assert type(batch.rest["tagged"]) is Tagged
        assert batch.rest["none"] is None
        assert len(batch.names) == len(batch.ids)
        names += engine.gather_for_metrics(batch.names)
        numbers += engine.gather_for_metrics(batch.ids[:, 0]).tolist()
    assert names == [f"text {i}" for i in range(9)]
    assert numbers == list(range(9))

    class Broken(Named):
        def __getitem__(self, index: int) -> Any:
            if index == 5:
                raise ValueError("no such text")
            return super().__getitem__(index)

    broken = engine.prepare(DataLoader(Broken(), batch_size=1, collate_fn=collate))
    with pytest.raises(ValueError if engine.is_main_process else RunnerError, match="no such text"):
        list(broken)


def check_what_a_loader_keeps() -> None:
    engine = Engine()
    batch_sampler = BatchSampler(SequentialSampler(range(7)), 2, False)
    source = DataLoader(range(7), batch_sampler=batch_sampler, num_workers=2, collate_fn=tuple, timeout=30)  # type: ignore[arg-type]
    loader = engine.prepare(source)
    assert isinstance(loader, DataLoader)
    assert (loader.num_workers, loader.collate_fn, loader.timeout) == (2, tuple, 30)
    assert engine.prepare(loader) is loader
    assert engine.prepare(source) is loader
    assert engine.gather_object([next(iter(loader))]) == [(0, 1), (2, 3)]
    own = [[6, 5, 4], [3], [0, 1], [2]]  # a batch sampler may be any list, of batches of any size
    found = list(engine.prepare(DataLoader(range(7), batch_sampler=own, collate_fn=tuple)))  # type: ignore[arg-type]
    assert found == [[(6, 5, 4), (0, 1)], [(3,), (2,)]][engine.process_index]
    unbatched = engine.prepare(DataLoader(range(5), batch_size=None))  # type: ignore[arg-type]
    assert list(unbatched) == [[0, 2, 4], [1, 3, 0]][engine.process_index]
    weighted = torch.utils.data.WeightedRandomSampler([1.0] * 9, 9)
    drawn = batches(engine.prepare(DataLoader(range(9), 3, sampler=weighted)))  # type: ignore[arg-type]
    counts = engine.gather_object([flat(drawn)])
    assert len(counts[0]) == len(counts[1]) == 6
    shuffled = engine.prepare(DataLoader(range(12), 3, shuffle=True))  # type: ignore[arg-type]
    for _ in range(2):  # one permutation for both, though their generators differ
        torch.manual_seed(engine.process_index + 1)
        assert sorted(i for part in engine.gather_object([batches(shuffled)]) for b in part for i in b) == list(
            range(12)
        )
    distributed_sampler = torch.utils.data.DistributedSampler(range(8), shuffle=False)  # type: ignore[arg-type]
    already = engine.prepare(DataLoader(range(8), 2, sampler=distributed_sampler))  # type: ignore[arg-type]
    assert flat(batches(already)) == list(range(engine.process_index, 8, 2))


def check_skipping() -> None:
    engine = Engine(seed=3)
    loader = engine.prepare(DataLoader(range(30), 3, shuffle=True, num_workers=0))  # type: ignore[arg-type]
    first, second = batches(loader), batches(loader)
    assert first != second
    assert loader.epoch == 2
    loader.set_epoch(0)
    rest = engine.skip_first_batches(loader, 2)
    assert len(rest) == 3
    assert batches(rest) == first[2:]
    assert loader.epoch == 1
    assert batches(loader) == second
    loader.set_epoch(0)
    assert len(batches(rest)) == 5, "skips once"
    for workers in (0, 2):
        source: Any = DataLoader(TensorDataset(torch.arange(11)), 2, num_workers=workers)
        seen = []
        for (batch,) in engine.skip_first_batches(engine.prepare(source), 1):
            seen += engine.gather_for_metrics(batch).tolist()
        assert seen == list(range(4, 11))
        objects: list[Any] = []
        for (batch,) in engine.prepare(source):
            objects += engine.gather_for_metrics([str(i) for i in batch.tolist()], use_gather_object=True)
        assert objects == [str(i) for i in range(11)]
    stream = engine.prepare(DataLoader(Numbers(11), 2))
    left = flat(engine.gather_object([flat(batches(engine.skip_first_batches(stream, 1)))]))
    assert set(left) >= set(range(4, 11))
    assert not {2, 3} & set(left)
    plain = DataLoader(range(6), 2)  # type: ignore[arg-type]
    assert batches(engine.skip_first_batches(plain, 1)) == [[2, 3], [4, 5]]
    # Rows that are several for each sample, and numbers that are one for each process.
    for (batch,) in engine.prepare(DataLoader(TensorDataset(torch.arange(5)), 2)):
        pairs = engine.gather_for_metrics(batch.repeat_interleave(2))
        once = engine.gather_for_metrics(batch.sum())
    assert pairs.tolist() == [4, 4]
    assert once.tolist() == [4 + 0]  # the last sample, and what filled its batch; the other process had nothing


def check_passes_at_the_same_time() -> None:
    everything = list(range(11))

    def seen(found: Any) -> list[int]:
        return sorted(i for part in Engine().gather_object([found]) for i in part)

    for options in ({}, {"dispatch_batches": True}, {"seed": 3}, {"split_batches": True}):
        engine = Engine(**options)
        for data in (range(11), Numbers(11)):
            shuffle = not isinstance(data, Numbers)
            loader = engine.prepare(DataLoader(data, 2, shuffle=shuffle))  # type: ignore[arg-type]
            outer = []
            for batch in loader:
                inner = [i for other in loader for i in engine.gather_for_metrics(other).tolist()]
                assert sorted(inner) == everything, options
                outer += engine.gather_for_metrics(batch).tolist()
            assert sorted(outer) == everything, options
            pairs = list(zip(loader, loader, strict=True))
            for side in (0, 1):
                assert set(seen(flat([pair[side].tolist() for pair in pairs]))) == set(everything)
    # Asking for the length in the middle of a pass leaves it alone.
    engine = Engine(even_batches=False)
    engine.prepare(model := mlp(), torch.optim.SGD(model.parameters(), 0.1))
    loader = engine.prepare(DataLoader(range(6), 2))  # type: ignore[arg-type]
    lengths = [len(loader) for _ in loader]
    assert len(lengths) == 2
    assert set(lengths) == {2 - engine.process_index}


def check_detections() -> None:
    """Lists of objects that hold tensors, of which some process has none."""
    engine = Engine()
    loader = engine.prepare(DataLoader(TensorDataset(torch.arange(8)), 4))
    for _ in loader:
        found = [{"boxes": torch.ones(1, 4)}] if engine.is_main_process else []
        with pytest.raises(InputError, match=r"process 0: \[1, 4\] float32; process 1: nothing"):
            engine.gather_for_metrics(found)
        assert len(engine.gather_for_metrics(found, use_gather_object=True)) == 1
        assert engine.gather_for_metrics([] if engine.is_main_process else ["word"]) == ["word"]


def orders_on_from(folder: str) -> list[list[int]]:
    """What a new engine without a seed sees after a state of the middle of epoch 1."""
    engine = Engine()
    torch.manual_seed(99)
    loader = engine.prepare(DataLoader(range(12), 4 // engine.num_processes, shuffle=True))  # type: ignore[arg-type]
    engine.load_state(folder)
    assert loader.epoch == 1
    found = []
    for batches_of in (engine.skip_first_batches(loader, 1), loader):
        found.append([i for batch in batches_of for i in engine.gather(batch).tolist()])
    return found


def interrupted(folder: str) -> tuple[list[int], list[list[int]]]:
    """Saves in the middle of epoch 1, without a seed: (what was seen of it, what it goes on with)."""
    engine = Engine()
    torch.manual_seed(engine.process_index)
    loader = engine.prepare(DataLoader(range(12), 4 // engine.num_processes, shuffle=True))  # type: ignore[arg-type]
    list(loader)
    seen: list[int] = []
    rest: list[int] = []
    for number, batch in enumerate(loader):
        (rest if number else seen).extend(engine.gather(batch).tolist())
        if number == 0:
            engine.save_state(folder)
    return seen, [rest, [i for batch in loader for i in engine.gather(batch).tolist()]]


def check_resuming_without_a_seed(one: str, two: str) -> None:
    """`one` was saved by one process; `two` is saved here."""
    seen, whole = interrupted(two)
    assert orders_on_from(two) == whole
    assert sorted(seen + whole[0]) == list(range(12))
    rest, after = orders_on_from(one)
    assert len(rest) == 8
    assert sorted(after) == list(range(12))
    Path(one, "rest.json").write_text(json.dumps(rest)) if Engine().is_main_process else None
    Path(two, "rest.json").write_text(json.dumps(whole)) if Engine().is_main_process else None


def loaders(one: str, two: str) -> None:
    check_passes_at_the_same_time()
    check_detections()
    check_resuming_without_a_seed(one, two)
    check_lengths_and_indices()
    check_modes()
    check_streams()
    check_streams_that_shard_themselves()
    check_dispatch_of_nested_batches()
    check_what_a_loader_keeps()
    check_skipping()


# --- gradients --------------------------------------------------------------------------------------------------------


def check_no_sync() -> None:
    engine = Engine()
    rank = engine.process_index
    model = engine.prepare(mlp())
    inputs, targets = points(8).tensors
    loss = nn.functional.cross_entropy
    own = slice(4 * rank, 4 * rank + 4)

    def bare_gradient(rows: slice) -> list[float]:
        alone = mlp()
        loss(alone(inputs[rows]), targets[rows]).backward()
        return [x for p in alone.parameters() for x in p.grad.flatten().tolist()]  # type: ignore[union-attr]

    def gradient() -> list[float]:
        return [x for p in model.parameters() for x in p.grad.flatten().tolist()]

    with engine.no_sync(model):
        engine.backward(loss(model(inputs[own]), targets[own]))
    assert gradient() == pytest.approx(bare_gradient(own), abs=1e-7)
    model.zero_grad()
    engine.backward(loss(model(inputs[own]), targets[own]))
    assert gradient() == pytest.approx(bare_gradient(slice(0, 8)), abs=1e-7)


def check_overflow_on_one_process() -> None:
    engine = Engine(precision="fp16", grad_scaler={"init_scale": 8.0, "growth_interval": 2})
    torch.manual_seed(0)
    first, second = nn.Linear(2, 1), nn.Linear(2, 1)
    one, two = torch.optim.SGD(first.parameters(), 0.1), torch.optim.SGD(second.parameters(), 0.1)
    plan = torch.optim.lr_scheduler.ExponentialLR(one, 0.5)
    first, second, one, two, plan = engine.prepare(first, second, one, two, plan)
    before = weights(engine.unwrap_model(first)), weights(engine.unwrap_model(second))
    x = torch.ones(3, 2)
    bad = torch.tensor(float("inf") if engine.is_last_process else 1.0)
    for times in (1, 2):
        engine.backward(first(x).mean() * bad)
        one.step()
        plan.step()
        assert one.step_was_skipped
        assert engine.optimizer_step_was_skipped
        engine.backward(second(x).mean())
        two.step()
        assert not two.step_was_skipped
        one.zero_grad()
        two.zero_grad()
        assert engine.scaler.value == 8.0 / 2**times, "once an iteration"
    assert weights(first) == before[0]
    assert weights(second) != before[1]
    assert plan.get_last_lr() == [0.1]
    for _ in range(2):
        engine.backward(first(x).mean() + second(x).mean())
        engine.clip_grad_norm_([*first.parameters(), *second.parameters()], 1.0)
        one.step()
        two.step()
        plan.step()
        one.zero_grad()
        two.zero_grad()
    assert not engine.optimizer_step_was_skipped
    assert engine.scaler.value == 4.0
    assert plan.get_last_lr() == [0.025]
    for _ in range(3):  # one of the two several times in an iteration
        engine.backward(first(x).mean())
        one.step()
        one.zero_grad()
    assert weights(first) != before[0]
    assert len({tuple(found) for found in engine.gather_object([weights(first)])}) == 1


def check_steps_per_process() -> None:
    engine = Engine(step_scheduler_per_process=True)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    plan = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    model, optimizer, plan = engine.prepare(model, optimizer, plan)
    engine.backward(model(torch.ones(1, 4)).mean())
    optimizer.step()
    plan.step()
    assert plan.get_last_lr() == [0.25]


def check_clipping() -> None:
    engine = Engine()
    inputs, targets = points(8).tensors
    model, optimizer = mlp(), None
    listed = list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model, optimizer = engine.prepare(model, optimizer)
    for parameters, kind in ((listed, 2.0), (model.parameters(), 2.0), (listed[:2], 2.0), (listed, float("inf"))):
        chosen = list(parameters)
        own = slice(4 * engine.process_index, 4 * engine.process_index + 4)
        engine.backward(nn.functional.cross_entropy(model(inputs[own]), targets[own]))
        alone = mlp()
        nn.functional.cross_entropy(alone(inputs), targets).backward()
        same = list(alone.parameters())[: len(chosen)]
        wanted = nn.utils.clip_grad_norm_(same, 0.01, kind)
        assert engine.clip_grad_norm_(chosen, 0.01, kind).item() == pytest.approx(wanted.item(), rel=1e-5)
        for p, q in zip(listed, same, strict=False):
            assert torch.allclose(p.grad, q.grad, atol=1e-7)  # type: ignore[arg-type]
        engine.clip_grad_value_(model.parameters(), 1e-4)
        assert max(p.grad.abs().max().item() for p in listed) <= 1e-4 * (1 + 1e-6)  # type: ignore[union-attr]
        optimizer.zero_grad()


def check_uneven_streams() -> None:
    """Process 0 has more batches than process 1: both take every step, and the weights stay alike."""
    engine = Engine(even_batches=False, accumulation_steps=2, dispatch_batches=False)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    class Pieces(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            yield from points(14)

    model, optimizer, loader = engine.prepare(model, optimizer, DataLoader(Pieces(), batch_size=4))
    seen = 0
    for inputs, targets in loader:
        with engine.accumulate(model):
            engine.backward(nn.functional.cross_entropy(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
        seen += 1
    assert optimizer.taken == 1
    assert seen == 2
    bare = mlp()
    step = torch.optim.SGD(bare.parameters(), 0.1)
    inputs, targets = points(14).tensors
    rows = [slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 14)]
    torch.stack([nn.functional.cross_entropy(bare(inputs[r]), targets[r]) for r in rows]).mean().backward()
    step.step()
    assert weights(model) == pytest.approx(weights(bare), abs=1e-6)
    with engine.join_uneven_inputs([model], even_batches=True):
        assert engine.even_batches
    model.eval()
    found = engine.gather_object([batches(engine.prepare(DataLoader(range(6), 2)))])  # type: ignore[arg-type]
    assert found == [[[0, 1], [4, 5]], [[2, 3]]], "no company where nothing trains"


def gradients() -> None:
    check_no_sync()
    check_overflow_on_one_process()
    check_steps_per_process()
    check_clipping()
    check_uneven_streams()


# --- control ----------------------------------------------------------------------------------------------------------


def control(folder: str) -> None:
    engine = Engine(cpu=True)
    rank = engine.process_index
    assert (engine.num_processes, engine.is_main_process, engine.is_last_process) == (2, rank == 0, rank == 1)
    assert str(engine.distributed_type) == "MULTI_CPU" == engine.distributed_type
    assert engine.use_distributed
    path = Path(folder, "first")
    with engine.main_process_first():
        assert path.exists() == (rank == 1)
        if rank == 0:
            path.touch()
    try:
        with engine.local_main_process_first():
            assert Path(folder, "second").exists() == (rank == 1)
            if rank == 0:
                Path(folder, "second").touch()
                raise KeyError("broken")
    except KeyError:
        assert rank == 0
    assert engine.on_main_process(lambda: "here")() == ("here" if rank == 0 else None)
    assert engine.on_local_main_process(lambda: "here")() == ("here" if rank == 0 else None)
    assert engine.on_last_process(lambda: "here")() == ("here" if rank == 1 else None)
    assert engine.on_process(process_index=1)(lambda: "here")() == ("here" if rank == 1 else None)
    assert engine.on_local_process(lambda: "here", local_process_index=0)() == ("here" if rank == 0 else None)
    assert not engine.check_trigger()
    if rank == 1:
        engine.set_trigger()
    assert engine.check_trigger()
    assert not engine.check_trigger()
    with engine.split_between_processes([1, 2, 3]) as part:
        assert part == [[1, 2], [3]][rank]
    with engine.split_between_processes({"a": (1, 2, 3), "b": torch.arange(3)}, apply_padding=True) as part:
        assert part["a"] == [(1, 2), (3, 3)][rank]
        assert part["b"].tolist() == [[0, 1], [2, 2]][rank]
    with engine.split_between_processes(points(5)) as part:
        assert len(part) == 3 - rank
    with engine.split_between_processes([1]) as part:
        assert part == [[1], []][rank]
    assert engine.gather(torch.tensor([rank])).tolist() == [0, 1]
    assert engine.reduce(torch.tensor(1.0)).item() == 2
    torch.manual_seed(rank)
    model = engine.prepare(nn.Linear(2, 2))  # the processes need not have made the same model
    assert len({tuple(found) for found in engine.gather_object([weights(model)])}) == 1
    engine.save_model(model, folder)
    assert Path(folder, "model.safetensors").exists()
    engine.wait_for_everyone()
    engine.end_training()


# --- models whose parameters a backend replaces -----------------------------------------------------------------------


class Scaled(nn.Module):
    """With a parameter of no dimension, which stays whole where others are sharded."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(4, 3)
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.factor


def models(backend: str) -> None:
    engine = Engine(backend=backend, debug=True)
    x = torch.arange(12.0).reshape(3, 4)
    own = x * (1 + engine.process_index)

    def loss_of(model: Any, inputs: Tensor) -> Tensor:
        return model(inputs).square().mean()

    def norm_of(times: int) -> float:
        alone = Scaled()
        (times * (loss_of(alone, x) + loss_of(alone, 2 * x)) / 2).backward()
        return float(torch.stack([p.grad.norm() for p in alone.parameters()]).norm())  # type: ignore[union-attr]

    def fresh() -> Any:
        model = Scaled()
        return engine.prepare(model, torch.optim.SGD(model.parameters(), 0.1))

    # Between forward and backward: zeroed and clipped is what the optimizer steps.
    model, optimizer = fresh()
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    engine.backward(loss_of(model, own))
    loss = loss_of(model, own)
    assert {id(p) for p in model.parameters()} == stepped
    assert [name for name, _ in model.named_parameters("a")] == ["a.factor", "a.layer.weight", "a.layer.bias"]
    assert engine.clip_grad_norm_(model.parameters(), 1e-3).item() == pytest.approx(norm_of(1), rel=1e-5)
    model.zero_grad()
    engine.backward(loss)
    assert engine.clip_grad_norm_(model.parameters(), 1e3).item() == pytest.approx(norm_of(1), rel=1e-5)
    # One graph twice: all of it is averaged, whole parameters too.
    model, optimizer = fresh()
    loss = loss_of(model, own)
    engine.backward(loss, retain_graph=True)
    engine.backward(loss)
    assert engine.clip_grad_norm_(model.parameters(), 1e3).item() == pytest.approx(norm_of(2), rel=1e-5)
    optimizer.step()
    assert len({tuple(found) for found in engine.gather_object([weights(model)])}) == 1
    # Whole values go into what is sharded, also between forward and backward.
    ones = {name: torch.ones_like(value) for name, value in engine.get_state_dict(model).items()}
    model(x)
    model.load_state_dict(ones)
    assert weights(model) == [1.0] * 16
    engine.unwrap_model(model).load_state_dict({name: 2 * value for name, value in ones.items()})
    assert weights(model) == [2.0] * 16
    assert model(x).sum().item() == pytest.approx(2 * (2 * x.sum().item() * 3 + 2 * 9))
    engine.end_training()
