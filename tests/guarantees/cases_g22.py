"""Portable checkpoints: what any backend saves, on any number of processes, any other loads, bit for bit.

A cell is a backend, a number of processes and a precision. A case is a pair of cells: one trains and saves, the other
loads, and must then hold the very tensors of the first, put together; then it trains a step. What the first held is
told by torch's and DeepSpeed's own words for whole tensors, not by what was saved.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import combinations, groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from processes import run_ranks
from torch import Tensor, nn

from runner import distributed
from runner.checkpoint import Checkpointer, RandomState
from runner.engine.backend import Backend
from runner.engine.ddp import DDP
from runner.engine.deepspeed import DeepSpeed
from runner.engine.engine import Engine
from runner.engine.fsdp import FSDP
from runner.engine.mesh import Mesh
from runner.engine.precision import PRECISIONS, LossScaling, Precision
from runner.engine.single import Single
from runner.errors import InputError
from runner.hooks.ema import EMA
from runner.train.schedules import Schedule, cosine

#: Cases that the long form gives to `run_all` at a time.
AT_ONCE = 225

CPU = torch.device("cpu")
WORLDS, STEPS, SIZE, WORDS, WIDTH = (1, 2, 4), 2, 8, 11, 6
MOST = max(WORLDS)


class Cell(NamedTuple):
    backend: str
    world: int
    precision: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.world}-{self.precision}"


class Case(NamedTuple):
    save: Cell
    load: Cell

    def __str__(self) -> str:
        return f"{self.save} into {self.load}"


@cache
def cells() -> tuple[Cell, ...]:
    """All that are valid."""
    backends = ["single", "ddp", "fsdp", "hybrid", *(f"z{stage}" for stage in range(4))]
    return tuple(Cell(*cell) for cell in product(backends, WORLDS, ("fp32", "bf16", "fp16")) if _valid(*cell))


def _valid(backend: str, world: int, precision: str) -> bool:
    if backend in ("single", "hybrid"):
        return world == (1 if backend == "single" else 4)
    # DeepSpeed has no fp16 on a CPU, and without a stage no float32 copies of bf16 weights.
    return precision != "fp16" and (backend, precision) != ("z0", "bf16") if backend.startswith("z") else True


def usable(*, deepspeed: bool = True) -> list[Cell]:
    """The cells, with those of DeepSpeed or without. Raises ModuleNotFoundError where it is wanted and not there."""
    if deepspeed and find_spec("deepspeed") is None:
        raise ModuleNotFoundError("deepspeed is not installed, and most pairs of G22 are with its stages: install it")
    return [cell for cell in cells() if deepspeed or not cell.backend.startswith("z")]


def cases(count: int, seed: int, *, deepspeed: bool = True) -> list[Case]:
    """Pairs that cover each two of (backend, processes, precision of either cell) together soon; then all others.

    Of pairs that cover as much, the one that keeps the fewest processes busy.
    """
    found = usable(deepspeed=deepspeed)
    everything = [Case(save, load) for save in found for load in found]
    random.Random(seed).shuffle(everything)
    chosen: list[Case] = []
    uncovered = {two for case in everything for two in _pairs(case)}
    rest = everything
    there: set[Any] = set()
    while uncovered and len(chosen) < count:
        best = max(rest, key=lambda case: (len(uncovered & _pairs(case)), -_cost(case, there)))
        chosen.append(best)
        there |= set(enumerate(best))
        rest.remove(best)
        uncovered -= _pairs(best)
    return chosen + rest[: max(count - len(chosen), 0)]


def _cost(case: Case, there: set[Any]) -> int:
    """Processes times what each has to do: a cell is built once, and trained once where it saves."""
    fresh = [two not in there for two in enumerate(case)]
    return case.load.world * (1 + fresh[1]) + case.save.world * 2 * fresh[0]


@cache
def _pairs(case: Case) -> frozenset[Any]:
    return frozenset(combinations(enumerate([*case.save, *case.load]), 2))


def run(case: Case, folder: Path) -> str | None:
    """None where the promise held, else how it did not."""
    return run_all([case], folder)[0]


def run_all(chosen: Sequence[Case], folder: Path, timeout: float = 600.0) -> list[str | None]:
    """All cases in one start of processes, which form groups of 1, of 2 and of 4 in turn."""
    found: dict[Case, str] = {}
    for part in run_ranks(_session, MOST, list(chosen), folder, timeout=timeout):
        found |= part
    return [found.get(case, "it was never run") or None for case in chosen]


# --- the processes ----------------------------------------------------------------------------------------------------


def _session(chosen: list[Case], folder: Path) -> dict[Case, str]:
    """What this process found, as the first of its groups."""
    rank = distributed.rank()
    distributed.leave()
    found: dict[Case, str] = {}
    saved = sorted({case.save for case in chosen})
    for world in WORLDS:
        with _Group(rank, world, folder, "save") as (number, of):
            for cell in [cell for cell in saved if cell.world == world][number::of]:
                _save(cell, folder)
            if world == MOST:  # all have saved by now
                found |= _loads(chosen, world, 0, 1, folder)
    for world in (2, 1):
        with _Group(rank, world, folder, "load") as (number, of):
            found |= _loads(chosen, world, number, of, folder)
    return found


class _Group:
    """A process group of `world` neighbours among the processes; gives (its number, how many such there are)."""

    def __init__(self, rank: int, world: int, folder: Path, word: str) -> None:
        self._rank, self._world = rank, world
        self._file = folder / f".group_{word}_{world}_{rank // world}"

    def __enter__(self) -> tuple[int, int]:
        store = dist.FileStore(str(self._file), self._world)
        dist.init_process_group("gloo", store=store, rank=self._rank % self._world, world_size=self._world)
        _count_anew()
        return self._rank // self._world, MOST // self._world

    def __exit__(self, kind: Any, *_: Any) -> None:
        distributed.leave(together=kind is None)


def _count_anew() -> None:
    """DeepSpeed numbers modules as they come and compares numbers; these processes have seen different ones."""
    if "deepspeed.runtime.zero.parameter_offload" in sys.modules:
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.runtime.zero.partition_parameters import Init

        DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
        Init.param_id = 0


def _loads(chosen: Sequence[Case], world: int, number: int, of: int, folder: Path) -> dict[Case, str]:
    """Loads, cell by cell, all that it is to load; what was wrong by case, as the group's first process tells it."""
    mine = sorted((case for case in chosen if case.load.world == world), key=lambda case: case.load)
    found: dict[Case, str] = {}
    for cell, group in [(cell, list(group)) for cell, group in groupby(mine, lambda case: case.load)][number::of]:
        trained = _Trained(cell, seed=20 + number)
        for case in group:
            found[case] = "; ".join(_load(trained, case.save, folder))
        trained.end()
    return found if distributed.rank() == 0 else {}


