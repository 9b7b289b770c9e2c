"""Collectives over nested values, on one process and on three."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from processes import run_ranks
from torch import Tensor

from runner import collectives, distributed
from runner.errors import InputError


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Sample:
    x: Tensor
    name: str


def test_one_process_gives_itself() -> None:
    value = {"a": torch.arange(3), "b": (None, "word")}
    found = collectives.gather(value)
    assert found["a"].tolist() == [0, 1, 2]
    assert found["b"] == (None, "word")
    assert collectives.gather(torch.tensor(2.0)).tolist() == [2.0]
    assert collectives.gather_object(["a"]) == ["a"]
    assert collectives.gather_object("a") == ["a"]
    assert collectives.broadcast(value) is value
    assert collectives.reduce(torch.tensor([True, False])).tolist() == [1, 0]
    assert collectives.reduce(torch.tensor([1, 2]), "mean", scale=2.0).tolist() == [2.0, 4.0]
    assert collectives.pad_across_processes(torch.ones(2, 2)).shape == (2, 2)
    assert collectives.gather(3).tolist() == [3]
    found = collectives.reduce({"n": 3, "x": [0.1, True], "word": "w"}, "mean", scale=2)
    assert found == {"n": 6.0, "x": [0.2, 2.0], "word": "w"}


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(InputError, match="no tensor"):
        collectives.gather({"a": 3})
    with pytest.raises(InputError, match="reduction"):
        collectives.reduce(torch.ones(1), "median")


def test_types_stay() -> None:
    value = OrderedDict(a=[Pair(torch.ones(1), 2)], b=Sample(torch.ones(2), "n"))
    found = collectives.map_tensors(lambda tensor: tensor + 1, value)
    assert type(found) is OrderedDict
    assert type(found["a"][0]) is Pair
    assert found["a"][0].left.item() == 2
    assert found["b"] == Sample(found["b"].x, "n")
    assert found["b"].x.tolist() == [2, 2]


def test_cutting_takes_rows_of_tensors_and_items_of_lists() -> None:
    batch = {
        "x": torch.arange(4),
        "names": ["a", "b", "c", "d"],
        "n": torch.tensor(7),
        "pair": Pair(torch.ones(4, 2), 1),
    }
    found = collectives.cut(batch, 4, 1, 3)
    assert found["x"].tolist() == [1, 2]
    assert found["names"] == ["b", "c"]
    assert found["n"].item() == 7
    assert found["pair"].left.shape == (2, 2)


def on_three() -> None:
    rank = distributed.rank()
    number = float(rank)
    wide = torch.arange(8).reshape(2, 4)[:, ::2] + 10 * rank
    value = {
        "rows": torch.full((rank, 2), number),  # none on the first process
        "scalar": torch.tensor(number),
        "pair": Pair(torch.tensor([rank == 1]), None),
        "half": [torch.tensor([number], dtype=torch.bfloat16)],
        "sample": Sample(wide, f"process {rank}"),
        "empty": torch.empty(0, 3),
        "complex": torch.tensor([complex(number, 1)]),
    }
    found = collectives.gather(value)
    assert found["rows"].tolist() == [[1, 1], [2, 2], [2, 2]]
    assert found["scalar"].tolist() == [0, 1, 2]
    assert type(found["pair"]) is Pair
    assert found["pair"].left.tolist() == [False, True, False]
    assert found["pair"].left.dtype == torch.bool
    assert found["half"][0].dtype == torch.bfloat16
    assert found["half"][0].tolist() == [0, 1, 2]
    assert found["sample"].x[:, 0].tolist() == [0, 4, 10, 14, 20, 24]
    assert found["sample"].name == f"process {rank}"
    assert found["empty"].shape == (0, 3)
    assert found["complex"].real.tolist() == [0, 1, 2]
    with pytest.raises(InputError, match=r"process 0: \[1, 2\] float32; process 1: \[1, 3\] float32"):
        collectives.gather(torch.ones(1, 2 + rank))

    assert collectives.gather_object([rank] * rank) == [1, 2, 2]
    assert collectives.gather_object({"rank": rank}) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]

    sent = collectives.broadcast({**value, "object": {1, rank}} if rank == 1 else None, 1)
    assert sent["rows"].tolist() == [[1, 1]]
    assert sent["scalar"].item() == 1
    assert sent["sample"].name == "process 1"
    assert sent["sample"].x.tolist() == [[10, 12], [14, 16]]
    assert sent["half"][0].dtype == torch.bfloat16
    assert sent["object"] == {1}

    own = torch.tensor([rank, 2 - rank])
    assert collectives.reduce(own).tolist() == [3, 3]
    assert own.tolist() == [rank, 2 - rank]
    assert collectives.reduce({"a": own}, "mean")["a"].tolist() == [1.0, 1.0]
    assert collectives.reduce(own, "max").tolist() == [2, 2]
    assert collectives.reduce(own, "min", scale=3).tolist() == [0, 0]
    assert collectives.reduce(torch.tensor(rank == 1)).item() == 1
    assert collectives.reduce(torch.tensor(rank == 1), "max").dtype == torch.bool
    exact = collectives.reduce(torch.tensor([256.0 if rank == 0 else 1.0], dtype=torch.bfloat16))
    assert exact.dtype == torch.bfloat16
    assert exact.item() == 258  # 256 + 1 is 256 in bfloat16

    assert collectives.reduce({"n": 2**53 + rank, "x": 0.1}) == {"n": 3 * 2**53 + 3, "x": pytest.approx(0.3, abs=1e-16)}
    assert collectives.reduce((rank, rank), "mean") == (1.0, 1.0)
    assert collectives.reduce(rank == 1, "max") is True
    assert collectives.gather(rank).tolist() == [0, 1, 2]
    assert collectives.gather(rank / 2).tolist() == [0, 0.5, 1]
    check_what_differs_is_said_everywhere(rank)

    ragged = torch.ones(2, rank + 1)
    assert collectives.pad_across_processes(ragged, dim=1, pad_index=-1)[0].tolist() == [1] * (rank + 1) + [-1] * (
        2 - rank
    )
    first = collectives.pad_across_processes((ragged, torch.tensor(1)), dim=1, pad_first=True)
    assert first[0][0].tolist() == [0] * (2 - rank) + [1] * (rank + 1)
    assert first[1].item() == 1
    assert collectives.pad_across_processes(torch.ones(rank)).shape == (2,)
    assert collectives.scatter_object([[i] for i in range(3)] if rank == 0 else None) == [rank]


def check_what_differs_is_said_everywhere(rank: int) -> None:
    """The same InputError on all, at once, however little a process's own value lets it know."""
    boxes = torch.ones(1, 4)
    nothing: list[Any] = []
    calls: list[tuple[str, Any, str]] = [
        (
            "gather",
            nothing if rank == 1 else [{"boxes": boxes}],
            r"\[0\]\['boxes'\]: processes 0, 2: \[1, 4\] float32; process 1: nothing",
        ),
        ("gather", "none" if rank == 0 else boxes, r"\(process 0: nothing; processes 1, 2: \[1, 4\]"),
        ("gather", {"a" if rank == 2 else "b": boxes}, r"\['b'\]: processes 0, 1.*\['a'\]: processes 0, 1: nothing"),
        ("gather", boxes.long() if rank == 2 else boxes, r"process 2: \[1, 4\] int64"),
        ("gather_either", nothing if rank == 0 else [boxes], r"process 0: nothing"),
        ("gather_either", [boxes] * (rank + 1), r"\[2\]: processes 0, 1: nothing; process 2"),
        ("pad_across_processes", nothing if rank == 0 else [boxes], r"process 0: nothing"),
        ("pad_across_processes", boxes[0] if rank == 1 else boxes, r"process 1: \[4\]"),
    ]
    for word, value, said in calls:
        arguments = (value, value) if word == "gather_either" else (value,)
        with pytest.raises(InputError, match=said) as caught:
            getattr(collectives, word)(*arguments)
        assert len(set(distributed.gather(str(caught.value)))) == 1
    one, two = boxes * rank, boxes.long() * rank
    found = collectives.gather({"a": one, "b": two} if rank else {"b": two, "a": one})
    assert list(found) == (["a", "b"] if rank else ["b", "a"])
    assert (found["a"].dtype, found["b"].dtype) == (torch.float32, torch.int64)
    assert found["b"][:, 0].tolist() == [0, 1, 2]
    assert collectives.gather_either(nothing, nothing) == []
    assert collectives.gather_either(nothing, ["a"] * rank) == ["a"] * 3
    assert collectives.gather_either([one], None)[0].shape == (3, 4)


def test_on_three_processes() -> None:
    run_ranks(on_three, 3)
