"""G10: what is not finite is met by the policy that was asked for, by all processes alike, and is never saved.

A case puts a NaN or an infinity somewhere (a loss, a gradient, a weight), on one process only, into a training by
configuration. What must come of it is told by a loop in plain torch, which leaves out the steps that the policy does.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from processes import run_ranks
from torch import Tensor, nn

from runner import distributed
from runner.data.order import Order
from runner.data.synthetic import random_classification
from runner.distributed import ALONE, Ranks
from runner.errors import TrainingStopped
from runner.folder import Bystander, RunFolder
from runner.train.hook import Hook
from runner.train.loop import train
from runner.train.run import Run

SAMPLES, SIZE, STEPS, SAVED, RATE = 50, 8, 10, 3, 0.1

#: (what, when): a micro-batch's loss; the gradient that flows back, or the one that is there; a weight, or a frozen
#: one that no loss shows, when a step begins or ends.
PLACES = (
    ("loss", "first"),
    ("loss", "last"),
    ("gradient", "backward"),
    ("gradient", "ready"),
    ("weight", "begin"),
    ("weight", "end"),
    ("frozen", "end"),
)
POLICIES = ("stop", "skip", "rollback", "ignore")
DEEPSPEED = tuple(f"deepspeed-z{stage}" for stage in range(4))
#: Cases that the long form gives to `run_all` at a time.
AT_ONCE = 60


class Case(NamedTuple):
    """`step` (from 1) is where the value is put, by process `rank` where there are two; `delayed`: as on a GPU."""

    what: str
    when: str
    value: str
    step: int
    policy: str
    backend: str
    rank: int = 0
    delayed: bool = False
    in_background: bool = False

    @property
    def world(self) -> int:
        return 1 if self.backend == "single" else 2

    def __str__(self) -> str:
        marks = "".join([" delayed" * self.delayed, " async" * self.in_background])
        return f"{self.value} {self.what} {self.when} @{self.step} {self.policy} {self.backend} on {self.rank}{marks}"


@cache
def _everything() -> tuple[Case, ...]:
    found = []
    for (what, when), policy, backend in product(PLACES, POLICIES, ["single", "ddp", "fsdp", *DEEPSPEED]):
        # DeepSpeed leaves such steps out itself, so `ignore` is refused; and what it steps is out of a hook's reach.
        refused = backend in DEEPSPEED[1:] and (policy == "ignore" or what in ("weight", "frozen"))
        for value, step in () if refused else product(("nan", "inf", "-inf"), (1, 2, 5, 6, 7, STEPS)):
            for rank in (0, 1) if backend != "single" else (0,):
                for delayed in (False, True) if backend in ("single", "ddp") else (False,):
                    for in_background in (False, True):
                        case = Case(what, when, value, step, policy, backend, rank, delayed, in_background)
                        found.append(case)
    return tuple(found)


def cases(count: int, seed: int, *, deepspeed: bool = True) -> list[Case]:
    """First those that cover each two of (place, value, step, policy, backend, ...) together soon; then any others.

    Raises ModuleNotFoundError where DeepSpeed is to take part and is not there: without it they would not be all.
    """
    if deepspeed and find_spec("deepspeed") is None:
        raise ModuleNotFoundError(
            "deepspeed is not installed, and its stages are among the backends of G10: install it"
        )
    draw = random.Random(seed)
    everything = [case for case in _everything() if deepspeed or case.backend not in DEEPSPEED]
    draw.shuffle(everything)
    chosen: list[Case] = []
    covered: set[Any] = set()
    while len(chosen) < count:
        some = everything[:400]
        best = max(some, key=lambda case: len(_pairs(case) - covered))
        if not _pairs(best) - covered:
            break
        chosen.append(best)
        everything.remove(best)
        covered |= _pairs(best)
        draw.shuffle(everything)
    return chosen + everything[: count - len(chosen)]


@cache
def _pairs(case: Case) -> frozenset[Any]:
    values = ((case.what, case.when), *case[2:])
    return frozenset(combinations(enumerate(values), 2))


def run(case: Case, folder: Path) -> str | None:
    """None where the promise held, else how it did not."""
    return run_all([case], folder)[0]


def run_all(chosen: Sequence[Case], folder: Path, timeout: float = 600.0) -> list[str | None]:
    """All cases; those of two processes in one start of them."""
    found: dict[Case, str] = {}
    together = [case for case in chosen if case.world == 2]
    if together:
        for part in run_ranks(_session, 2, together, folder, timeout=timeout):
            for case, problems in part.items():
                found[case] = "; ".join(filter(None, [found.get(case, ""), problems]))
    found |= _session([case for case in chosen if case.world == 1], folder)
    return [found.get(case, "it was never run") or None for case in chosen]


def _session(chosen: list[Case], folder: Path) -> dict[Case, str]:
    """What this process found in each case."""
    return {case: "; ".join(_violated(case, folder)) for case in chosen}


# --- a training with something in it ----------------------------------------------------------------------------------


class Net(nn.Module):
    """A layer, a frozen one, and a buffer that is infinite by design."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 3)
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.mask: Tensor
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        #: What the gradient is multiplied with on its way back.
        self.backward_by: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x).tanh()
        if self.backward_by is not None and hidden.requires_grad:
            by, self.backward_by = self.backward_by, None
            hidden.register_hook(lambda gradient: gradient * by)
        return self.outer(hidden)


