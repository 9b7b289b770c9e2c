"""Weights to begin with: every kind of source, names that do not fit, hostile files, one process and two."""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_ranks
from safetensors.torch import save_file
from small import Result, config, mlp, spec
from torch import Tensor, nn

from runner import distributed
from runner.checkpoint import weights
from runner.checkpoint.weights import begin_with, find
from runner.engine.model_state import ModelState
from runner.errors import InputError
from runner.recipe.init_from import Asked, matcher, renamer

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

Job = Callable[..., Result]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(4)


def values(seed: int = 1, model: Callable[[], nn.Module] = mlp) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {name: value.clone() for name, value in model().state_dict().items()}


def put(asked: Any, folder: Path, model: nn.Module | None = None, tied: Any = None) -> tuple[nn.Module, str, list[str]]:
    wanted = Asked.of(asked)
    model = mlp() if model is None else model
    done, left = begin_with(wanted, find(wanted, folder), ModelState(model), tied or {})
    return model, done, left


def equal(model: nn.Module, expected: dict[str, Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == expected.keys() and all(own[name].equal(value) for name, value in expected.items())


def refused(asked: Any, folder: Path, model: nn.Module | None = None) -> str:
    before = None if model is None else {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        put(asked, folder, model)
    assert model is None or before is None or equal(model, before)
    return " | ".join(f"{p.key}: {p.why} ({p.fix})" for p in caught.value.problems)


# --- sources ----------------------------------------------------------------------------------------------------------


def sharded(folder: Path, parts: list[dict[str, Tensor]]) -> None:
    placed = {}
    for number, part in enumerate(parts):
        name = f"model-{number}.safetensors"
        save_file(part, folder / name)
        placed |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def halves(known: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    names = list(known)
    return [{n: known[n] for n in names[:2]}, {n: known[n] for n in names[2:]}]


def test_a_file_a_folder_and_several_files(tmp_path: Path) -> None:
    known = values()
    save_file(known, tmp_path / "mine.safetensors")
    model, done, left = put("mine.safetensors", tmp_path)
    assert equal(model, known)
    assert (done.split(",")[0], left) == ("4 of 4 tensors", [])
    assert equal(put(str(tmp_path), Path("/"))[0], known)
    (tmp_path / "many").mkdir()
    sharded(tmp_path / "many", halves(known))
    assert equal(put("many", tmp_path)[0], known)
    assert equal(put({"path": "many/model.safetensors.index.json"}, tmp_path)[0], known)


def test_a_folder_of_links_as_the_hub_keeps_it(tmp_path: Path) -> None:
    known = values()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file(known, tmp_path / "blobs" / "abc")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/abc")
    assert equal(put("snapshot", tmp_path)[0], known)


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path / "cache")

    (tmp_path / "cache").mkdir()
    sharded(tmp_path / "cache", halves(values()))
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert equal(put({"path": "someone/model", "revision": "v2"}, tmp_path)[0], values())
    assert (asked["name"], asked["revision"]) == ("someone/model", "v2")
    assert asked["allow_patterns"] == ["*.safetensors", "*.safetensors.index.json"]


def test_the_hub_says_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def download(name: str, **options: Any) -> str:
        raise OSError("no route to host\nand a page of text")

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert "neither here nor to be had from the hub: OSError: no route to host (" in refused("someone/model", tmp_path)


def test_without_the_hubs_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refused("someone/model", tmp_path)


@pytest.mark.parametrize("inside", [None, "state_dict", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_wrote(tmp_path: Path, inside: str | None, zipped: bool) -> None:
    known = values()
    saved: Any = known if inside is None else {inside: known, "epoch": 3}
    torch.save(saved, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    assert equal(put("model.pt", tmp_path)[0], known)


def test_a_folder_as_transformers_wrote_it_once(tmp_path: Path) -> None:
    known = values()
    torch.save(known, tmp_path / "pytorch_model.bin")
    assert equal(put(str(tmp_path), tmp_path)[0], known)
    (tmp_path / "two").mkdir()
    for number, part in enumerate(halves(known)):
        torch.save(part, tmp_path / "two" / f"{number}.bin")
    placed = {name: f"{number}.bin" for number, part in enumerate(halves(known)) for name in part}
    (tmp_path / "two" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    assert equal(put("two", tmp_path)[0], known)


# --- what fits --------------------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_told_at_once(tmp_path: Path) -> None:
    known = values()
    known["3.weight"] = torch.zeros(7, 16)
    known |= {f"extra.{number}": torch.zeros(1) for number in range(8)}
    del known["0.bias"]
    save_file(known, tmp_path / "a.safetensors")
    said = refused("a.safetensors", tmp_path, mlp())
    assert "1 are missing: 0.bias;" in said
    assert "8 are not the model's: extra.0, extra.1, extra.2, extra.3, extra.4 and 3 more" in said
    assert "1 have another shape or type: 3.weight ([7, 16] there, [3, 16] here)" in said
    assert "2 of the model's 4 tensors fit" in said
    assert "strict: false" in said
    torch.manual_seed(0)
    fresh = {name: value.clone() for name, value in mlp().state_dict().items()}
    torch.manual_seed(0)
    model, done, left = put({"path": "a.safetensors", "strict": False}, tmp_path)
    assert equal(model, {**fresh, "0.weight": known["0.weight"], "3.bias": known["3.bias"]})
    assert done.startswith("2 of 4 tensors")
    assert len(left) == 3


def test_nothing_that_fits_is_refused_always(tmp_path: Path) -> None:
    save_file({"other": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert "0 of the model's 4 tensors fit" in refused({"path": "a.safetensors", "strict": False}, tmp_path, mlp())


def test_a_beginning_that_one_side_lacks_is_advised(tmp_path: Path) -> None:
    known = values()
    save_file({f"model.{name}": value for name, value in known.items()}, tmp_path / "longer.safetensors")
    said = refused("longer.safetensors", tmp_path, mlp())
    assert "rename: {model.: ''}" in said
    assert equal(put({"path": "longer.safetensors", "rename": {"model.": ""}}, tmp_path)[0], known)
    save_file(known, tmp_path / "shorter.safetensors")
    outer = nn.ModuleDict({"model": mlp()})
    assert "rename: {**: model.**}" in refused("shorter.safetensors", tmp_path, outer)
    put({"path": "shorter.safetensors", "rename": {"**": "model.**"}}, tmp_path, outer)
    assert equal(outer["model"], known)


@pytest.mark.parametrize(
    ("rename", "name", "new"),
    [
        ({"^bert\\.": "model.bert."}, "bert.layer.0.weight", "model.bert.layer.0.weight"),
        ({"bert.": ""}, "bert.layer.0.weight", "layer.0.weight"),
        ({"bert": "x", "ber": "y"}, "bert.a", "x.a"),
        ({"layers.*.attn.": "blocks.*.attention."}, "layers.12.attn.q", "blocks.12.attention.q"),
        ({"layers.*.attn.": "blocks.*.attention."}, "layers.1.2.attn.q", "layers.1.2.attn.q"),
        ({"**.gamma": "**.weight"}, "a.b.norm.gamma", "a.b.norm.weight"),
        ({"*.*.": "*-*."}, "a.b.c", "a-b.c"),
        ({"": "m."}, "a", "m.a"),
        ({"no": "x"}, "a.no", "a.no"),
    ],
)
def test_renaming(rename: dict[str, str], name: str, new: str) -> None:
    assert renamer(rename)(name) == new


def test_no_pattern_takes_long() -> None:
    started = time.perf_counter()
    matcher("*a*b**c*d").match("a.b" * 200 + "." + "abc" * 2000)
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    ("asked", "key", "why"),
    [
        ({}, "init_from.path", "is missing"),
        ({"path": ""}, "init_from.path", "must be a path"),
        ({"path": "a", "strict": "no"}, "init_from.strict", "must be true or false"),
        ({"path": "a", "rename": ["a"]}, "init_from.rename", "must be a mapping of texts"),
        ({"path": "a", "rename": {"(a+)+": "b"}}, "init_from.rename", "is no pattern of names: it has ( ) +"),
        ({"path": "a", "rename": {"a": "*"}}, "init_from.rename", "has more * than"),
        ({"path": "a", "rename": {"*.*.*.*.*": "a"}}, "init_from.rename", "has too many stars"),
        ({"path": "a", "only": "b"}, "init_from.only", "must be a list of texts"),
        ({"path": "a", "only": [0.0]}, "init_from.only", "must be a list of texts"),
        ({"path": "a", "rename": {0: "b"}}, "init_from.rename", "must be a mapping of texts"),
        ({"path": 7}, "init_from.path", "must be a path"),
        ({"path": "a", "revision": 1234567}, "init_from.revision", "must be a text"),
        ({"path": "a", "part": "optimizer"}, "init_from.part", "must be model, or ema"),
        ({"path": "a", "file": "b"}, "init_from.file", "unknown key"),
    ],
)
def test_what_is_asked_wrongly(asked: dict[str, Any], key: str, why: str) -> None:
    with pytest.raises(InputError) as caught:
        Asked.of(asked)
    assert [problem.key for problem in caught.value.problems] == [key]
    assert why in caught.value.problems[0].why
    assert caught.value.problems[0].fix


def test_only_some(tmp_path: Path) -> None:
    known = values()
    save_file({**known, "3.weight": torch.zeros(9, 16)}, tmp_path / "a.safetensors")
    model, done, left = put({"path": "a.safetensors", "only": ["0."]}, tmp_path)
    assert model[0].weight.equal(known["0.weight"])
    assert not model[3].bias.equal(known["3.bias"])
    assert (done[:14], left) == ("2 of 4 tensors", [])


def test_only_what_the_model_does_not_have(tmp_path: Path) -> None:
    save_file(values(), tmp_path / "a.safetensors")
    for strict in (True, False):
        told = refused({"path": "a.safetensors", "only": ["zzz"], "strict": strict}, tmp_path, mlp())
        assert told.startswith("init_from.only: matches no name of the model, which has 0.weight, 0.bias")


@pytest.mark.parametrize("stored", ["embed.weight", "head.weight"])
def test_tied_weights_by_any_of_their_names(tmp_path: Path, stored: str) -> None:
    known = values(model=Tied)
    weight = known["embed.weight"]
    rest = {name: value for name, value in known.items() if name not in ("embed.weight", "head.weight")}
    save_file({stored: weight, **rest}, tmp_path / "a.safetensors")
    model = Tied()
    put("a.safetensors", tmp_path, model, {"head.weight": "embed.weight"})
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.equal(weight)
    assert model.norm.running_mean.equal(known["norm.running_mean"])


def test_another_type_is_converted_and_told(tmp_path: Path) -> None:
    known = {name: value.bfloat16() for name, value in values().items()}
    save_file(known, tmp_path / "a.safetensors")
    model, done, _ = put("a.safetensors", tmp_path)
    assert equal(model, {name: value.float() for name, value in known.items()})
    assert "4 converted, bfloat16 -> float32" in done
    save_file({**known, "0.bias": torch.zeros(16, dtype=torch.int64)}, tmp_path / "b.safetensors")
    assert "0.bias (int64 there, float32 here)" in refused("b.safetensors", tmp_path, mlp())


# --- hostile and broken -----------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.pth", "a.ckpt", "pytorch_model.bin"])
@pytest.mark.parametrize("plain", [True, False])
def test_a_payload_is_refused_and_does_not_run(tmp_path: Path, name: str, plain: bool) -> None:
    saved = {**values(), "x": Payload(tmp_path / "ran")}
    if plain:
        (tmp_path / name).write_bytes(pickle.dumps(saved))
    else:
        torch.save(saved, tmp_path / name)
    said = refused(name if name[0] == "a" else str(tmp_path), tmp_path)
    assert "holds more than tensors" in said
    assert "nothing in the file was executed" in said
    assert not (tmp_path / "ran").exists()


def test_broken_files(tmp_path: Path) -> None:
    save_file(values(), tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    broken = {
        "empty": b"",
        "short": whole[:-5],
        "none": b"not at all a safetensors file",
        "header": (2**62).to_bytes(8, "little") + whole[8:],
        "pickle": pickle.dumps({"a": 1}),
    }
    for name, content in broken.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        assert "cannot be read" in refused(f"{name}.safetensors", tmp_path), name


@pytest.mark.parametrize(
    ("document", "why"),
    [
        ("{", "cannot be read"),
        ("[]", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": {"0.weight": "../x.safetensors"}}', "is no file beside it"),
        ('{"weight_map": {"0.weight": "/etc/passwd"}}', "is no file beside it"),
        ('{"weight_map": {"0.weight": ".."}}', "is no file beside it"),
        ('{"weight_map": {"0.weight": "gone.safetensors"}}', "gone.safetensors is missing"),
        ('{"weight_map": {"0.weight": "x.bin"}}', "of another kind"),
        ('{"weight_map": {"nowhere": "x.safetensors"}}', "says that nowhere is in x.safetensors"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_hostile_indexes(tmp_path: Path, document: str, why: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    for folder in (tmp_path, inner):
        save_file(values(), folder / "x.safetensors")
    (inner / "x.bin").write_bytes(b"")
    (inner / "model.safetensors.index.json").write_text(document)
    assert why in refused("inner", tmp_path)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda folder: None, "holds no weights"),
        (
            lambda folder: [save_file(values(), folder / f"{n}.safetensors") for n in "ab"],
            "name one file: a.safetensors",
        ),
        (lambda folder: (folder / "readme.md").touch(), "holds no weights"),
    ],
)
def test_folders_without(tmp_path: Path, make: Callable[[Path], Any], why: str) -> None:
    make(tmp_path)
    assert why in refused(str(tmp_path), tmp_path)


def test_the_advice_can_be_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from runner.__main__ import main

    monkeypatch.chdir(tmp_path)
    sizes = {"0.weight": (32, 16), "0.bias": (32,), "2.weight": (4, 32), "2.bias": (4,)}
    for start, file in (("model.", "longer.safetensors"), ("", "whole.safetensors")):
        save_file({start + name: torch.randn(size) for name, size in sizes.items()}, tmp_path / file)
    assert main(["+recipe=smoke", "train.steps=1", "init_from=whole.safetensors"]) == 0
    assert "init_from: 4 of 4 tensors, 676 numbers" in capsys.readouterr().out
    assert main(["+recipe=smoke", "train.steps=1", "init_from=longer.safetensors"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    advised = said.partition('on the command line "')[2].partition('"')[0]
    assert main(["+recipe=smoke", "train.steps=1", advised]) == 0
    assert main(["+recipe=smoke", "train.steps=1", "init_from={path: whole.safetensors, rename: {**: a.**}}"]) == 2


def test_no_file_of_weights(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    assert "is no file of weights" in refused("a.txt", tmp_path)
    assert "does not exist" in refused("./b/c/d", tmp_path)


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_a_run_begins_with_another_runs_weights(job: Job, tmp_path: Path) -> None:
    first = job("first", train__epochs=1, hooks=with_ema())
    second = job("second", train={"epochs": None, "steps": 1}, init_from=str(tmp_path / "first"))
    assert second.code == 0
    other = job("other", train={"epochs": None, "steps": 1})
    assert second.losses[0] != other.losses[0]
    trained = {name: value.clone() for name, value in first.watch.weights.items()}
    source = find(Asked(str(tmp_path / "first")), tmp_path)
    model = mlp()
    begin_with(Asked("first"), source, ModelState(model), {})
    assert equal(model, trained)
    averaged = mlp()
    asked = Asked(str(tmp_path / "first" / "checkpoints" / "step_00000007"), part="ema")
    begin_with(asked, find(asked, tmp_path), ModelState(averaged), {})
    assert not equal(averaged, trained)
    saved = json.loads((tmp_path / "second" / "checkpoints" / "step_00000001" / "state.json").read_text())
    assert saved["extra"]["config"]["init_from"] == str(tmp_path / "first")


def with_ema() -> dict[str, Any]:
    return {**config()["hooks"], "ema": spec("runner.hooks.ema.EMA", decay=0.9)}


def test_a_damaged_checkpoint_is_refused(job: Job, tmp_path: Path) -> None:
    job("first", train={"epochs": None, "steps": 1})
    file = tmp_path / "first" / "checkpoints" / "step_00000001" / "rank_0.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        job("second", init_from=str(file.parent))
    assert "rank_0.safetensors" in caught.value.problems[0].why
    assert not (tmp_path / "second").exists()


def test_who_goes_on_does_not_look_at_it(job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file(values(), tmp_path / "a.safetensors")
    begin = str(tmp_path / "a.safetensors")
    assert job(init_from=begin, hooks={**config()["hooks"], "more": spec("small.Interrupt", step=3)}).code == 75
    (tmp_path / "a.safetensors").unlink()
    with caplog.at_level("INFO", logger="runner"):
        assert job(init_from=begin).code == 0
    assert "init_from" not in caplog.text


def test_what_does_not_fit_leaves_no_folder(job: Job, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError) as caught:
        job(init_from=str(tmp_path / "a.safetensors"))
    assert caught.value.problems[0].key == "init_from"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["init_from=./gone.safetensors"], "does not exist, and is no name of the hub"),
        (["init_from=gone.safetensors"], "does not exist, and is no name of the hub"),
        (["init_from={path: gone/a/b}"], "does not exist, and is no name of the hub"),
        (["init_from={file: a}"], "unknown key"),
        (["init_from={path: a, rename: {a+b: b}}"], "is no pattern of names"),
        (["init_from=3"], "must be"),
        (["init_from={path: smoke, only: [0.]}"], "fix: write only: ['0.', head]; put names that look like numbers in"),
    ],
)
def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    from runner.__main__ import main

    monkeypatch.chdir(tmp_path)
    assert main(["+recipe=smoke", "train.steps=2", *words]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert why in said
    assert "init_from" in said


# --- several processes ------------------------------------------------------------------------------------------------


def begun(folder: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Begins with a file in every process, and says what the model holds then and how much was read here."""
    from sharding import Net, adamw, engine, whole

    read = 0
    opened = weights.Files.opened

    def counted(self: weights.Files, file: str, stack: ExitStack) -> Any:
        inner = opened(self, file, stack)

        def reading(key: str, part: tuple[slice, ...]) -> Tensor:
            nonlocal read
            found = inner(key, part)
            read += found.numel()
            return found

        return reading

    weights.Files.opened = counted  # type: ignore[method-assign]
    torch.manual_seed(0)
    if name == "deepspeed":
        from runner.engine.deepspeed import DeepSpeed
        from runner.engine.engine import Engine
        from runner.engine.mesh import Mesh
        from runner.engine.precision import PRECISIONS

        mesh = Mesh(distributed.rank(), distributed.world_size())
        made = Engine(DeepSpeed(torch.device("cpu"), PRECISIONS["fp32"], mesh, **options))
        made.prepare(mlp, adamw)
    else:
        made = engine(name, **options)
        made.prepare(Net, adamw)
    asked = Asked.of({"path": folder, "strict": False})
    state = made.state()["model"]
    done, left = begin_with(asked, weights.find_together(asked, Path()), state, {"words.weight": "embed.weight"})
    if name == "deepspeed":
        from runner import shares

        held = {key: shares.whole(value).clone() for key, value in state.state_dict().items()}
    else:
        held = {key.removeprefix("module."): value for key, value in whole(made.backend.model).items()}
    made.backend.close()
    return {"held": held, "read": read, "done": done, "left": left}


@pytest.mark.parametrize(("name", "options"), [("ddp", {}), ("fsdp", {}), ("fsdp", {"replicas": 2})])
def test_two_processes(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    from sharding import Net

    known = values(model=Net)
    del known["words.weight"]
    unstored = known.pop("unused")
    sharded(tmp_path, [dict(list(known.items())[:4]), dict(list(known.items())[4:])])
    total = sum(value.numel() for value in known.values())
    for found in run_ranks(begun, 2, str(tmp_path), name, options, timeout=110):
        held = found["held"]
        assert all(held[key].equal(value) for key, value in known.items())
        assert held["words.weight"].equal(known["embed.weight"])
        assert held["unused"].equal(torch.ones_like(unstored))  # as it was initialised
        assert found["left"] == ["1 are missing: unused"]
        if name == "fsdp" and not options:
            assert found["read"] <= 0.6 * total
        else:
            assert found["read"] == total


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_deepspeed_in_two_processes(tmp_path: Path, stage: int) -> None:
    known = values()
    known.pop("3.bias")
    save_file(known, tmp_path / "model.safetensors")
    torch.manual_seed(0)
    fresh = mlp().state_dict()["3.bias"]
    for found in run_ranks(begun, 2, str(tmp_path), "deepspeed", {"stage": stage}, timeout=110):
        assert all(found["held"][key].equal(value) for key, value in known.items())
        assert found["held"]["3.bias"].equal(fresh)


def refusing(folder: str) -> str:
    asked = Asked.of(folder)
    try:
        weights.find_together(asked, Path())
    except InputError as error:
        return str(error)
    return "taken"


def test_all_processes_hear_of_what_the_first_refuses(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    first, second = run_ranks(refusing, 2, str(tmp_path))
    assert first == second
    assert "cannot be read" in first
