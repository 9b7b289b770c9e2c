"""The manifest of a checkpoint: which files it has, with their hashes, and which tensor lies where in them."""

from __future__ import annotations

import json
import logging
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from runner.checkpoint.synced import synced_file
from runner.checkpoint.tensor_file import SUFFIX, TYPES, header_bytes
from runner.checkpoint.tree import join, split
from runner.errors import RunnerError, wrong

NAME = "manifest.json"
FORMAT = 2

#: What a file of JSON may be: enough for some hundred thousand tensors, and read within seconds.
MOST_BYTES = 128 << 20
MOST_BRACKETS = 2_500_000

#: How a manifest ends, so that the hash of all that stands before can be checked before a word of it is believed.
_END = '"hash": "{}"\n}}\n'

_log = logging.getLogger(__name__)


class Damaged(RunnerError):
    """A folder that is no complete checkpoint, whatever the reason."""

    def __init__(self, folder: Path, why: str) -> None:
        self.folder, self.why = folder, why
        super().__init__(f"{folder} is not a complete checkpoint: {why}")

    def __reduce__(self) -> Any:
        return Damaged, (self.folder, self.why)


@dataclass(frozen=True)
class File:
    """What a file must be: its size, and its xxh3_128 hash (None: written before there were hashes)."""

    size: int
    hash: str | None


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
    files: Mapping[str, File] = field(default_factory=dict)
    tensors: Mapping[str, Entry] = field(default_factory=dict)
    #: How many processes wrote it.
    world: int = 1

    def write(self, folder: Path) -> None:
        """Writes `manifest.json` and syncs it; one line a file and a tensor, for people and for diff."""
        data = self.text()
        with synced_file(folder / NAME) as file:
            file.write(data)

    def text(self) -> bytes:
        """What is written. Raises RunnerError where no reader would take so much."""
        lines = [
            f'"format": {FORMAT}',
            f'"step": {self.step}',
            f'"world": {self.world}',
            f'"metrics": {_json(split(self.metrics)[0])}',
            _block("files", {name: {"size": file.size, "xxh3_128": file.hash} for name, file in self.files.items()}),
            _block("tensors", {name: _described(entry) for name, entry in sorted(self.tensors.items())}),
        ]
        data = sealed(("{\n" + ",\n".join(lines) + ",\n").encode())
        if (why := too_much(data)) is not None:
            raise RunnerError(f"cannot save so many tensors: {NAME} {why}")
        return data

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads a checkpoint's manifest, checks its own hash, and compares names and sizes of the files.

        Raises Damaged where the folder is no complete checkpoint, and InputError where a newer version wrote it.
        """
        data = read_bounded(folder, NAME)
        hashed = _is_sealed(data, folder)
        document = parsed(data, folder, NAME)
        try:
            manifest = cls._parsed(document, folder, hashed)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise Damaged(folder, f"{NAME} cannot be read ({_shown(error)})") from error
        manifest._compare_files(folder)
        return manifest

    def _compare_files(self, folder: Path) -> None:
        for name, expected in self.files.items():
            found = plain_file(folder, name)
            if found.st_size != expected.size:
                raise Damaged(folder, f"{name} has {found.st_size:,} bytes instead of {expected.size:,}")
        # Names that begin with a dot are left by file systems and file managers; nothing here reads them.
        try:
            names = {name for name in os.listdir(folder) if not name.startswith(".")}
        except OSError as error:
            raise Damaged(folder, f"it cannot be read ({error.strerror})") from error
        extra = sorted(names - {NAME, *self.files})
        if extra:
            raise Damaged(folder, f"{extra[0]!r} is not of it")

    @classmethod
    def _parsed(cls, document: dict[str, Any], folder: Path, hashed: bool) -> Manifest:
        version = _whole(document["format"])
        if version > FORMAT:
            raise wrong(
                "resume",
                f"the checkpoint has format {version}, this version of the program reads up to {FORMAT}",
                "use the version of the program that wrote it, or a newer one",
                value=str(folder),
            )
        if version < 1 or hashed != (version >= 2):
            raise ValueError(f"of format {version}, {'with' if hashed else 'without'} a hash at its end")
        files = {_plain_name(name): _file(entry, hashed) for name, entry in document["files"].items()}
        tensors = {name: _entry(name, entry, files) for name, entry in document["tensors"].items()}
        _check_room(tensors, files)
        metrics = {name: float(value) for name, value in join(document["metrics"], _no_tensor).items()}
        return cls(_whole(document["step"]), metrics, files, tensors, _whole(document.get("world", 1)))


# --- bytes ------------------------------------------------------------------------------------------------------------


def sealed(body: bytes) -> bytes:
    """A manifest's text with the hash of all before it at the end."""
    return body + _END.format(xxh3_128_hexdigest(body)).encode()


def _is_sealed(data: bytes, folder: Path) -> bool:
    """Whether a manifest ends with a hash. Raises Damaged where that is not the hash of what stands before."""
    length = len(_END.format("0" * 32))
    if b'"hash"' not in data[-2 * length :]:
        return False
    if data != sealed(data[:-length]):
        raise Damaged(folder, f"{NAME} has another hash than the one written at its end")
    return True


