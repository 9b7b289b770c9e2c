"""One job: from a finished plan to an exit code, with the run's folder, its signals and its end in order."""

from __future__ import annotations

import json
import logging
import os
import resource
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from runner import console
from runner.assemble import Parts, assemble, check, check_metrics
from runner.checkpoint import extra_of, find, latest
from runner.distributed import leave
from runner.environment import describe_later
from runner.errors import InputError, Problem, RunnerError, wrong
from runner.folder import RunFolder, finite
from runner.launch.worker import WorkPlan
from runner.places import make_importable
from runner.recipe.redact import redact, redact_command, secrets_of
from runner.train.loop import train
from runner.train.progress import Plan
from runner.train.run import Run

DONE, FAILED, PREEMPTED, INTERRUPTED = 0, 1, 75, 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

log = logging.getLogger("runner")


class Interrupted(BaseException):
    """A signal came before there was a training that could end in order."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = _exit_code(number)


def work(plan: WorkPlan) -> int:
    """Does the job. Returns its exit code; raises InputError where the user's input is wrong."""
    make_importable(Path(plan.directory))
    environment = describe_later(Path(plan.directory))
    with _signals() as signals:
        try:
            parts = check(plan.config)
            folder, resume, fresh = _folder(plan, parts)
            folder.lock()
            try:
                if _finished(folder, parts.plan):
                    return DONE
                return _in_folder(plan, parts, folder, resume, fresh, signals, environment)
            finally:
                folder.unlock()
        except Interrupted as stop:
            log.info("%s before the first step: nothing to save", stop)
            return stop.exit_code
        except SystemExit as error:
            log.error("something that the configuration names ended the program: SystemExit(%s)", error.code)
            return FAILED
        finally:
            leave()


def _in_folder(
    plan: WorkPlan,
    parts: Parts,
    folder: RunFolder,
    resume: Path | None,
    fresh: bool,
    signals: _Signals,
    environment: Any,
) -> int:
    """The job once its folder is there.

    Until everything is built and found right, nothing that an earlier run left in the folder is touched, and a folder
    that is `fresh` goes away again where the input is wrong.
    """
    handlers = console.keep(folder.path / "logs" / "main.log", folder.path / "logs" / "rank_0.log")
    run: Run | None = None
    try:
        if fresh:
            folder.state("starting", step=0)
            _write_inputs(plan, folder)
        built = assemble(plan.config, parts, folder, resume=resume, terminal=plan.terminal)
        check_metrics(built)
        built.config = redact(plan.config, plan.written)
        built.setting = _setting(plan, parts)
        run = built
        if not fresh:
            _write_inputs(plan, folder)
        if plan.run_dir is None:
            folder.link_latest()
        _introduce(run, plan)
        if resume is not None:
            log.info("  goes on  after step %d, from %s", run.progress.step, _short(resume, plan))
        run.trackers.start(folder.path, run.progress.step, run.config)
        run.startup_seconds = time.time() - plan.started
        folder.state("running", step=run.progress.step)
        signals.run = run
        train(run)
        return _ended(run, plan)
    except InputError as error:
        if run is not None and run.progress.step > run.first_step:
            return _failed(error, run, folder, plan)
        console.close(handlers)
        if fresh:
            folder.discard()
        raise
    except (Exception, SystemExit, KeyboardInterrupt, Interrupted) as error:
        return _failed(error, run, folder, plan)
    finally:
        signals.run = None
        if run is not None:
            run.trackers.close()
            _drop(run)
        if folder.path.is_dir():
            _write_environment(folder, environment, parts)
        console.close(handlers)


# --- the folder -----------------------------------------------------------------------------------------------------


def _finished(folder: RunFolder, length: Plan) -> bool:
    """Whether a completed run has nothing left to do, and says so. One that stopped early is complete as well."""
    told = folder.read_json("summary.json")
    if not told or told.get("status") != "completed" or told.get("planned_steps", 0) < length.steps:
        return False
    log.info("%s is already complete: %d steps", folder.path.name, told["steps"])
    return True


def _folder(plan: WorkPlan, parts: Parts) -> tuple[RunFolder, Path | None, bool]:
    """The run's folder, the checkpoint to go on from, and whether the folder was empty."""
    resume = plan.config["resume"]
    named = None if resume in ("auto", "never") else find(Path(plan.directory, resume))
    if named is not None:
        _compare(plan, parts, named)
    if plan.run_dir is None:
        return RunFolder.new(Path(plan.directory, "runs"), plan.config["name"]), named, True
    path = Path(plan.directory, plan.run_dir)
    folder = RunFolder.named(path)
    if not any(child.name != ".lock" for child in path.iterdir()):
        return folder, named, True
    if resume == "never":
        raise wrong(
            "resume",
            f"never, and {plan.run_dir} is not empty",
            "name another run_dir, or say resume=auto",
            value=resume,
        )
    if not (path / "status.json").exists():
        raise wrong(
            "run_dir",
            "is not empty and holds no run",
            "name a run's folder, or one that is not there",
            value=plan.run_dir,
        )
    if named is not None:
        return folder, named, False
    last = latest(path / "checkpoints")
    if last is not None:
        _compare(plan, parts, last)
    return folder, last, False


