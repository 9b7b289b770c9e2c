"""Collectives over nested values: containers keep their types, tensors may differ in length between processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runner import distributed
from runner.errors import wrong

REDUCTIONS = ("sum", "mean", "max", "min")


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The same nested value with `function(tensor)` in the place of each tensor; other leaves stay.

    Dictionaries, lists, tuples, named tuples, dataclasses and mappings of a class of their own keep their types.
    """
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, value)


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """`map_tensors` for every leaf, whatever it is."""
    if isinstance(value, Mapping):
        items = {key: map_leaves(function, item) for key, item in value.items()}
        if type(value) is dict:
            return items
        # A class of its own (OrderedDict, a model's output): a copy whose items are replaced.
        filled: Any = copy(value)
        for key, item in items.items():
            filled[key] = item
        return filled
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_leaves(function, item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_leaves(function, item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: map_leaves(function, getattr(value, f.name)) for f in fields(value) if f.init}
        return replace(value, **changed)
    return function(value)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a nested value, in the order in which `map_tensors` meets them."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    return found


def gather(value: Any) -> Any:
    """Every tensor of a nested value, concatenated along dimension 0 over the processes in rank order.

    A tensor of shape (n, ...) becomes (n_0 + n_1 + ..., ...), where the n may differ; one of shape () becomes
    (processes,). Numbers, strings and None stay this process's own.

    Example:
        gather({"logits": logits})["logits"]  # (processes * batch, classes)

    Raises InputError, on all processes alike, where shapes or types do not go together.
    """
    tensors = tensors_in(value)
    if not tensors:
        why = f"there is no tensor in a {type(value).__name__}"
        raise wrong("gather", why, "gather_object gathers any Python object")
    known = distributed.gather([(tuple(tensor.shape), tensor.dtype) for tensor in tensors])
    _check_alike(known)
    whole = iter(_gathered(tensor, [shapes[i][0] for shapes in known]) for i, tensor in enumerate(tensors))
    return map_tensors(lambda _: next(whole), value)


def _check_alike(known: list[list[tuple[tuple[int, ...], torch.dtype]]]) -> None:
    """Raises InputError where the processes' tensors differ in number, type, or in another dimension than 0."""
    first = [(max(1, len(shape)), shape[1:], dtype) for shape, dtype in known[0]]
    if all([(max(1, len(shape)), shape[1:], dtype) for shape, dtype in shapes] == first for shapes in known):
        return
    each = "; ".join(
        f"process {rank}: {', '.join(f'{list(shape)} {str(dtype)[6:]}' for shape, dtype in shapes)}"
        for rank, shapes in enumerate(known)
    )
    why = f"the processes' tensors may differ in dimension 0 only ({each})"
    raise wrong("gather", why, "pad_across_processes(value, dim=1) makes another dimension alike")


def _gathered(tensor: Tensor, shapes: list[tuple[int, ...]]) -> Tensor:
    if len(shapes) == 1:
        return tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()
    rows = [shape[0] if shape else 1 for shape in shapes]
    inner = tuple(tensor.shape[1:])
    size = tensor.element_size() * _product(inner)
    # As bytes: any type, any backend; the shorter ones are filled up to the longest.
    sent = torch.zeros(max(rows) * size, dtype=torch.uint8, device=tensor.device)
    own = _as_bytes(tensor)
    sent[: own.numel()] = own
    parts = [torch.empty_like(sent) for _ in rows]
    if sent.numel():
        dist.all_gather(parts, sent)
    pieces = [
        part[: count * size].view(tensor.dtype).reshape(count, *inner) for part, count in zip(parts, rows, strict=True)
    ]
    return torch.cat(pieces)


def _as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor, a copy of that of another, as one row of bytes."""
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    if flat.stride(0) != 1:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def _product(sizes: tuple[int, ...]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def gather_object(value: Any) -> list[Any]:
    """Every process's object in rank order; where all gave lists or tuples, these joined into one list.

    Objects are pickled between the job's own processes.

    Example:
        gather_object([f"process {rank}"])  # ["process 0", "process 1"]
    """
    found = distributed.gather(value)
    if all(isinstance(item, (list, tuple)) for item in found):
        return [entry for item in found for entry in item]
    return found


def broadcast(value: Any, source: int = 0) -> Any:
    """The nested value of process `source` on every process: tensors as tensors, everything else pickled.

    What the other processes pass is not looked at, so it may be None.

    Example:
        broadcast({"weights": torch.randn(3), "name": "a"} if main else None)
    """
    if distributed.world_size() == 1:
        return value
    here = distributed.rank() == source
    tensors = tensors_in(value) if here else []
    plan = map_tensors(_Stub.of, value) if here else None
    plan = distributed.broadcast(plan, source)
    sent = iter(tensors)

    def filled(leaf: Any) -> Any:
        if not isinstance(leaf, _Stub):
            return leaf
        tensor = next(sent) if here else leaf.empty()
        if tensor.numel():
            dist.broadcast(_as_bytes(tensor), source)
        return tensor

    return map_leaves(filled, plan)


class _Stub:
    """The shape, type and kind of device of a tensor that travels by itself."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    @classmethod
    def of(cls, tensor: Tensor) -> _Stub:
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device.type)

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


