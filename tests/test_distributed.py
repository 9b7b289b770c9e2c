"""The process group and its collectives, in two processes."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
from processes import run_ranks

from runner import distributed
from runner.distributed import Ranks
from runner.errors import InputError


def collectives() -> dict[str, Any]:
    return {
        "rank": distributed.rank(),
        "world": distributed.world_size(),
        "total": distributed.total(torch.tensor([distributed.rank() + 1.0])).item(),
        "broadcast": distributed.broadcast({"from": distributed.rank()}, source=1),
        "gather": distributed.gather((distributed.rank(), "x")),
    }


def test_collectives_in_two_processes() -> None:
    same = {"world": 2, "total": 3.0, "broadcast": {"from": 1}, "gather": [(0, "x"), (1, "x")]}
    assert run_ranks(collectives, 2) == [{"rank": rank, **same} for rank in range(2)]


def test_collectives_alone() -> None:
    assert collectives() == {"rank": 0, "world": 1, "total": 1.0, "broadcast": {"from": 0}, "gather": [(0, "x")]}
    assert not distributed.joined()
    distributed.barrier()


def failing() -> None:
    if distributed.rank() == 1:
        raise ValueError("on purpose")
    distributed.barrier()


def test_the_error_of_a_rank_comes_back() -> None:
    with pytest.raises(AssertionError, match=r"rank 1: [\s\S]*ValueError: on purpose"):
        run_ranks(failing, 2)


def test_a_port_in_use_is_the_users_input() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} of 127.0.0.1 is in use"):
            distributed.store(Ranks(0, 2, 0, 2, ("127.0.0.1", port)))
