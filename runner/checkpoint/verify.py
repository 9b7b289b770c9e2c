"""Whether the files of a checkpoint are what its manifest says: structure, sizes, hashes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from xxhash import xxh3_128

from runner.checkpoint import tensor_file
from runner.checkpoint.manifest import Damaged, Manifest, chunks_of, opened

_PIECE = 1 << 22

#: Files that this process has read and found right: path -> what the system said of it then.
_read_before: dict[Path, tuple[object, ...]] = {}

#: Checkpoints that this process has found damaged, whose manifests would still count them among the good ones.
_damaged: set[Path] = set()

_log = logging.getLogger(__name__)


def known_damaged(folder: Path) -> bool:
    """Whether `verify` has found damage in the files of a checkpoint."""
    return folder.resolve() in _damaged


def renewed(folder: Path) -> None:
    """Forgets what was found in a checkpoint that has been replaced."""
    _damaged.discard(folder.resolve())


def verify(folder: Path, manifest: Manifest, share: tuple[int, int] = (0, 1)) -> None:
    """Reads every file of a checkpoint and compares its hash; raises Damaged for the first that is not right.

    `share` is (rank, processes): only every so many-th file, for processes that verify together. A file that this
    process has found right and that nobody has touched since is not read again.
    """
    try:
        _verify(folder, manifest, *share)
    except Damaged:
        _damaged.add(folder.resolve())
        raise
    renewed(folder)


def _verify(folder: Path, manifest: Manifest, rank: int, processes: int) -> None:
    names = sorted(manifest.files)[rank::processes]
    if all(manifest.files[name].hash for name in names):
        if len(names) < 2:
            errors = [_checked(folder, name, manifest) for name in names]
        else:
            with ThreadPoolExecutor(4) as pool:
                errors = list(pool.map(lambda name: _checked(folder, name, manifest), names))
        for error in errors:
            if error is not None:
                raise error
    else:
        _log.warning("%s was written by an older version, without hashes: damage in it cannot be found", folder)
    check_structure(folder, manifest, names)


def check_structure(folder: Path, manifest: Manifest, names: Collection[str]) -> None:
    """Raises Damaged where a file of tensors holds other ones than the manifest says; reads only its header."""
    expected: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {name: {} for name in names}
    for chunk, dtype in chunks_of(manifest.tensors):
        if chunk.file in expected:
            expected[chunk.file][chunk.key] = (dtype, chunk.sizes)
    for name, tensors in expected.items():
        if not (tensors or name.endswith(tensor_file.SUFFIX)):
            continue
        try:
            with open(opened(folder, name), "rb") as file:
                tensor_file.check_header(file, manifest.files[name].size, tensors)
        except (OSError, ValueError) as error:
            raise Damaged(folder, f"{name}: {error}") from error


def check_bytes(folder: Path, name: str, data: bytes, manifest: Manifest) -> None:
    """Raises Damaged where a file that is already in memory is not what the manifest says."""
    expected = manifest.files[name].hash
    found = xxh3_128(data).hexdigest()
    if expected is not None and found != expected:
        raise Damaged(folder, _differs(name, found, expected))


def _checked(folder: Path, name: str, manifest: Manifest) -> Damaged | None:
    path, expected = folder / name, manifest.files[name].hash
    assert expected is not None
    try:
        handle = opened(folder, name)
        try:
            if _read_before.get(path) == (expected, *_identity(handle)):
                return None
            found = _hash(handle)
            # Within one tick of the file system's clock a change would leave no trace.
            settled = time.time_ns() - os.fstat(handle).st_mtime_ns > 2_000_000_000
            if found == expected and settled:
                _read_before[path] = (expected, *_identity(handle))
        finally:
            os.close(handle)
    except Damaged as error:
        return error
    except OSError as error:
        return Damaged(folder, f"{name} cannot be read ({error.strerror or error})")
    return None if found == expected else Damaged(folder, _differs(name, found, expected))


def _differs(name: str, found: str, expected: str) -> str:
    return f"{name} has the hash {found} instead of {expected}"


def _identity(handle: int) -> tuple[int, ...]:
    found = os.fstat(handle)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _hash(handle: int) -> str:
    digest, buffer = xxh3_128(), memoryview(bytearray(_PIECE))
    while count := os.readv(handle, [buffer]):
        digest.update(buffer[:count])
    return digest.hexdigest()
