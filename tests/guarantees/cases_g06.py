"""G6: a bit flipped, a file cut, a page zeroed, a file gone or swapped: found, and the one before is taken."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FILES = ("manifest.json", "state.json", "rank_0.safetensors", "rank_1.safetensors")
#: Of 1,450 cases so many are of each kind.
KINDS = {"flip": 1000, "cut": 200, "zeroed": 200, "missing": 25, "swapped": 25}
_PAGE = 4096


@dataclass(frozen=True)
class Case:
    number: int
    kind: str
    file: str
    #: Which bit, byte, page or other file: of what is there, the so many-th part.
    place: float

    def __str__(self) -> str:
        return f"{self.number}: {self.kind} {self.file} at {self.place:.4f}"


def cases(count: int, seed: int) -> list[Case]:
    rng = random.Random(seed)
    whole = [kind for kind, share in KINDS.items() for _ in range(share)]
    kinds = [whole[number * len(whole) // count] for number in range(count)] if count < len(whole) else whole
    kinds += [rng.choice(whole) for _ in range(count - len(kinds))]
    return [Case(number, kind, FILES[number % len(FILES)], rng.random()) for number, kind in enumerate(kinds)]


class Box:
    """Takes what is loaded, and counts how often."""

    loads = 0

    def state_dict(self) -> Any:
        raise AssertionError("it is only loaded")

    def load_state_dict(self, state: Any) -> None:
        self.loads += 1


def run(case: Case, folder: Path) -> str | None:
    from runner.checkpoint import Checkpointer, store
    from runner.errors import InputError

    folder = folder / "checkpoints"
    for step in (1, 2):
        store.path_of(folder, step).mkdir(parents=True)
        for name, data in _sound(step).items():
            (store.path_of(folder, step) / name).write_bytes(data)
    good, bad = store.path_of(folder, 1), store.path_of(folder, 2)
    names = harm(case, bad)
    told = _Told()
    log = logging.getLogger("runner.checkpoint.store")
    log.addHandler(told)
    try:
        taken = store.latest(folder)
    finally:
        log.removeHandler(told)
    if taken != good:
        return f"{taken} was taken"
    if len(told.lines) != 1 or bad.name not in told.lines[0] or not any(name in told.lines[0] for name in names):
        return f"the line does not name file and checkpoint: {told.lines}"
    if case.kind == "flip" and "hash" not in told.lines[0] and "header" not in told.lines[0]:
        return f"the line does not speak of a hash: {told.lines}"
    box = Box()
    for refuse in (lambda: store.find(bad), lambda: Checkpointer(folder, {"box": box}).load(bad)):
        try:
            refuse()
        except InputError as error:
            if error.exit_code != 2 or not any(name in str(error) for name in names):
                return f"another error: {error}"
        else:
            return "the one that is named was taken"
    if box.loads:
        return "something was loaded from it"
    Checkpointer(folder, {"box": box}).load(good)
    return None if box.loads == 1 else "the sound one was not loaded"


class _Told(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def harm(case: Case, folder: Path) -> tuple[str, ...]:
    """Does it to a checkpoint, and gives the names of which what is said must hold one."""
    file = folder / case.file
    data = bytearray(file.read_bytes())
    harmed: tuple[str, ...] = (case.file,)
    if case.kind == "flip":
        byte, bit = divmod(int(case.place * len(data) * 8), 8)
        data[byte] ^= 1 << bit
    elif case.kind == "cut":
        del data[int(case.place * len(data)) :]
    elif case.kind == "zeroed":
        start = int(case.place * -(-len(data) // _PAGE)) * _PAGE
        data[start : start + _PAGE] = bytes(len(data[start : start + _PAGE]))
    elif case.kind == "missing":
        file.unlink()
        if case.place < 0.5:
            # Renamed: all its bytes are there, under another name.
            (folder / f"{case.file}.1").write_bytes(data)
        return (case.file,)
    else:
        # With the file of the same name of the other checkpoint, or with another one of the same.
        other = folder.with_name("step_00000001") / case.file
        data = bytearray(other.read_bytes())
        if case.place < 0.5 and case.file.endswith("safetensors"):
            twin = folder / f"rank_{1 - int(case.file[5])}.safetensors"
            data = bytearray(twin.read_bytes())
            twin.write_bytes(file.read_bytes())
            harmed = (case.file, twin.name)
        elif case.file == "manifest.json":
            harmed = FILES  # it is the files that differ from what another's manifest says
    file.write_bytes(data)
    return harmed


@cache
def _sound(step: int) -> dict[str, bytes]:
    """The files of a checkpoint as two processes write it: half of each tensor in each file."""
    import tempfile

    import torch

    from runner.checkpoint.manifest import Chunk, Entry, File, Manifest
    from runner.checkpoint.tensor_file import Piece, write_file

    torch.manual_seed(step)
    tensors = {f"box/layer.{number}.weight": torch.randn(8, 90 + number) for number in range(8)}
    chunks: dict[str, list[Chunk]] = {name: [] for name in tensors}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files = {}
        for rank in range(2):
            file = f"rank_{rank}.safetensors"
            pieces = []
            for name, tensor in tensors.items():
                part = tensor[4 * rank : 4 * rank + 4]
                pieces.append(Piece(name, part.dtype, tuple(part.shape), lambda part=part: part))
                chunks[name].append(Chunk((4 * rank, 0), tuple(part.shape), file, name))
            files[file] = File(*write_file(folder / file, pieces))
        state = {name.removeprefix("box/"): {"$tensor": name} for name in tensors}
        files["state.json"] = _written(folder / "state.json", {"state": {"box": state}, "extra": {"step": step}})
        entries = {name: Entry("float32", tuple(tensors[name].shape), tuple(found)) for name, found in chunks.items()}
        Manifest(step, {"loss": 0.5}, files, entries, 2).write(folder)
        return {file.name: file.read_bytes() for file in folder.iterdir()}


def _written(path: Path, document: Any) -> Any:
    import json

    from runner.checkpoint.manifest import File
    from runner.checkpoint.synced import synced_file

    with synced_file(path) as file:
        file.write(json.dumps(document).encode())
    return File(file.size, file.hash)
