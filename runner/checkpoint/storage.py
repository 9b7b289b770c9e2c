"""How torch.distributed.checkpoint (DCP) writes into and reads from a checkpoint's folder.

DCP plans which process writes and reads which part of which tensor; here are its two storage classes, which put
tensors into safetensors files, and the manifest in the place of DCP's own pickle. Importing this module imports
DCP, which takes a second, so it is imported where something is saved or loaded.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from runner.checkpoint.manifest import Chunk, Damaged, Entry, Manifest
from runner.checkpoint.synced import synced_file
from runner.checkpoint.tensor_file import TYPES, Piece, type_name, write_file
from runner.errors import RunnerError


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], draft: Manifest, documents: Mapping[str, Any]
) -> None:
    """Writes a checkpoint's files into an empty folder, the manifest last; every process of a job calls it.

    `draft` is the manifest without files and tensors; `documents` are file names and what JSON they hold, written
    by the first process. Raises what went wrong in a writer (OSError), and RunnerError as `check_types` does.
    """
    check_types(tensors)
    with _plain_errors():
        save(
            dict(tensors),
            storage_writer=Writer(folder, draft, documents),
            # What processes hold alike is the first one's: only its buffers (running means) count in training.
            planner=DefaultSavePlanner(flatten_state_dict=False, dedup_save_to_lowest_rank=True),
            no_dist=_alone(),
        )


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


class Writer(StorageWriter):
    """Writes one file `rank_N.safetensors` a process; then the first process the documents and the manifest."""

    def __init__(self, folder: Path, draft: Manifest, documents: Mapping[str, Any]) -> None:
        self.folder, self.draft, self.documents = folder, draft, documents

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data=f"rank_{rank}.safetensors") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if not plan.items:
            return _done([])
        pieces = [_piece(item, key, planner) for item, key in zip(plan.items, _keys(plan.items), strict=True)]
        size = write_file(self.folder / plan.storage_data, pieces)
        return _done(
            [
                WriteResult(item.index, piece.bytes, (plan.storage_data, piece.key, size))
                for item, piece in zip(plan.items, pieces, strict=True)
            ]
        )

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = {result.index: result.storage_data for results_of_rank in results for result in results_of_rank}
        files = {file: size for file, _key, size in written.values()}
        for name, document in self.documents.items():
            with synced_file(self.folder / name) as stream:
                stream.write(json.dumps(document, allow_nan=False, separators=(",", ":")).encode())
                files[name] = stream.tell()
        tensors = {name: _entry(name, meta, written) for name, meta in metadata.state_dict_metadata.items()}
        dataclasses.replace(self.draft, files=files, tensors=tensors).write(self.folder)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003
        return False


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


def _piece(item: WriteItem, key: str, planner: SavePlanner) -> Piece:
    if item.tensor_data is None:
        raise RuntimeError(f"{key} is not a tensor; DCP would pickle it")

    def get() -> Tensor:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, Tensor)
        return tensor

    return Piece(key, item.tensor_data.properties.dtype, tuple(item.tensor_data.chunk.sizes), get)


def _entry(name: str, meta: Any, written: Mapping[MetadataIndex, tuple[str, str, int]]) -> Entry:
    chunks = []
    for chunk in meta.chunks:
        file, key, _size = written[MetadataIndex(name, chunk.offsets)]
        chunks.append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), file, key))
    return Entry(type_name(meta.properties.dtype), tuple(meta.size), tuple(chunks))


def _tensor_metadata(entry: Entry) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in entry.chunks]
    return TensorStorageMetadata(TensorProperties(getattr(torch, entry.dtype)), torch.Size(entry.shape), chunks)


def _alone() -> bool:
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


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
