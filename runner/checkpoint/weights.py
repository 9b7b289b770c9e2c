"""Weights to begin with: where somebody's tensors lie, which of a model's they are, and reading them by parts."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runner import distributed
from runner.checkpoint import store
from runner.checkpoint.manifest import NAME as MANIFEST
from runner.checkpoint.manifest import Chunk, Damaged, Entry, Manifest
from runner.checkpoint.tensor_file import TYPES, type_name
from runner.errors import InputError, wrong
from runner.recipe.init_from import KEY, Asked, is_hub_name, matcher, renamer

#: Bytes that an index of several files may have; a million names have less.
_INDEX_LIMIT = 200 * 2**20
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")
#: Under which people save a model's state beside other things.
_INSIDE = ("state_dict", "model_state_dict", "model", "module")
_NAMES = {TYPES[name]: name for name in TYPES}
_FIX = "init_from={path: …, strict: false} begins with what fits; rename: {…} and only: […] say what belongs where"


# --- where tensors lie ------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Named tensors in files, of which parts can be read."""

    where: str
    tensors: Mapping[str, Entry]

    def opened(self, file: str, stack: ExitStack) -> Callable[[str, tuple[slice, ...]], Tensor]:
        """Reads parts of the tensors in a file, by their key there; the file is closed with the stack."""


@dataclass
class Files:
    """safetensors files of one folder."""

    where: str
    folder: Path
    tensors: Mapping[str, Entry]

    def opened(self, file: str, stack: ExitStack) -> Callable[[str, tuple[slice, ...]], Tensor]:
        handle = stack.enter_context(safe_open(self.folder / file, framework="pt"))
        entries = {chunk.key: entry.dtype for entry in self.tensors.values() for chunk in entry.chunks}

        def read(key: str, part: tuple[slice, ...]) -> Tensor:
            found = handle.get_slice(key)
            if _NAMES.get(found.get_dtype()) != entries[key]:
                raise wrong(KEY, f"{file}: {key} is of another type than was said", _SOUND, value=self.where)
            whole = all((s.start, s.stop) == (0, n) for s, n in zip(part, found.get_shape(), strict=True))
            return handle.get_tensor(key) if whole else found[part]

        return read


@dataclass
class Unpickled:
    """Tensors of files that torch wrote, read with its restricted reader."""

    where: str
    values: Mapping[str, Tensor]
    tensors: Mapping[str, Entry]

    def opened(self, file: str, stack: ExitStack) -> Callable[[str, tuple[slice, ...]], Tensor]:
        return lambda key, part: self.values[key][part]


_SOUND = "give a file that is whole, as its author wrote it"


