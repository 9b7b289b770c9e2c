"""`debug=true`: what the engine decided, told once, and a check that all processes call the same collectives."""

from __future__ import annotations

import functools
import inspect
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from runner import distributed
from runner.errors import RunnerError

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

#: The collectives of torch.distributed, with the argument whose shapes must be the same on all processes.
_PLAIN = {
    "all_reduce": "tensor",
    "all_reduce_coalesced": "tensors",
    "broadcast": "tensor",
    "reduce": "tensor",
    "all_gather": "tensor_list",
    "all_gather_into_tensor": "input_tensor",
    "_all_gather_base": "input_tensor",
    "all_gather_coalesced": "input_tensor_list",
    "gather": "tensor",
    "scatter": "tensor",
    "reduce_scatter": "input_list",
    "reduce_scatter_tensor": "input",
    "_reduce_scatter_base": "input",
    "all_to_all": None,
    "all_to_all_single": None,
    "barrier": None,
    "all_gather_object": None,
    "broadcast_object_list": None,
    "gather_object": None,
    "scatter_object_list": None,
}
#: Those of torch.distributed._functional_collectives, which DTensor uses.
_FUNCTIONAL = {
    "all_reduce": "self",
    "all_reduce_coalesced": "self",
    "broadcast": "self",
    "all_gather_tensor": "self",
    "all_gather_tensor_autograd": "self",
    "all_gather_single": "self",
    "all_gather_single_autograd": "self",
    "all_gather_single_coalesced": "self",
    "all_gather_into_tensor_coalesced": "self",
    "reduce_scatter_tensor": "self",
    "reduce_scatter_tensor_autograd": "self",
    "reduce_scatter_single": "self",
    "reduce_scatter_single_autograd": "self",
    "reduce_scatter_single_coalesced": "inputs",
    "reduce_scatter_tensor_coalesced": "inputs",
    "all_to_all_single": None,
    "all_to_all_single_autograd": None,
}
#: Arguments that must be the same on all processes, where a collective has them.
_SAME = ("op", "reduceOp", "src", "dst", "group_src", "group_dst", "gather_dim", "scatter_dim")


class CollectiveMismatch(RunnerError):
    """The processes of a group do not call the same collective: each would wait for the others for ever."""


