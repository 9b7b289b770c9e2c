"""One job: from a finished plan to an exit code, with the processes' group, the run's folder and its end in order."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from signal import Signals as Signal
from typing import TYPE_CHECKING, Any

import torch
import yaml

from runner import console, distributed, garbage
from runner.assemble import Parts, assemble, check, check_metrics, needs_group
from runner.data.loader import read_by
from runner.data.main import Remote
from runner.data.reading import AnyLoader
from runner.debugging import CollectiveWatch, explain, standing
from runner.distributed import ALONE, Ranks
from runner.drift import one_for_all, setting
from runner.environment import describe_later
from runner.errors import Elsewhere, InputError, RunnerError
from runner.folder import Bystander, RunFolder, finite
from runner.heartbeat import ENDING, Heartbeat
from runner.launch.failure import Failure, gone, is_secondary, raised_by, record, redirect, show, tell_run, worded
from runner.launch.report import BEAT, Report, file_of
from runner.launch.watch import START, Watchdog
from runner.launch.worker import WorkPlan, leave
from runner.places import make_importable
from runner.recipe import links
from runner.recipe.redact import redact, redact_command, secrets_of
from runner.resume import Place, earlier, leave_behind, place_of
from runner.signals import NOTHING_TO_SAVE, Interrupted, Signals, end_workers, exit_code, handled
from runner.train.loop import train
from runner.train.run import Run

if TYPE_CHECKING:
    from torch.distributed import Store

DONE, FAILED = 0, 1

log = logging.getLogger("runner")


def work(plan: WorkPlan, ranks: Ranks = ALONE, store: Store | None = None) -> int:
    """Does this process's part of the job. Returns its exit code; raises InputError where the user's input is wrong."""
    make_importable(Path(plan.directory))
    console.hide(secrets_of(plan.config, plan.written))
    environment = describe_later(Path(plan.directory)) if ranks.main else None
    together = False
    with handled() as signals, ExitStack() as watch:
        signals.speaks = ranks.main
        signals.handed_on = plan.report is not None or ranks.world_size > 1
        try:
            if needs_group(plan.config, ranks):
                device = "cuda" if plan.config["device"] != "cpu" and torch.cuda.is_available() else "cpu"
                group = store if store is not None else distributed.store(ranks)
                distributed.join(ranks, group, device, max(START, plan.config["launch"]["timeout"]) + 60.0)
            if ranks.world_size > 1 and plan.report is None and plan.config["launch"]["threads"] is None:
                # Our own parent has shared the cores out; other launchers give each process one, or all of them.
                torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size))
            parts, place = _agreed(plan, ranks)
            if plan.config["debug"]:
                watch.enter_context(CollectiveWatch(min(60.0, plan.config["launch"]["timeout"])))
            go_on = _command(plan, _short(place.folder.path, plan))
            signals.go_on = go_on if ranks.main and not plan.report else None
            if ranks.local_rank == 0:  # each computer's parent: after a restart the first process may be on another
                tell_run(plan, place.folder.path, go_on)
            try:
                if not place.finished:
                    code = _in_folder(plan, parts, place, ranks, signals, environment)
                    together = code != FAILED
                    return code
                together = True
                return DONE
            finally:
                place.folder.unlock()
        except (Exception, Interrupted) as error:
            stop = signals.cause(error)
            if not isinstance(stop, Interrupted):
                raise
            _say_interrupted(stop, plan, ranks)
            return stop.exit_code
        except SystemExit as error:
            log.error("something that the configuration names ended the program: SystemExit(%s)", error.code)
            record(plan, ranks, RunnerError(f"SystemExit({error.code})"), FAILED)
            return FAILED
        finally:
            signals.over = True
            watch.close()
            distributed.leave(together=together)


def _agreed(plan: WorkPlan, ranks: Ranks) -> tuple[Parts, Place]:
    """Checks, and finds the place. The first process does both before the others, so that downloads happen once.

    Raises InputError, and Elsewhere in the processes that only hear of one; a fresh folder is gone then.
    """
    parts, place, refused, remote = None, None, None, None
    if ranks.main:
        try:
            parts = check(plan.config, ranks)
            place = place_of(plan, parts, ranks)
        except BaseException as error:
            refused = error
    if parts is not None and plan.config["data"]["reader"] == "main":
        remote = (Remote.of(parts.train), None if parts.eval is None else Remote.of(parts.eval))
    told = None if place is None else (place.told, remote)
    told = distributed.broadcast(told)
    if told is not None and not ranks.main:
        (path, *rest), remote = told
        try:
            parts, place = check(plan.config, ranks, remote), Place(Bystander(path), *rest)
        except BaseException as error:
            refused = error
    try:
        _all_agree(refused, told is not None)
        assert parts is not None
        one_for_all(parts)
    except BaseException:
        if place is not None:
            if place.fresh:
                place.folder.discard()
            place.folder.unlock()
        raise
    assert place is not None
    return parts, place


def _say_interrupted(stop: Interrupted, plan: WorkPlan, ranks: Ranks) -> None:
    """What a signal before the first step means; after an earlier attempt there may be checkpoints."""
    folder = earlier(plan, ranks)
    if folder is None:
        log.info("%s before the first step: %s", stop, NOTHING_TO_SAVE)
        return
    log.info("%s before the first step after a restart", stop)
    if not plan.watched:  # else the parent says it
        log.info("to go on: %s", _command(plan, _short(Path(folder), plan)))


def _all_agree(refused: BaseException | None, begun: bool) -> None:
    """Raises what this process refused, or Elsewhere where another one did. Without `begun` it was the first one."""
    agreed = begun and all(distributed.gather(refused is None))
    if refused is not None:
        raise refused
    if not agreed:
        raise Elsewhere("another process found something wrong")


def _in_folder(plan: WorkPlan, parts: Parts, place: Place, ranks: Ranks, signals: Signals, environment: Any) -> int:
    """The job once its folder is there.

    Until everything is built and found right, nothing that an earlier run left in the folder is touched, and a folder
    that is fresh goes away again where the input is wrong.
    """
    folder, resume, fresh = place.folder, place.resume, place.fresh
    own_log = folder.path / "logs" / f"rank_{ranks.rank}.log"
    handlers = console.keep(*([folder.path / "logs" / "main.log"] if ranks.main else []), own_log)
    if not ranks.main:
        redirect(own_log)
    run: Run | None = None
    watchdog: Watchdog | None = None
    try:
        distributed.barrier()  # all logs are there: none is made again in a folder that the first process has discarded
        if fresh:
            _write_inputs(plan, folder)
        terminal = plan.terminal if ranks.main else "dumb"
        built = assemble(plan.config, parts, folder, resume=resume, terminal=terminal)
        check_metrics(built)
        built.config = redact(plan.config, plan.written)
        built.setting = setting(plan, parts)
        run = built
        if place.named and resume is not None:
            run.progress.stop_reason = None  # it was another run's, or the user goes on from there on purpose
            leave_behind(run, resume)
        if not fresh:
            _write_inputs(plan, folder)
        if plan.run_dir is None:
            folder.link_latest()
        _introduce(run, plan)
        if plan.config["debug"]:
            _explain(run)
        if resume is not None:
            log.info("  goes on  after step %d, from %s", run.progress.step, _short(resume, plan))
        elif not fresh:
            log.info("  begins   anew: what ran in this folder before has left no checkpoint")
        if place.drift is not None:
            place.drift.tell()
        run.trackers.start(folder.path, run.progress.step, run.config)
        run.startup_seconds = time.time() - plan.started
        folder.state("running", step=run.progress.step)
        if plan.watched and plan.report is not None:
            run.heartbeat = Heartbeat(Report(plan.report).path(file_of(ranks.rank, BEAT)))
        else:
            watchdog = _watchdog(run, plan, ranks).start()
        signals.run = run
        garbage.as_ever()
        train(run)
        return _ended(run, plan)
    except InputError as error:
        if run is not None and run.progress.step > run.first_step:
            return _failed(error, run, folder, plan, ranks)
        console.close(handlers)
        if fresh:
            folder.discard()
        raise
    except (Exception, SystemExit, KeyboardInterrupt, Interrupted) as error:
        return _failed(signals.cause(error), run, folder, plan, ranks)
    finally:
        signals.over, signals.run = True, None
        if watchdog is not None:
            watchdog.stop()
        if run is not None:
            run.heartbeat.beat(ENDING, run.progress.step)
            run.trackers.close()
            _drop(run)
            end_workers()
        if ranks.main and (folder.path / "status.json").exists():  # it was not discarded
            _write_environment(folder, environment, parts)
        console.close(handlers)


# --- the folder -----------------------------------------------------------------------------------------------------


@contextmanager
def _must_be_written(path: Path) -> Iterator[None]:
    """For a file without which a run is not one: says in one sentence where the disk does not take it."""
    try:
        yield
    except OSError as error:
        raise RunnerError(f"{path} cannot be written: {error.strerror or error}") from error


def _write_inputs(plan: WorkPlan, folder: RunFolder) -> None:
    config = redact(plan.config, plan.written)
    with _must_be_written(folder.path / "config.yaml"):
        folder.write_text("config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120))
        folder.write_text("overrides.txt", _command(plan, None) + "\n")
        meant = links.to_keep(config, plan.written, folder.path)
        if meant or (folder.path / links.FILE).exists():
            folder.write_json(links.FILE, meant)


def _write_environment(folder: RunFolder, environment: Any, parts: Parts) -> None:
    device = parts.backend.device
    devices = [str(device)]
    if device.type == "cuda":
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    try:
        found = environment.result(timeout=5)
        if found.get("git"):
            found["git"]["difference"] = console.scrub(found["git"]["difference"])
    except Exception as error:
        found = {"error": str(error)}
    about = {
        **found,
        "devices": devices,
        "world_size": parts.backend.mesh.data_size,
        "threads": torch.get_num_threads(),
    }
    with suppress(OSError):  # of a disk that is full, what had to be said was said
        folder.write_json("environment.json", about)


# --- beginning and end ----------------------------------------------------------------------------------------------


def _introduce(run: Run, plan: WorkPlan) -> None:
    """Says what is about to be trained, with the numbers that matter."""
    config, model = plan.config, run.model
    of_them = "" if model.trained == model.parameters else f", {_count(model.trained)} of them trained"
    batch, order = config["batch"], run.train_data.order
    held_out = ""
    if run.eval_data is not None:
        length = run.eval_data.order.length
        held_out = ", a stream held out" if length is None else f", {length:,} held out"
    log.info("%s: %s", run.name, _short(run.folder.path, plan))
    log.info("  model    %s, %s parameters%s", model.kind, _count(model.parameters), of_them)
    log.info("  data     %s%s", "a stream" if order.length is None else f"{order.length:,} samples", held_out)
    world = run.engine.mesh.data_size
    processes = f"{world} process" if world == 1 else f"{world} processes"
    if run.fits:
        log.info("  batch    %d, on %s; the micro-batch is to be found", batch["global_size"], processes)
    else:
        micro, steps = batch["micro_size"], config["accumulation"]["steps"]
        log.info("  batch    %d = %d micro x %d accumulation x %s", batch["global_size"], micro, steps, processes)
    an_epoch = "" if order.length is None else f", {run.plan.steps_per_epoch} an epoch"
    log.info("  length   %d steps%s", run.plan.steps, an_epoch)
    log.info(
        "  engine   %s on %s, %s, %s, %s",
        run.engine.backend.name,
        run.engine.device,
        run.engine.precision.name,
        type(run.engine.optimizer).__name__,
        "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads",
    )


def _explain(run: Run) -> None:
    """What the engine decided, once, for each process."""
    engine = run.engine
    lines = [standing(engine.device), f"backend {engine.backend.name}, precision {engine.precision.name}"]
    explain([*lines, *engine.backend.describe()], log.info)


def _count(number: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _ended(run: Run, plan: WorkPlan) -> int:
    """Writes the summary of a training that ended in order and says how it ended."""
    stopped = None if run.complete else run.ending
    status = "completed" if stopped is None else "interrupted"
    reason = run.stop_reason if stopped is None else Signal(stopped).name
    summary = _summary(status, run, plan)
    for name in ("peak_memory_bytes", "peak_device_memory_bytes"):
        if name in summary:
            summary[name] = [one for of_rank in distributed.gather(summary[name]) for one in of_rank]
    with _must_be_written(run.folder.path / "summary.json"):
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
        console.say(json.dumps(finite(summary), indent=2) + "\n", sys.stdout)
    if stopped is None:
        log.info("  %s", _short(run.folder.path / "summary.json", plan))
        return DONE
    _say_how_to_go_on(plan, run.folder)
    return exit_code(stopped)


def _key_of(error: BaseException, run: Run) -> str | None:
    """The key of the configuration whose object raised an error, by whose methods are in its traceback.

    What a data worker met came by a loader, the traceback of the worker is a text. The end of a worker is told wherever
    this process just is: it is known by its number alone.
    """
    named = {id(hook): f"hooks.{name}" for name, hook in run.hooks.items()}
    named[id(run.task)] = "task"
    for data, key in ((run.train_data, "data.train"), (run.eval_data, "data.eval")):
        named[id(getattr(data, "dataset", None))] = key
    named.pop(id(None), None)  # no data.eval, or data that the first process reads
    if pids := gone(error):
        return next((named[read] for pid in pids if (read := read_by(pid)) in named), None)
    raised = raised_by(error)
    loaders = tuple(str(Path("runner", "data", name)) for name in ("loader.py", "stream.py"))
    ours = [frame.function for frame in raised.frames if frame.file.endswith(loaders)]
    of_dataset = raised.afar and bool(ours) and ours[-1] not in ("_made", "_batch")  # these two call the collate
    found, trace = None, error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        own = frame.f_locals.get("self")
        if own is not None and id(own) in named:
            found = named[id(own)]
        elif isinstance(own, torch.nn.Module) and frame.f_code.co_name == "forward":
            found = "model"
        elif of_dataset and isinstance(own, AnyLoader):
            found = named.get(id(own.dataset), found)
        trace = trace.tb_next
    return found


def _watchdog(run: Run, plan: WorkPlan, ranks: Ranks) -> Watchdog:
    """For a process that no parent of ours watches: ends it where it makes no progress."""

    def end(what: str) -> None:
        error = RunnerError(what)
        step, told = run.progress.step, f"{plan.config['name']} failed"
        run.folder.state("failed", step=step, reason=what)
        with suppress(OSError, KeyError):
            before = run.folder.read_json("summary.json") or {}
            run.folder.write_json("summary.json", {**before, "status": "failed", "steps": step, "error": what})
        record(plan, ranks, error, FAILED, told=told, folder=run.folder.path)
        go_on = _command(plan, _short(run.folder.path, plan)) if ranks.world_size == 1 else None
        if plan.report is None:
            show(Failure.of(error, ranks, FAILED, told, go_on), plan)
        end_workers()
        for child in multiprocessing.active_children():
            child.kill()
        leave(FAILED)

    timeout, compiles = plan.config["launch"]["timeout"], bool(plan.config["compile"])
    return Watchdog(run.heartbeat, timeout, run.folder.path, end, rank=ranks.rank, compiles=compiles)


def _failed(error: BaseException, run: Run | None, folder: RunFolder, plan: WorkPlan, ranks: Ranks) -> int:
    """Tells of a failure: its cause last, once; the traceback only where the user needs it.

    Under a parent the process leaves a record, from which the parent tells of the first failure of all.
    """
    step = 0 if run is None else run.progress.step
    if isinstance(error, Interrupted):
        if run is None:
            status = folder.read_json("status.json")  # an earlier start may have come further
            step = status.get("step", 0) if isinstance(status, dict) else 0
        folder.state("interrupted", step=step, reason=str(error))
        raise error
    key = None if run is None or isinstance(error, RunnerError) else _key_of(error, run)
    what = worded(error, key)
    with suppress(OSError):  # the folder may have gone, or its disk be full: the error itself must be told
        folder.state("failed", step=step, reason=what)
        folder.write_json("summary.json", {**_summary("failed", run, plan), "error": what})
    text = console.scrub("".join(traceback.format_exception(error)))
    where = f"after step {step}" if step else "before its first step"
    told = f"{plan.config['name']} failed {where}"
    name = "error.txt" if ranks.world_size == 1 else f"error_rank_{ranks.rank}.txt"
    with suppress(OSError):
        (folder.path / "logs" / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    go_on = _command(plan, _short(folder.path, plan))
    record(plan, ranks, error, FAILED, told=told, go_on=go_on, folder=folder.path, key=key)
    if plan.report is not None:
        with console.muted():
            log.error("%s (rank %d): %s", told, ranks.rank, what)
        return FAILED
    if ranks.world_size > 1 and is_secondary(error):
        return FAILED
    if plan.full_error or not isinstance(error, RunnerError):
        console.say(text, sys.stderr)
    _say_how_to_go_on(plan, folder)
    log.error("%s: %s", told if ranks.world_size == 1 else f"{told} (rank {ranks.rank})", what)
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
        "world_size": distributed.world_size(),
    }
    if run is None:
        return common
    progress, device = run.progress, run.engine.device
    seconds = progress.seconds
    here = max(seconds - progress.seconds_before - run.paused_seconds, 1e-9)
    saved = run.checkpointer.newest if run.checkpointer else None
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
        "micro_size": plan.config["batch"]["micro_size"] if run.fit is None else run.fit.micro_size,
        "accumulation": config["accumulation"]["steps"] if run.fit is None else run.fit.accumulation,
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
    words = links.command(plan.command, plan.config, plan.written)
    words = [f"+{word}" if word.startswith("recipe=") else word for word in words]
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
