"""Named objects with state become a checkpoint, and come back from one."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, overload

import torch
from torch import Tensor

from runner import distributed
from runner.checkpoint import store
from runner.checkpoint.failure import Failure, SaveFailed
from runner.checkpoint.manifest import Damaged, Entry, Manifest, parsed, read_bounded
from runner.checkpoint.peers import Peers
from runner.checkpoint.staging import Staging
from runner.checkpoint.tensor_file import type_name
from runner.checkpoint.tree import join, split, tensors_of
from runner.checkpoint.verify import check_bytes, known_damaged, renewed, verify
from runner.errors import InputError, Problem, RunnerError, wrong

if TYPE_CHECKING:
    from runner.checkpoint.storage import Part

_log = logging.getLogger(__name__)

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

    `state` maps names to objects; they are loaded in this order (random states go last). A name that matches one of the
    patterns `optional` (`hooks.*`) may be missing in a checkpoint or among the objects. The newest `keep` checkpoints
    stay, and so does the best one by `best`, those of `protected`, and those whose step is a multiple of `milestones`.
    Only one job may have a Checkpointer for a folder: making one removes what killed processes left there. With
    `reads_only` the folder may be anybody's, and nothing in it is removed. All processes of the job make, save and load
    together: each writes and reads its own part of the tensors, the first one all else.

    A save that the training does not wait for goes on in a thread. What became of it is told by `poll`, or by `finish`,
    which waits. `failed` says that it could not be saved, on this process; the processes tell each other of it and
    then call `finish` together, which raises on all of them.
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
        milestones: int | None = None,
        reads_only: bool = False,
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
        #: Where the folder of a run is there now and vanishes later, that is an error and no reason for another.
        self._parents = not folder.parent.is_dir()
        self._state = dict(state)
        self._keep = keep
        self._best = None if best is None else Best(*best)
        self._optional = tuple(optional)
        self._protected = {path.resolve() for path in protected}
        self._milestones = milestones
        #: The metrics of the checkpoints that were there at the start or were saved since; alike on all processes.
        self._metrics: dict[Path, Mapping[str, float]] = {}
        #: The metrics of the complete ones that are there, as far as their manifests have been read.
        self._there: dict[Path, Mapping[str, float]] = {}
        self._staging = Staging()
        self._peers: Peers | None = None
        self._flight: _Flight | None = None
        self._published: list[Path] = []
        self._begun = False
        self.failed = False
        #: What was loaded last, and which of the objects it had no state of: they stayed as they were. Alike on all.
        self.loaded: Path | None = None
        self.lacked: tuple[str, ...] = ()
        with _all_or_none():
            if distributed.rank() == 0:
                if not reads_only:
                    store.sweep(folder)
                if self._best is not None:
                    self._metrics = {path: self._there[path] for path in self._complete()}
        if self._best is not None:
            # `improves` must say the same everywhere, whatever the first process is just writing or removing.
            self._metrics = distributed.broadcast(self._metrics)

    @overload
    def save(
        self, step: int, extra: Any = None, metrics: Mapping[str, Any] | None = None, *, wait: Literal[True] = True
    ) -> Path: ...

    @overload
    def save(
        self, step: int, extra: Any = None, metrics: Mapping[str, Any] | None = None, *, wait: bool
    ) -> Path | None: ...

    def save(
        self, step: int, extra: Any = None, metrics: Mapping[str, Any] | None = None, *, wait: bool = True
    ) -> Path | None:
        """Saves all objects and `extra` (JSON), then prunes; a checkpoint of the same step is replaced.

        Without `wait` the state is copied, None is returned, and a thread does the rest: what is changed afterwards
        does not show in the checkpoint. One is written at a time: a save that is still going on is waited for, and
        where it failed, that is raised and nothing is saved.

        `metrics` are the results of an evaluation at this very step; what is no number in them is left out. Raises
        SaveFailed where the disk does not take it (what was there before stays as it was), RunnerError naming the key
        of a value that cannot be saved, and, with the checkpoint saved or under way, InputError where `metrics` lack
        the metric of `best`.
        """
        from runner.checkpoint.storage import own_part

        told = self.finish()
        self._published = told
        with _all_or_none():
            document, tensors = split({name: item.state_dict() for name, item in self._state.items()})
            documents = {STATE: {"state": document, "extra": _json("extra", extra)}}
            draft = Manifest(step, _numbers(metrics or {}))
            part = own_part(tensors)
        path = store.path_of(self._folder, step)
        if wait:
            flight = _Flight(path, self._metrics.get(path))
            self._metrics[path] = draft.metrics
            try:
                self._write(path, part, draft, documents, Peers())
            except BaseException:
                self._forget(flight)
                raise
        else:
            self._peers = self._peers or Peers(own=True)
            part = replace(part, tensors=self._staging.copies(part.tensors))
            flight = _Flight(path, self._metrics.get(path))
            self._metrics[path] = draft.metrics
            self._start(flight, part, draft, documents, self._peers)
        if self._best is not None and metrics is not None and self._best.metric not in metrics:
            have = ", ".join(sorted(metrics)) or "none"
            raise wrong(
                "checkpoint.best.metric", "no evaluation reports it", f"one of: {have}", value=self._best.metric
            )
        return path if wait else None

    def poll(self) -> list[Path]:
        """The checkpoints that were published since the last call; costs nothing while there is no news.

        A process alone raises SaveFailed here where a save failed; several do so in `finish`, together.
        """
        flight = self._flight
        if flight is None or not flight.done:
            return self._told() if self._published else []
        if flight.failure is not None and distributed.world_size() > 1:
            return self._told()
        return self.finish()

    def finish(self) -> list[Path]:
        """Waits for the save that is going on and returns as `poll`; raises SaveFailed where it failed."""
        flight, self._flight = self._flight, None
        if flight is not None:
            assert flight.thread is not None
            flight.thread.join()
            self.failed = False
            if flight.failure is not None:
                self._forget(flight)
                raise flight.failure
            self._published.append(flight.path)
        return self._told()

    def close(self, seconds: float | None = None) -> None:
        """For the end of a training that has failed already: waits as `finish`, and says what went wrong.

        At most `seconds`: where another process is lost, its part may never come.
        """
        flight = self._flight
        if flight is not None and flight.thread is not None:
            flight.thread.join(seconds)
            if not flight.done:
                _log.warning("%s was being saved, and is lost: it took too long", flight.path)
                return
        try:
            self.finish()
        except SaveFailed as error:
            _log.warning("%s", error)

    @property
    def saving(self) -> bool:
        """Whether a save is going on, or has just ended and nobody has asked."""
        return self._flight is not None

    def _told(self) -> list[Path]:
        told, self._published = self._published, []
        return told

    def _forget(self, flight: _Flight) -> None:
        """What was planned for the sake of a save that failed."""
        if flight.before is None:
            self._metrics.pop(flight.path, None)
        else:
            self._metrics[flight.path] = flight.before

    def _start(self, flight: _Flight, part: Part, draft: Manifest, documents: Mapping[str, Any], peers: Peers) -> None:
        def work() -> None:
            try:
                self._write(flight.path, part, draft, documents, peers)
            except BaseException as error:
                flight.failure = _as_failed(error, flight.path)
                self.failed = True
            finally:
                flight.done = True

        # Not a daemon: a process that ends meanwhile waits until the checkpoint is whole.
        flight.thread = threading.Thread(target=work, name=f"save-{flight.path.name}", daemon=False)
        self._flight = flight
        flight.thread.start()

    def _write(self, path: Path, part: Part, draft: Manifest, documents: Mapping[str, Any], peers: Peers) -> None:
        """Writes, publishes and prunes: all that is done in the thread."""
        from runner.checkpoint.storage import write_checkpoint

        if peers.rank == 0 and not self._begun:
            # Only once: what vanishes later is an error as well.
            with suppress(OSError):
                self._folder.mkdir(parents=self._parents, exist_ok=True)
        self._begun = True
        write_checkpoint(self._folder, part, draft, documents, peers)
        if peers.rank == 0:
            renewed(path)
            self._there[path] = draft.metrics
            self._prune()
        # Nobody may look at the folder while the first process still removes.
        peers.broadcast(None)

    def latest(self) -> Path | None:
        """The newest complete checkpoint, all its files verified; errors as `store.latest`."""
        return store.latest(self._folder)

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint by its manifest and its files' sizes, to be named; nothing is read for it."""
        for path in reversed(store.candidates(self._folder)):
            with suppress(Damaged, InputError):
                Manifest.read(path)
                return path
        return None

    def load(self, path: Path, *, convert: bool = False) -> Any:
        """Loads all objects from a checkpoint and returns its `extra`.

        Raises InputError before any object is touched where the checkpoint does not suit: names that it lacks or
        that nobody takes, other shapes or types (with `convert`, one floating-point type is converted to another),
        another optimizer; and where the checkpoint is damaged. The processes share out the files to verify.
        """
        try:
            with _all_or_none():
                manifest = Manifest.read(path)
                verify(path, manifest, (distributed.rank(), distributed.world_size()))
            with _all_or_none():
                document = _read_document(path, manifest)
                saved = _outlines(path, manifest, document)
                targets = self._targets(path, manifest, saved, convert)
            if targets:
                from runner.checkpoint.storage import read_tensors

                read_tensors(path, manifest, targets)
            loaded = {name: join(document["state"][name], targets.__getitem__) for name in self._state if name in saved}
        except Damaged as error:
            raise wrong("resume", str(error), "name another checkpoint", value=str(path)) from error
        for name, state in loaded.items():
            self._state[name].load_state_dict(state)
        self.loaded, self.lacked = path, tuple(name for name in self._state if name not in loaded)
        return document["extra"]

    def leave_behind(self, source: Path, step: int) -> Path | None:
        """Sets aside what does not lead to `source`, a checkpoint of `step` from which the training goes on.

        That is what is newer, and everything where `source` lies in another folder. If it stayed, the next start would
        go on from there, and retention would remove what is saved from now on. Returns the folder that holds it now,
        on the first process; None where there is nothing. All processes call it.
        """
        last = step if source.resolve().parent == self._folder.resolve() else -1
        place = None
        with _all_or_none():
            if distributed.rank() == 0:
                left = [path for path in store.candidates(self._folder) if store.step_of(path) > last]
                place = store.set_aside(left) if left else None
        for known in (self._metrics, self._there):
            for path in [path for path in known if store.step_of(path) > last]:
                del known[path]
        return place

    def prune(self) -> list[Path]:
        """Removes what retention does not keep, and returns it. Damaged folders are nobody's and stay.

        Where the folder cannot be looked at, that is a warning and nothing is removed.
        """
        gone: list[Path] = distributed.broadcast(self._prune() if distributed.rank() == 0 else [])
        return gone

    def _prune(self) -> list[Path]:
        try:
            return self._pruned()
        except OSError as error:
            # What was saved counts, and the others wait to hear of it; the next save tries again.
            _log.warning("%s: older checkpoints could not be looked at: %s", self._folder, error.strerror or error)
            return []

    def _pruned(self) -> list[Path]:
        paths = self._complete()
        best = self._best_path(paths, self._there)
        protected = {path for path in paths if path == best or path.resolve() in self._protected}
        gone = store.expired(paths, self._keep, protected, self._milestones)
        for path in gone:
            try:
                store.remove(path)
            except OSError as error:
                # The checkpoint that was saved counts; the next save tries again.
                _log.warning("%s, which may go, could not be removed: %s", path, error.strerror)
        return gone

    @property
    def best(self) -> dict[str, Any] | None:
        """{metric, value, step, checkpoint} of the best of the checkpoints that have the metric, or None."""
        if self._best is None:
            return None
        flying = None if self._flight is None else self._flight.path
        path = self._best_path([path for path in self._known() if path != flying], self._metrics)
        if path is None:
            return None
        value = self._metrics[path][self._best.metric]
        return {"metric": self._best.metric, "value": value, "step": store.step_of(path), "checkpoint": str(path)}

    def improves(self, metrics: Mapping[str, Any]) -> bool:
        """Whether an evaluation is better than that of every checkpoint there is or will be: worth saving now."""
        if self._best is None or self._best.metric not in metrics:
            return False
        value, best = float(metrics[self._best.metric]), self._best_path(self._known(), self._metrics)
        if math.isnan(value) or best is None:
            return not math.isnan(value)
        known = self._metrics[best][self._best.metric]
        return value < known if self._best.mode == "min" else value > known

    def _may_lack(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self._optional)

    def _known(self) -> list[Path]:
        """The checkpoints that were ever seen or saved here, by rising step; the best of them is still there."""
        return sorted(self._metrics, key=lambda path: (store.step_of(path), path.name))

    def _complete(self) -> list[Path]:
        """The complete checkpoints by rising step, with their metrics known; a manifest is read only once."""
        paths = store.candidates(self._folder)
        for path in paths:
            if path not in self._there:
                with suppress(Damaged, InputError):
                    self._there[path] = Manifest.read(path).metrics
        return [path for path in paths if path in self._there and not known_damaged(path)]

    def _best_path(self, paths: list[Path], metrics: Mapping[Path, Mapping[str, float]]) -> Path | None:
        """The best by `best`; of equal ones the first."""
        if self._best is None:
            return None
        metric, sign = self._best.metric, 1 if self._best.mode == "min" else -1
        scores = {path: sign * metrics[path].get(metric, math.nan) for path in paths}
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


