"""Builds a model of which this process keeps only its part of each parameter, with the values of an ordinary build.

While the user's function builds the model, a parameter that is registered with a module is whole at first. When other
parameters come, the oldest are cut down to this process's rows. What runs on a parameter afterwards runs on the whole
of it where it overwrites it anyway (`normal_`, `copy_`: all random numbers are drawn, so the generator goes on as it
would), and on the rows where each element stands for itself (`mul_`, `to`). Where something needs values that are gone,
the model is built again in the ordinary way. So there is no second set of rules for initialisation: either the same
operations run on the same numbers, or the ordinary build does.
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from runner.errors import RunnerError

#: Smaller parameters stay whole until the model is placed (bytes).
LEAST = 2**20
#: How much of whole parameters may be held beside the one at hand (bytes).
ROOM = 2**26

_aten = torch.ops.aten
#: What replaces every element of its first argument without looking at it.
_OVERWRITES = {
    _aten.normal_.default,
    _aten.uniform_.default,
    _aten.zero_.default,
    _aten.fill_.Scalar,
    _aten.fill_.Tensor,
    _aten.copy_.default,
    _aten.random_.default,
    _aten.random_.to,
    getattr(_aten.random_, "from"),
    _aten.bernoulli_.float,
    _aten.exponential_.default,
    _aten.log_normal_.default,
    _aten.cauchy_.default,
    _aten.geometric_.default,
}
#: What makes each element from the same element and numbers, in place or as a new tensor.
_ELEMENTWISE = {
    *(_aten.mul_.Tensor, _aten.mul_.Scalar, _aten.mul.Tensor, _aten.mul.Scalar),
    *(_aten.div_.Tensor, _aten.div_.Scalar, _aten.div.Tensor, _aten.div.Scalar),
    *(_aten.add_.Tensor, _aten.add_.Scalar, _aten.add.Tensor, _aten.add.Scalar),
    *(_aten.sub_.Tensor, _aten.sub_.Scalar, _aten.sub.Tensor, _aten.sub.Scalar),
    *(_aten.clamp_.default, _aten.erfinv_.default, _aten.neg_.default, _aten.abs_.default),
    *(_aten.clone.default, _aten._to_copy.default),
}
_ALIASES = {_aten.detach.default, _aten.alias.default}
#: What looks at shape and type only.
_SHAPES = {
    *(_aten.new_empty.default, _aten.new_zeros.default, _aten.new_ones.default, _aten.new_full.default),
    *(_aten.empty_like.default, _aten.zeros_like.default, _aten.ones_like.default, _aten.full_like.default),
    *(_aten.rand_like.default, _aten.randn_like.default, _aten.new_empty_strided.default),
}


@dataclass(frozen=True)
class Rows:
    """Which rows of every parameter are this process's: the `index`th of `count` equal parts, the last ones smaller."""

    index: int
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        size = -(-tensor.size(0) // self.count)
        start = min(self.index * size, tensor.size(0))
        return tensor[start : min(start + size, tensor.size(0))]


@dataclass
class Built:
    """A model, and this process's rows of those of its parameters that are on the meta device.

    `whole` says why all of the model was held at once, where it was.
    """

    model: nn.Module
    rows: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    whole: str | None = None


def build_in_parts(build: Callable[[], nn.Module], rows: Rows, least: int = LEAST, room: int = ROOM) -> Built:
    """Calls `build`; once more, in the ordinary way, where it does what cannot be done on a part of a parameter."""
    if rows.count == 1:
        return Built(build())
    before = _random_state()
    store = _Store(rows, least, room)
    try:
        with _registering(store):
            model = build()
        return store.finish(model)
    except RunnerError:
        raise  # of the user's input: it would be the same again
    except Exception as error:
        # Whatever it was: the ordinary build decides whether it is an error.
        why = store.failed or f"{type(error).__name__}: {error}"
    store.closed = True
    _set_random_state(before)
    return Built(build(), whole=why)


class _NeedsWhole(Exception):
    """An operation needs all of a parameter that was cut."""


class _Cell:
    """A parameter's value: the whole, or this process's rows of it."""

    def __init__(self, store: _Store, whole: Tensor | None, part: Tensor | None, like: Tensor) -> None:
        self.store, self.whole, self.part = store, whole, part
        self.shape, self.dtype = like.shape, like.dtype
        self.bytes = like.numel() * like.element_size()


class _Store:
    """All values of one build, the ones used last at the end."""

    def __init__(self, rows: Rows, least: int, room: int) -> None:
        self.rows, self.least, self.room = rows, least, room
        self.whole: OrderedDict[int, _Cell] = OrderedDict()
        self.failed: str | None = None
        self.closed = False
        self.lock = RLock()

    def adopt(self, parameter: Any) -> None:
        """Takes the value of a parameter over, which stays the same object."""
        plain = type(parameter) is nn.Parameter and parameter.device.type == "cpu" and parameter.dim() > 0
        if not plain or parameter.grad is not None or not parameter.is_contiguous():
            return
        size, storage = parameter.numel() * parameter.element_size(), parameter.untyped_storage()
        if size < self.least or storage.nbytes() != size or _holders(storage) > 1:
            return
        del storage
        split = _Split(_Cell(self, parameter.detach(), None, parameter), parameter.requires_grad)
        split.__dict__.update(parameter.__dict__)
        try:
            torch.utils.swap_tensors(parameter, split)
        except (RuntimeError, TypeError):
            return
        self.used(parameter._cell)

    def used(self, cell: _Cell) -> None:
        """Moves a whole value to the end and cuts the ones at the front as far as there is no room for them."""
        with self.lock:
            if cell.whole is None:
                return
            self.whole[id(cell)] = cell
            self.whole.move_to_end(id(cell))
            held = sum(other.bytes for other in self.whole.values()) - cell.bytes
            for other in list(self.whole.values())[:-1]:
                if held <= self.room:
                    return
                # Somebody who holds a view of it may write to it later.
                if _holders(other.whole.untyped_storage()) == 1:  # type: ignore[union-attr]
                    other.part, other.whole = self.rows.of(other.whole).clone(), None  # type: ignore[arg-type]
                    del self.whole[id(other)]
                    held -= other.bytes

    def finish(self, model: nn.Module) -> Built:
        """The model with parameters on the meta device in place of those whose rows it gives."""
        self.closed = True
        if self.failed is not None:
            raise _NeedsWhole(self.failed)
        if any(isinstance(buffer, _Split) for buffer in model.buffers()):
            raise _NeedsWhole("a buffer shares its values with a parameter")
        built, made = Built(model), dict[int, nn.Parameter]()
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if not isinstance(parameter, _Split):
                    continue
                if id(parameter) not in made:
                    cell = parameter._cell
                    meta = nn.Parameter(torch.empty(cell.shape, dtype=cell.dtype, device="meta"))
                    meta.requires_grad_(parameter.requires_grad)
                    meta.__dict__.update({k: v for k, v in vars(parameter).items() if k not in ("_cell", "_is_param")})
                    part = cell.part if cell.whole is None else self.rows.of(cell.whole).clone()
                    assert part is not None
                    built.rows[meta] = part
                    cell.part, cell.whole = part, None
                    made[id(parameter)] = meta
                module._parameters[name] = made[id(parameter)]
        self.whole.clear()
        return built


class _Split(Tensor):
    """A parameter during the build: looks like a tensor on the CPU, its value is in a cell."""

    _cell: _Cell

    @staticmethod
    def __new__(cls, cell: _Cell, requires_grad: bool = False, is_param: bool = True) -> _Split:
        made: _Split = Tensor._make_wrapper_subclass(cls, cell.shape, dtype=cell.dtype, requires_grad=requires_grad)
        made._cell = cell
        if is_param:
            made._is_param = True  # type: ignore[attr-defined]  # for isinstance(…, nn.Parameter)
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"Parameter of shape {list(self.shape)}, {self.dtype}, in parts while the model is built"

    def __deepcopy__(self, memo: dict[int, Any]) -> _Split:
        if id(self) not in memo:
            with torch.no_grad():
                copied = self.clone()
            made = _Split(copied._cell, self.requires_grad)  # type: ignore[attr-defined]
            made.__dict__.update({k: v for k, v in vars(self).items() if k != "_cell"})
            memo[id(self)] = made
        return memo[id(self)]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            return _set_data(*args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        splits = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, _Split)]
        store = splits[0]._cell.store
        if func in _ALIASES:
            return _Split(splits[0]._cell, is_param=False)
        if store.closed:
            raise RunnerError("a parameter of the time before the model was sharded is used after it")
        with store.lock:
            first = args[0] if args and isinstance(args[0], _Split) else None
            if first is not None and func in _SHAPES:
                return func(torch.empty(first.shape, dtype=first.dtype), *args[1:], **kwargs)
            for split in splits:
                cell = split._cell
                if cell.whole is not None:
                    continue
                numbers = len(splits) == 1 and all(x.dim() == 0 for x in tree_leaves((args[1:], kwargs)) if _is(x))
                if split is first and func in _OVERWRITES and len(splits) == 1:
                    cell.whole, cell.part = torch.empty(cell.shape, dtype=cell.dtype), None
                elif split is first and func in _ELEMENTWISE and numbers:
                    return _on_rows(func, split, args, kwargs)
                else:
                    store.failed = f"{func} needs all of a parameter of shape {list(split.shape)}"
                    raise _NeedsWhole(store.failed)
            values = tree_map(lambda x: x._cell.whole if isinstance(x, _Split) else x, (args, kwargs))
            found = func(*values[0], **values[1])
            for split in splits:
                store.used(split._cell)
        if first is not None and found is first._cell.whole:
            return first
        copies = func in (_aten.clone.default, _aten._to_copy.default)
        if copies and found.device.type == "cpu" and found.is_contiguous():
            # A copy of a parameter will become one, as its layers are copied or its type changes.
            copied = _Split(_Cell(store, found, None, found), is_param=False)
            store.used(copied._cell)
            return copied
        return found


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