class CollectiveWatch:
    """Compares, before each collective, what the processes of its group are about to call.

    What is called, with which shapes and types, where in the code, and as the how-manieth collective of its group is
    written to the job's store and compared with what the others write. CollectiveMismatch names the ranks that
    differ, on all of them, and ranks that call nothing within `seconds`, with the last that they did call.

    Sees what is called through torch.distributed and its functional collectives, whatever module calls it: the
    runner, scripts, DTensor, FSDP and DeepSpeed. Does not see what C++ calls by itself (DistributedDataParallel's
    gradient buckets and buffers), what was compiled into a graph, and messages from one process to another. Where
    the processes part in one of those, their next collective that is seen tells of it.

    Every collective then costs some messages to the store, so this is for debugging. `store` is the process group's
    own where none is given. As a context manager, or by `install` and `remove`.
    """

    _made = 0

    def __init__(self, seconds: float = 60.0, store: Store | None = None) -> None:
        self.seconds = seconds
        self._store = store
        self._counts: dict[str, int] = {}
        self._inside = threading.local()
        self._lock = threading.Lock()
        self._replaced: list[tuple[dict[str, Any], str, Any]] = []

    def install(self) -> CollectiveWatch:
        """Puts itself in front of the collectives, wherever they were imported to. Acts in a group of several only."""
        if distributed.world_size() == 1 or self._replaced:
            return self
        import torch.distributed._functional_collectives as functional
        from torch.distributed import PrefixStore, distributed_c10d

        # All processes make as many watches, one after the other, so their keys never meet those of another watch.
        CollectiveWatch._made += 1
        store = self._store or distributed_c10d._get_default_store()
        self._keys = PrefixStore(f"watch{CollectiveWatch._made}", store)
        ours: dict[int, tuple[Any, Any]] = {}
        for module, known, group_of in (
            (distributed_c10d, _PLAIN, _plain_group),
            (functional, _FUNCTIONAL, _functional_group),
        ):
            for name, about in known.items():
                original = getattr(module, name, None)
                if original is not None and id(original) not in ours:
                    ours[id(original)] = (original, self._watching(original, name.lstrip("_"), about, group_of))
        for module in list(sys.modules.values()):
            names = getattr(module, "__dict__", None)
            if names is None or module is sys.modules[__name__]:
                continue
            for name, value in list(names.items()):
                found = ours.get(id(value))
                if found is not None and found[0] is value:
                    names[name] = found[1]
                    self._replaced.append((names, name, value))
        return self

    def remove(self) -> None:
        """Puts the collectives back."""
        for names, name, original in self._replaced:
            names[name] = original
        self._replaced.clear()

    def __enter__(self) -> CollectiveWatch:
        return self.install()

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _watching(
        self, original: Callable[..., Any], name: str, about: str | None, group_of: Callable[[Any], Any]
    ) -> Callable[..., Any]:
        """The collective with the comparison in front; a collective that another one calls is part of that."""
        signature = inspect.signature(original)
        import torch

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or getattr(self._inside, "yes", False) or not distributed.joined():
                return original(*args, **kwargs)
            self._inside.yes = True
            try:
                given = signature.bind(*args, **kwargs).arguments
                self._compare(_what(name, about, given), group_of(given.get("group")))
                return original(*args, **kwargs)
            finally:
                self._inside.yes = False

        return watched

    def _compare(self, what: str, group: Any) -> None:
        """Raises CollectiveMismatch unless all processes of the group are about to do the same."""
        import torch.distributed as dist

        me = distributed.rank()
        ranks = dist.get_process_group_ranks(group) if group is not None else []
        if me not in ranks or len(ranks) < 2:
            return
        name = group.group_name
        with self._lock:
            count = self._counts[name] = self._counts.get(name, 0) + 1
        self._keys.set(f"{name}/{count}/{me}", f"{what}\n{_where()}")
        found = self._wait(name, count, ranks)
        if len({text.partition("\n")[0] for text in found.values()}) > 1:
            raise CollectiveMismatch(
                f"the processes do not call the same collective (number {count} of {_named(name, ranks)}):\n"
                + "\n".join(_lines(found))
            )
        # All have come so far, so all have read what came before.
        self._keys.delete_key(f"{name}/{count - 1}/{me}")

    def _wait(self, name: str, count: int, ranks: list[int]) -> dict[int, str]:
        """What each rank wrote. Asks again and again: a store that waits would hold up this process's threads."""
        deadline, pause = time.monotonic() + self.seconds, 1e-4
        missing, found = list(ranks), {}
        while missing:
            for rank in list(missing):
                if self._keys.check([f"{name}/{count}/{rank}"]):
                    found[rank] = self._keys.get(f"{name}/{count}/{rank}").decode()
                    missing.remove(rank)
            if missing and time.monotonic() > deadline:
                raise CollectiveMismatch(self._absent(name, count, ranks, found, missing))
            if missing:
                time.sleep(pause)
                pause = min(2 * pause, 0.02)
        return found

    def _absent(self, name: str, count: int, ranks: list[int], found: Mapping[int, str], missing: list[int]) -> str:
        lines = _lines(found)
        for rank in missing:
            last = f"{name}/{count - 1}/{rank}"
            if count > 1 and self._keys.check([last]):
                known = self._keys.get(last).decode().replace("\n", " at ")
                lines.append(f"  rank {rank}: none; the one before was {known}")
            else:
                lines.append(f"  rank {rank}: none, and none before that this rank could see")
        numbers = f"rank {missing[0]} does" if len(missing) == 1 else f"ranks {_numbers(missing)} do"
        return (
            f"{numbers} not call a collective that others have waited in for {self.seconds:g} s "
            f"(number {count} of {_named(name, ranks)}):\n" + "\n".join(lines)
        )


