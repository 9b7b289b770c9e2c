"""How torch.distributed.checkpoint (DCP) writes into and reads from a checkpoint's folder.

DCP plans which process writes and reads which part of which tensor; here is what it plans for: safetensors files, and
the manifest in the place of DCP's own pickle. Its planner is asked directly, because its `save` talks through the
group, and changes the warnings, of the whole process, which a thread beside the training must not. Importing this
module imports DCP, which takes a second, so it is imported where something is saved or loaded.
"""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from runner import distributed
from runner.checkpoint import store
from runner.checkpoint.failure import Failure, SaveFailed, first, free_bytes
from runner.checkpoint.manifest import Chunk, Damaged, Entry, File, Manifest, too_much
from runner.checkpoint.peers import Peers
from runner.checkpoint.synced import sync_folder, synced_file
from runner.checkpoint.tensor_file import SUFFIX, TYPES, Piece, size_of, type_name, write_file
from runner.errors import RunnerError

Documents = Mapping[str, Any]


@dataclass(frozen=True)
class _Place:
    """Where a part of a tensor has been written, and what became of the file."""

    index: MetadataIndex
    file: str
    key: str
    written: File


@dataclass(frozen=True)
class Part:
    """What one process has to write: DCP's items, and the memory of each."""

    items: list[WriteItem]
    tensors: Mapping[MetadataIndex, Tensor]


def own_part(tensors: Mapping[str, Tensor]) -> Part:
    """This process's part of the tensors, which are not copied. What all have alike is the first process's.

    Raises RunnerError as `check_types` does.
    """
    check_types(tensors)
    first = distributed.rank() == 0
    planner = _planner()
    own = {name: tensor for name, tensor in tensors.items() if _writes(tensor, first)}
    planner.set_up_planner(own, is_coordinator=first)
    items = planner.create_local_plan().items
    return Part(items, {item.index: _memory(planner, item) for item in items})


def write_checkpoint(folder: Path, part: Part, draft: Manifest, documents: Documents, peers: Peers) -> Path:
    """Writes and publishes the checkpoint of `draft.step`; every process of a job calls it.

    `draft` is the manifest without files and tensors; `documents` are file names and what JSON they hold, written by
    the first process. Raises SaveFailed on all processes where one of them fails; nothing of it is left then.
    """
    path = store.path_of(folder, draft.step)
    try:
        failure = _lead(path, part, draft, documents, peers) if peers.rank == 0 else _follow(part, peers)
    except RuntimeError as error:
        # torch's, of the words that processes say to each other: whoever tells of it finds out that it is no first
        # cause by what it came from.
        raise SaveFailed(path, "another process is not heard any more", None, None, None) from error
    except Exception as error:
        failure = Failure.of(error, peers.rank, peers.world)
    if failure is not None:
        raise SaveFailed(path, failure.why, failure.needed, failure.free, failure.errno)
    return path


def _lead(path: Path, part: Part, draft: Manifest, documents: Documents, peers: Peers) -> Failure | None:
    """The first process: plans for all, makes the folder, and publishes it when everything has been written."""
    plans = [SavePlan(items) for items in peers.gather(part.items)]
    needed: int | None = None
    failure: Failure | None = None
    staging: Path | None = None
    tasks: list[Any] = []
    texts: dict[str, bytes] = {}
    try:
        try:
            planner = _planner()
            planner.set_up_planner({}, is_coordinator=True)
            plans, metadata = planner.create_global_plan(plans)
            texts = {name: _text(name, document) for name, document in documents.items()}
            needed = _needed(plans, draft, texts)
            staging = store.begin(path)
            _check_space(staging, needed)
            tasks = [(staging / f"rank_{rank}{SUFFIX}", plan.items) for rank, plan in enumerate(plans)]
        except Exception as error:
            failure = Failure.of(error)
        task = peers.scatter([failure] * peers.world if failure else tasks)
        if failure is None:
            said = peers.gather(_attempt(task, part, peers))
            failure = first(said)
            if failure is None:
                assert staging is not None
                try:
                    written = {place.index: place for results in said for place in results}
                    _finish(staging, metadata, written, replace(draft, world=peers.world), texts)
                    store.publish(staging, path)
                except Exception as error:
                    failure = Failure.of(error, 0, peers.world)
        if failure is not None:
            if staging is not None:
                store.discard(staging)
            failure = replace(failure, needed=needed, free=free_bytes(path.parent))
    except BaseException:
        if staging is not None:
            store.discard(staging)
        raise
    found: Failure | None = peers.broadcast(failure)
    return found


