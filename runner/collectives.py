"""Collectives over nested values: containers keep their types, tensors may differ in length between processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from copy import copy
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, NamedTuple

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


def map_leaves(function: Callable[[Any], Any], value: Any, whole: Callable[[Any], bool] | None = None) -> Any:
    """`map_tensors` for every leaf, whatever it is; a container for which `whole` is true counts as one."""
    inside = None if whole is not None and whole(value) else _opened(value)
    if inside is None:
        return function(value)
    parts, rebuilt = inside
    return rebuilt([map_leaves(function, item, whole) for item in parts.values()])


def _opened(value: Any) -> tuple[dict[str, Any], Callable[[list[Any]], Any]] | None:
    """(what a container holds, by how one gets there; what makes the same container of other items), or None."""
    if isinstance(value, Mapping):
        return {f"[{key!r}]": item for key, item in value.items()}, partial(refilled, value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {f".{name}": getattr(value, name) for name in value._fields}, lambda items: type(value)(*items)
    if isinstance(value, (list, tuple)):
        return {f"[{number}]": item for number, item in enumerate(value)}, type(value)
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value) if field.init]
        changed = {f".{name}": getattr(value, name) for name in names}
        return changed, lambda items: replace(value, **dict(zip(names, items, strict=True)))
    return None


def refilled(mapping: Mapping[Any, Any], items: list[Any]) -> Any:
    """A mapping of the same type and keys with other values; a dictionary for one of a type that cannot be changed."""
    filled = dict(zip(mapping, items, strict=True))
    if type(mapping) is dict or not isinstance(mapping, MutableMapping):
        return filled
    # A class of its own (OrderedDict, a model's output): a copy whose items are replaced.
    other: Any = copy(mapping)
    for key, item in filled.items():
        other[key] = item
    return other


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

    A tensor of shape (n, ...) becomes (n_0 + n_1 + ..., ...), where the n may differ; one of shape (), or a number
    given by itself, becomes (processes,). Numbers inside of containers, strings and None stay this process's own.

    Example:
        gather({"logits": logits})["logits"]  # (processes * batch, classes)

    Raises InputError, on all processes alike, where their structures, shapes or types do not go together.
    """
    value = _as_tensor(value)
    plans = _plans(value)
    if not any(plans):
        why = f"there is no tensor in a {type(value).__name__}"
        raise wrong("gather", why, "gather_object gathers any Python object")
    return _joined("gather", value, plans)


def gather_either(value: Any, objects: Any) -> Any:
    """`gather` of a nested value that holds tensors, or `gather_object` of `objects` where no process has any.

    Which of them is decided by what all processes have, and so is the same on all.
    """
    plans = _plans(value)
    return _joined("gather_for_metrics", value, plans) if any(plans) else gather_object(objects)


def _as_tensor(value: Any) -> Any:
    return torch.tensor(value) if isinstance(value, (bool, int, float)) else value