_BOUND = ("model", "task", "optimizer", "scheduler", "data", "seed", "batch.global_size")
_FREE_DATA = ("num_workers",)


def _compare(plan: WorkPlan, parts: Parts, checkpoint: Path) -> None:
    """Raises InputError for configuration that would make the training another one, unless it is in resume_allow.

    Other settings that can change a result are warned of.
    """
    saved = extra_of(checkpoint) or {}
    before, now = saved.get("config", {}), redact(plan.config, plan.written)
    allowed = plan.config["resume_allow"]
    problems = [
        Problem(
            key,
            f"was {old!r} in the run that goes on",
            f"give the old value, allow the change by resume_allow=[{key}], or start a new run without run_dir",
            value=new,
        )
        for bound in _BOUND
        for key, old, new in _differences(bound, _at(before, bound), _at(now, bound))
        if not any(key == word or key.startswith(word + ".") for word in allowed)
        and key.removeprefix("data.") not in _FREE_DATA
    ]
    if problems:
        raise InputError(*problems)
    for name, new in _setting(plan, parts).items():
        old = saved.get("setting", {}).get(name, new)
        if new != old:
            log.warning("%s was %s and is %s: results may differ in the last digits", name, old, new)


def _setting(plan: WorkPlan, parts: Parts) -> dict[str, Any]:
    """What the training runs on: may differ when it goes on, and is then warned of."""
    return {
        "precision": plan.config["precision"]["name"],
        "device": str(parts.backend.device),
        "torch": torch.__version__,
    }


def _at(config: Any, key: str) -> Any:
    for word in key.split("."):
        config = config.get(word) if isinstance(config, Mapping) else None
    return config