def _follow(part: Part, peers: Peers) -> Failure | None:
    peers.gather(part.items)
    task = peers.scatter(None)
    if not isinstance(task, Failure):
        peers.gather(_attempt(task, part, peers))
    found: Failure | None = peers.broadcast(None)
    return found


def _attempt(task: tuple[Path, list[WriteItem]], part: Part, peers: Peers) -> list[_Place] | Failure:
    try:
        return _write_file(*task, part)
    except Exception as error:
        return Failure.of(error, peers.rank, peers.world)


def _write_file(file: Path, items: list[WriteItem], part: Part) -> list[_Place]:
    """Writes one process's tensors; returns where each of them is, and the file's size and hash."""
    if not items:
        return []
    pieces = [_piece(item, key, part) for item, key in zip(items, _keys(items), strict=True)]
    done = File(*write_file(file, pieces))
    return [_Place(item.index, file.name, piece.key, done) for item, piece in zip(items, pieces, strict=True)]


def _finish(
    folder: Path,
    metadata: Metadata,
    written: Mapping[MetadataIndex, _Place],
    draft: Manifest,
    texts: Mapping[str, bytes],
) -> None:
    """Writes the documents and, last, the manifest."""
    files = {place.file: place.written for place in written.values()}
    for name, text in texts.items():
        with synced_file(folder / name) as stream:
            stream.write(text)
        files[name] = File(stream.size, stream.hash)
    tensors = {name: _entry(name, meta, written) for name, meta in metadata.state_dict_metadata.items()}
    replace(draft, files=files, tensors=tensors).write(folder)
    sync_folder(folder)


def _needed(plans: list[SavePlan], draft: Manifest, texts: Mapping[str, bytes]) -> int:
    """The bytes that a checkpoint will take, but for what a file system adds."""
    tensors = sum(size_of([_outline(item, key) for item, key in _named(plan.items)]) for plan in plans if plan.items)
    entries = sum(200 + 2 * len(item.index.fqn) for plan in plans for item in plan.items)
    return tensors + entries + len(draft.text()) + sum(map(len, texts.values()))


def _check_space(folder: Path, needed: int) -> None:
    """Raises OSError where the file system says at once that it will not do; it may still say so later."""
    free = free_bytes(folder)
    if free is not None and free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _planner() -> DefaultSavePlanner:
    return DefaultSavePlanner(flatten_state_dict=False, dedup_save_to_lowest_rank=True)


def _writes(tensor: Tensor, first: bool) -> bool:
    """Whether this process may have to write some of a tensor; of replicas only the first along their dimension."""
    if not hasattr(tensor, "__create_write_items__"):
        return first
    placements, mesh = getattr(tensor, "placements", None), getattr(tensor, "device_mesh", None)
    if placements is None or mesh is None:
        return True
    place = mesh.get_coordinate()
    if place is None:
        return False
    return not any(placement.is_replicate() and where for placement, where in zip(placements, place, strict=True))


def _memory(planner: SavePlanner, item: WriteItem) -> Tensor:
    tensor = planner.resolve_data(item)
    if item.tensor_data is None or not isinstance(tensor, Tensor):
        raise RuntimeError(f"{item.index.fqn} is not a tensor; DCP would pickle it")
    return tensor.detach()


def _text(name: str, document: Mapping[str, Any]) -> bytes:
    """A document as it is written. Raises RunnerError, naming the largest part, where no reader would take so much."""
    text = _encoded(document)
    if (why := too_much(text)) is not None:
        others = {part: value for part, value in document.items() if part != "state"}
        parts = {**document.get("state", {}), **others}
        most = max(parts, key=lambda part: len(_encoded(parts[part])))
        raise RunnerError(f"{name} {why}; most of it is the state of {most}: keep so many numbers in a tensor")
    return text


def _encoded(document: Any) -> bytes:
    return json.dumps(document, allow_nan=False, separators=(",", ":")).encode()


def check_types(tensors: Mapping[str, Tensor]) -> None:
    """Raises RunnerError for a type of tensor that cannot be saved."""
    for name, tensor in tensors.items():
        if type_name(tensor.dtype) not in TYPES:
            raise RunnerError(f"cannot save `{name}`: a tensor of type {type_name(tensor.dtype)}")


