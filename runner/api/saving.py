"""What is written for others: a model's weights as safetensors, in pieces where they are large; single objects."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runner import shares
from runner.errors import wrong

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def whole_state(model: nn.Module) -> dict[str, Any]:
    """A model's state under its own names, shards put together (all processes take part); nothing is copied twice."""
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }


def all_names(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A model's whole state from one that has the same values in the same order, but tied ones once."""
    values, known = iter(state.values()), {}
    found = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or id(value) not in known:
            known[id(value)] = shares.whole(next(values))
        found[name] = known[id(value)]
    return found


def save_weights(state: Mapping[str, Any], folder: Path, max_shard_size: int | str, safe: bool) -> list[Path]:
    """Writes `model.safetensors`, or `model-00001-of-00003.safetensors` and so on with an index, and returns them.

    Tensors that share memory (tied weights) are written once, under the first name.
    """
    pieces = _pieces(_written_once(state), _bytes(max_shard_size))
    kind = "safetensors" if safe else "bin"
    folder.mkdir(parents=True, exist_ok=True)
    stem = "model" if safe else "pytorch_model"
    written = []
    where: dict[str, str] = {}
    for number, piece in enumerate(pieces, 1):
        name = f"{stem}.{kind}" if len(pieces) == 1 else f"{stem}-{number:05d}-of-{len(pieces):05d}.{kind}"
        written.append(folder / name)
        _replaced(folder / name, partial(save_file, piece, safe=safe))
        where |= dict.fromkeys(piece, name)
    index = folder / f"{stem}.{kind}.index.json"
    if len(pieces) > 1:
        size = sum(_size(tensor) for piece in pieces for tensor in piece.values())
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2, sort_keys=True)
        _replaced(index, lambda path: path.write_text(text + "\n", encoding="utf-8"))
        written.append(index)
    for old in folder.glob(f"{stem}*"):
        if old not in written and re.fullmatch(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.{kind}(\.index\.json)?", old.name):
            old.unlink()
    return written


def save_file(value: Any, path: Path, *, safe: bool) -> None:
    """One object: a mapping of tensors as safetensors, or anything by torch.save."""
    if not safe:
        torch.save(value, path)
        return
    from safetensors.torch import save_file as save_safely

    if not isinstance(value, Mapping) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        raise wrong("save", "safetensors hold a mapping of names to tensors only", "safe_serialization=False")
    save_safely({name: tensor.detach().contiguous() for name, tensor in value.items()}, path, {"format": "pt"})


def save_object(value: Any, path: Path, *, safe: bool) -> None:
    """`save_file` into a file that appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replaced(path, lambda temporary: save_file(value, temporary, safe=safe))


def _replaced(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _written_once(state: Mapping[str, Any]) -> dict[str, Tensor]:
    seen: set[tuple[Any, ...]] = set()
    kept = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        place = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if value.numel() and place in seen:
            continue
        seen.add(place)
        # Views of one memory cannot be told apart by the format; a copy of each can.
        kept[name] = (
            value.detach() if value.numel() * value.element_size() == _memory(value) else value.detach().clone()
        )
    return kept


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _pieces(state: Mapping[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    pieces: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if pieces[-1] and size + _size(tensor) > most:
            pieces.append({})
            size = 0
        pieces[-1][name] = tensor
        size += _size(tensor)
    return pieces


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(size: int | str) -> int:
    if isinstance(size, int) and size > 0:
        return size
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?)B", str(size).upper())
    if found is None or found[2] not in _UNITS or not float(found[1]):
        raise wrong("max_shard_size", "is no size", 'a number of bytes, or one such as "5GB" or "200MB"', value=size)
    return int(float(found[1]) * _UNITS[found[2]])
