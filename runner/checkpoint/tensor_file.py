"""A safetensors file, written tensor by tensor.

The library's own writer wants all tensors at once, contiguous, in memory of their own and on the CPU, and does not
tell the number of a failed system call; reading is left to the library.
"""

from __future__ import annotations

import ctypes
import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from runner.checkpoint.synced import Written, synced_file

SUFFIX = ".safetensors"

#: Our name of a type (torch's, without "torch.") -> the name in a safetensors file.
TYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "complex64": "C64",
}


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Piece:
    """One tensor of a file: its key, and how to get it when its turn has come."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    get: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(path: Path, pieces: Sequence[Piece]) -> tuple[int, str]:
    """Writes a new file and syncs it; at most one tensor is copied at a time. Returns the file's size and hash."""
    # Wide types first keeps every tensor aligned to its type, as the library does.
    ordered = sorted(pieces, key=lambda piece: (-piece.dtype.itemsize, piece.key))
    with synced_file(path) as file:
        file.write(_header(ordered))
        for piece in ordered:
            _write_tensor(file, piece)
        return file.size, file.hash


def _header(pieces: Sequence[Piece]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for piece in pieces:
        end = start + piece.bytes
        entries[piece.key] = {
            "dtype": TYPES[type_name(piece.dtype)],
            "shape": piece.shape,
            "data_offsets": (start, end),
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def size_of(pieces: Sequence[Piece]) -> int:
    """The bytes that a file of these will have."""
    return len(_header(pieces)) + sum(piece.bytes for piece in pieces)


def header_bytes(key: str, shape: Sequence[int]) -> int:
    """The most that one tensor takes in a header, where a character may take six bytes (twelve in pairs)."""
    return 12 * len(key) + 32 * len(shape) + 256


def check_header(file: BinaryIO, size: int, expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raises ValueError where a file of `size` bytes does not hold just the `expected` tensors (key -> type, shape).

    Looked at before the library opens the file: its parts must lie side by side and fill the file, and the header is
    not larger than what names these tensors.
    """
    length = int.from_bytes(file.read(8), "little")
    most = 4096 + sum(header_bytes(key, shape) for key, (_, shape) in expected.items())
    if not 2 <= length <= min(most, size - 8):
        raise ValueError(f"its header would have {length:,} bytes")
    text = file.read(length)
    try:
        header = dict(json.loads(text.decode()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"its header cannot be read ({type(error).__name__})") from error
    header.pop("__metadata__", None)
    if header.keys() != expected.keys():
        names = ", ".join(repr(name)[:80] for name in sorted(header.keys() ^ expected.keys())[:3])
        raise ValueError(f"it holds other tensors than the manifest says: {names}")
    places = []
    for key, (dtype, shape) in expected.items():
        try:
            entry = header[key]
            start, end = entry["data_offsets"]
            right = entry["dtype"] == TYPES[dtype] and tuple(entry["shape"]) == shape
            right = right and end - start == math.prod(shape) * getattr(torch, dtype).itemsize
            places.append((operator.index(start), operator.index(end)))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"its header cannot be read at {key!r} ({type(error).__name__})") from error
        if not right:
            raise ValueError(f"{key} is not what the manifest says")
    position = 0
    for start, end in sorted(places):
        if start != position:
            raise ValueError("its tensors overlap or leave holes")
        position = end
    if 8 + length + position != size:
        raise ValueError(f"its tensors end at {8 + length + position:,} of {size:,} bytes")


def _write_tensor(file: Written, piece: Piece) -> None:
    tensor = piece.get().detach().cpu().resolve_conj().resolve_neg().contiguous()
    if tensor.dtype != piece.dtype or tuple(tensor.shape) != piece.shape:
        raise RuntimeError(f"{piece.key} was planned as {piece.dtype} {piece.shape}, is {tensor.dtype} {tensor.shape}")
    if piece.bytes:
        # The memory itself: numpy knows no bfloat16, and bytes() would copy.
        file.write(memoryview((ctypes.c_char * piece.bytes).from_address(tensor.data_ptr())))
