"""debug=true: ranks that call something else, or nothing, are named before anybody hangs."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from processes import run_ranks

from runner import distributed
from runner.debugging import CollectiveMismatch, CollectiveWatch, explain, standing


def caught(call: Any) -> str:
    try:
        call()
    except CollectiveMismatch as error:
        return str(error)
    return ""


def differing() -> dict[str, str]:
    """Each mismatch on both ranks; after one, the next begins with what all have called."""
    rank = distributed.rank()
    first, second = dist.new_group([0, 1]), dist.new_group([0])
    original = dist.all_reduce
    told: dict[str, str] = {}
    with CollectiveWatch(seconds=20.0) as watch:
        assert dist.all_reduce is not original
        assert dist.distributed_c10d.all_reduce is dist.all_reduce
        total = distributed.total(torch.ones(3))
        assert total.tolist() == [2.0, 2.0, 2.0]
        assert distributed.gather(rank) == [0, 1]
        assert distributed.broadcast("word" if rank == 0 else None) == "word"
        distributed.barrier()
        dist.all_reduce(torch.ones(1), async_op=True).wait()
        if rank == 0:
            dist.all_reduce(torch.ones(1), group=second)  # a group of its own
        # Shards of different sizes are what this one is for.
        dist.all_to_all_single(torch.empty(3), torch.ones(3), [1, 2] if rank else [2, 1], [1, 2] if rank else [2, 1])
        tell = told.__setitem__
        tell("name", caught(lambda: dist.all_reduce(torch.ones(4)) if rank == 0 else dist.broadcast(torch.ones(2), 0)))
        tell("shape", caught(lambda: dist.all_reduce(torch.ones(2, 3 + rank))))
        tell("type", caught(lambda: distributed.total(torch.ones(2, dtype=[torch.float32, torch.float64][rank]))))
        tell("source", caught(lambda: dist.broadcast(torch.ones(2), rank)))
        tell("list", caught(lambda: dist.all_gather([torch.ones(1 + rank)] * 2, torch.ones(1 + rank))))
        tell("object", caught(lambda: distributed.gather(1) if rank else distributed.broadcast(1)))
        tell("group", caught(lambda: dist.all_reduce(torch.ones(1 + rank), group=first)))
        from torch.distributed.tensor import DTensor, Partial, Shard, init_device_mesh

        mesh = init_device_mesh("cpu", (2,))
        sharded = DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)], run_check=False)
        assert sharded.full_tensor().shape == (4, 2)
        partial = DTensor.from_local(torch.ones(2, 2), mesh, [Partial()], run_check=False)
        tell("dtensor", caught(lambda: (partial if rank else sharded).full_tensor()))
        watch.seconds = 0.5
        begun = time.monotonic()
        if rank == 0:
            tell("absent", caught(lambda: dist.all_reduce(torch.ones(5))))
            assert time.monotonic() - begun < 5.0
    assert dist.all_reduce is original
    dist.all_reduce(torch.ones(1))
    return told


def test_ranks_that_differ_are_named() -> None:
    told, other = run_ranks(differing, 2)
    here = "tests/test_debugging.py:"
    assert "do not call the same collective" in told["name"]
    assert f"rank 0: all_reduce of float32 [4] at {here}" in told["name"]
    assert f"rank 1: broadcast of float32 [2] src=0 at {here}" in told["name"]
    for name in told.keys() - {"absent"}:
        assert told[name] == other[name] != "", name
    assert "rank 0: all_reduce of float32 [2, 3]" in told["shape"]
    assert "rank 1: all_reduce of float32 [2, 4]" in told["shape"]
    assert "float32 [2]" in told["type"]
    assert "float64 [2]" in told["type"]
    assert "runner/distributed.py:" in told["type"]
    assert f", from {here}" in told["type"]
    assert "src=0" in told["source"]
    assert "src=1" in told["source"]
    assert "all_gather of 2 times float32 [1]" in told["list"]
    assert "rank 0: broadcast_object_list" in told["object"]
    assert "rank 1: all_gather_object" in told["object"]
    assert "number 1 of all processes" in told["group"]
    assert "rank 0: all_gather_" in told["dtensor"]
    assert "rank 1: all_reduce of float32 [2, 2]" in told["dtensor"]
    assert "rank 1 does not call a collective that others have waited in for 0.5 s" in told["absent"]
    assert f"rank 0: all_reduce of float32 [5] at {here}" in told["absent"]
    assert "rank 1: none; the one before was" in told["absent"]
    assert "absent" not in other


def three() -> tuple[str, list[str]]:
    rank = distributed.rank()
    said: list[str] = []
    explain([standing("cpu"), "backend ddp", f"shard {rank}"], said.append)
    with CollectiveWatch(seconds=20.0):
        return caught(lambda: dist.all_reduce(torch.ones(1 if rank == 1 else 2))), said


def test_of_three_ranks_those_alike_are_told_together_and_decisions_once() -> None:
    results = run_ranks(three, 3)
    lines = results[0][0].splitlines()
    assert lines[1].startswith("  ranks 0, 2: all_reduce of float32 [2]")
    assert lines[2].startswith("  rank 1: all_reduce of float32 [1]")
    said = results[0][1]
    assert said[0] == "debug: backend ddp"
    assert [line.split(",")[0] for line in said[1::2]] == [f"debug: rank {rank} of 3" for rank in range(3)]
    assert said[2::2] == [f"debug: rank {rank}: shard {rank}" for rank in range(3)]
    assert results[1][1] == []


def test_one_process_is_left_alone() -> None:
    before = dist.all_reduce
    with CollectiveWatch():
        assert dist.all_reduce is before
    said: list[str] = []
    explain(["backend single"], said.append)
    assert said == ["debug: backend single"]
