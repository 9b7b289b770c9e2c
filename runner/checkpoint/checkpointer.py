"""Named objects with state become a checkpoint, and come back from one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from runner import distributed
from runner.checkpoint import store
from runner.checkpoint.manifest import Damaged, Entry, Manifest
from runner.checkpoint.tensor_file import type_name
from runner.checkpoint.tree import join, split, tensors_of
from runner.errors import InputError, Problem, RunnerError, wrong

STATE = "state.json"


class Stateful(Protocol):
    """What can be saved.

    A state is a nest of dictionaries, lists and tuples of tensors, numbers, strings, booleans and None. An object
    that also has `template(saved)` says what it can take: it gets the saved state with tensors on the meta device
    (shapes and types without contents), and returns the same nest with tensors of its own, which are then filled in
    place and given to `load_state_dict`. It changes nothing yet, and raises InputError where the saved state does
    not suit it. Without `template` an object is given CPU tensors of the shapes that were saved.
    """

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class Best(NamedTuple):
    """Which evaluation counts as the best: a metric's name, and `min` or `max`."""

    metric: str
    mode: str


class Checkpointer:
    """Saves and loads named objects, in folders `step_00000100` of one folder.

    `state` maps names to objects; they are loaded in this order (random states go last). A name that matches one of
    the patterns `optional` (`hooks.*`) may be missing in a checkpoint or among the objects. The newest `keep`
    checkpoints stay, and so does the best one by `best`, and those of `protected`. Only one job may have a
    Checkpointer for a folder: making one removes what killed processes left there. All processes of the job make,
    save and load together: each writes and reads its own part of the tensors, the first one all else.
    """

    def __init__(
        self,
        folder: Path,
        state: Mapping[str, Stateful],
        keep: int = 2,
        best: tuple[str, str] | None = None,
        *,
        optional: Collection[str] = (),
        protected: Iterable[Path] = (),
    ) -> None:
        if keep < 2:
            raise wrong(
                "checkpoint.keep",
                "fewer than two would leave nothing if the newest is damaged",
                "2 or more",
                value=keep,
            )
        if best is not None and best[1] not in ("min", "max"):
            raise wrong("checkpoint.best.mode", "is neither min nor max", "min or max", value=best[1])
        self._folder = folder
        self._state = dict(state)
        self._keep = keep
        self._best = None if best is None else Best(*best)
        self._optional = tuple(optional)
        self._protected = {path.resolve() for path in protected}
        self._metrics: dict[Path, Mapping[str, float]] = {}
        if distributed.rank() == 0:
            store.sweep(folder)

    def save(self, step: int, extra: Any = None, metrics: Mapping[str, Any] | None = None) -> Path:
        """Saves all objects and `extra` (JSON), then prunes; a checkpoint of the same step is replaced.

        `metrics` are the results of an evaluation at this very step; what is no number in them is left out. Raises
        OSError where the disk does not take it (what was there before stays as it was), RunnerError naming the key
        of a value that cannot be saved, and, with the checkpoint saved, InputError where `metrics` lack the metric
        of `best`.
        """
        from runner.checkpoint.storage import check_types, write_checkpoint

        with _all_or_none():
            document, tensors = split({name: item.state_dict() for name, item in self._state.items()})
            documents = {STATE: {"state": document, "extra": _json("extra", extra)}}
            draft = Manifest(step, _numbers(metrics or {}))
            check_types(tensors)
        self._write(step, lambda staging: write_checkpoint(staging, tensors, draft, documents))
        path = store.path_of(self._folder, step)
        self._metrics[path] = draft.metrics
        self.prune()
        if self._best is not None and metrics is not None and self._best.metric not in metrics:
            have = ", ".join(sorted(metrics)) or "none"
            raise wrong(
                "checkpoint.best.metric", "no evaluation reports it", f"one of: {have}", value=self._best.metric
            )
        return path

    def _write(self, step: int, write: Callable[[Path], None]) -> None:
        """Lets all processes write into one staging folder, which the first one makes and publishes."""
        if distributed.rank() > 0:
            staging = distributed.broadcast(None)
            if staging is not None:
                write(staging)
            if not distributed.broadcast(None):
                raise RunnerError("the first process could not save the checkpoint")
            return
        told = done = False
        try:
            with store.committed(self._folder, step) as staging:
                distributed.broadcast(staging)
                told = True
                write(staging)
            done = True
        finally:
            if not told:
                distributed.broadcast(None)
            distributed.broadcast(done)

    def latest(self) -> Path | None:
        """The newest complete checkpoint; errors as `store.latest`."""
        return store.latest(self._folder)

    def load(self, path: Path, *, convert: bool = False) -> Any:
        """Loads all objects from a checkpoint and returns its `extra`.

        Raises InputError before any object is touched where the checkpoint does not suit: names that it lacks or
        that nobody takes, other shapes or types (with `convert`, one floating-point type is converted to another),
        another optimizer; and where the checkpoint is damaged.
        """
        try:
            with _all_or_none():
                manifest = Manifest.read(path)
                document = _read_document(path)
                saved = _outlines(path, manifest, document)
                targets = self._targets(path, manifest, saved, convert)
            if targets:
                from runner.checkpoint.storage import read_tensors

                read_tensors(path, manifest, targets)
            extra = join(document["extra"], targets.__getitem__)
            loaded = {name: join(document["state"][name], targets.__getitem__) for name in self._state if name in saved}
        except Damaged as error:
            raise wrong("resume", str(error), "name another checkpoint", value=str(path)) from error
        for name, state in loaded.items():
            self._state[name].load_state_dict(state)
        return extra

    def prune(self) -> list[Path]:
        """Removes what retention does not keep, and returns it. Damaged folders are nobody's and stay."""
        paths = self._complete()
        best = self._best_path(paths)
        protected = {path for path in paths if path == best or path.resolve() in self._protected}
        gone = store.expired(paths, self._keep, protected)
        for path in gone:
            if distributed.rank() == 0:
                store.remove(path)
            self._metrics.pop(path, None)
        # Nobody may look at the folder while the first process still removes.
        distributed.barrier()
        return gone

    @property
    def best(self) -> dict[str, Any] | None:
        """{metric, value, step, checkpoint} of the best of the checkpoints that have the metric, or None."""
        path = self._best_path(self._complete())
        if self._best is None or path is None:
            return None
        value = self._metrics[path][self._best.metric]
        return {"metric": self._best.metric, "value": value, "step": store.step_of(path), "checkpoint": str(path)}

    def improves(self, metrics: Mapping[str, Any]) -> bool:
        """Whether an evaluation is better than that of every checkpoint there is: worth saving now."""
        if self._best is None or self._best.metric not in metrics:
            return False
        value, best = float(metrics[self._best.metric]), self.best
        if math.isnan(value) or best is None:
            return not math.isnan(value)
        known = float(best["value"])
        return value < known if self._best.mode == "min" else value > known

    def _may_lack(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self._optional)

    def _complete(self) -> list[Path]:
        """The complete checkpoints by rising step, with their metrics known; a manifest is read only once."""
        paths = store.candidates(self._folder)
        for path in paths:
            if path not in self._metrics:
                with suppress(Damaged, InputError):
                    self._metrics[path] = Manifest.read(path).metrics
        return [path for path in paths if path in self._metrics]

    def _best_path(self, paths: list[Path]) -> Path | None:
        """The best by `best`; of equal ones the first."""
        if self._best is None:
            return None
        metric, sign = self._best.metric, 1 if self._best.mode == "min" else -1
        scores = {path: sign * self._metrics[path].get(metric, math.nan) for path in paths}
        known = [path for path in paths if not math.isnan(scores[path])]
        return min(known, key=scores.__getitem__, default=None)

    def _targets(self, path: Path, manifest: Manifest, saved: Mapping[str, Any], convert: bool) -> dict[str, Tensor]:
        """The tensors to fill, by name, once it is sure that everything fits."""
        problems: list[Problem] = []
        missing = [name for name in self._state if name not in saved and not self._may_lack(name)]
        unused = [name for name in saved if name not in self._state and not self._may_lack(name)]
        odd: list[str] = []
        targets: dict[str, Tensor] = {}
        for name in (name for name in self._state if name in saved):
            try:
                wanted = tensors_of({name: _template(self._state[name], saved[name])})
            except InputError as error:
                problems += error.problems
                continue
            entries = {key: manifest.tensors[key] for key in tensors_of({name: saved[name]})}
            missing += [key for key in wanted if key not in entries]
            unused += [key for key in entries if key not in wanted]
            both = [key for key in wanted if key in entries]
            odd += [f"{key} ({why})" for key in both if (why := _difference(entries[key], wanted[key], convert))]
            targets |= wanted
        lists = {"it lacks": missing, "nothing here takes": unused, "it differs in": odd}
        why = "; ".join(f"{words} {_first(names)}" for words, names in lists.items() if names)
        if why:
            fix = "resume with the configuration that saved it, or start anew in another run_dir"
            problems.append(Problem("resume", f"the checkpoint does not fit: {why}", fix, value=str(path)))
        if problems:
            raise InputError(*problems)
        return targets


