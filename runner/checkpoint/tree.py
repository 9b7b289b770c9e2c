"""A nested state as two things: named tensors, and a JSON document that says where each of them belongs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from runner.errors import RunnerError

# What JSON cannot say is an object of one key that begins with "$". A dictionary that has such a key itself, or one
# that is not a string, is written as "$dict", a list of pairs.
_TENSOR, _FLOAT, _TUPLE, _DICT = "$tensor", "$float", "$tuple", "$dict"
_FIX = "return tensors, numbers, strings, booleans, None, and lists, tuples and dictionaries of them"


def split(value: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """(document, tensors): plain JSON, and the tensors by their path such as `model/layers.0.weight`.

    Floats keep every bit (NaN, infinity and -0.0 too), integers any size, tuples and the type of dictionary keys;
    subclasses (OrderedDict, named tuples, torch.Size) come back as their plain type.

    Raises RunnerError, naming the path, for anything else, bytes included.
    """
    tensors: dict[str, Tensor] = {}
    return _encode(value, path, tensors), tensors


def join(document: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The nested state that `split` took apart, with `tensor(path)` at the place of each tensor."""
    if isinstance(document, list):
        return [join(item, tensor) for item in document]
    if not isinstance(document, dict):
        return document
    if len(document) == 1:
        ((word, content),) = document.items()
        if word == _TENSOR:
            return tensor(content)
        if word == _FLOAT:
            return float(content)
        if word == _TUPLE:
            return tuple(join(item, tensor) for item in content)
        if word == _DICT:
            return {join(key, tensor): join(item, tensor) for key, item in content}
    return {key: join(item, tensor) for key, item in document.items()}


def tensors_of(value: Any, path: str = "") -> dict[str, Tensor]:
    """The tensors of a nested state by their path."""
    return split(value, path)[1]


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {_FLOAT: repr(float(value))}
    if isinstance(value, Tensor):
        _check(value, path)
        if path in tensors:
            raise RunnerError(f"cannot save `{path}`: two keys of one dictionary read the same")
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        return _encode_mapping(value, path, tensors)
    if isinstance(value, list | tuple):
        items = [_encode(item, _below(path, index), tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    raise RunnerError(f"cannot save `{path}`: a value of type {_type_name(value)}; {_FIX}")


def _encode_mapping(value: Mapping[Any, Any], path: str, tensors: dict[str, Tensor]) -> Any:
    for key in value:
        if key is not None and not isinstance(key, bool | int | float | str):
            raise RunnerError(f"cannot save `{path}`: a dictionary key of type {_type_name(key)}; use strings")
    items = {key: _encode(item, _below(path, key), tensors) for key, item in value.items()}
    if all(isinstance(key, str) and not key.startswith("$") for key in items):
        return items
    return {_DICT: [[_encode(key, path, tensors), item] for key, item in items.items()]}


def _check(tensor: Tensor, path: str) -> None:
    if tensor.layout != torch.strided:
        raise RunnerError(f"cannot save `{path}`: a tensor of layout {tensor.layout}; save its dense parts")
    if tensor.is_quantized:
        raise RunnerError(f"cannot save `{path}`: a quantized tensor; save its integers and scales")


def _below(path: str, key: object) -> str:
    # As in JSON pointers, so that a "/" within a key cannot make two paths the same.
    word = str(key).replace("~", "~0").replace("/", "~1")
    return f"{path}/{word}" if path else word


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
