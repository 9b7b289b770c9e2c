"""runner: a declarative training-recipe runner for PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.api.engine import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]


def __getattr__(name: str) -> Any:
    # Late, because the engine imports torch and most commands do without.
    if name == "Engine":
        from importlib import import_module

        return import_module("runner.api.engine").Engine
    raise AttributeError(f"module 'runner' has no attribute {name!r}")
