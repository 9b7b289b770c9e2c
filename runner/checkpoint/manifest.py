"""The manifest of a checkpoint: which files it has, and which tensor lies where in them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.checkpoint.synced import synced_file
from runner.checkpoint.tensor_file import TYPES
from runner.checkpoint.tree import join, split
from runner.errors import RunnerError, wrong

NAME = "manifest.json"
FORMAT = 1


class Damaged(RunnerError):
    """A folder that is no complete checkpoint, whatever the reason."""

    def __init__(self, folder: Path, why: str) -> None:
        self.folder, self.why = folder, why
        super().__init__(f"{folder} is not a complete checkpoint: {why}")


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor: where it lies in the tensor, and in which file under which key."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    key: str


@dataclass(frozen=True)
class Entry:
    """A tensor: the type as torch names it, the whole shape, and the chunks that make it up."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Manifest:
    """All that can be known of a checkpoint without opening its other files."""

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)
    tensors: Mapping[str, Entry] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes `manifest.json` and syncs it; one line a file and a tensor, for people and for diff."""
        lines = [
            f'"format": {FORMAT}',
            f'"step": {self.step}',
            f'"metrics": {_json(split(self.metrics)[0])}',
            _block("files", {name: {"size": size} for name, size in self.files.items()}),
            _block("tensors", {name: _described(entry) for name, entry in sorted(self.tensors.items())}),
        ]
        with synced_file(folder / NAME) as file:
            file.write(("{\n" + ",\n".join(lines) + "\n}\n").encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads a checkpoint's manifest and compares the sizes of its files.

        Raises Damaged where the folder is no complete checkpoint, and InputError where a newer version wrote it.
        """
        try:
            manifest = cls._parsed(json.loads((folder / NAME).read_bytes()), folder)
        except FileNotFoundError:
            raise Damaged(folder, f"it has no {NAME}") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise Damaged(folder, f"{NAME} cannot be read ({type(error).__name__}: {error})") from error
        for name, size in manifest.files.items():
            file = folder / name
            if not file.is_file():
                raise Damaged(folder, f"{name} is missing")
            if (found := file.stat().st_size) != size:
                raise Damaged(folder, f"{name} has {found:,} bytes instead of {size:,}")
        return manifest

    @classmethod
    def _parsed(cls, document: dict[str, Any], folder: Path) -> Manifest:
        if (version := _whole(document["format"])) > FORMAT:
            raise wrong(
                "resume",
                f"the checkpoint has format {version}, this version of the program reads up to {FORMAT}",
                "use the version of the program that wrote it, or a newer one",
                value=str(folder),
            )
        files = {_plain_name(name): _whole(entry["size"]) for name, entry in document["files"].items()}
        tensors = {name: _entry(name, entry, files) for name, entry in document["tensors"].items()}
        metrics = {name: float(value) for name, value in join(document["metrics"], _no_tensor).items()}
        return cls(_whole(document["step"]), metrics, files, tensors)


def _entry(name: str, document: dict[str, Any], files: Mapping[str, int]) -> Entry:
    shape = _wholes(document["shape"])
    chunks = tuple(
        Chunk(_wholes(chunk["offsets"]), _wholes(chunk["sizes"]), chunk["file"], str(chunk["key"]))
        for chunk in document["chunks"]
    )
    if document["dtype"] not in TYPES:
        raise ValueError(f"{name} has the unknown type {document['dtype']}")
    # What no chunk covers would be left as it was in memory, without a word.
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        raise ValueError(f"the chunks of {name} do not make up its shape {shape}")
    for chunk in chunks:
        ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        if any(end > length for end, length in zip(ends, shape, strict=True)) or chunk.file not in files:
            raise ValueError(f"a chunk of {name} lies outside of it or in an unknown file")
    return Entry(document["dtype"], shape, chunks)


def _described(entry: Entry) -> dict[str, object]:
    return {
        "dtype": entry.dtype,
        "shape": entry.shape,
        "chunks": [{"file": c.file, "key": c.key, "offsets": c.offsets, "sizes": c.sizes} for c in entry.chunks],
    }


def _block(name: str, entries: Mapping[str, object]) -> str:
    lines = ",\n".join(f"  {json.dumps(key)}: {_json(entry)}" for key, entry in entries.items())
    return f"{json.dumps(name)}: {{\n{lines}\n}}" if lines else f"{json.dumps(name)}: {{}}"


def _json(value: object) -> str:
    return json.dumps(value, allow_nan=False)


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _wholes(values: list[object]) -> tuple[int, ...]:
    return tuple(_whole(value) for value in values)


def _plain_name(name: str) -> str:
    if name != Path(name).name or name in ("", ".", "..") or "\\" in name:
        raise ValueError(f"{name!r} is not the name of a file in the checkpoint's folder")
    return name


def _no_tensor(name: str) -> Any:
    raise ValueError(f"a tensor ({name}) where a number is expected")
