"""What differs between a run that goes on and the checkpoint it goes on from.

A difference is free (told in one line), warned of, or stops the start unless `resume_allow` names it. The classes are
lists of key prefixes below; a key that is on none of them is warned of.

And what differs between the processes of one run, which may differ in nothing (`one_for_all`).
"""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from runner import distributed
from runner.assemble import Parts
from runner.checkpoint import extra_of
from runner.checkpoint.manifest import Manifest
from runner.data.fingerprint import difference, fingerprint
from runner.data.reading import training_order
from runner.data.stream import has_exact_state, is_stream
from runner.environment import commit_of, hash_of, own_code, version_of, versions_in_use
from runner.errors import Elsewhere, InputError, Problem
from runner.launch.worker import WorkPlan
from runner.recipe.redact import redact
from runner.recipe.schema import complete

log = logging.getLogger("runner")

_STOPS = ("model", "task", "optimizer", "scheduler", "data", "seed", "batch.global_size")
_FREE_DATA = ("data.num_workers", "data.reader")
_FREE = (
    *(*_FREE_DATA, "name", "train", "batch", "accumulation", "eval", "log", "backend", "launch"),
    *("checkpoint", "hooks", "trackers", "debug", "trust"),
)
#: What the setting tells more truly (`auto` may be the same as `cpu`), or what is about the going on itself.
_NOT_TOLD = (
    *("device", "backend.name", "launch.nproc_per_node", "launch.nnodes", "launch.node_rank", "launch.threads"),
    *("precision", "resume", "resume_allow", "run_dir", "init_from"),
)
#: Warned of, and more than another rounding.
_ANOTHER_STEP = ("grad_clip", "nan")
_DIGITS = "results may differ in the last digits"
_FROM_HERE = "the steps from here on are made otherwise"
_MOST = 60
#: Text that is taken for nothing else without quotes.
_WORD = re.compile(r"(?!(?:true|false|null)$)[A-Za-z_][\w./-]*")


@dataclass
class Drift:
    """What a run that goes on does otherwise, to be told once its log is there."""

    warnings: list[str] = field(default_factory=list)
    free: list[str] = field(default_factory=list)

    def tell(self) -> None:
        for line in self.warnings:
            log.warning("%s", line)
        if self.free:
            log.info("  differs  %s", ", ".join(self.free))


# --- what is saved ----------------------------------------------------------------------------------------------------


def setting(plan: WorkPlan, parts: Parts) -> dict[str, Any]:
    """What the training runs on, beside its configuration: saved with each checkpoint, by the first process."""
    if distributed.rank() > 0:
        return {}
    device = parts.backend.device
    directory = Path(plan.directory)
    return {
        "precision": plan.config["precision"]["name"],
        "device": device.type,
        "hardware": _hardware(device),
        "threads": _threads(plan.config),
        "world": parts.backend.mesh.data_size,
        "backend": parts.backend.name,
        "steps": parts.plan.steps,
        "python": platform.python_version(),
        "versions": versions_in_use(),
        "commit": commit_of(directory),
        "code": own_code(directory),
        "data": _fingerprints(parts),
    }


def one_for_all(parts: Parts) -> None:
    """Raises InputError in the first process, and Elsewhere in the others, where processes differ that may not.

    Each computer reads its own files and has its own packages: a copy of the data that is older on one of them would
    give samples twice and lose others, and nothing would fail. Samples of other contents are only warned of: a path
    or the name of the computer in them is no harm.
    """
    if distributed.world_size() == 1:
        return
    seen = {
        "steps": parts.plan.steps,
        "versions": {"Python": ".".join(platform.python_version_tuple()[:2]), "torch": torch.__version__},
        "data": _fingerprints(parts),
    }
    first, *others = distributed.gather(seen)
    problems = [problem for rank, other in enumerate(others, 1) for problem in _unlike(first, rank, other)][:5]
    if problems and distributed.rank() > 0:
        raise Elsewhere("another process differs from the first")
    if problems:
        raise InputError(*problems)
    if distributed.rank() == 0:
        for rank, other in enumerate(others, 1):
            for name, one in first["data"].items():
                if unlike := difference(one, other["data"][name], rank):
                    log.warning("data.%s %s", name, unlike)