def reduce(value: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
    """Every tensor of a nested value, added up (or mean, max, min) over the processes; the result is on all of them.

    Shapes and types stay, but for sums of bool (int64) and means of integers (float32).

    Example:
        reduce(torch.tensor(3.0), "mean")  # 0-d

    Args:
        reduction: "sum", "mean", "max" or "min".
        scale: the result is multiplied with it.
    """
    if reduction not in REDUCTIONS:
        raise wrong("reduction", "is none that is known", f"one of {', '.join(REDUCTIONS)}", value=reduction)
    return map_tensors(lambda tensor: _reduced(tensor, reduction, scale), value)


def _reduced(tensor: Tensor, reduction: str, scale: float) -> Tensor:
    whole = tensor.detach()
    if whole.dtype == torch.bool:
        whole = whole.long() if reduction == "sum" else whole.float() if reduction == "mean" else whole.byte()
    elif not whole.is_floating_point() and not whole.is_complex() and reduction == "mean":
        whole = whole.float()
    elif whole.dtype in (torch.bfloat16, torch.float16):
        whole = whole.float()  # added up in float32, whatever the backend would do
    whole = whole.clone(memory_format=torch.contiguous_format)
    if distributed.world_size() > 1 and whole.numel():
        operation = {"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}.get(reduction, dist.ReduceOp.SUM)
        dist.all_reduce(whole, operation)
    if reduction == "mean":
        whole /= distributed.world_size()
    if scale != 1.0:
        whole = whole * scale
    keeps = tensor.is_floating_point() or (tensor.dtype == torch.bool and reduction in ("max", "min"))
    return whole.to(tensor.dtype) if keeps else whole


def pad_across_processes(value: Any, dim: int = 0, pad_index: float = 0, pad_first: bool = False) -> Any:
    """Every tensor filled up along `dim` to the longest over the processes, with `pad_index`, at the end or start.

    A tensor that has no such dimension stays as it is.

    Example:
        pad_across_processes(token_ids, dim=1, pad_index=tokenizer.pad_token_id)  # (batch, longest)
    """
    tensors = tensors_in(value)
    sizes = [tensor.shape[dim] if -tensor.dim() <= dim < tensor.dim() else -1 for tensor in tensors]
    longest = iter([max(column) for column in zip(*distributed.gather(sizes), strict=True)])
    return map_tensors(lambda tensor: _padded(tensor, next(longest), dim, pad_index, pad_first), value)


def _padded(tensor: Tensor, size: int, dim: int, pad_index: float, pad_first: bool) -> Tensor:
    if size < 0 or tensor.shape[dim] == size:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    padding = tensor.new_full(shape, pad_index)
    return torch.cat([padding, tensor] if pad_first else [tensor, padding], dim=dim)


def scatter_object(values: list[Any] | None, source: int = 0) -> Any:
    """Process r gets `values[r]` of process `source`, pickled between the job's own processes."""
    if distributed.world_size() == 1:
        assert values is not None
        return values[0]
    box: list[Any] = [None]
    dist.scatter_object_list(box, values if distributed.rank() == source else None, source)
    return box[0]


def cut(value: Any, rows: int, start: int, stop: int) -> Any:
    """Rows start to stop of every tensor, and of every list of leaves, that has `rows` of them; the rest whole."""
    if isinstance(value, list) and len(value) == rows and not any(isinstance(item, Tensor) for item in value):
        return value[start:stop]
    if isinstance(value, Tensor):
        return value[start:stop].clone() if value.dim() and value.shape[0] == rows else value
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(cut(item, rows, start, stop) for item in value)
    if isinstance(value, tuple):
        return type(value)(*(cut(item, rows, start, stop) for item in value))
    if isinstance(value, Mapping):
        items = {key: cut(item, rows, start, stop) for key, item in value.items()}
        if type(value) is dict:
            return items
        filled: Any = copy(value)
        for key, item in items.items():
            filled[key] = item
        return filled
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: cut(getattr(value, f.name), rows, start, stop) for f in fields(value) if f.init}
        )
    return value
