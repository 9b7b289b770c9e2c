"""runner: a declarative training-recipe runner for PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.api.engine import DistributedType, Engine
    from runner.api.seeding import set_seed

__version__ = "0.1.0"
__all__ = ["DistributedType", "Engine", "__version__", "set_seed"]

_WHERE = {
    "Engine": "runner.api.engine",
    "DistributedType": "runner.api.engine",
    "set_seed": "runner.api.seeding",
}


def __getattr__(name: str) -> Any:
    # Late, because the engine imports torch and most commands do without.
    if name in _WHERE:
        from importlib import import_module

        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'runner' has no attribute {name!r}")