def _save(cell: Cell, folder: Path) -> None:
    trained = _Trained(cell, seed=cells().index(cell))
    for step in range(STEPS):
        trained.train(step)
    checkpointer = Checkpointer(folder / str(cell), trained.state())
    # Every other cell saves in the background, where it is written while a step changes everything.
    checkpointer.save(STEPS, {"cell": str(cell)}, wait=cells().index(cell) % 2 == 0)
    held = {"tensors": trained.whole(), "rates": trained.rates(), "scale": trained.scale()}
    held["loss"] = trained.train(STEPS)
    checkpointer.finish()
    if distributed.rank() == 0:
        torch.save(held, folder / f"{cell}.pt")
    distributed.barrier()
    trained.end()


def _load(trained: _Trained, source: Cell, folder: Path) -> Iterator[str]:
    """What is not as it was saved."""
    saved = torch.load(folder / f"{source}.pt", weights_only=True)
    try:
        checkpointer = Checkpointer(folder / ".elsewhere" / str(distributed.rank()), trained.state(), optional=["ema"])
        extra = checkpointer.load(folder / str(source) / f"step_{STEPS:08d}", convert=True)
    except InputError as error:
        yield f"refused: {error}"
        return
    if extra != {"cell": str(source)}:
        yield f"extra is {extra}"
    now = trained.whole()
    for name, value in saved["tensors"].items():
        if name.startswith("ema/") and name not in now:
            continue  # what a backend refuses
        yield from _differs(name, value, now.get(name))
    if (rates := trained.rates()) != saved["rates"]:
        yield f"learning rates {rates} instead of {saved['rates']}"
    if saved["scale"] and trained.scale() and trained.scale() != saved["scale"]:
        yield f"loss scale {trained.scale()} instead of {saved['scale']}"
    loss = trained.train(STEPS)
    near = 1e-5 if source.precision == trained.cell.precision == "fp32" else 3e-2
    if not abs(loss - saved["loss"]) <= near * abs(saved["loss"]):
        yield f"the next loss is {loss} instead of {saved['loss']}"
    unchanged = [
        name for name, value in now.items() if name == "model/up.weight" and _same(value, trained.whole()[name])
    ]
    if unchanged:
        yield "a step more changes nothing"


