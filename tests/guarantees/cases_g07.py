"""G7: a payload in every kind of file of a checkpoint, which is then read: nothing of it may be executed."""

from __future__ import annotations

import io
import json
import marshal
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Where the payload is put. `sealed`: the manifest is made to agree with it, as its author would.
PLACES = (
    "manifest",
    "manifest inside",
    "state",
    "state sealed",
    "tensors",
    "tensors sealed",
    "extra",
    "hidden",
    "data",
)

_EXECUTING = (
    "pickle.find_class",
    "marshal.loads",
    "code.__new__",
    "exec",
    "compile",
    "import",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "subprocess.Popen",
    "ctypes.dlopen",
    "socket.connect",
)
_heard: list[list[str]] = []


@dataclass(frozen=True)
class Case:
    number: int
    name: str

    def __str__(self) -> str:
        return f"{self.number}: {self.name}"


def cases(count: int, seed: int) -> list[Case]:
    del seed
    names = list(_payloads(Path("unused")))
    return [Case(number, name) for number, name in enumerate(names[:count])]


def run(case: Case, folder: Path) -> str | None:
    mark = folder / "executed"
    payload = _payloads(mark)[case.name]
    for number, place in enumerate(PLACES):
        where = folder / str(number) / "checkpoints"
        harmless = _put(payload, place, where)
        why = _read(where, harmless)
        if mark.exists() or why is not None:
            return f"{case.name} in {place}: {why or 'was executed'}"
    return None


def _read(where: Path, harmless: bool) -> str | None:
    from runner.checkpoint import Checkpointer, extra_of, store
    from runner.errors import RunnerError

    path = where / "step_00000001"
    box = Box()
    refused = []
    with executing() as events:
        reads: list[Callable[[], Any]] = [
            lambda: store.find(path),
            lambda: store.latest(where),
            lambda: extra_of(path),
            lambda: Checkpointer(where, {"box": box}, best=("loss", "min")).load(path),
            lambda: Checkpointer(where, {"box": box}).prune() or _refuse(),
        ]
        for read in reads:
            try:
                read()
            except RunnerError:
                refused.append(True)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            else:
                refused.append(False)
    if events:
        return f"these were heard: {events[:5]}"
    return None if any(refused[:4]) != harmless else f"refused: {refused}"


def _refuse() -> None:
    from runner.errors import RunnerError

    raise RunnerError("nothing is wrong")


class Box:
    def __init__(self) -> None:
        import torch

        self.state: Any = {"w": torch.zeros(4)}

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def _put(payload: bytes, place: str, where: Path) -> bool:
    """Makes a checkpoint with the payload in it; whether it does no harm there and is to be read."""
    import torch

    from runner.checkpoint import Checkpointer

    box = Box()
    if place == "data":
        # The bytes of a tensor are just that.
        box.state = {"w": torch.frombuffer(bytearray(payload), dtype=torch.uint8)}
    path = Checkpointer(where, {"box": box}).save(1, metrics={"loss": 1.0})
    if place in ("hidden", "extra"):
        (path / {"hidden": ".metadata", "extra": "data.pkl"}[place]).write_bytes(payload)
    elif place == "manifest":
        (path / "manifest.json").write_bytes(payload)
    elif place == "manifest inside":
        sealed_again(path, inside=payload)
    elif place != "data":
        name = "state.json" if place.startswith("state") else "rank_0.safetensors"
        (path / name).write_bytes(payload)
        if place.endswith("sealed"):
            sealed_again(path)
    return place in ("hidden", "data", "manifest inside")


def sealed_again(path: Path, inside: bytes = b"", **changes: Any) -> None:
    """Makes a manifest agree with what the files are now, as somebody who means harm would."""
    from xxhash import xxh3_128_hexdigest

    from runner.checkpoint.manifest import sealed

    document = json.loads((path / "manifest.json").read_bytes())
    del document["hash"]
    for name in document["files"]:
        if (path / name).stat().st_size > 1 << 30:
            continue
        data = (path / name).read_bytes()
        document["files"][name] = {"size": len(data), "xxh3_128": xxh3_128_hexdigest(data)}
    if inside:
        document["metrics"]["loss"] = 1.0
        document["__reduce__"] = inside.decode("latin1")
    document |= changes
    (path / "manifest.json").write_bytes(sealed(json.dumps(document).encode()[:-1] + b",\n"))


@contextmanager
def executing() -> Iterator[list[str]]:
    """What was executed meanwhile, by the interpreter's own account."""

    def hear(event: str, arguments: Any) -> None:
        if _heard and event in _EXECUTING:
            _heard[-1].append(f"{event} {str(arguments)[:100]}")

    if not hasattr(sys, "_runner_tests_hear"):
        sys.addaudithook(hear)
        sys._runner_tests_hear = True  # type: ignore[attr-defined]
        # What is imported at the first use is not the payload's doing.
        import tempfile

        with tempfile.TemporaryDirectory() as place:
            where = Path(place) / "warm"
            _put(b"1234", "hidden", where)
            _read_all(where)
    events: list[str] = []
    _heard.append(events)
    try:
        yield events
    finally:
        _heard.pop()


def _read_all(where: Path) -> None:
    from runner.checkpoint import Checkpointer

    saver = Checkpointer(where, {"box": Box()}, best=("loss", "min"))
    path = saver.latest()
    assert path is not None
    saver.load(path)
    saver.prune()


class _Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _payloads(mark: Path) -> dict[str, bytes]:
    """Forty, by name: each makes a file where it is executed."""
    import os
    import subprocess

    import numpy
    import torch

    code = f"open({str(mark)!r}, 'w').close()"
    calls = {
        "os.system": _Calls(os.system, f"touch '{mark}'"),
        "exec": _Calls(exec, code),
        "eval": _Calls(eval, code),
        "Popen": _Calls(subprocess.Popen, ["touch", str(mark)]),
        "open": _Calls(open, str(mark), "w"),
    }
    found = {
        f"pickle {protocol} of {name}": pickle.dumps(call, protocol=protocol)
        for protocol in range(6)
        for name, call in calls.items()
    }
    found["pickle by hand"] = b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR."
    archive = io.BytesIO()
    torch.save({"w": calls["exec"]}, archive)
    found["torch.save"] = archive.getvalue()
    legacy = io.BytesIO()
    torch.save({"w": calls["exec"]}, legacy, _use_new_zipfile_serialization=False)
    found["torch.save, the old way"] = legacy.getvalue()
    array = io.BytesIO()
    numpy.save(array, numpy.array([calls["exec"]], dtype=object), allow_pickle=True)
    found["numpy.save"] = array.getvalue()
    found["marshal"] = marshal.dumps(compile(code, "x", "exec"))
    found["yaml"] = f'!!python/object/apply:os.system ["touch {mark}"]'.encode()
    found["json of jsonpickle"] = json.dumps({"py/reduce": [{"py/function": "os.system"}, [f"touch {mark}"]]}).encode()
    target = {"_target_": "os.system", "command": f"touch {mark}"}
    found["json of a target"] = json.dumps({"state": {"box": target}, "extra": {"$tensor": target}}).encode()
    found["python"] = code.encode()
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("__main__.py", code)
        file.writestr("archive/data.pkl", found["pickle 2 of exec"])
    found["zip"] = zipped.getvalue()
    assert len(found) == 40
    return found