def plain_file(folder: Path, name: str) -> os.stat_result:
    """What the system says of a file of the checkpoint. Raises Damaged for links, folders, devices and nothing."""
    try:
        found = os.lstat(folder / name)
    except FileNotFoundError:
        raise Damaged(folder, f"it has no {NAME}" if name == NAME else f"{name} is missing") from None
    except OSError as error:
        raise Damaged(folder, f"{name} cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(found.st_mode):
        raise Damaged(folder, f"{name} is missing: what has its name is not a regular file")
    return found


def opened(folder: Path, name: str) -> int:
    """A descriptor of a file of the checkpoint, which is a regular one."""
    plain_file(folder, name)
    return os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def read_bounded(folder: Path, name: str) -> bytes:
    """A file of JSON. Raises Damaged where it is too large to be one, or cannot be read."""
    if (size := plain_file(folder, name).st_size) > MOST_BYTES:
        raise Damaged(folder, f"{name} has {size:,} bytes; no checkpoint has more than {MOST_BYTES:,} there")
    try:
        with open(opened(folder, name), "rb") as file:
            return file.read(MOST_BYTES + 1)
    except OSError as error:
        raise Damaged(folder, f"{name} cannot be read ({_shown(error)})") from error


def parsed(data: bytes, folder: Path, name: str) -> Any:
    """What JSON says. Raises Damaged, within bounded time and memory, where it is none."""
    if (why := too_much(data)) is not None:
        raise Damaged(folder, f"{name} {why}")
    try:
        # As text: given bytes, the library guesses an encoding, and imports it.
        return json.loads(data.decode())
    except (ValueError, RecursionError, MemoryError) as error:
        raise Damaged(folder, f"{name} cannot be read ({_shown(error)})") from error


def too_much(data: bytes) -> str | None:
    """Why no reader takes a document of JSON, if so."""
    if len(data) > MOST_BYTES:
        return f"has {len(data):,} bytes; no checkpoint has more than {MOST_BYTES:,} there"
    if (count := data.count(b"{") + data.count(b"[")) > MOST_BRACKETS:
        return f"has {count:,} lists and dictionaries; no checkpoint has more than {MOST_BRACKETS:,} there"
    return None


def _shown(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= 300 else f"{text[:280]}…"


# --- entries ----------------------------------------------------------------------------------------------------------


def _file(document: dict[str, Any], hashed: bool) -> File:
    digest = document["xxh3_128"] if hashed else None
    if digest is not None and (not isinstance(digest, str) or len(digest) != 32):
        raise ValueError(f"{digest!r} is not a hash")
    if hashed and digest is None:
        raise ValueError("a file without a hash")
    return File(_whole(document["size"]), digest)


def _entry(name: str, document: dict[str, Any], files: Mapping[str, File]) -> Entry:
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
    if len(chunks) > 1 and _overlap([chunk for chunk in chunks if math.prod(chunk.sizes)]):
        raise ValueError(f"the chunks of {name} overlap")
    return Entry(document["dtype"], shape, chunks)


def _overlap(chunks: Sequence[Chunk], most: int = 20_000_000) -> bool:
    """Whether two blocks have an element in common; also where that takes too many comparisons to find out."""
    if len(chunks) < 2 or not chunks[0].sizes:
        return len(chunks) > 1
    # Along the dimension that is cut most often, few blocks lie beside each other.
    along = max(range(len(chunks[0].sizes)), key=lambda axis: len({chunk.offsets[axis] for chunk in chunks}))
    active: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.offsets[along]):
        active = [other for other in active if other.offsets[along] + other.sizes[along] > chunk.offsets[along]]
        most -= len(active)
        if most < 0 or any(_meet(chunk, other) for other in active):
            return True
        active.append(chunk)
    return False


def _meet(one: Chunk, two: Chunk) -> bool:
    sides = zip(one.offsets, one.sizes, two.offsets, two.sizes, strict=True)
    return all(a < c + d and c < a + b for a, b, c, d in sides)


def _check_room(tensors: Mapping[str, Entry], files: Mapping[str, File]) -> None:
    """Tensors larger than their files would be memory that a few bytes ask for; files larger, time to read them."""
    needed, headers = dict.fromkeys(files, 0), dict.fromkeys(files, 4096)
    for chunk, dtype in chunks_of(tensors):
        needed[chunk.file] += math.prod(chunk.sizes) * width(dtype)
        headers[chunk.file] += header_bytes(chunk.key, chunk.sizes)
    for name, size in needed.items():
        if size > files[name].size:
            raise ValueError(f"the tensors in {name} take {size:,} bytes, which is more than the file has")
        if name.endswith(SUFFIX) and files[name].size > 8 + headers[name] + size:
            raise ValueError(f"the tensors in {name} take {size:,} bytes, and the file has {files[name].size:,}")


def chunks_of(tensors: Mapping[str, Entry]) -> Iterator[tuple[Chunk, str]]:
    for entry in tensors.values():
        for chunk in entry.chunks:
            yield chunk, entry.dtype


def width(dtype: str) -> int:
    """The bytes of one element of a type, as torch names it."""
    import torch

    found: torch.dtype = getattr(torch, dtype)
    return found.itemsize


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
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _wholes(values: list[object]) -> tuple[int, ...]:
    if not isinstance(values, list) or len(values) > 64:
        raise ValueError(f"{str(values)[:100]} are not the sizes of a tensor")
    return tuple(_whole(value) for value in values)


def _plain_name(name: str) -> str:
    if name != Path(name).name or name in ("", ".", "..", NAME) or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file in the checkpoint's folder")
    return name


def _no_tensor(name: str) -> Any:
    raise ValueError(f"a tensor ({name}) where a number is expected")
