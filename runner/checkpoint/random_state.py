"""The states of the process-wide random generators."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


class RandomState:
    """The generators of torch (CPU and every CUDA device), of Python, and of numpy where that is used.

    To be loaded last: making a data iterator, for one, draws from them. They belong to one process and cannot follow
    another number of processes or devices; devices that were not there keep their own state.
    """

    def state_dict(self) -> dict[str, Any]:
        version, words, gauss = random.getstate()
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
            "numpy": _numpy_state(),
        }

    def load_state_dict(self, state: Any) -> None:
        """Raises KeyError or ValueError for what `state_dict` did not return."""
        python = state["python"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available():
            for device in range(min(len(state["cuda"]), torch.cuda.device_count())):
                torch.cuda.set_rng_state(state["cuda"][device], device)
        if state["numpy"] is not None:
            _set_numpy_state(state["numpy"])


def _numpy_state() -> dict[str, Any] | None:
    if "numpy.random" not in sys.modules:
        return None
    import numpy

    state: Any = numpy.random.get_state()
    kind, words, position, has_gauss, gauss = state
    numbers = torch.from_numpy(words.astype(numpy.int64))
    return {"kind": kind, "words": numbers, "position": position, "has_gauss": has_gauss, "gauss": gauss}


def _set_numpy_state(state: Any) -> None:
    import numpy

    words = state["words"].numpy().astype(numpy.uint32)
    numpy.random.set_state((state["kind"], words, state["position"], state["has_gauss"], state["gauss"]))