def _on_rows(func: Any, split: _Split, args: Any, kwargs: Any) -> Any:
    cell = split._cell
    found = func(cell.part, *args[1:], **kwargs)
    if found is cell.part:
        return split
    if found.device.type != "cpu" or not found.is_contiguous():
        cell.store.failed = f"{func} moves a part of a parameter"
        raise _NeedsWhole(cell.store.failed)
    like = torch.empty(cell.shape, dtype=found.dtype, device="meta")
    return _Split(_Cell(cell.store, None, found, like), is_param=False)


def _set_data(target: Tensor, value: Tensor) -> None:
    """`target.data = value`, where at least one of them is a _Split: the object stays and takes the other value."""
    if isinstance(value, _Split):
        made: Tensor = _Split(value._cell, target.requires_grad)
        kept = {k: v for k, v in vars(target).items() if k != "_cell"}
    else:
        made = nn.Parameter(value.detach(), requires_grad=target.requires_grad)
        kept = {k: v for k, v in vars(target).items() if k not in ("_cell", "_is_param")}
    made.__dict__.update(kept)
    torch.utils.swap_tensors(target, made)


def _holders(storage: torch.UntypedStorage) -> int:
    """How many tensors hold a storage, beside the Python object that asks."""
    return torch._C._storage_Use_Count(storage._cdata) - 1  # type: ignore[attr-defined]


@contextmanager
def _registering(store: _Store) -> Iterator[None]:
    """Parameters that modules register go to the store."""
    register = nn.Module.register_parameter

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            with store.lock:
                store.adopt(param)
        register(self, name, param)

    nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if (numpy := sys.modules.get("numpy")) is not None:
        state["numpy"] = numpy.random.get_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "numpy" in state:
        sys.modules["numpy"].random.set_state(state["numpy"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
