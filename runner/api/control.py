"""Who does what: the first process before the others, functions of one process, inputs split among all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from runner import collectives, distributed
from runner.errors import wrong


@contextmanager
def goes_first(first: bool) -> Iterator[None]:
    """The block runs on the processes that go first, then, also when it raised there, on the others."""
    if not first:
        distributed.barrier()
    try:
        yield
    finally:
        if first:
            distributed.barrier()


def only(here: Callable[[], bool], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs where `here()` is true, and elsewhere does nothing and returns None."""

    @wraps(function)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if here() else None

    return chosen


def split(inputs: Any, rank: int, world: int, padding: bool) -> Any:
    """Process `rank`'s part of a list, range, array, tensor, data set or mapping of such; the first ones get the rest.

    With `padding` the last item is repeated until all parts are as long as the first.
    """
    if world == 1:
        return inputs
    if isinstance(inputs, Mapping):
        lengths = {len(value) for value in inputs.values()}
        if len(lengths) > 1:
            why = f"the values of the {type(inputs).__name__} have different lengths: {sorted(lengths)}"
            raise wrong("split_between_processes", why, "give values of one length")
        return collectives.refilled(inputs, [split(value, rank, world, padding) for value in inputs.values()])
    if not isinstance(inputs, Sized):
        why = f"a {type(inputs).__name__} has no length"
        raise wrong("split_between_processes", why, "give a list, tuple, mapping, array, tensor or data set")
    each, over = divmod(len(inputs), world)
    start = rank * each + min(rank, over)
    stop = start + each + (rank < over)
    missing = each + (over > 0) - (stop - start) if padding else 0
    if isinstance(inputs, Tensor):
        own = inputs[start:stop]
        last = inputs[-1:].expand(missing, *inputs.shape[1:]) if len(inputs) else inputs
        return torch.cat([own, last]) if missing else own
    sequence: Any = inputs
    if isinstance(inputs, range):
        return [*inputs[start:stop], *[*inputs[-1:]] * missing] if missing else inputs[start:stop]
    if isinstance(inputs, (list, tuple, str, bytes)):
        return sequence[start:stop] + sequence[-1:] * missing
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(inputs, numpy.ndarray):
        return numpy.concatenate([inputs[start:stop], *[inputs[-1:]] * missing])
    indices = [*range(start, stop), *([len(inputs) - 1] * missing if len(inputs) else [])]
    # A Hugging Face data set stays one; any other becomes a view of these samples.
    return inputs.select(indices) if hasattr(inputs, "select") else torch.utils.data.Subset(inputs, indices)  # type: ignore[arg-type]


def kept(value: Any, size: int | None, real: int | None) -> Any:
    """What belongs to the first `real` of a batch's `size` samples, in every tensor and list of a nested value.

    A tensor with several rows for each sample keeps theirs; one without dimension 0 stays, unless no sample is real.
    """
    if real is None or (real == size and size is not None):
        return value
    return collectives.map_tensors(lambda tensor: _kept(tensor, size, real), value)


def _kept(tensor: Tensor, size: int | None, real: int) -> Tensor:
    if tensor.dim() == 0:
        return tensor if real else tensor.reshape(1)[:0]
    rows = tensor.shape[0]
    if not size or rows % size:
        return tensor if real else tensor[:0]
    return tensor[: real * (rows // size)]


def kept_items(items: Any, size: int | None, real: int) -> Any:
    """The same for a list or tuple of objects, one for each sample."""
    if not size or len(items) % size:
        return items if real else items[:0]
    return items[: real * (len(items) // size)]