def _differences(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _differences(f"{key}.{name}", old.get(name), new.get(name))
    elif old != new:
        yield key, old, new


def _write_inputs(plan: WorkPlan, folder: RunFolder) -> None:
    config = redact(plan.config, plan.written)
    folder.write_text("config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120))
    folder.write_text("overrides.txt", _command(plan, None) + "\n")


def _write_environment(folder: RunFolder, environment: Any, parts: Parts) -> None:
    device = parts.backend.device
    devices = [str(device)]
    if device.type == "cuda":
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    try:
        found = environment.result(timeout=5)
    except Exception as error:
        found = {"error": str(error)}
    folder.write_json(
        "environment.json", {**found, "devices": devices, "world_size": 1, "threads": torch.get_num_threads()}
    )


# --- beginning and end ----------------------------------------------------------------------------------------------


def _introduce(run: Run, plan: WorkPlan) -> None:
    """Says what is about to be trained, with the numbers that matter."""
    config, model = plan.config, run.engine.model
    count = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    of_them = "" if trained == count else f", {_count(trained)} of them trained"
    batch, order = config["batch"], run.train_data.order
    held_out = "" if run.eval_data is None else f", {run.eval_data.order.length:,} held out"
    log.info("%s: %s", run.name, _short(run.folder.path, plan))
    log.info("  model    %s, %s parameters%s", type(model).__name__, _count(count), of_them)
    log.info("  data     %s samples%s", f"{order.length:,}", held_out)
    log.info(
        "  batch    %d = %d micro x %d accumulation x 1 process",
        batch["global_size"],
        batch["micro_size"],
        config["accumulation"]["steps"],
    )
    log.info("  length   %d steps, %d an epoch", run.plan.steps, run.plan.steps_per_epoch)
    log.info(
        "  engine   %s on %s, %s, %s, %d threads",
        run.engine.backend.name,
        run.engine.device,
        run.engine.precision.name,
        type(run.engine.optimizer).__name__,
        torch.get_num_threads(),
    )


def _count(number: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _ended(run: Run, plan: WorkPlan) -> int:
    """Writes the summary of a training that ended in order and says how it ended."""
    stopped = None if run.complete else run.signal
    status = "completed" if stopped is None else "interrupted"
    reason = run.stop_reason if stopped is None else signal.Signals(stopped).name
    summary = _summary(status, run, plan)
    run.folder.write_json("summary.json", summary)
    run.folder.state(status, step=run.progress.step, reason=reason)
    rate = f"{summary['samples_per_second']:.1f} samples/s"
    values = "  ".join(f"{k} {v:.4f}" for k, v in summary["metrics"].items() if k not in ("split", "step", "samples"))
    shown = "  ".join(filter(None, [f"{summary['train_seconds']:.1f} s", rate, values]))
    log.info("%s: step %d  %s", status, run.progress.step, shown)
    if run.stop_reason:
        log.info("  stopped early: %s", run.stop_reason)
    if run.progress.skipped:
        log.info(
            "  %d steps changed no weight (%d of them by the loss scale)", run.progress.skipped, run.progress.overflows
        )
    if plan.json:
        print(json.dumps(finite(summary), indent=2), flush=True)
    if stopped is None:
        log.info("  %s", _short(run.folder.path / "summary.json", plan))
        return DONE
    _say_how_to_go_on(plan, run.folder)
    return _exit_code(stopped)


def _failed(error: BaseException, run: Run | None, folder: RunFolder, plan: WorkPlan) -> int:
    """Tells of a failure: its cause last, once; the traceback only where the user needs it."""
    step = 0 if run is None else run.progress.step
    if isinstance(error, Interrupted):
        folder.state("interrupted", step=step, reason=str(error))
        raise error
    what = f"{type(error).__name__}: {error}" if not isinstance(error, RunnerError) else str(error)
    folder.state("failed", step=step, reason=what)
    folder.write_json("summary.json", {**_summary("failed", run, plan), "error": what})
    text = "".join(traceback.format_exception(error))
    (folder.path / "logs" / "error.txt").write_text(text, encoding="utf-8")
    if plan.full_error or not isinstance(error, RunnerError):
        print(text, file=sys.stderr, end="", flush=True)
    _say_how_to_go_on(plan, folder)
    where = "before its first step" if run is None else f"after step {step}"
    log.error("%s failed %s: %s", plan.config["name"], where, what)
    return FAILED


def _summary(status: str, run: Run | None, plan: WorkPlan) -> dict[str, Any]:
    config = plan.config
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    common = {
        "status": status,
        "steps": 0,
        "samples": 0,
        "peak_memory_bytes": [usage],
        "precision": config["precision"]["name"],
        "world_size": 1,
    }
    if run is None:
        return common
    progress, device = run.progress, run.engine.device
    seconds = progress.seconds
    here = max(seconds - progress.seconds_before - run.paused_seconds, 1e-9)
    saved = run.checkpointer.latest() if run.checkpointer else None
    summary = {
        **common,
        "steps": progress.step,
        "planned_steps": run.plan.steps,
        "samples": progress.samples,
        "skipped_steps": progress.skipped,
        "train_seconds": seconds,
        "samples_per_second": (progress.samples - run.train_data.order.samples(run.first_step)) / here,
        "startup_seconds": run.startup_seconds,
        "device": str(device),
        "metrics": run.metrics,
        "best": run.checkpointer.best if run.checkpointer else None,
        "backend": run.engine.backend.name,
        "checkpoint": str(saved) if saved else None,
    }
    if device.type == "cuda":
        summary["peak_device_memory_bytes"] = [torch.cuda.max_memory_allocated(device)]
    return summary


def _say_how_to_go_on(plan: WorkPlan, folder: RunFolder) -> None:
    log.info("to go on: %s", _command(plan, _short(folder.path, plan)))


def _command(plan: WorkPlan, run_dir: str | None) -> str:
    words = [f"+{word}" if word.startswith("recipe=") else word for word in plan.command]
    if run_dir is not None and not any(word.lstrip("+").startswith("run_dir=") for word in words):
        words = [*words, f"run_dir={run_dir}"]
    return shlex.join(["python", "-m", "runner", *redact_command(words, secrets_of(plan.config, plan.written))])


def _short(path: Path, plan: WorkPlan) -> str:
    """The path as the user would type it."""
    try:
        return str(path.relative_to(plan.directory))
    except ValueError:
        return str(path)


def _drop(run: Run) -> None:
    """Lets go of model, optimizer and loaders before the process leaves."""
    for name in list(vars(run)):
        setattr(run, name, None)


# --- signals --------------------------------------------------------------------------------------------------------


class _Signals:
    """The first signal ends the run after its step, the second at once."""

    run: Run | None = None
    received = False

    def __init__(self) -> None:
        self._process = os.getpid()

    def __call__(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            # A data worker, forked with this handler: the training process decides when it ends.
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.received:
            os._exit(INTERRUPTED if number == signal.SIGINT else 128 + number)
        self.received = True
        if self.run is None:
            raise Interrupted(number)
        self.run.signal = number
        # No logging here: the signal may have come while the logger held its lock.
        os.write(
            2, f"\n{signal.Signals(number).name}: finishing this step and saving; once more to leave at once\n".encode()
        )


@contextmanager
def _signals() -> Iterator[_Signals]:
    handler = _Signals()
    try:
        before = {number: signal.signal(number, handler) for number in _SIGNALS}
    except ValueError:
        # Not the main thread (a notebook's, a test's): signals belong to somebody else.
        yield handler
        return
    try:
        yield handler
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _exit_code(number: int) -> int:
    return INTERRUPTED if number == signal.SIGINT else PREEMPTED