def classification() -> Any:
    from runner.tasks.classification import Classification

    class Bad(Classification):
        """Adds a value to the loss of a micro-batch."""

        adds: float | None = None

        def loss(self, outputs: Any, batch: Any) -> Tensor:
            loss = super().loss(outputs, batch)
            if self.adds is not None and outputs.requires_grad:
                adds, self.adds = self.adds, None
                loss = loss + adds * outputs.sum()
            return loss

    return Bad()


class Poison(Hook):
    """Puts the value where the case says, once, on its process."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._done = distributed.rank() != (case.rank if case.world == 2 else 0)
        self.losses: dict[int, float] = {}

    def _now(self, run: Run, what: str, when: str, ahead: int) -> bool:
        case = self._case
        if self._done or (case.what, case.when) != (what, when) or run.progress.step + ahead != case.step:
            return False
        self._done = True
        return True

    def on_run_start(self, run: Run) -> None:
        if self._case.delayed:
            run.engine.backend.handle.device_decides = True

    def on_step_start(self, run: Run) -> None:
        value = float(self._case.value)
        for when in ("first", "last"):
            if self._now(run, "loss", when, 1):
                run.task.adds = value  # type: ignore[attr-defined]
        if self._now(run, "gradient", "backward", 1):
            _bare(run).backward_by = value
        if self._now(run, "weight", "begin", 1):
            self._write(run, "outer")

    def on_gradients_ready(self, run: Run) -> None:
        if self._now(run, "gradient", "ready", 1):
            backend: Any = run.engine.backend
            layout = getattr(backend.handle, "_layout", None)
            found = layout.gradients() if layout else [p.grad for p in backend.handle.parameters if p.grad is not None]
            with torch.no_grad():
                _first(found).fill_(float(self._case.value))

    def on_step_end(self, run: Run) -> None:
        assert run.loss is not None
        self.losses[run.progress.step] = run.loss.item()
        if self._now(run, "weight", "end", 0):
            self._write(run, "outer")
        if self._now(run, "frozen", "end", 0):
            self._write(run, "frozen")

    def _write(self, run: Run, layer: str) -> None:
        with torch.no_grad():
            _first(list(getattr(_bare(run), layer).parameters())).fill_(float(self._case.value))


def _first(tensors: list[Any]) -> Tensor:
    """One element of the first tensor of which this process has a part."""
    parts = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    return next(part for part in parts if part.numel()).view(-1)[:1]


def _bare(run: Run) -> Any:
    model = run.engine.model
    return getattr(model, "module", model)


def _configuration(case: Case) -> dict[str, Any]:
    from contract.training import OPTIONS
    from small import config, spec

    name, _, stage = case.backend.partition("-z")
    options = {**OPTIONS[name], **({"stage": int(stage)} if stage else {})}
    if name == "fsdp":
        options["replicas"] = 1
    return config(
        model=spec("guarantees.cases_g10.Net"),
        task=spec("guarantees.cases_g10.classification"),
        optimizer=spec("torch.optim.SGD", lr=RATE, fused=case.delayed),
        scheduler=None,
        train={"epochs": None, "steps": STEPS},
        batch={"global_size": SIZE, "micro_size": SIZE // (2 * case.world)},
        accumulation={"steps": 2},
        log__every=4 if case.delayed else 1,
        backend={"name": name, **options},
        checkpoint={**config()["checkpoint"], "every": {"steps": SAVED}, "async": case.in_background},
        nan=case.policy,
        hooks={
            "metrics_log": spec("runner.hooks.metrics_log.MetricsLog"),
            "poison": {"_target_": "guarantees.cases_g10.Poison", "case": case},
        },
    )


class Outcome(NamedTuple):
    """What is left of a training on this process."""

    run: Run
    stopped: str | None
    weights: Mapping[str, Tensor]
    losses: dict[int, float]
    path: Path


def _trained(case: Case, path: Path) -> Outcome:
    """The training of a case, as a job makes it."""
    from runner.assemble import assemble, check

    world = case.world
    rank = distributed.rank() if world == 2 else 0
    plain = _configuration(case)
    ranks = Ranks(rank, world, rank, world) if world == 2 else ALONE
    path.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    folder = RunFolder(path) if rank == 0 else Bystander(path)
    # A hook is made of plain values in a configuration; this one is handed what it is to do.
    hook = plain["hooks"].pop("poison")["case"]
    parts = check(plain, ranks)
    parts.hooks["poison"] = Poison(hook)
    made = assemble(plain, parts, folder, resume=None)
    made.trackers.start(path, 0, {})
    stopped = None
    try:
        train(made)
    except TrainingStopped as error:
        stopped = str(error)
    made.trackers.close()
    state = made.engine.state()["model"].state_dict()
    weights = {name: _full(value).detach().clone() for name, value in state.items()}
    return Outcome(made, stopped, weights, made.hooks["poison"].losses, path)


def _full(value: Any) -> Tensor:
    value = getattr(value, "full_tensor", lambda: value)()
    if isinstance(value, Tensor):
        return value
    # DeepSpeed's stages give whole tensors in pieces.
    pieces: Tensor = value.whole()
    return pieces


# --- what must come of it ---------------------------------------------------------------------------------------------


def by_hand(left_out: set[int], steps: int = STEPS) -> tuple[dict[str, Tensor], dict[int, float]]:
    """Weights and losses of the same training in plain torch, without some of its steps (from 1)."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    inputs, labels = random_classification(SAMPLES, 8, 3).tensors
    order, losses = Order(SAMPLES, SIZE), {}
    for step in range(1, steps + 1):
        rows = order.indices(step - 1)
        loss = nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
        if step in left_out:
            continue
        losses[step] = loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}, losses


