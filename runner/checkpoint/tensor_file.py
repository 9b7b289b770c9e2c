"""A safetensors file, written tensor by tensor.

The library's own writer wants all tensors at once, contiguous, in memory of their own and on the CPU, and does not
tell the number of a failed system call; reading is left to the library.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from runner.checkpoint.synced import synced_file

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


def write_file(path: Path, pieces: Sequence[Piece]) -> int:
    """Writes a new file and syncs it; at most one tensor is copied at a time. Returns the file's size."""
    # Wide types first keeps every tensor aligned to its type, as the library does.
    ordered = sorted(pieces, key=lambda piece: (-piece.dtype.itemsize, piece.key))
    with synced_file(path) as file:
        file.write(_header(ordered))
        for piece in ordered:
            _write_tensor(file, piece)
        return file.tell()


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


def _write_tensor(file: BinaryIO, piece: Piece) -> None:
    tensor = piece.get().detach().cpu().resolve_conj().resolve_neg().contiguous()
    if tensor.dtype != piece.dtype or tuple(tensor.shape) != piece.shape:
        raise RuntimeError(f"{piece.key} was planned as {piece.dtype} {piece.shape}, is {tensor.dtype} {tensor.shape}")
    if piece.bytes:
        # The memory itself: numpy knows no bfloat16, and bytes() would copy.
        file.write((ctypes.c_char * piece.bytes).from_address(tensor.data_ptr()))