def _unlike(first: Mapping[str, Any], rank: int, other: Mapping[str, Any]) -> list[Problem]:
    found = []
    for name, version in first["versions"].items():
        if other["versions"][name] != version:
            why = f"rank {rank} has {name} {other['versions'][name]}, and rank 0 has {version}"
            found.append(Problem(None, why, "install the same on every computer"))
    for name, one in first["data"].items():
        if unlike := difference({**one, "items": None}, other["data"][name], rank):
            found.append(Problem(f"data.{name}", unlike, "give every process the same data, in the same order"))
    if not found and other["steps"] != first["steps"]:
        why = f"{other['steps']} steps on rank {rank}, and {first['steps']} on rank 0"
        found.append(Problem("data.train", why, "give every process data of the same length"))
    return found


def _hardware(device: torch.device) -> str:
    """What of the hardware decides which kernels run."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _threads(config: Mapping[str, Any]) -> int:
    if config["determinism"] == "canonical":
        return 1
    return config["launch"]["threads"] or torch.get_num_threads()


def _fingerprints(parts: Parts) -> dict[str, Any]:
    """Taken once a process, so that data with a generator of their own are read as often in every run."""
    if parts.fingerprints is None:
        sets = {"train": parts.train, "eval": parts.eval}
        parts.fingerprints = {name: fingerprint(found) for name, found in sets.items() if found is not None}
    return parts.fingerprints


# --- what differs -----------------------------------------------------------------------------------------------------


def compare(plan: WorkPlan, parts: Parts, checkpoint: Path) -> Drift:
    """Raises InputError for what would make the training another one, unless it is in resume_allow; gives the rest."""
    saved = _mapping(extra_of(checkpoint))
    before, then = _mapping(saved.get("config")), _mapping(saved.get("setting"))
    if not before:
        return Drift([f"{checkpoint} does not say how it was configured: nothing was compared"])
    drift = Drift()
    now = setting(plan, parts)
    changed = _changed(plan, before)
    allowed = list(plan.config["resume_allow"])
    problems = [*_unknown(allowed, plan.config), *_too_short(plan, parts, checkpoint)]
    for key, old, new in changed:
        if _within(key, _NOT_TOLD) or (key.startswith("backend.") and then.get("backend") != now["backend"]):
            continue  # options of a backend that is another one now
        if _stops(key):
            if _within(key, allowed):
                means = _place_in_data(plan, parts, checkpoint, old, new) if key == "batch.global_size" else ""
                drift.warnings.append(f"{key} was {_shown(old)} and is {_shown(new)}: allowed, and applies{means}")
            else:
                problems.append(_stop(key, f"was {_shown(old)} in the run that goes on", value=new))
        elif _within(key, _FREE):
            drift.free.append(f"{key} {_shown(old)} -> {_shown(new)}")
        else:
            effect = _FROM_HERE if _within(key, _ANOTHER_STEP) else _DIGITS
            drift.warnings.append(f"{key} was {_shown(old)} and is {_shown(new)}: {effect}")
    _compare_settings(then, now, drift)
    _compare_precision(changed, drift)
    _compare_code(then, now, Path(plan.directory), drift)
    problems += _compare_data(then, now, [key for key, _, _ in changed], allowed, drift)
    if plan.config["init_from"] is not None and before.get("init_from") != plan.config["init_from"]:
        drift.free.append("init_from is not used, because the weights come from the checkpoint")
    if problems:
        raise InputError(*problems)
    return drift


def compare_finished(plan: WorkPlan, before: Mapping[str, Any]) -> Drift:
    """The same for a run that has nothing left to do, by its configuration. Nothing of what differs has an effect.

    Raises InputError where another training is asked for: it would not take place, and nobody would know.
    """
    changed, allowed = _changed(plan, before), list(plan.config["resume_allow"])
    problems = _unknown(allowed, plan.config)
    told = []
    for key, old, new in changed:
        if _stops(key) and not _within(key, allowed):
            why = f"was {_shown(old)} in the run that is complete there"
            problems.append(Problem(key, why, "give back what it was, or name another run_dir", value=new))
        elif key == "precision.name" or not _within(key, _NOT_TOLD):
            told.append(f"{key} {_shown(old)} -> {_shown(new)}")
    if problems:
        raise InputError(*problems)
    return Drift(free=[*told[:-1], f"{told[-1]} (without effect, because nothing is left to do)"] if told else [])


def _changed(plan: WorkPlan, before: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value before, value now) of the configuration."""
    return list(_differences("", complete(dict(before)), complete(redact(plan.config, plan.written))))