def _bad_step(case: Case) -> int:
    """The step whose samples are to blame (from 1), as far as can be known.

    Of a weight: the update before it showed, unless a checkpoint after it shows that it was good. One that no loss
    shows is seen when a checkpoint is due.
    """
    if case.what == "frozen":
        return min(-(-case.step // SAVED) * SAVED, STEPS)
    before = (case.what, case.when) == ("weight", "begin") and (case.step - 1) % SAVED
    return case.step - 1 if before else case.step


def _ends(case: Case) -> bool:
    """Whether the training must end: `skip` has no step to leave out where a weight is bad."""
    return case.policy == "stop" or (case.policy == "skip" and case.what in ("weight", "frozen"))


def _violated(case: Case, folder: Path) -> list[str]:
    """How this process found the promise broken."""
    path = folder / f"{abs(hash(str(case))):x}" if case.world == 1 else folder / str(case).replace(" ", "_")
    try:
        found = _trained(case, path)
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    problems = list(_unlike(case, found))
    if case.world == 2:
        told = distributed.gather((found.stopped, found.run.progress.step, sorted(found.run.progress.passed_over)))
        if len(set(map(str, told))) > 1:
            problems.append(f"the processes differ: {told}")
    found.run.engine.backend.close()
    return problems


def _unlike(case: Case, found: Outcome) -> list[str]:
    problems = []
    bad, progress = _bad_step(case), found.run.progress
    if (found.stopped is not None) != _ends(case):
        problems.append(f"stopped with {found.stopped!r}")
    if found.stopped is None and progress.step != STEPS:
        problems.append(f"ended after {progress.step} steps")
    kept, there = _saved(found.path / "checkpoints")
    if kept:
        problems.append(f"not finite in a checkpoint: {kept}")
    if case.policy != "ignore":
        problems += _unlike_by_hand(case, found, bad)
        problems += _journal(case, found, bad)
    if found.stopped is not None and there and f"step_{there[-1]:08d}" not in found.stopped:
        problems.append(f"of checkpoints {there} the last is not named: {found.stopped}")
    if found.stopped is None and case.policy != "ignore" and (not there or there[-1] != STEPS):
        problems.append(f"checkpoints at the end: {there}")
    return problems


def _unlike_by_hand(case: Case, found: Outcome, bad: int) -> list[str]:
    problems = []
    if found.stopped is None:
        expected, losses = by_hand({bad})
    else:
        # A weight that is bad is there for all to see; the others are as they were.
        expected, losses = by_hand(set(), bad if case.what in ("weight", "frozen") else bad - 1)
        if case.what in ("weight", "frozen"):
            expected = {}
    for name, value in expected.items():
        if name not in found.weights:
            problems.append(f"{name} is not among what is left of the training")
        elif not torch.allclose(found.weights[name].float(), value, rtol=1e-4, atol=1e-5):
            problems.append(f"{name} is not what the other steps alone make of it")
    if found.stopped is None:
        for step, loss in losses.items():
            if not math.isclose(found.losses.get(step, math.nan), loss, rel_tol=1e-4, abs_tol=1e-5):
                problems.append(f"step {step} has loss {found.losses.get(step)} instead of {loss}")
                break
    return problems


def _journal(case: Case, found: Outcome, bad: int) -> list[str]:
    """What is wrong with the files of a run; the first process looks."""
    if distributed.rank() and case.world == 2:
        return []
    problems = []
    lines = [json.loads(line) for line in (found.path / "not_finite.jsonl").read_text().splitlines()]
    expected = (bad, case.policy, Order(SAMPLES, SIZE).indices(bad - 1).tolist())
    if [(line["step"], line["policy"], line["samples"]) for line in lines] != [expected]:
        problems.append(f"the journal says {lines}, and it was {expected}")
    records = [json.loads(line) for line in (found.path / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if record["split"] == "train"]
    every = 4 if case.delayed else 1
    last = found.run.progress.step
    due = [step for step in range(1, last + 1) if step % every == 0 or step == STEPS]
    if steps != due:
        problems.append(f"records of steps {steps}")
    return problems


def _saved(folder: Path) -> tuple[list[str], list[int]]:
    """(what is not finite in the checkpoints, their steps); a mask may be."""
    from safetensors.torch import load_file

    bad, steps = [], []
    for path in sorted(folder.glob("step_*")):
        steps.append(int(path.name.rpartition("_")[2]))
        for file in path.glob("*.safetensors"):
            for name, value in load_file(file).items():
                if value.is_floating_point() and not value.isfinite().all() and "mask" not in name:
                    bad.append(f"{path.name}/{name}")
    return bad, steps
