"""Checkpoints that somebody made to do harm: refused as damaged, within bounded time and memory."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from guarantees.cases_g07 import Box, sealed_again
from xxhash import xxh3_128_hexdigest

from runner.checkpoint import Checkpointer, extra_of, find, latest
from runner.checkpoint.manifest import MOST_BYTES, Manifest, sealed
from runner.errors import InputError, RunnerError

RANK = "rank_0.safetensors"
HUGE = 10**12


def document(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "manifest.json").read_bytes())
    return found


def file(size: int) -> dict[str, Any]:
    return {"size": size, "xxh3_128": "0" * 32}


def entry(shape: list[int], *chunks: tuple[list[int], list[int]], key: str = "box/w", name: str = RANK) -> Any:
    parts = [{"file": name, "key": key, "offsets": offsets, "sizes": sizes} for offsets, sizes in chunks]
    return {"dtype": "float32", "shape": shape, "chunks": parts}


def change_files(path: Path, **files: Any) -> None:
    sealed_again(path, files=document(path)["files"] | files)


def header(path: Path, change: Callable[[dict[str, Any]], Any], length: int | None = None) -> None:
    """Another header in the file of tensors, with a manifest that agrees."""
    data = (path / RANK).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(change(json.loads(data[8:end]))).encode()
    text += b" " * (-len(text) % 8)
    (path / RANK).write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data[end:])
    sealed_again(path)


def overlapping(found: dict[str, Any]) -> dict[str, Any]:
    found["box/v"]["data_offsets"] = found["box/w"]["data_offsets"]
    return found


def linked(path: Path) -> None:
    (path.parent / "elsewhere").write_bytes((path / RANK).read_bytes())
    (path / RANK).unlink()
    (path / RANK).symlink_to(path.parent / "elsewhere")


def piped(path: Path) -> None:
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")


def sparse(path: Path) -> None:
    with open(path / RANK, "r+b") as stream:
        stream.truncate(HUGE)
    change_files(path, **{RANK: file(HUGE)})


def large(path: Path, name: str) -> None:
    with open(path / name, "r+b") as stream:
        stream.truncate(MOST_BYTES + 1)


def deep(path: Path, name: str) -> None:
    (path / name).write_bytes(b'{"state":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b',"extra":0}')
    if name == "state.json":
        sealed_again(path)


def odd_state(path: Path, **words: Any) -> None:
    (path / "state.json").write_text(json.dumps({"state": {"box": {}}, "extra": None} | words))
    sealed_again(path)


def many(path: Path) -> None:
    entries = b",".join(b'"%d":{"dtype":"float32","shape":[],"chunks":[]}' % number for number in range(10**6))
    (path / "manifest.json").write_bytes(
        sealed(b'{"format":2,"step":1,"metrics":{},"files":{},"tensors":{%b},' % entries)
    )


def tensors(path: Path, found: Any) -> None:
    sealed_again(path, tensors={"box/w": found})


ATTACKS: dict[str, Callable[[Path], Any]] = {
    "a file above": lambda path: change_files(path, **{"../x": file(1)}),
    "a file in a folder": lambda path: change_files(path, **{"a/b": file(1)}),
    "an absolute path": lambda path: change_files(path, **{"/etc/passwd": file(1)}),
    "the manifest itself": lambda path: change_files(path, **{"manifest.json": file(1)}),
    "a name with a zero": lambda path: change_files(path, **{"a\0b": file(1)}),
    "a link": linked,
    "a pipe": piped,
    "10^12 bytes": lambda path: change_files(path, **{RANK: file(HUGE)}),
    "10^12 bytes that are there": sparse,
    "10^6 entries": many,
    "a large manifest": lambda path: large(path, "manifest.json"),
    "a large document": lambda path: (large(path, "state.json"), sealed_again(path)),
    "a deep manifest": lambda path: deep(path, "manifest.json"),
    "a deep document": lambda path: deep(path, "state.json"),
    "a tensor of 10^12 elements": lambda path: tensors(path, entry([HUGE], ([0], [HUGE]))),
    "a tensor of no elements, endless": lambda path: tensors(
        path, entry([0, 2**62, 2**62], ([0, 0, 0], [0] + [2**62] * 2))
    ),
    "sizes that no integer holds": lambda path: tensors(path, entry([2**80], ([0], [2**80]))),
    "sizes that are no numbers": lambda path: tensors(path, entry([True], ([0], [1]))),
    "blocks that overlap": lambda path: tensors(path, entry([4], ([0], [2]), ([0], [2]))),
    "a block outside": lambda path: tensors(path, entry([4], ([2], [4]))),
    "a hundred dimensions": lambda path: tensors(path, entry([1] * 100, ([0] * 100, [1] * 100))),
    "another key": lambda path: tensors(path, entry([4], ([0], [4]), key="box/x")),
    "tensors in the document": lambda path: tensors(path, entry([4], ([0], [4]), name="state.json")),
    "a header of 100 MB": lambda path: header(path, lambda found: found, 100_000_000),
    "a header of nothing": lambda path: header(path, lambda found: found, 0),
    "a header that is a list": lambda path: header(path, lambda found: [1]),
    "tensors in one place": lambda path: header(path, overlapping),
    "tensors before the start": lambda path: header(
        path, lambda found: {**found, "box/w": {**found["box/w"], "data_offsets": [-16, 0]}}
    ),
    "places that are no numbers": lambda path: header(
        path, lambda found: {**found, "box/w": {**found["box/w"], "data_offsets": ["a", "b"]}}
    ),
    "a tensor too many": lambda path: header(path, lambda found: {**found, "more": found["box/w"]}),
    "a reference to no tensor": lambda path: odd_state(path, state={"box": {"w": {"$tensor": "box/no"}}}),
    "a reference that is none": lambda path: odd_state(path, state={"box": {"w": {"$tensor": []}}}),
    "a float of words": lambda path: odd_state(path, state={"box": {"$float": "words"}}),
    "a tensor where none belongs": lambda path: odd_state(path, extra={"$tensor": "box/w"}),
    "a state that is none": lambda path: odd_state(path, state=3),
    "another encoding": lambda path: (path / "manifest.json").write_bytes(
        (path / "manifest.json").read_text().encode("utf-16")
    ),
}


#: Beginnings of those that are only seen where the document is read.
LATE = ("a reference", "a float", "a tensor where", "a state", "a large document", "a deep document")


@pytest.mark.parametrize("attack", ATTACKS)
def test_it_is_damaged_and_soon_known_to_be(tmp_path: Path, attack: str) -> None:
    box = Box()
    box.state["v"] = torch.ones(4)
    path = Checkpointer(tmp_path, {"box": box}).save(1, {"said": 1})
    ATTACKS[attack](path)
    victim = Box()
    loads: list[Any] = []
    victim.load_state_dict = loads.append  # type: ignore[method-assign]
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(InputError) as caught:
        Checkpointer(tmp_path, {"box": victim}).load(path)
    assert "is not a complete checkpoint" in caught.value.problems[0].why
    assert len(str(caught.value)) < 1000
    assert time.process_time() - started < 5
    # In KiB; a list of a million entries in the test itself counts as well.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000
    assert loads == []
    # Whether the document suits the tensors is only known where it is loaded.
    if not attack.startswith(LATE):
        with pytest.raises(InputError):
            find(path)
    else:
        find(path)
        with suppress(InputError):
            extra_of(path)


def test_a_folder_full_of_them(tmp_path: Path) -> None:
    """None is taken, and nothing else than this is said."""
    box = Box()
    box.state["v"] = torch.ones(4)
    whole = [name for name in ATTACKS if not name.startswith(LATE)]
    for step, attack in enumerate(whole, 1):
        path = Checkpointer(tmp_path / "one", {"box": box}).save(step)
        ATTACKS[attack](path)
        (tmp_path / "all").mkdir(exist_ok=True)
        path.rename(tmp_path / "all" / path.name)
    with pytest.raises(RunnerError, match=f"none of the {len(whole)} checkpoints"):
        latest(tmp_path / "all")


def test_many_blocks_are_compared_in_bounded_time(tmp_path: Path) -> None:
    box = Box()
    box.state["w"] = torch.zeros(100, 100)
    path = Checkpointer(tmp_path, {"box": box}).save(1)
    for where in ([0, 0], [1, 0]):
        blocks = [([i, j], [1, 1]) for i in range(100) for j in range(100) if (i, j) != (5, 5)]
        tensors(path, entry([100, 100], *blocks, (where if where == [1, 0] else [5, 5], [1, 1])))
        started = time.process_time()
        with pytest.raises(RunnerError) as caught:
            find(path)
        assert ("overlap" in str(caught.value)) is (where == [1, 0])
        assert time.process_time() - started < 20


# Formats --------------------------------------------------------------------------------------------------------------


def as_format_1(path: Path) -> None:
    found = document(path)
    for name in ("hash", "world"):
        del found[name]
    found["files"] = {name: {"size": said["size"]} for name, said in found["files"].items()}
    (path / "manifest.json").write_text(json.dumps(found | {"format": 1}))


def test_the_first_format_is_read_and_said_to_have_no_hashes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    box = Box()
    box.state["w"] += 3
    path = Checkpointer(tmp_path, {"box": box}).save(1)
    as_format_1(path)
    back = Box()
    Checkpointer(tmp_path, {"box": back}).load(path)
    assert back.state["w"].tolist() == [3.0] * 4
    assert "was written by an older version, without hashes" in caplog.text
    assert Manifest.read(path).files[RANK].hash is None


def test_hashes_cannot_be_left_out_of_the_second(tmp_path: Path) -> None:
    path = Checkpointer(tmp_path, {"box": Box()}).save(1)
    found, sound = document(path), (path / "manifest.json").read_bytes()
    del found["hash"]
    (path / "manifest.json").write_text(json.dumps(found))
    with pytest.raises(RunnerError, match="of format 2, without a hash at its end"):
        Manifest.read(path)
    (path / "manifest.json").write_bytes(sound)
    change_files(path, **{RANK: {"size": (path / RANK).stat().st_size}})
    with pytest.raises(RunnerError, match="xxh3_128"):
        Manifest.read(path)


def test_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    path = Checkpointer(tmp_path, {"box": Box()}).save(1)
    manifest = Manifest.read(path)
    assert manifest.files.keys() == {RANK, "state.json"}
    for name, said in manifest.files.items():
        assert said.hash == xxh3_128_hexdigest((path / name).read_bytes())
    text = (path / "manifest.json").read_bytes()
    body, _, end = text.rpartition(b'"hash": ')
    assert end.decode() == f'"{xxh3_128_hexdigest(body)}"\n}}\n'
