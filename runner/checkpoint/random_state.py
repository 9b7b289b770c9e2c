"""The states of the process-wide random generators, of every process."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from runner import distributed, shares
from runner.checkpoint.tree import join, split

log = logging.getLogger(__name__)

#: numpy's global generator, as far as it is the usual one.
_WORDS = 624


class RandomState:
    """The generators of torch (CPU and every CUDA device in use), of Python, and of numpy where that is used.

    Each process saves its own, as a row of a few small tensors, and takes it back. To be loaded last: making a data
    iterator, for one, draws from them. They cannot follow another number of processes, which is said once; devices
    that were not there keep their own state. Training draws from generators that are seeded anew at each step, so it
    does not depend on any of this; code of the user's that draws elsewhere may. All processes call the same words.
    """

    def state_dict(self) -> dict[str, Any]:
        version, words, gauss = random.getstate()
        return {
            "torch": shares.row(torch.get_rng_state()),
            "cuda": _cuda_states(),
            "python": {"version": version, "words": _integers(words), "gauss": _maybe(gauss)},
            "numpy": _numpy_state(),
        }

    def template(self, saved: Any) -> Any:
        """Tensors to be filled with this process's rows, where there are as many processes."""
        document, tensors = split(saved)
        return join(document, lambda name: shares.empty(tensors[name].shape, tensors[name].dtype))

    def load_state_dict(self, state: Any) -> None:
        """Raises KeyError or ValueError for what `state_dict` did not return."""
        before, now = len(state["torch"]), distributed.world_size()
        if before != now:
            if distributed.rank() == 0:
                log.info(
                    "random states of %d processes cannot follow to %d; training does not need them (its generators "
                    "are seeded at each step), only code that draws at other times begins anew",
                    before,
                    now,
                )
            return
        python = state["python"]
        there, value = _mine(python["gauss"]).tolist()
        random.setstate((python["version"], tuple(_mine(python["words"]).tolist()), value if there else None))
        torch.set_rng_state(_mine(state["torch"]))
        _set_cuda_states(state["cuda"])
        _set_numpy_state(state["numpy"])


def _mine(rows: Tensor) -> Tensor:
    """This process's row, in memory of its own."""
    own = shares.own(rows)
    return own[0 if len(own) == 1 else distributed.rank()].clone()


def _integers(values: Any) -> Tensor:
    return shares.row(torch.tensor(values, dtype=torch.int64))


def _maybe(value: float | None) -> Tensor:
    """(whether there is a number, the number)."""
    return shares.row(torch.tensor([value is not None, value or 0.0], dtype=torch.float64))


def _cuda_states() -> dict[str, Tensor] | None:
    """Asked only where CUDA is in use, which looking at it would begin; processes may see different numbers of them."""
    states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    most = max(distributed.gather([len(states), *(len(one) for one in states[:1])]))
    if most == [0]:
        return None
    padded = torch.zeros(*most, dtype=torch.uint8)
    for number, one in enumerate(states):
        padded[number] = one
    return {"states": shares.row(padded), "devices": _integers([len(states)])}


def _set_cuda_states(saved: Mapping[str, Tensor] | None) -> None:
    if saved is None or not torch.cuda.is_available():
        return
    states, known = _mine(saved["states"]), int(_mine(saved["devices"]))
    for device in range(min(known, torch.cuda.device_count())):
        torch.cuda.set_rng_state(states[device], device)


def _numpy_state() -> dict[str, Tensor]:
    """In the same form whether or not numpy is used, which may differ between the processes."""
    words, position, has_gauss, gauss = [0] * _WORDS, -1, 0, 0.0
    if "numpy.random" in sys.modules:
        import numpy

        state: Any = numpy.random.get_state(legacy=False)
        if state["bit_generator"] == "MT19937":
            words, position = state["state"]["key"].tolist(), state["state"]["pos"]
            has_gauss, gauss = state["has_gauss"], state["gauss"]
    return {"words": _integers([*words, position]), "gauss": _maybe(gauss if has_gauss else None)}


def _set_numpy_state(saved: Mapping[str, Tensor]) -> None:
    *words, position = _mine(saved["words"]).tolist()
    if position < 0:
        return
    import numpy

    there, gauss = _mine(saved["gauss"]).tolist()
    numpy.random.set_state(("MT19937", numpy.array(words, dtype=numpy.uint32), position, int(there), gauss))