@dataclass
class _Flight:
    """A save that goes on in its thread; `before` are the metrics of the checkpoint that it replaces."""

    path: Path
    before: Mapping[str, float] | None
    thread: threading.Thread | None = None
    failure: SaveFailed | None = None
    done: bool = False


def _as_failed(error: BaseException, path: Path) -> SaveFailed:
    if isinstance(error, SaveFailed):
        return error
    why = Failure.of(error)
    failed = SaveFailed(path, why.why, None, None, why.errno)
    failed.__cause__ = error
    return failed


@contextmanager
def _all_or_none() -> Iterator[None]:
    """Raises on every process what one of them raises inside, so that none waits for another that has given up."""
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    damaged = (failed.folder, failed.why) if isinstance(failed, Damaged) else None
    said = distributed.gather(None if failed is None else (f"{type(failed).__name__}: {failed}", damaged))
    if failed is not None:
        raise failed
    for rank, (words, damage) in ((rank, found) for rank, found in enumerate(said) if found is not None):
        raise Damaged(*damage) if damage is not None else RunnerError(f"rank {rank}: {words}")


def extra_of(path: Path) -> Any:
    """What was saved beside the state, read without loading anything. Raises InputError where it is damaged."""
    try:
        return _read_document(path, Manifest.read(path))["extra"]
    except Damaged as error:
        raise wrong("resume", str(error), "name another checkpoint", value=str(path)) from error


def _no_tensor(name: str) -> Any:
    raise ValueError(f"{name} is a tensor where none belongs")


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
    except (ValueError, TypeError, KeyError, RuntimeError, RecursionError) as error:
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


def _read_document(path: Path, manifest: Manifest) -> dict[str, Any]:
    """{"state": as it is written, "extra": the values themselves}."""
    if STATE not in manifest.files:
        raise Damaged(path, f"{STATE} is missing")
    data = read_bounded(path, STATE)
    check_bytes(path, STATE, data, manifest)
    document = parsed(data, path, STATE)
    try:
        return {"state": dict(document["state"]), "extra": join(document["extra"], _no_tensor)}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Damaged(path, f"{STATE} cannot be read ({type(error).__name__}: {error})") from error
