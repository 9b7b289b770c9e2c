"""What the environment says: another launcher's ranks, and two switches for the terminal."""

from __future__ import annotations

import os
from dataclasses import dataclass

from runner.errors import InputError, Problem


@dataclass(frozen=True)
class Environment:
    """World size by another launcher (1 without one), and how to talk to the user."""

    world_size: int = 1
    full_error: bool = False
    terminal: str | None = None

    @classmethod
    def read(cls) -> Environment:
        """Reads the environment once. Raises InputError where a launcher's variable is no number."""
        text = os.environ.get("WORLD_SIZE", "1")
        try:
            world = int(text)
        except ValueError:
            raise InputError(
                Problem(None, f"WORLD_SIZE={text} in the environment is not a number", "unset it, or use torchrun")
            ) from None
        return cls(
            world_size=world,
            full_error=os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0"),
            terminal=os.environ.get("TERM"),
        )

    def check(self) -> list[Problem]:
        """What a launcher asks for that cannot be done."""
        if self.world_size == 1:
            return []
        return [
            Problem(
                None,
                f"a launcher started {self.world_size} processes (WORLD_SIZE={self.world_size}), "
                "and this version trains in one",
                "start one process, or unset WORLD_SIZE",
            )
        ]