@contextmanager
def _all_or_none() -> Iterator[None]:
    """Raises on every process what one of them raises inside, so that none waits for another that has given up."""
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    said = distributed.gather(None if failed is None else f"{type(failed).__name__}: {failed}")
    if failed is not None:
        raise failed
    first = next((rank for rank, error in enumerate(said) if error), None)
    if first is not None:
        raise RunnerError(f"rank {first}: {said[first]}")


def extra_of(path: Path) -> Any:
    """What was saved beside the state, read without loading anything. Raises InputError where it is damaged."""
    try:
        return join(_read_document(path)["extra"], _no_tensor)
    except Damaged as error:
        raise wrong("resume", str(error), "name another checkpoint", value=str(path)) from error


def _no_tensor(name: str) -> Any:
    raise RunnerError(f"{name} is a tensor where none belongs")


def _template(item: Stateful, saved: Any) -> Any:
    template: Callable[[Any], Any] | None = getattr(item, "template", None)
    return template(saved) if template is not None else _allocated(saved)


def _allocated(saved: Any) -> Any:
    document, tensors = split(saved)
    return join(document, lambda name: torch.empty_like(tensors[name], device="cpu"))


def _outlines(path: Path, manifest: Manifest, document: Mapping[str, Any]) -> dict[str, Any]:
    """The saved state with tensors of the saved shapes and types, without contents."""

    def outline(name: str) -> Tensor:
        entry = manifest.tensors[name]
        return torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device="meta")

    try:
        return dict(join(document["state"], outline))
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged(path, f"{STATE} does not go with its manifest ({type(error).__name__}: {error})") from error


def _difference(entry: Entry, target: Tensor, convert: bool) -> str | None:
    if entry.shape != tuple(target.shape):
        return f"shape {list(entry.shape)} in the checkpoint, {list(target.shape)} here"
    dtype = getattr(torch, entry.dtype)
    if dtype == target.dtype or (convert and dtype.is_floating_point and target.dtype.is_floating_point):
        return None
    return f"{entry.dtype} in the checkpoint, {type_name(target.dtype)} here"


def _first(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


def _json(name: str, value: Any) -> Any:
    document, tensors = split(value, name)
    if tensors:
        raise TypeError(f"{name} is JSON and cannot hold tensors: {_first(list(tensors))}")
    return document


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads((path / STATE).read_bytes())
        return {"state": dict(document["state"]), "extra": document["extra"]}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise Damaged(path, f"{STATE} cannot be read ({type(error).__name__}: {error})") from error