class _Spec(NamedTuple):
    """A tensor as the other processes need to know it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        where = "" if self.device == "cpu" else f" on {self.device}"
        return f"{list(self.shape)} {str(self.dtype)[6:]}{where}"


def _plans(value: Any) -> list[dict[str, _Spec]]:
    """What tensors each process has, and where in its value: one exchange, after which all decide alike."""
    found = {path: _Spec(tuple(one.shape), one.dtype, one.device.type) for path, one in _placed(value).items()}
    return distributed.gather(found)


def _placed(value: Any, path: str = "") -> dict[str, Tensor]:
    """The tensors of a nested value by their places, such as "['boxes'][0]"."""
    if isinstance(value, Tensor):
        return {path: value}
    inside = _opened(value)
    if inside is None:
        return {}
    return {name: one for step, item in inside[0].items() for name, one in _placed(item, path + step).items()}


def _check_alike(
    word: str, plans: list[dict[str, _Spec]], kind: Callable[[_Spec], Any], rule: str, fixes: tuple[str, str]
) -> None:
    """Raises InputError, naming the processes, where their tensors lie elsewhere or are not of one kind.

    Args:
        kind: what of a tensor must be the same on all.
        rule: what to say where it is not.
        fixes: what to do where tensors are missing on some process, and where kinds differ.
    """
    odd = []
    missing = False
    for path in {path: None for plan in plans for path in plan}:
        found = [plan.get(path) for plan in plans]
        if len({None if spec is None else kind(spec) for spec in found}) > 1:
            missing = missing or None in found
            odd.append(f"{path}{': ' if path else ''}{_told(found)}")
    if odd:
        more = f"; and {len(odd) - 3} more" if len(odd) > 3 else ""
        said = "the processes' values must hold tensors in the same places" if missing else rule
        raise wrong(word, f"{said} ({'; '.join(odd[:3])}{more})", fixes[0] if missing else fixes[1])


def _told(found: list[_Spec | None]) -> str:
    """Which processes have what."""
    ranks: dict[str, list[str]] = {}
    for rank, spec in enumerate(found):
        ranks.setdefault("nothing" if spec is None else str(spec), []).append(str(rank))
    return "; ".join(f"process{'es' * (len(who) > 1)} {', '.join(who)}: {what}" for what, who in ranks.items())


def _joined(word: str, value: Any, plans: list[dict[str, _Spec]]) -> Any:
    """The gathered value, once it is sure that the processes' tensors go together."""
    objects = "gather_object, or gather_for_metrics(value, use_gather_object=True), takes lists of any objects"
    padded = "pad_across_processes(value, dim=1) makes another dimension alike"
    rule = "the processes' tensors may differ in dimension 0 only"
    _check_alike(
        word, plans, lambda spec: (max(1, len(spec.shape)), spec.shape[1:], *spec[1:]), rule, (objects, padded)
    )
    tensors = _placed(value)
    # In one order on all: that of the first process, whose dictionaries may be in another.
    whole = {path: _gathered(tensors[path], [plan[path].shape for plan in plans]) for path in plans[0]}
    results = iter([whole[path] for path in tensors])
    return map_tensors(lambda _: next(results), value)


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
    """Every tensor and number of a nested value, added up (or mean, max, min) over the processes, on all of them.

    Shapes and types stay, but for sums of bool (int64) and means of integers (float32); numbers give numbers.

    Example:
        reduce(torch.tensor(3.0), "mean")  # 0-d
        reduce({"correct": 7, "loss": 0.5})  # {"correct": 14, "loss": 1.0} with the same on two processes

    Args:
        reduction: "sum", "mean", "max" or "min".
        scale: the result is multiplied with it.
    """
    if reduction not in REDUCTIONS:
        raise wrong("reduction", "is none that is known", f"one of {', '.join(REDUCTIONS)}", value=reduction)

    def reduced(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return _reduced(leaf, reduction, scale)
        if not isinstance(leaf, (bool, int, float)):
            return leaf
        # In double precision, which is what Python's numbers have.
        exact = torch.float64 if isinstance(leaf, float) or reduction == "mean" else None
        return _reduced(torch.tensor(leaf, dtype=exact), reduction, scale).item()

    return map_leaves(reduced, value)


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
    plans = _plans(value)
    rule = "the processes' tensors must have the same number of dimensions"
    objects = "gather_object gathers lists of any objects"
    _check_alike("pad_across_processes", plans, lambda spec: len(spec.shape), rule, (objects, "give such"))

    def longest(path: str) -> int:
        return max(
            plan[path].shape[dim] if -len(plan[path].shape) <= dim < len(plan[path].shape) else -1 for plan in plans
        )

    sizes = iter([longest(path) for path in _placed(value)])
    return map_tensors(lambda tensor: _padded(tensor, next(sizes), dim, pad_index, pad_first), value)


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

    def column(one: Any) -> bool:
        return isinstance(one, list) and len(one) == rows and not any(isinstance(item, Tensor) for item in one)

    def piece(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[start:stop].clone() if leaf.dim() and leaf.shape[0] == rows else leaf
        return leaf[start:stop] if column(leaf) else leaf

    return map_leaves(piece, value, column)
