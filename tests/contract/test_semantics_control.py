"""SEMANTICS.md, lines 20 to 25: collectives and control."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from contract.lines import Together
from runner import Engine, collectives
from runner.debugging import CollectiveMismatch, CollectiveWatch
from runner.errors import InputError

pytestmark = pytest.mark.usefixtures("quiet")

two = Together(2)
three = Together(3)
WORLDS = pytest.mark.parametrize("together", [two, three], ids=["two", "three"])


class Pair(NamedTuple):
    first: Tensor
    second: Any


@dataclass
class Point:
    x: Tensor
    name: str
    y: Any = None


class Output(OrderedDict):  # type: ignore[type-arg]
    """A mapping of a class of its own, as models return."""


# --- 20: gather -------------------------------------------------------------------------------------------------------


@two.add
@three.add
def gathering() -> None:
    engine = Engine()
    rank, world = engine.process_index, engine.num_processes
    everyone = range(world)
    assert engine.gather(torch.tensor([rank, 10 + rank])).tolist() == [x for r in everyone for x in (r, 10 + r)]
    # Different numbers of rows; nested containers of all kinds keep their types.
    rows = torch.full((rank + 1, 2), float(rank))
    value = {
        "list": [rows, (rows.long(), 1.5)],
        "pair": Pair(rows, {"deep": rows[:, 0]}),
        "point": Point(rows, f"rank {rank}", Output(a=rows)),
        "none": None,
    }
    found = engine.gather(value)
    expected = torch.cat([torch.full((r + 1, 2), float(r)) for r in everyone])
    assert type(found) is dict
    assert type(found["list"]) is list
    assert type(found["list"][1]) is tuple
    assert type(found["pair"]) is Pair
    assert type(found["point"]) is Point
    assert type(found["point"].y) is Output
    for tensor in (found["list"][0], found["pair"].first, found["point"].x, found["point"].y["a"]):
        assert torch.equal(tensor, expected)
    assert torch.equal(found["list"][1][0], expected.long())
    assert found["list"][1][1] == 1.5
    assert torch.equal(found["pair"].second["deep"], expected[:, 0])
    assert (found["point"].name, found["none"]) == (f"rank {rank}", None)
    # Kinds of tensors.
    assert torch.equal(engine.gather(torch.tensor(float(rank))), torch.arange(world).float())  # 0-d
    wide = torch.arange(6.0).view(2, 3) + rank
    columns = torch.cat([(torch.arange(6.0).view(2, 3) + r).t() for r in everyone])
    assert not wide.t().is_contiguous()
    assert torch.equal(engine.gather(wide.t()), columns)
    assert torch.equal(
        engine.gather(wide[:, ::2]), torch.cat([(torch.arange(6.0).view(2, 3) + r)[:, ::2] for r in everyone])
    )
    assert torch.equal(engine.gather(torch.ones(1).expand(3)), torch.ones(3 * world))
    for dtype in (torch.bool, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.complex64):
        gathered = engine.gather(torch.tensor([rank, 1]).to(dtype))
        assert gathered.dtype == dtype
        assert torch.equal(gathered, torch.tensor([x for r in everyone for x in (r, 1)]).to(dtype))
    for empty in (torch.empty(0), torch.empty(0, 3), torch.empty(2, 0)):
        assert engine.gather(empty).shape == (empty.shape[0] * world, *empty.shape[1:])
    # Empty on one process only.
    some = engine.gather(torch.full((2 if rank == 0 else 0,), 7))
    assert some.tolist() == [7, 7]
    weights = torch.ones(2, requires_grad=True)
    assert not engine.gather(weights * 2).requires_grad
    # Objects, by pickle between these processes.
    assert engine.gather_object([f"rank {rank}", {1, rank}]) == [x for r in everyone for x in (f"rank {r}", {1, r})]
    assert engine.gather_object({"rank": rank}) == [{"rank": r} for r in everyone]
    with pytest.raises(InputError, match="process 1: "):
        engine.gather(torch.ones(2, 2 + rank))
    with pytest.raises(InputError, match="there is no tensor"):
        engine.gather({"a": "no tensor"})


@WORLDS
def test_20_gather_in_rank_order_with_types_kept(together: Together) -> None:
    together(gathering)


# --- 21: pad, reduce, broadcast ---------------------------------------------------------------------------------------


@two.add
@three.add
def padding_and_reducing() -> None:
    engine = Engine()
    rank, world = engine.process_index, engine.num_processes
    own = torch.arange(1, rank + 2)
    last = engine.pad_across_processes(own, pad_index=-1)
    first = engine.pad_across_processes(own, pad_index=-1, pad_first=True)
    missing = [-1] * (world - rank - 1)
    assert last.tolist() == [*range(1, rank + 2), *missing]
    assert first.tolist() == [*missing, *range(1, rank + 2)]
    wide = engine.pad_across_processes({"a": [torch.ones(2, rank + 1), torch.tensor(3.0)]}, dim=1)
    assert wide["a"][0].shape == (2, world)
    assert wide["a"][0].sum() == 2 * (rank + 1)
    assert wide["a"][1].item() == 3.0  # has no such dimension
    assert engine.pad_across_processes(torch.ones(rank + 1, 2), dim=-2).shape == (world, 2)
    assert engine.gather(last).tolist() == [
        x for r in range(world) for x in [*range(1, r + 2), *[-1] * (world - r - 1)]
    ]
    numbers = [r + 1.0 for r in range(world)]
    value = {"a": (torch.tensor([rank + 1.0, -rank]), None, "word")}
    for reduction, expected in (
        ("sum", [sum(numbers), -sum(range(world))]),
        ("mean", [sum(numbers) / world, -sum(range(world)) / world]),
        ("max", [world, 0]),
        ("min", [1, 1 - world]),
    ):
        found = engine.reduce(value, reduction)
        assert found["a"][0].tolist() == pytest.approx(expected)
        assert found["a"][1:] == (None, "word")
        assert value["a"][0].tolist() == [rank + 1.0, -rank], "what was given stays"
        assert collectives.reduce(value, reduction)["a"][0].tolist() == pytest.approx(expected)
    # One default for method and function.
    assert engine.reduce(torch.tensor(2.0)).item() == collectives.reduce(torch.tensor(2.0)).item() == 2.0 * world
    assert engine.reduce(torch.tensor(2.0), scale=0.5).item() == world
    assert engine.reduce(torch.tensor([True, rank == 0]), "sum").tolist() == [world, 1]
    assert engine.reduce(torch.ones(3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert engine.reduce(torch.ones(2, 3).t()).tolist() == [[world] * 2] * 3
    with pytest.raises(InputError, match="is none that is known"):
        engine.reduce(torch.ones(1), "product")
    # Objects, from any process.
    for source in range(world):
        mine = {"rank": rank, "set": {rank}, "point": Point(torch.full((2,), rank), "word")} if rank == source else None
        sent = engine.broadcast(mine, source)
        assert (sent["rank"], sent["set"], sent["point"].name) == (source, {source}, "word")
        assert sent["point"].x.tolist() == [source, source]
    assert engine.broadcast(torch.arange(6).view(2, 3).t() if rank == 0 else None).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert engine.broadcast("words" if rank == 0 else None) == "words"


@WORLDS
def test_21_pad_reduce_and_broadcast(together: Together) -> None:
    together(padding_and_reducing)


# --- 22: debug mode ---------------------------------------------------------------------------------------------------


@three.add
def mismatches() -> dict[str, tuple[str, float]]:
    """What each rank is told, and after how long, where the others would have waited for ever."""
    engine = Engine()
    rank = engine.process_index
    told: dict[str, tuple[str, float]] = {}

    def caught(name: str, call: Any) -> None:
        began = time.monotonic()
        try:
            call()
        except CollectiveMismatch as error:
            told[name] = (str(error), time.monotonic() - began)

    with CollectiveWatch(seconds=30.0):
        assert engine.reduce(torch.ones(2)).tolist() == [3.0, 3.0]
        assert engine.gather(torch.tensor([rank])).tolist() == [0, 1, 2]
        caught("shape", lambda: engine.reduce(torch.ones(2, 3 if rank == 1 else 4)))
        caught("kind", lambda: engine.gather_object(rank) if rank == 2 else engine.wait_for_everyone())
        caught("type", lambda: engine.reduce(torch.ones(2, dtype=torch.float64 if rank == 0 else torch.float32)))
    return told


def test_22_debug_names_the_ranks_and_shapes_that_differ_before_anybody_hangs() -> None:
    ranks = three(mismatches)
    for told in ranks:
        assert set(told) == {"shape", "kind", "type"}
        assert all(seconds < 10 for _, seconds in told.values())
        text = told["shape"][0]
        assert "ranks 0, 2: all_reduce of float32 [2, 4]" in text
        assert "rank 1: all_reduce of float32 [2, 3]" in text
        assert "ranks 0, 1: barrier" in told["kind"][0]
        assert "rank 2: all_gather_object" in told["kind"][0]
        assert "rank 0: all_reduce of float64 [2]" in told["type"][0]
        assert "ranks 1, 2: all_reduce of float32 [2]" in told["type"][0]


# --- 23: who comes first, who does what -------------------------------------------------------------------------------


@three.add
def order_of_processes() -> dict[Any, Any]:
    engine = Engine()
    rank = engine.process_index
    found: dict[Any, Any] = {}
    for name, first in (("main", engine.main_process_first), ("local", engine.local_main_process_first)):
        for raises in (False, True):
            with pytest.raises(KeyError) if raises and rank == 0 else _nothing(), first():
                began = time.monotonic()
                time.sleep(0.2 if rank == 0 else 0.0)
                if raises and rank == 0:
                    found[name, raises] = (began, time.monotonic())
                    raise KeyError
                found[name, raises] = (began, time.monotonic())
    for name, decorator in (
        ("main", engine.on_main_process),
        ("local_main", engine.on_local_main_process),
        ("last", engine.on_last_process),
        ("one", engine.on_process(process_index=1)),
        ("local_two", engine.on_local_process(local_process_index=2)),
    ):

        @decorator
        def told(word: str, end: str = "") -> str:
            """Words."""
            return f"{word} {rank}{end}"

        assert told.__name__ == "told"
        assert told.__doc__ == "Words."
        found[name] = told("rank", end="!")
    assert (engine.is_main_process, engine.is_last_process) == (rank == 0, rank == 2)
    return found


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def test_23_the_main_process_first_also_when_it_raises_and_functions_of_one_process() -> None:
    ranks = three(order_of_processes)
    for name in ("main", "local"):
        for raises in (False, True):
            ended = ranks[0][name, raises][1]
            assert all(other[name, raises][0] >= ended for other in ranks[1:]), (name, raises)
    for name, who in (("main", 0), ("local_main", 0), ("last", 2), ("one", 1), ("local_two", 2)):
        assert [rank[name] for rank in ranks] == [f"rank {r}!" if r == who else None for r in range(3)]


# --- 24: split_between_processes --------------------------------------------------------------------------------------


@three.add
def parts() -> dict[str, Any]:
    engine = Engine()
    found: dict[str, Any] = {}
    for count in (0, 1, 2, 3, 7, 8):
        for padding in (False, True):
            rows = list(range(count))
            values: dict[str, Any] = {
                "list": rows,
                "tuple": tuple(rows),
                "tensor": torch.arange(count)[:, None],
                "dict": {"a": rows, "b": torch.arange(count)},
                "data": TensorDataset(torch.arange(count)),
            }
            for kind, value in values.items():
                with engine.split_between_processes(value, apply_padding=padding) as part:
                    if kind == "tensor":
                        assert part.dim() == 2
                        part = part[:, 0].tolist()
                    elif kind == "dict":
                        assert part["b"].tolist() == part["a"]
                        part = part["a"]
                    elif kind == "data":
                        part = [int(part[i][0]) for i in range(len(part))]
                    assert type(part) is (tuple if kind == "tuple" else list)
                    found[f"{kind} {count} {padding}"] = list(part)
    with pytest.raises(InputError, match="different lengths"), engine.split_between_processes({"a": [1], "b": []}):
        pass
    return found


def test_24_parts_for_all_processes() -> None:
    ranks = three(parts)
    for key in ranks[0]:
        _, count, padding = key.split()
        number = int(count)
        sizes = [number // 3 + (rank < number % 3) for rank in range(3)]
        own = [part[key][:size] for part, size in zip(ranks, sizes, strict=True)]
        assert [i for part in own for i in part] == list(range(number)), key
        if padding == "True" and number:
            assert [len(part[key]) for part in ranks] == [sizes[0]] * 3, key
            assert all(i == number - 1 for part, size in zip(ranks, sizes, strict=True) for i in part[key][size:]), key
        else:
            assert [len(part[key]) for part in ranks] == sizes, key


def test_24b_a_hugging_face_data_set_stays_one() -> None:
    datasets = pytest.importorskip("datasets")
    from runner.api.control import split

    rows = datasets.Dataset.from_dict({"a": list(range(5))})
    pieces = [split(rows, rank, 3, False) for rank in range(3)]
    assert [type(piece) for piece in pieces] == [datasets.Dataset] * 3
    assert [piece["a"][:] for piece in pieces] == [[0, 1], [2, 3], [4]]


# --- 25: triggers -----------------------------------------------------------------------------------------------------


@three.add
def triggers() -> list[bool]:
    engine, other = Engine(), Engine()
    found = [engine.check_trigger()]
    for who in range(3):
        if engine.process_index == who:
            engine.set_trigger()
        found += [other.check_trigger(), engine.check_trigger(), engine.check_trigger()]
    engine.set_trigger()
    engine.set_trigger()
    return [*found, engine.check_trigger(), engine.check_trigger()]


def test_25_a_trigger_on_one_is_seen_by_all_once() -> None:
    for found in three(triggers):
        assert found == [False, *[False, True, False] * 3, True, False]
