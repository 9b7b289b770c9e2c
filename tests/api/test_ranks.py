"""Loaders, gradients and control on two processes."""

from __future__ import annotations

from pathlib import Path

from processes import run_ranks

from api import ranks


def test_loaders() -> None:
    run_ranks(ranks.loaders, 2, timeout=100)


def test_gradients() -> None:
    run_ranks(ranks.gradients, 2)


def test_control(tmp_path: Path) -> None:
    run_ranks(ranks.control, 2, str(tmp_path))
