"""TensorBoard event files."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes every number of every record as SPLIT/NAME into RUN/tensorboard.

    The writer is imported with the first record, so that the first training step does not wait for it.
    """

    def __init__(self, folder: str = "tensorboard") -> None:
        self._name = folder
        self._writer: Any = None

    def start(self, folder: Path, step: int, config: Mapping[str, Any]) -> None:
        if find_spec("tensorboard") is None:
            raise ModuleNotFoundError("the package tensorboard is not installed (pip install tensorboard)")
        self._folder = folder / self._name
        self._folder.mkdir(exist_ok=True)
        self._purge = step + 1 if step else None

    def log(self, record: Mapping[str, Any]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge)
        split = record["split"]
        for name, value in record.items():
            if name not in ("split", "step") and isinstance(value, (int, float)):
                self._writer.add_scalar(f"{split}/{name}", value, record["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