def _differs(name: str, saved: Tensor, now: Tensor | None) -> Iterator[str]:
    if now is None:
        yield f"{name} is not there"
    elif now.shape != saved.shape:
        yield f"{name} has shape {list(now.shape)} instead of {list(saved.shape)}"
    elif not _same(saved.to(now.dtype), now):
        yield f"{name} differs in {int((saved.to(now.dtype) != now).sum())} of {now.numel()} elements"


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, signs of zeros included."""
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


# --- a training in a cell ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Tied, frozen and unused weights, rows that do not divide or are too few, and buffers that move."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 7)
        self.down = nn.Linear(7, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.one = nn.Parameter(torch.randn(1, WIDTH))
        self.scale = nn.Parameter(torch.randn(1) + 2)
        self.unused = nn.Parameter(torch.randn(3, 2))
        self.out = nn.Linear(WIDTH, WORDS, bias=False)
        self.out.weight = self.embed.weight
        self.mean: Tensor
        self.calls: Tensor
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.one
        h = h - self.mean.to(h.dtype)
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(h.mean(0).to(self.mean.dtype), 0.1)
                self.calls += 1
        h = h + self.down(self.up(self.norm(h)).relu())
        return self.out(self.frozen(h) * self.scale)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    own = [p for p in model.parameters() if p.requires_grad]
    free = {"params": [p for p in own if p.ndim < 2], "weight_decay": 0.0, "lr": 3e-3}
    return torch.optim.AdamW([{"params": [p for p in own if p.ndim > 1]}, free], lr=1e-2, weight_decay=0.1)


class _Trained:
    """An engine in a cell, with what a run saves beside it."""

    def __init__(self, cell: Cell, seed: int) -> None:
        self.cell = cell
        torch.manual_seed(seed)
        self.engine = Engine(_backend(cell))
        self.engine.prepare(Net, _optimizer)
        self._schedule = Schedule(cosine(self.engine.optimizer, 10, warmup=0.2))
        self._ema: EMA | None = EMA(0.5)
        try:
            self._ema.placed(self.engine)
        except InputError:  # where a backend keeps what is trained out of reach
            self._ema = None

    def state(self) -> dict[str, Any]:
        ema = {} if self._ema is None else {"ema": self._ema}
        return {**self.engine.state(), "schedule": self._schedule, **ema, "random": RandomState()}

    def train(self, step: int) -> float:
        """The loss of one step on the step's samples."""
        made = self.engine
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randint(WORDS, (2, SIZE), generator=generator)
        mine = slice(
            made.mesh.data_rank * SIZE // made.mesh.data_size, (made.mesh.data_rank + 1) * SIZE // made.mesh.data_size
        )
        with made.accumulate(last=True):
            loss = nn.functional.cross_entropy(made.forward(x[mine]), y[mine], reduction="sum")
            share = made.backward(loss, made.factor(SIZE))
        known = made.exchange(share)
        update = made.step(0.5, skip=known.skip)
        assert not update.skipped
        self._schedule.step()
        if self._ema is not None:
            self._ema.on_step_end(None)  # type: ignore[arg-type]
        return float(known.loss)

    def whole(self) -> dict[str, Tensor]:
        """Copies of all whole tensors, by other words than those that save."""
        backend = self.engine.backend
        told = _of_zero(backend) if isinstance(backend, DeepSpeed) else _of_torch(backend)
        averages = {} if self._ema is None else self._ema.state_dict()["averages"]
        found = [*told, *((f"ema/{name}", value) for name, value in averages.items())]
        return {name: _full(value).detach().clone() for name, value in found}

    def rates(self) -> dict[str, float]:
        """By parameter's size, for backends may have more groups."""
        groups = self.engine.optimizer.param_groups
        found: dict[str, set[float]] = {}
        for group in groups:
            found.setdefault("decayed" if group["weight_decay"] else "free", set()).add(float(group["lr"]))
        return {name: rate for name, rates in sorted(found.items()) for rate in rates}

    def scale(self) -> float:
        return float(self.engine.state()["scaler"].state_dict()["scale"])

    def end(self) -> None:
        self.engine.backend.close()


