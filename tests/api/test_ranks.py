"""Loaders, gradients and control on two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import run_ranks

from api import ranks


def test_loaders(tmp_path: Path) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    _, whole = ranks.interrupted(one)
    run_ranks(ranks.loaders, 2, one, two, timeout=100)
    assert json.loads((tmp_path / "one" / "rest.json").read_text()) == whole[0]
    assert json.loads((tmp_path / "two" / "rest.json").read_text()) == ranks.orders_on_from(two)


def test_gradients() -> None:
    run_ranks(ranks.gradients, 2)


def test_control(tmp_path: Path) -> None:
    run_ranks(ranks.control, 2, str(tmp_path))


@pytest.mark.parametrize("backend", ["ddp", "fsdp"])
def test_models(backend: str) -> None:
    run_ranks(ranks.models, 2, backend)