def _stops(key: str) -> bool:
    return _within(key, _STOPS) and not _within(key, _FREE_DATA)


def _stop(key: str, why: str, **value: Any) -> Problem:
    fix = f"give back what it was, allow the change by resume_allow=[{key}], or start a new run without run_dir"
    return Problem(key, why, fix, **value)


def _unknown(allowed: list[str], config: Mapping[str, Any]) -> list[Problem]:
    """Words of resume_allow that no key begins with: a change that was meant to be allowed would not be."""
    problems = []
    for word in allowed:
        first = word.partition(".")[0]
        if first not in config:
            close = get_close_matches(first, list(config), 1, 0.6)
            inside = [f"{key}.{first}" for key, spec in config.items() if isinstance(spec, Mapping) and first in spec]
            meant = close or inside[:1]
            fix = f"did you mean {meant[0]}?" if meant else "name a key, such as optimizer.lr, or a group, such as data"
            problems.append(Problem("resume_allow", f"names {word}, and there is no such key", fix))
    return problems


def _too_short(plan: WorkPlan, parts: Parts, checkpoint: Path) -> list[Problem]:
    done = Manifest.read(checkpoint).step
    if parts.plan.steps >= done:
        return []
    key = "train.steps" if plan.config["train"]["steps"] else "train.epochs"
    why = f"makes {parts.plan.steps} steps, and {done} are done in the checkpoint to go on from"
    fix = "give more, name an earlier checkpoint by resume=, or start a new run without run_dir"
    return [Problem(key, why, fix, value=plan.config["train"][key.partition(".")[2]])]


def _place_in_data(plan: WorkPlan, parts: Parts, checkpoint: Path, old: int, new: int) -> str:
    """What another global batch makes of the place in the training data, which is kept as a number of steps."""
    if is_stream(parts.train) and has_exact_state(parts.train):
        return ". The stream goes on by its own state: no sample is passed over or seen again"
    step, drop_last = Manifest.read(checkpoint).step, plan.config["data"]["drop_last"]
    orders = [training_order(parts.train, size, 0, drop_last=drop_last) for size in (old, new)]
    if not all(order.steps_per_epoch for order in orders):
        return ""  # the data were others as well
    before, after = (order.samples(step) for order in orders)
    if before == after:
        return ". The place in the data stays the same"
    # Without a length the steps count from where the stream began last, which is not known here.
    most = "" if orders[0].length else "at most "
    what = "passed over" if after > before else "seen again"
    return (
        f". The place in the data is step x batch.global_size: after step {step} it was {before} and is {after}, so "
        f"{most}{abs(after - before)} samples are {what}"
    )


def _compare_settings(then: Mapping[str, Any], now: Mapping[str, Any], drift: Drift) -> None:
    another_world = then.get("world", now["world"]) != now["world"]
    for name in ("precision", "device", "hardware", "threads", "python"):
        old = then.get(name, now[name])
        if old != now[name] and name == "threads" and another_world:
            # It follows from the number of processes, which moves the last digits anyway.
            drift.free.append(f"threads {_plain(old)} -> {_plain(now[name])}")
        elif old != now[name]:
            drift.warnings.append(f"{name} was {_plain(old)} and is {_plain(now[name])}: {_DIGITS}")
    for name, old in _mapping(then.get("versions")).items():
        new = now["versions"].get(name) or version_of(str(name))
        if old != new:
            drift.warnings.append(f"{name} was {_plain(old)} and is {_plain(new or 'not installed')}: {_DIGITS}")
    steps = then.get("steps")
    if isinstance(steps, int) and now["steps"] < steps:
        drift.warnings.append(f"the training was to take {steps} steps and is to take {now['steps']}")
    for name in ("world", "backend"):
        old = then.get(name, now[name])
        if old != now[name]:
            drift.free.append(f"{name} {_plain(old)} -> {_plain(now[name])}")