def _backend(cell: Cell) -> Backend:
    mesh = Mesh(distributed.rank(), distributed.world_size(), 2 if cell.backend == "hybrid" else 1)
    precision: Precision = PRECISIONS[cell.precision]
    if precision.loss_scaling is not None:
        precision = replace(precision, loss_scaling=LossScaling(init_scale=256.0))
    if cell.backend.startswith("z"):
        backend: Backend = DeepSpeed(CPU, precision, mesh, stage=int(cell.backend[1:]))
    else:
        kind = {"single": Single, "ddp": DDP, "fsdp": FSDP, "hybrid": FSDP}[cell.backend]
        # Whatever a step leaves without a gradient is no error here.
        options = {"find_unused_parameters": True} if kind is DDP else {}
        backend = kind(CPU, precision, mesh, **options)
    problems = backend.check()
    assert not problems, problems
    return backend


def _of_torch(backend: Backend) -> Iterator[tuple[str, Tensor]]:
    model = getattr(backend.model, "module", backend.model)
    names = {p: name for name, p in model.named_parameters()}
    yield from ((f"model/{name}", value) for name, value in _values(model, names))
    for p, entry in backend.optimizer.state.items():
        yield from ((f"{key}/{names[p]}", value) for key, value in entry.items())


def _of_zero(backend: Any) -> Iterator[tuple[str, Tensor]]:
    """By DeepSpeed's own words, which do not reach what stage 0 keeps, nor `step`."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine, layout = backend.model, backend.handle._layout
    names = {p: name for name, p in engine.module.named_parameters()}
    if not layout.divided:
        backend.model = engine.module
        try:
            yield from list(_of_torch(backend))
        finally:
            backend.model = engine
        return
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):  # anew: the state may be another one by now
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, value in _values(engine.module, names):
        if isinstance(value, nn.Parameter) and value.requires_grad:
            value = safe_get_full_fp32_param(value)
        elif hasattr(value, "ds_tensor"):
            with GatheredParameters([value]):
                value = value.detach().clone()
        yield f"model/{name}", value
    for p, name in names.items():
        entry = engine.basic_optimizer.state.get(layout.piece(p).flat) if p.requires_grad else None
        if entry:
            yield f"step/{name}", entry["step"]
            for key in ("exp_avg", "exp_avg_sq"):
                yield f"{key}/{name}", safe_get_full_optimizer_state(p, key)


def _values(model: nn.Module, names: Mapping[nn.Parameter, str]) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, p) for p, name in names.items())
    yield from model.named_buffers()


def _full(tensor: Tensor) -> Tensor:
    whole: Any = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()
