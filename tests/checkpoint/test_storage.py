"""Tensors in safetensors files, the manifest beside them, and no pickle."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from runner.checkpoint.manifest import Damaged, Manifest, sealed
from runner.checkpoint.peers import Peers
from runner.checkpoint.storage import own_part, read_tensors, write_checkpoint
from runner.checkpoint.verify import check_structure
from runner.errors import InputError, RunnerError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def write(folder: Path, tensors: dict[str, Tensor]) -> Manifest:
    draft = Manifest(7, {"loss": float("nan")})
    write_checkpoint(folder.parent, own_part(tensors), draft, {"state.json": {"a": 1}}, Peers()).rename(folder)
    return Manifest.read(folder)


def read(folder: Path) -> dict[str, Tensor]:
    manifest = Manifest.read(folder)
    targets = {name: torch.empty(e.shape, dtype=getattr(torch, e.dtype)) for name, e in manifest.tensors.items()}
    check_structure(folder, manifest, manifest.files)
    read_tensors(folder, manifest, targets)
    return targets


def same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = a.contiguous().reshape(-1), b.contiguous().reshape(-1)
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def samples() -> dict[str, Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 5)
    tensors = {str(dtype): torch.randn(3, 7).to(dtype) for dtype in _FLOATS}
    tensors |= {str(dtype): torch.randint(0, 100, (5,)).to(dtype) for dtype in _WHOLE}
    return tensors | {
        "bool": torch.tensor([True, False, True]),
        "complex": torch.randn(3, dtype=torch.complex64),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "0-d": torch.tensor(2.5),
        "0-d int": torch.tensor(-(2**62)),
        "empty": torch.empty(0),
        "empty 2-d": torch.empty(0, 3, dtype=torch.int64),
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
        "transposed": base.t(),
        "slice": base[1:4, 2:],
        "expanded": torch.tensor([1.0]).expand(4),
        "shared": base,
        "shared too": base.view(-1)[3:9],
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "grad": torch.randn(3, requires_grad=True),
        "a/b~c ä\n": torch.ones(2),
    }


def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = samples()
    write(tmp_path / "c", tensors)
    back = read(tmp_path / "c")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].shape == tensor.shape, name
        assert same_bits(back[name], tensor.detach().resolve_conj()), name


def test_the_safetensors_library_reads_the_file(tmp_path: Path) -> None:
    tensors = samples()
    write(tmp_path / "c", tensors)
    loaded = load_file(tmp_path / "c" / "rank_0.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(same_bits(loaded[name], tensor.detach().resolve_conj()) for name, tensor in tensors.items())


def test_the_manifest_says_what_is_where(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    write(folder, {"model/w": torch.ones(2, 3), "model/b": torch.tensor(1)})
    text = json.loads((folder / "manifest.json").read_text())
    assert (text["format"], text["step"], text["world"]) == (2, 7, 1)
    for name, said in text["files"].items():
        data = (folder / name).read_bytes()
        assert said == {"size": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    assert (
        text["files"].keys()
        == {"rank_0.safetensors", "state.json"}
        == {p.name for p in folder.iterdir()} - {"manifest.json"}
    )
    chunk = {"file": "rank_0.safetensors", "key": "model/w", "offsets": [0, 0], "sizes": [2, 3]}
    assert text["tensors"]["model/w"] == {"dtype": "float32", "shape": [2, 3], "chunks": [chunk]}
    assert text["tensors"]["model/b"]["dtype"] == "int64"


def test_another_type_is_converted_while_reading(tmp_path: Path) -> None:
    values = torch.randn(5)
    manifest = write(tmp_path / "c", {"w": values})
    target = torch.empty(5, dtype=torch.bfloat16)
    read_tensors(tmp_path / "c", manifest, {"w": target})
    assert torch.equal(target, values.bfloat16())


def test_parameters_are_filled_in_place(tmp_path: Path) -> None:
    manifest = write(tmp_path / "c", {"w": torch.arange(6.0).view(2, 3)})
    parameter = torch.nn.Parameter(torch.zeros(3, 2).t())
    address = parameter.data_ptr()
    read_tensors(tmp_path / "c", manifest, {"w": parameter})
    assert parameter.data_ptr() == address
    assert parameter.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_no_tensors_at_all(tmp_path: Path) -> None:
    assert write(tmp_path / "c", {}).tensors == {}


def test_a_type_that_safetensors_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="cannot save `a/b`: a tensor of type complex128"):
        write(tmp_path / "c", {"a/b": torch.ones(2, dtype=torch.complex128)})


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rank_0.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["missing", "shorter", "longer", "empty", "a folder"])
def test_missing_and_cut_files_are_noticed(tmp_path: Path, name: str, harm: str) -> None:
    write(tmp_path / "c", {"w": torch.ones(100)})
    file = tmp_path / "c" / name
    data = file.read_bytes()
    file.unlink()
    if harm == "a folder":
        file.mkdir()
    elif harm != "missing":
        file.write_bytes({"shorter": data[:-7], "longer": data + b"}", "empty": b""}[harm])
    with pytest.raises(Damaged) as caught:
        Manifest.read(tmp_path / "c")
    assert name in str(caught.value)


def change(folder: Path, **values: object) -> None:
    document = json.loads((folder / "manifest.json").read_text()) | values
    del document["hash"]
    (folder / "manifest.json").write_bytes(sealed(json.dumps(document).encode()[:-1] + b",\n"))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "", "a\\b"])
def test_a_manifest_cannot_point_outside(tmp_path: Path, name: str) -> None:
    write(tmp_path / "c", {"w": torch.ones(3)})
    change(tmp_path / "c", files={name: {"size": 1, "xxh3_128": "0" * 32}}, tensors={})
    with pytest.raises(Damaged, match="is not the name of a file"):
        Manifest.read(tmp_path / "c")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "float32", "shape": [4], "chunks": []},
        {"dtype": "float32", "shape": [4], "chunks": [{"file": "no", "key": "w", "offsets": [0], "sizes": [4]}]},
        {"dtype": "load", "shape": [0], "chunks": []},
        {"dtype": "float32", "shape": [-4], "chunks": []},
        {"dtype": "float32", "shape": 4},
        [],
        None,
    ],
)
def test_a_manifest_that_makes_no_sense(tmp_path: Path, entry: object) -> None:
    write(tmp_path / "c", {"w": torch.ones(3)})
    change(tmp_path / "c", tensors={"w": entry})
    with pytest.raises(Damaged, match=r"manifest\.json cannot be read"):
        Manifest.read(tmp_path / "c")


@pytest.mark.parametrize("shape", [[8], [4, 1]])
def test_a_file_that_holds_something_else(tmp_path: Path, shape: list[int]) -> None:
    write(tmp_path / "c", {"w": torch.ones(4)})
    chunk = {"file": "rank_0.safetensors", "key": "w", "offsets": [0] * len(shape), "sizes": shape}
    change(tmp_path / "c", tensors={"w": {"dtype": "float32", "shape": shape, "chunks": [chunk]}})
    with pytest.raises(Damaged, match="the manifest"):
        read(tmp_path / "c")


def test_a_newer_format_is_refused_in_words(tmp_path: Path) -> None:
    write(tmp_path / "c", {"w": torch.ones(4)})
    change(tmp_path / "c", format=3)
    with pytest.raises(InputError) as caught:
        Manifest.read(tmp_path / "c")
    assert "format 3" in caught.value.problems[0].why
    assert "newer" in caught.value.problems[0].fix


# Pickle ---------------------------------------------------------------------------------------------------------------

_heard: list[str] | None = None


def _hear(event: str, _arguments: object) -> None:
    if _heard is not None:
        _heard.append(event)


@contextmanager
def heard() -> Iterator[list[str]]:
    """The audit events of the interpreter inside the block."""
    global _heard
    if not _hear.__dict__.setdefault("added", False):
        sys.addaudithook(_hear)
        _hear.__dict__["added"] = True
    events: list[str] = []
    _heard = events
    try:
        yield events
    finally:
        _heard = None


def test_nothing_is_pickled_imported_or_executed(tmp_path: Path) -> None:
    write(tmp_path / "first", samples())
    read(tmp_path / "first")
    with heard() as events:
        write(tmp_path / "second", samples())
        read(tmp_path / "second")
    assert "open" in events
    assert not {"pickle.find_class", "import", "exec", "compile", "os.system", "subprocess.Popen"} & set(events)
    for file in (tmp_path / "second").iterdir():
        assert file.suffix in (".json", ".safetensors")
        assert not file.read_bytes().startswith((b"\x80", b"PK"))


# Several processes ----------------------------------------------------------------------------------------------------

_RANK = """
import os, sys, torch, torch.distributed as dist
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from runner.checkpoint.manifest import Manifest
from runner.checkpoint.peers import Peers
from runner.checkpoint.storage import own_part, read_tensors, write_checkpoint

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
full = torch.arange(35.0).view(7, 5)
tensors = {
    "rows": distribute_tensor(full, mesh, [Shard(0)]),
    "columns": distribute_tensor(full, mesh, [Shard(1)]),
    "one row": distribute_tensor(full[:1], mesh, [Shard(0)]),
    "replicated": distribute_tensor(full, mesh, [Replicate()]),
    "plain": full,
}
checkpoint = write_checkpoint(folder, own_part(tensors), Manifest(1), {"state.json": {}}, Peers(own=True))
dist.barrier()
targets = {name: distribute_tensor(torch.zeros_like(full), mesh, [Shard(1)]) for name in ("rows", "columns", "plain")}
read_tensors(checkpoint, Manifest.read(checkpoint), targets)
for name, target in targets.items():
    assert torch.equal(target.full_tensor(), full), name
dist.barrier()
print("ok", flush=True)
os._exit(0)
"""


def test_two_processes_save_sharded_tensors_and_one_loads_them(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            output, errors = process.communicate(timeout=60)
            assert (process.returncode, output) == (0, "ok\n"), errors
    finally:
        for process in ranks:
            process.kill()
    folder = tmp_path / "step_00000001"
    assert {file.name for file in folder.iterdir()} == {
        "manifest.json",
        "state.json",
        "rank_0.safetensors",
        "rank_1.safetensors",
    }
    full = torch.arange(35.0).view(7, 5)
    expected = dict.fromkeys(("rows", "columns", "replicated", "plain"), full) | {"one row": full[:1]}
    loaded = read(folder)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    rows = Manifest.read(folder).tensors["rows"].chunks
    assert [(c.file, c.offsets, c.sizes) for c in rows] == [
        ("rank_0.safetensors", (0, 0), (4, 5)),
        ("rank_1.safetensors", (4, 0), (3, 5)),
    ]
    with safe_open(folder / "rank_1.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("rows"), full[4:])