def find(asked: Asked, directory: Path, *, verify: bool = True) -> Source:
    """What was asked for, with the name, type and shape of each tensor. Raises InputError where it cannot be had.

    Without `verify` the files of a checkpoint of this program are not compared with their hashes: another process did.
    """
    try:
        path = directory / Path(asked.path).expanduser()
        if path.is_file():
            return _of_file(path)
        if path.is_dir():
            return _of_folder(path, asked, verify)
        if is_hub_name(asked.path):
            return _of_folder(_fetched(asked), asked)
    except (OSError, SafetensorError, ValueError, RecursionError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise wrong(KEY, f"cannot be read: {why}", _SOUND, value=asked.path) from error
    fix = "give a file, a folder, ORG/NAME of the hub, or one of your runs"
    raise wrong(KEY, "does not exist", fix, value=asked.path)


def _fetched(asked: Asked) -> Path:
    """The hub's folder of a model, in its cache; nothing but safetensors files is fetched."""
    try:
        import huggingface_hub
    except ImportError:
        fix = "pip install huggingface_hub, or give the path of a file or folder"
        raise wrong(KEY, "no such file or folder, and for a model of the hub huggingface_hub is not installed", fix,
                    value=asked.path) from None  # fmt: skip
    try:
        found = huggingface_hub.snapshot_download(
            asked.path,
            revision=asked.revision,
            allow_patterns=["*.safetensors", "*.safetensors.index.json"],
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # of the library's, of requests', of the system's
        first = str(error).strip().splitlines()[:1] or [""]
        why = f"is neither here nor to be had from the hub: {type(error).__name__}: {first[0][:200]}"
        raise wrong(
            KEY, why, "look at the name and the network, or give the path of a folder", value=asked.path
        ) from error
    return Path(found)


def _of_file(path: Path) -> Source:
    if path.suffix in _PICKLED:
        return _of_pickles(path.parent, [path.name], str(path))
    if path.name.endswith(".index.json"):
        return _of_index(path)
    if path.suffix != ".safetensors":
        why = "is no file of weights: its name ends in none of .safetensors, .bin, .pt, .pth, .ckpt"
        raise wrong(KEY, why, "give one of these, or a folder", value=str(path))
    return Files(str(path), path.parent, _entries(path.parent, [path.name]))


def _of_folder(path: Path, asked: Asked, verify: bool = True) -> Source:
    if (path / MANIFEST).exists() or (path / "checkpoints").is_dir() or re.fullmatch(r"step_\d+", path.name):
        return _of_checkpoint(path, asked, verify)
    if asked.part != "model":
        raise wrong(f"{KEY}.part", "is of checkpoints, and this is none", "leave it out", value=asked.part)
    for name in (_SINGLE[0], _INDEXES[0]):
        if (path / name).is_file():
            return _of_file(path / name)
    there = sorted(child.name for child in path.iterdir() if child.suffix == ".safetensors" and child.is_file())
    if len(there) == 1:
        return _of_file(path / there[0])
    for name in (_SINGLE[1], _INDEXES[1]):
        if not there and (path / name).is_file():
            return _of_file(path / name)
    what = f"holds {len(there)} safetensors files and no {_INDEXES[0]}" if there else "holds no weights"
    fix = f"name one file: {', '.join(there[:5])}" if there else f"there should be {_SINGLE[0]} or {_INDEXES[0]}"
    raise wrong(KEY, what, fix, value=str(path))


def _of_index(path: Path) -> Source:
    """Several files by their index, which names the file of each tensor."""
    if path.stat().st_size > _INDEX_LIMIT:
        raise wrong(KEY, f"an index of {path.stat().st_size:,} bytes", _SOUND, value=str(path))
    document = json.loads(path.read_bytes())
    placed = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise wrong(KEY, "is no index: it has no weight_map of names to files", _SOUND, value=str(path))
    files = sorted(set(placed.values()))
    for file in files:
        if file != Path(file).name or file in ("", ".", "..") or "\\" in file or "\0" in file:
            raise wrong(KEY, f"names {file!r}, which is no file beside it", _SOUND, value=str(path))
        if not (path.parent / file).is_file():
            raise wrong(KEY, f"{file} is missing", "fetch all files of the model", value=str(path.parent))
        if Path(file).suffix != (".bin" if path.name == _INDEXES[1] else ".safetensors"):
            raise wrong(KEY, f"names {file!r}, which is of another kind", _SOUND, value=str(path))
    if path.name == _INDEXES[1]:
        return _of_pickles(path.parent, files, str(path.parent))
    entries = _entries(path.parent, files)
    for name, file in placed.items():
        if name not in entries or entries[name].chunks[0].file != file:
            raise wrong(KEY, f"the index says that {name} is in {file}, and it is not", _SOUND, value=str(path))
    return Files(str(path.parent), path.parent, entries)


def _entries(folder: Path, files: list[str]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118  # it is no mapping
                if name in found:
                    raise ValueError(f"{name} is in {found[name].chunks[0].file} and in {file}")
                part = handle.get_slice(name)
                shape = tuple(part.get_shape())
                chunk = Chunk((0,) * len(shape), shape, file, name)
                found[name] = Entry(_NAMES.get(part.get_dtype(), part.get_dtype()), shape, (chunk,))
    return found


def _of_pickles(folder: Path, files: list[str], where: str) -> Source:
    """Only by torch's restricted reader: a file that holds more than tensors is refused, and nothing in it runs."""
    values: dict[str, Tensor] = {}
    for file in files:
        values |= _unpickled(folder / file)
    if not values:
        raise wrong(KEY, "holds no tensors by name", "save model.state_dict()", value=where)
    # One file after all: parts of what is in memory already.
    entries = {
        name: Entry(type_name(t.dtype), tuple(t.shape), (Chunk((0,) * t.dim(), tuple(t.shape), files[0], name),))
        for name, t in values.items()
    }
    return Unpickled(where, values, entries)


def _unpickled(path: Path) -> dict[str, Tensor]:
    def load(mmap: bool) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what it thinks of the file's age
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)

    try:
        try:
            found = load(True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            found = load(False)  # of the format before torch 1.6
    except Exception as error:
        why = f"is not read: it holds more than tensors, or is damaged ({type(error).__name__})"
        fix = "ask its author for safetensors; nothing in the file was executed"
        raise wrong(KEY, why, fix, value=str(path)) from error
    for word in _INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(word), Mapping):
            found = found[word]
            break
    pairs = found.items() if isinstance(found, Mapping) else ()
    return {str(name): value for name, value in pairs if isinstance(value, Tensor) and value.layout == torch.strided}


def _of_checkpoint(path: Path, asked: Asked, verify: bool) -> Source:
    """The model's part of a checkpoint of this program, of any backend, once its files are verified."""
    folder = store.find(path, KEY) if verify else path
    try:
        manifest = Manifest.read(folder)
    except Damaged as error:
        raise wrong(KEY, str(error), "name another checkpoint", value=asked.path) from error
    entries = _below(manifest.tensors, "model/")
    if asked.part == "ema":
        averages = _below(manifest.tensors, "hooks.ema/averages/")
        if not averages:
            raise wrong(f"{KEY}.part", f"{folder} holds no averaged weights", "leave it out", value=asked.part)
        entries |= averages
    return Files(str(folder), folder, entries)


def _below(tensors: Mapping[str, Entry], start: str) -> dict[str, Entry]:
    inside = {name.removeprefix(start): entry for name, entry in tensors.items() if name.startswith(start)}
    return {name.replace("~1", "/").replace("~0", "~"): entry for name, entry in inside.items() if "/" not in name}


# --- what goes where --------------------------------------------------------------------------------------------------


@dataclass
class Match:
    """Which stored tensor is which of the model's, and what is left on either side."""

    taken: dict[str, Entry] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    converted: Counter[str] = field(default_factory=Counter)


def match(asked: Asked, stored: Mapping[str, Entry], own: Mapping[str, Tensor], tied: Mapping[str, str]) -> Match:
    """`own` are the model's tensors by name, `tied` further names of some of them. Raises InputError for two in one."""
    found = Match()
    wanted = [matcher(pattern) for pattern in asked.only]
    rename = renamer(asked.rename)
    offered: dict[str, tuple[str, Entry]] = {}
    for name, entry in stored.items():
        new = rename(name)
        if wanted and not any(pattern.match(new) for pattern in wanted):
            continue
        place = tied.get(new, new)
        if place in offered and offered[place][0] == new:
            both = f"two stored tensors become {new}, one of them {name}"
            raise wrong(f"{KEY}.rename", both, "mend the patterns")
        if place not in own:
            found.unexpected.append(new)
        elif place not in offered or new == place:  # of tied names the model's first counts
            offered[place] = (new, entry)
    for name, target in own.items():
        if wanted and not any(pattern.match(name) for pattern in wanted):
            continue
        if name not in offered:
            found.missing.append(name)
            continue
        entry = offered[name][1]
        if (why := _mismatch(entry, target)) is not None:
            found.mismatched.append(f"{name} ({why})")
            continue
        found.taken[name] = entry
        if entry.dtype != type_name(target.dtype):
            found.converted[f"{entry.dtype} -> {type_name(target.dtype)}"] += 1
    return found


def _mismatch(entry: Entry, target: Tensor) -> str | None:
    if entry.shape != tuple(target.shape):
        return f"{list(entry.shape)} there, {list(target.shape)} here"
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        return f"of type {entry.dtype} there"
    if dtype != target.dtype and not (dtype.is_floating_point and target.dtype.is_floating_point):
        return f"{entry.dtype} there, {type_name(target.dtype)} here"
    return None


def _judge(asked: Asked, found: Match, own: Mapping[str, Tensor]) -> list[str]:
    """What does not fit, in words. Raises InputError where it must fit."""
    lists = {
        "are missing": found.missing,
        "are not the model's": found.unexpected,
        "have another shape or type": found.mismatched,
    }
    words = [f"{len(names)} {word}: {_first(names)}" for word, names in lists.items() if names]
    if words and (asked.strict or not found.taken):
        fits = f"{len(found.taken)} of the model's {len(own)} tensors fit"
        raise wrong(
            KEY, f"does not fit the model; {'; '.join(words)}; {fits}", _advice(asked, found) or _FIX, value=asked.path
        )
    if not found.taken and asked.only:
        why = f"matches no name of the model, which has {_first(list(own))}"
        raise wrong(f"{KEY}.only", why, "write the beginning of one of these; * is one word in it", value=[*asked.only])
    if not found.taken:
        raise wrong(KEY, "gives no tensor that is wanted", _FIX, value=asked.path)
    return words


def _advice(asked: Asked, found: Match) -> str | None:
    """A renaming that would bring more than half together: a beginning that one side has and the other has not."""
    for longer, shorter, word in (
        (found.missing, found.unexpected, "{{**: {0}**}}"),
        (found.unexpected, found.missing, "{{{0}: ''}}"),
    ):
        known = set(longer)
        for name in shorter[:20]:
            beginnings = {other[: -len(name)] for other in longer if other.endswith(f".{name}")}
            for start in sorted(beginnings, key=len)[:3]:
                if sum(1 for other in shorter if start + other in known) * 2 > len(shorter):
                    return f'on the command line "init_from={{path: {asked.path}, rename: {word.format(start)}}}"'
    return None


def _first(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- reading ----------------------------------------------------------------------------------------------------------


class ModelPart(Protocol):
    """A backend's state of the model: see checkpoint.checkpointer.Stateful."""

    def state_dict(self) -> Mapping[str, Any]: ...
    def template(self, saved: Any, /) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


def begin_with(asked: Asked, source: Source, model: ModelPart, tied: Mapping[str, str]) -> tuple[str, list[str]]:
    """Puts stored values into a model, each process its own part of it; gives what was done, and what did not fit.

    What nobody stored stays as it is. Raises InputError, before any value is changed, where it does not fit.
    """
    targets = dict(model.template(None))
    own = {name: value for name, value in targets.items() if isinstance(value, Tensor)}
    found = match(asked, source.tensors, own, tied)
    words = _judge(asked, found, own)
    if len(found.taken) < len(own):
        # A template may be empty memory; the state has the values that stay.
        targets = dict(model.state_dict())
    _fill({name: targets[name] for name in found.taken}, found.taken, source)
    model.load_state_dict(targets)
    size = sum(math.prod(entry.shape) for entry in found.taken.values())
    changed = "".join(f"; {count} converted, {word}" for word, count in sorted(found.converted.items()))
    return f"{len(found.taken)} of {len(own)} tensors, {size:,} numbers, from {source.where}{changed}", words


def _fill(targets: Mapping[str, Tensor], entries: Mapping[str, Entry], source: Source) -> None:
    """Reads into each target the part that this process holds, file by file."""
    wanted: dict[str, list[tuple[str, Chunk]]] = {}
    for name, entry in entries.items():
        for chunk in entry.chunks:
            wanted.setdefault(chunk.file, []).append((name, chunk))
    try:
        for file, chunks in wanted.items():
            with ExitStack() as stack, torch.no_grad():
                read = source.opened(file, stack)
                for name, chunk in chunks:
                    _copy(targets[name], chunk, read)
    except (OSError, SafetensorError, ValueError) as error:
        raise wrong(KEY, f"cannot be read: {type(error).__name__}: {error}", _SOUND, value=source.where) from error


def _copy(target: Tensor, chunk: Chunk, read: Callable[[str, tuple[slice, ...]], Tensor]) -> None:
    """What a chunk and this process's part of a tensor have in common."""
    own, offset = _own_part(target)
    if own.numel() == 0 and 0 in own.shape:
        return
    starts = [max(a, b) for a, b in zip(offset, chunk.offsets, strict=True)]
    ends = [min(a + n, b + m) for a, n, b, m in zip(offset, own.shape, chunk.offsets, chunk.sizes, strict=True)]
    if any(start >= end for start, end in zip(starts, ends, strict=True)):
        return
    there = tuple(slice(s - o, e - o) for s, e, o in zip(starts, ends, chunk.offsets, strict=True))
    here = tuple(slice(s - o, e - o) for s, e, o in zip(starts, ends, offset, strict=True))
    own[here].copy_(read(chunk.key, there))


def _own_part(target: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This process's part of a tensor, and where it begins in the whole."""
    target = target.detach()
    if not hasattr(target, "_local_tensor"):
        return target, (0,) * target.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placed: Any = target
    _, offset = compute_local_shape_and_global_offset(placed.shape, placed.device_mesh, placed.placements)
    return placed._local_tensor, tuple(offset)


# --- all of it --------------------------------------------------------------------------------------------------------


def find_together(asked: Asked, directory: Path) -> Source:
    """As `find`, the first process before the others, so that what is fetched is fetched once.

    Raises InputError on all processes alike.
    """
    found: Source | None = None
    failed: InputError | None = None
    if distributed.rank() == 0:
        try:
            found = find(asked, directory)
        except InputError as error:
            failed = error
    # A run's latest checkpoint may be another one a moment later, and its hashes are read once.
    checked = found.where if isinstance(found, Files) and (found.folder / MANIFEST).exists() else None
    problems, checked = distributed.broadcast((None if failed is None else failed.problems, checked))
    if problems is not None:
        raise failed or InputError(*problems)
    if found is not None:
        return found
    return find(asked if checked is None else replace(asked, path=checked), directory, verify=checked is None)