def _plain_group(group: Any) -> Any:
    """The process group; None for one that this process is no member of."""
    import torch.distributed as dist

    if group is None:
        return dist.group.WORLD
    return group if isinstance(group, dist.ProcessGroup) else None


def _functional_group(group: Any) -> Any:
    import torch.distributed._functional_collectives as functional
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(functional._resolve_group_name(group))


def _what(name: str, about: str | None, given: Mapping[str, Any]) -> str:
    """The part of a call that must be the same everywhere, in words."""
    words = [name]
    if about is not None:
        words += ["of", " and ".join(_shapes(given[about])) or "nothing"]
        if name in ("gather", "scatter") and given.get("async_op"):
            words.append("(async)")
    words += [f"{key}={_plain(given[key])}" for key in _SAME if given.get(key) is not None]
    if name in ("broadcast_object_list", "scatter_object_list"):
        objects = given.get("object_list", given.get("scatter_object_output_list"))
        words += ["of", f"{len(objects or ())} objects"]
    return " ".join(words)


def _shapes(value: Any) -> Iterator[str]:
    """`float32 [2, 3]` for each tensor, like ones counted."""
    tensors = list(_tensors(value))
    before, times = None, 0
    for text in [*(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors), None]:
        if text == before:
            times += 1
            continue
        if before is not None:
            yield before if times == 1 else f"{times} times {before}"
        before, times = text, 1


def _tensors(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif value is not None:
        yield value


def _plain(value: Any) -> str:
    return str(value).rpartition(".")[2]


def _where() -> str:
    """The line that called, outside of torch; where that is the runner's, also the line outside of it."""
    torch_folder = os.path.dirname(sys.modules["torch"].__file__ or "")
    runner_folder = os.path.dirname(__file__)
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        line = f"{_short(path)}:{frame.f_lineno}"
        ours = path.startswith(runner_folder)
        if path != __file__ and not path.startswith((torch_folder, "<")) and not (ours and found):
            found.append(line)
            if not ours:
                break
        frame = frame.f_back  # type: ignore[assignment]
    return ", from ".join(found) or "an unknown place"


def _short(path: str) -> str:
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def _lines(found: Mapping[int, str]) -> list[str]:
    """One line for the ranks that call the same at the same place."""
    alike: dict[str, list[int]] = {}
    for rank, text in sorted(found.items()):
        alike.setdefault(text, []).append(rank)
    return [f"  rank{'s' * (len(r) > 1)} {_numbers(r)}: {text.replace(chr(10), ' at ')}" for text, r in alike.items()]


def _numbers(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))


def _named(name: str, ranks: list[int]) -> str:
    return "all processes" if len(ranks) == distributed.world_size() else f"the group {name} of ranks {_numbers(ranks)}"


def standing(device: torch.device | str) -> str:
    """Who and where this process is, for `explain`."""
    import torch

    who = f"rank {distributed.rank()} of {distributed.world_size()}, process {os.getpid()} on {socket.gethostname()}"
    return f"{who}: device {device}, {torch.get_num_threads()} threads"


def explain(lines: Iterable[str], say: Callable[[str], Any] = print) -> None:
    """Tells the decisions of all processes once, through the first: what all have in common, then what is each one's.

    To be called by all processes.
    """
    every = distributed.gather(list(lines))
    if distributed.rank():
        return
    common = [line for line in every[0] if all(line in other for other in every)]
    for line in common:
        say(f"debug: {line}")
    for rank, own in enumerate(every):
        for line in own:
            if line not in common:
                start = "" if line.startswith(f"rank {rank} ") else f"rank {rank}: "
                say(f"debug: {start}{line}")