def read_tensors(folder: Path, manifest: Manifest, targets: Mapping[str, Tensor]) -> None:
    """Fills the target tensors in place, each with the tensor of its name or, where sharded, the parts it needs.

    Another type is converted. Raises Damaged where a file does not hold what the manifest says.
    """
    with _plain_errors():
        load(
            dict(targets),
            storage_reader=Reader(folder, manifest),
            planner=DefaultLoadPlanner(flatten_state_dict=False),
            no_dist=_alone(),
        )


class Reader(StorageReader):
    """Reads the parts of tensors that a plan asks for, wherever the manifest says that they lie."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.chunks: dict[MetadataIndex, Chunk] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        entries = self.manifest.tensors.items()
        self.chunks = {MetadataIndex(name, chunk.offsets): chunk for name, entry in entries for chunk in entry.chunks}
        return Metadata({name: _tensor_metadata(entry) for name, entry in entries})

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[str, list[tuple[ReadItem, Chunk]]] = {}
        for item in plan.items:
            chunk = self.chunks[item.storage_index]
            wanted.setdefault(chunk.file, []).append((item, chunk))
        for file, items in wanted.items():
            self._read_file(file, items, planner)
        return _done(None)

    def _read_file(self, file: str, items: list[tuple[ReadItem, Chunk]], planner: LoadPlanner) -> None:
        try:
            with safe_open(self.folder / file, framework="pt") as tensors:
                for item, chunk in items:
                    target = planner.resolve_tensor(item).detach()
                    source = self._part(tensors, item, chunk)
                    target.copy_(source)
                    planner.commit_tensor(item, target)
        except SafetensorError as error:
            raise Damaged(self.folder, f"{file}: {error}") from error

    def _part(self, tensors: Any, item: ReadItem, chunk: Chunk) -> Tensor:
        whole = tensors.get_slice(chunk.key)
        dtype = TYPES[self.manifest.tensors[item.storage_index.fqn].dtype]
        if tuple(whole.get_shape()) != chunk.sizes or whole.get_dtype() != dtype:
            raise Damaged(self.folder, f"{chunk.file}: {chunk.key} is not what the manifest says")
        bounds = zip(item.storage_offsets, item.lengths, strict=True)
        part: Tensor = (
            tensors.get_tensor(chunk.key)
            if tuple(item.lengths) == chunk.sizes
            else whole[tuple(slice(start, start + length) for start, length in bounds)]
        )
        return part

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003
        return False


def _keys(items: list[WriteItem]) -> list[str]:
    """The key of each item in its file: the tensor's name, and where several chunks have it, also their place."""
    count = Counter(item.index.fqn for item in items)
    return [
        item.index.fqn
        if count[item.index.fqn] == 1
        else f"{item.index.fqn}@{','.join(map(str, item.index.offset or ()))}"
        for item in items
    ]


def _named(items: list[WriteItem]) -> Iterator[tuple[WriteItem, str]]:
    return zip(items, _keys(items), strict=True)


def _piece(item: WriteItem, key: str, part: Part) -> Piece:
    return replace(_outline(item, key), get=lambda: part.tensors[item.index])


def _outline(item: WriteItem, key: str) -> Piece:
    data = item.tensor_data
    assert data is not None
    return Piece(key, data.properties.dtype, tuple(data.chunk.sizes), _nothing)


def _nothing() -> Tensor:
    raise RuntimeError("an outline has no contents")


def _entry(name: str, meta: Any, written: Mapping[MetadataIndex, _Place]) -> Entry:
    chunks = []
    for chunk in meta.chunks:
        place = written[MetadataIndex(name, chunk.offsets)]
        chunks.append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), place.file, place.key))
    return Entry(type_name(meta.properties.dtype), tuple(meta.size), tuple(chunks))


def _tensor_metadata(entry: Entry) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in entry.chunks]
    return TensorStorageMetadata(TensorProperties(getattr(torch, entry.dtype)), torch.Size(entry.shape), chunks)


def _alone() -> bool:
    # Also in a group of one, in which torch would pickle its plan for nobody.
    return distributed.world_size() == 1


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Takes the error of the first failing process out of DCP's wrapper, which is not even an Exception."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        cause, _trace = min(error.failures.items())[1]
        raise cause from None