def _compare_precision(changed: list[tuple[str, Any, Any]], drift: Drift) -> None:
    """Single numbers of a precision whose name is the same."""
    if any(key == "precision.name" for key, _, _ in changed):
        return
    for key, old, new in changed:
        if _within(key, ("precision",)):
            drift.warnings.append(f"{key} was {_shown(old)} and is {_shown(new)}: {_DIGITS}")


def _compare_code(then: Mapping[str, Any], now: Mapping[str, Any], directory: Path, drift: Drift) -> None:
    told = []
    old, new = then.get("commit", now["commit"]), now["commit"]
    if old != new:
        told.append(f"git commit was {_plain(old or 'none')[:12]} and is {_plain(new or 'none')[:12]}")
    if "code" in then:
        saved = _mapping(then["code"])
        # What was imported only while a model was built is not imported yet: the file itself tells.
        present = {**{name: hash_of(directory / str(name)) for name in saved}, **now["code"]}
        kinds = {
            "changed": [name for name in saved if present[name] not in (None, saved[name])],
            "gone": [name for name in saved if present[name] is None],
            "new": [name for name in now["code"] if name not in saved],
        }
        told += [
            f"{_listed(names)} {'is' if len(names) == 1 else 'are'} {word}" for word, names in kinds.items() if names
        ]
    if told:
        drift.warnings.append(f"the code differs from the checkpoint's: {'; '.join(told)}")


def _compare_data(
    then: Mapping[str, Any], now: Mapping[str, Any], changed: list[str], allowed: list[str], drift: Drift
) -> list[Problem]:
    """Other contents under the same configuration; where that has changed as well, it was told of."""
    problems = []
    before, present = _mapping(then.get("data")), now["data"]
    for name in ("train", "eval"):
        key = f"data.{name}"
        old, new = before.get(name), present.get(name)
        why = difference(old, new) if isinstance(old, Mapping) and isinstance(new, Mapping) else None
        if why is None or any(_within(other, ("data",)) and not _within(other, _FREE_DATA) for other in changed):
            continue
        if _within(key, allowed):
            drift.warnings.append(f"{key} {why}: allowed, and applies")
        else:
            problems.append(_stop(key, f"{why} from the run that goes on" if "differ" in why else why))
    return problems


def _differences(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """(key, old, new) of what differs, as deep as both sides have the same shape."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [*old, *(name for name in new if name not in old)]
        if "_target_" in names and old.get("_target_") != new.get("_target_"):
            # The arguments of another target are other things, but for those of the same name.
            yield f"{key}._target_", old.get("_target_"), new.get("_target_")
            names = [name for name in names if name in old and name in new and name != "_target_"]
        for name in names:
            yield from _differences(f"{key}.{name}" if key else str(name), old.get(name), new.get(name))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(f"{key}.{number}", one, other)
    elif not _same(old, new):
        yield key, old, new


def _same(old: Any, new: Any) -> bool:
    return (old == new and isinstance(old, bool) == isinstance(new, bool)) or (old != old and new != new)


def _within(key: str, words: Any) -> bool:
    """Whether a key is one of the words, or below one."""
    return any(key == word or key.startswith(f"{word}.") for word in words)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _shown(value: Any) -> str:
    """A value in a line: what a mapping builds, and of anything long the beginning."""
    if isinstance(value, Mapping) and "_target_" in value:
        return _plain(value["_target_"])
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    text = value if isinstance(value, str) and _WORD.fullmatch(value) else repr(value)
    return text if len(text) <= _MOST else f"{text[: _MOST - 3]}..."


def _plain(value: Any) -> str:
    """What a checkpoint says, as one short line."""
    text = str(value)
    text = text if text.isprintable() else repr(value)
    return text if len(text) <= _MOST else f"{text[: _MOST - 3]}..."


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(_plain, names[:most])) + more
