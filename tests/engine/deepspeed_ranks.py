"""What the processes of the DeepSpeed tests do."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from memory import Bytes, held_bytes
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from runner import distributed, shares
from runner.engine.checkpointing import checkpoint_activations
from runner.engine.compiling import compile_model
from runner.engine.deepspeed import DeepSpeed
from runner.engine.engine import Engine
from runner.engine.mesh import Mesh
from runner.engine.model_state import placed_as
from runner.engine.precision import PRECISIONS
from runner.engine.single import Single

CPU = torch.device("cpu")
FEATURES, CLASSES = 6, 3


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 17), nn.Tanh(), nn.Linear(17, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    free = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)


def samples(number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(number, FEATURES, generator=generator),
        torch.randint(CLASSES, (number,), generator=generator),
    )


def loss_sum(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="sum")


#: So that stage 3 divides small parameters too, and steps them in several rounds.
SMALL = {"stage3_param_persistence_threshold": 20, "sub_group_size": 30}


def engine(
    stage: int,
    precision: str = "fp32",
    seed: int = 3,
    model: Callable[[], nn.Module] = mlp,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    zero: dict[str, Any] | None = None,
    **options: Any,
) -> Engine:
    mesh = Mesh(distributed.rank(), distributed.world_size())
    zero = (SMALL if stage == 3 else {}) if zero is None else zero
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "ds.json")
        file.write_text(json.dumps({"zero_optimization": zero}))
        made = Engine(DeepSpeed(CPU, PRECISIONS[precision], mesh, stage=stage, config_file=str(file), **options))
        torch.manual_seed(seed)
        made.prepare(model, optimizer)
    return made


def train(
    made: Engine, steps: int, micro: int, size: int = 24, max_norm: float | None = 0.3, first: int = 0
) -> list[tuple[float, float]]:
    """(loss, norm) of each step; the samples of a step are dealt out in micro-batches to all processes."""
    rank, world = made.mesh.data_rank, made.mesh.data_size
    found = []
    for step in range(first, first + steps):
        for group in made.optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 40)
        inputs, targets = samples(size, step)
        mine = [(inputs[i : i + micro], targets[i : i + micro]) for i in range(rank * micro, size, world * micro)]
        factor, total = made.factor(size), torch.zeros(())
        for number, (x, y) in enumerate(mine):
            with made.accumulate(last=number == len(mine) - 1):
                total += made.backward(loss_sum(made.forward(x), y), factor)
        known = made.exchange(total)
        update = made.step(max_norm, skip=known.skip, measure=True)
        assert not update.skipped
        found.append((known.loss.item(), float(update.grad_norm)))
    return found


def by_hand(steps: int, size: int = 24, max_norm: float | None = 0.3) -> list[tuple[float, float]]:
    """The same in one process, without anything of the runner's."""
    torch.manual_seed(3)
    model = mlp()
    optimizer = adamw(model)
    found = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 40)
        inputs, targets = samples(size, step)
        loss = loss_sum(model(inputs), targets) / size
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    return found


def parity(stages: list[int], steps: int) -> dict[tuple[int, int], list[tuple[float, float]]]:
    found = {}
    for stage in stages:
        for accumulation in (1, 2, 4):
            micro = 24 // distributed.world_size() // accumulation
            found[stage, accumulation] = train(engine(stage), steps, micro)
    return found


def uneven(stage: int) -> list[tuple[float, float]]:
    """Losses weighted by tokens: micro-batches of uneven weights, and a process that runs out of samples."""
    made = engine(stage)
    rank = made.mesh.data_rank
    found = []
    for step in range(6):
        inputs, targets = samples(12, step)
        # (first sample, last sample, weight 0 for a padding batch)
        plan = [[(0, 1, 1), (1, 6, 1), (6, 8, 1)], [(8, 10, 1), (10, 12, 1), (0, 3, 0)]][rank]
        total = torch.zeros(())
        for number, (low, high, real) in enumerate(plan):
            factor = made.factor(12) if real else torch.zeros(())
            with made.accumulate(last=number == 2):
                total += made.backward(loss_sum(made.forward(inputs[low:high]), targets[low:high]), factor)
        known = made.exchange(total)
        update = made.step(0.3, skip=known.skip)
        found.append((known.loss.item(), float(update.grad_norm)))
    return found


def uneven_by_hand() -> list[tuple[float, float]]:
    torch.manual_seed(3)
    model = mlp()
    optimizer = adamw(model)
    found = []
    for step in range(6):
        inputs, targets = samples(12, step)
        loss = loss_sum(model(inputs), targets) / 12
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    return found


def weights(made: Engine) -> dict[str, Tensor]:
    return copied(made.state()["model"].state_dict())


def moments(made: Engine) -> dict[str, dict[str, Tensor]]:
    return copied(made.state()["optimizer"].state_dict()["state"])


def flattened(nested: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(nested, dict):
        return {k: v for key, value in nested.items() for k, v in flattened(value, f"{prefix}/{key}").items()}
    return {prefix: nested}


def equal(one: Any, other: Any) -> bool:
    a, b = flattened(one), flattened(other)
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k] for k, v in a.items()
    )


def skipped_with_nan(stage: int, precision: str = "fp32", **options: Any) -> dict[str, Any]:
    """NaN in one process's data; a finite step before, and two after."""
    made = engine(stage, precision, **options)
    train(made, 1, 6)
    before, state = weights(made), moments(made)
    inputs, targets = samples(12, 9)
    for accumulation in (1, 2):
        for number in range(accumulation):
            x = inputs.clone()
            if made.mesh.data_rank == 1 and number == 0:
                x[0, 0] = float("nan")
            with made.accumulate(last=number == accumulation - 1):
                loss = made.backward(loss_sum(made.forward(x), targets), made.factor(24))
        known = made.exchange(torch.zeros(()))  # the gradient alone must tell
        update = made.step(1.0, skip=known.skip)
        assert loss.ndim == 0
        assert known.skip is True
        assert update.skipped is True
    unchanged = equal(before, weights(made)) and equal(state, moments(made))
    return {"unchanged": unchanged, "after": train(made, 2, 6, first=1)}


def without_skip(stage: int, precision: str = "fp32", **options: Any) -> list[tuple[float, float]]:
    made = engine(stage, precision, **options)
    return train(made, 3, 6)[1:]


def skipping(stage: int, precision: str = "fp32", **options: Any) -> dict[str, Any]:
    return {**skipped_with_nan(stage, precision, **options), "expected": without_skip(stage, precision, **options)}


def rates(stage: int) -> bool:
    """A rate of 0 set on the handle's groups leaves the weights alone; one group's rate moves that group only."""
    made = engine(stage)
    train(made, 2, 6)
    before = weights(made)
    inputs, targets = samples(12, 5)
    for rate in (0.0, 0.1):
        made.optimizer.param_groups[0]["lr"] = rate
        made.optimizer.param_groups[1]["lr"] = 0.0
        with made.accumulate(last=True):
            made.backward(loss_sum(made.forward(inputs), targets), made.factor(24))
        made.step()
        after = weights(made)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == ({name for name in before if name.endswith("weight")} if rate else set()), (rate, moved)
    return True


def words(stage: int) -> dict[str, Any]:
    """The words of a handle one by one, beside torch's own on the whole gradient."""
    made = engine(stage)
    inputs, targets = samples(24, 1)
    mine = slice(12 * made.mesh.data_rank, 12 * made.mesh.data_rank + 12)
    bare = mlp()
    bare.load_state_dict(weights(made))
    (loss_sum(bare(inputs), targets) / 24).backward()
    expected = torch.nn.utils.clip_grad_norm_(bare.parameters(), float("inf"))
    with made.accumulate(last=True):
        made.backward(loss_sum(made.forward(inputs[mine]), targets[mine]), made.factor(24))
    handle = made.backend.handle
    norms = [handle.norm(), handle.clip(1e9), handle.norm(), handle.clip(0.01), handle.norm()]
    handle.zero()
    weights_before = weights(made)
    # A step without gradients after zero() is not asked for by any loop; another backward must start from nothing.
    with made.accumulate(last=True):
        made.backward(loss_sum(made.forward(inputs[mine]), targets[mine]), made.factor(24))
    again = handle.norm()
    handle.clip_values(1e-3)
    torch.nn.utils.clip_grad_value_(bare.parameters(), 1e-3)
    valued = torch.nn.utils.clip_grad_norm_(bare.parameters(), float("inf"))
    found = {"norms": [float(n) for n in norms], "again": float(again), "valued": float(handle.norm())}
    made.step()
    assert not equal(weights_before, weights(made))
    return {**found, "expected": float(expected), "expected_valued": float(valued)}


def communication(stage: int) -> list[list[str]]:
    """The collectives of each of four micro-batches of a step, and of the step itself."""
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    made = engine(stage)
    train(made, 2, 3)
    inputs, targets = samples(3, 5)
    found = []
    for number in range(4):
        with profile(activities=[ProfilerActivity.CPU]) as watched, made.accumulate(last=number == 3):
            made.backward(loss_sum(made.forward(inputs), targets), made.factor(24))
        found.append(sorted(e.name for e in watched.events() if e.name.startswith("gloo:") or "c10d::" in e.name))
    made.step()
    dist.barrier()
    return found


def small_runs(stages: list[int]) -> dict[str, Any]:
    return {
        "uneven": {stage: uneven(stage) for stage in stages},
        "nan": {stage: skipping(stage) for stage in stages},
        "rates": {stage: rates(stage) for stage in stages},
        "words": {stage: words(stage) for stage in stages},
        "communication": {stage: communication(stage) for stage in stages},
    }


# --- state ------------------------------------------------------------------------------------------------------------


def copied(nested: Any) -> Any:
    """A state as a checkpoint keeps it: put together, in memory of its own. All processes call it."""
    if isinstance(nested, dict):
        return {key: copied(value) for key, value in nested.items()}
    if isinstance(nested, list):
        return [copied(value) for value in nested]
    return shares.whole(nested).detach().cpu().clone() if isinstance(nested, Tensor) else nested


def outlined(nested: Any) -> Any:
    if isinstance(nested, dict):
        return {key: outlined(value) for key, value in nested.items()}
    if isinstance(nested, list):
        return [outlined(value) for value in nested]
    return torch.empty_like(nested, device="meta") if isinstance(nested, Tensor) else nested


def fill(target: Any, source: Any) -> None:
    """Copies the tensors of a saved state into those that `template` gave, as a checkpoint is read."""
    if isinstance(target, dict):
        assert target.keys() == source.keys()
        for key, value in target.items():
            fill(value, source[key])
    elif isinstance(target, Tensor):
        assert (target.shape, target.dtype) == (source.shape, source.dtype)
        with torch.no_grad():
            target.copy_(placed_as(target, source))


def saved(made: Engine, state: Any = None) -> dict[str, Any]:
    state = state or made.state()
    assert sorted(state) == ["model", "optimizer", "scaler"]
    return {name: copied(dict(item.state_dict())) for name, item in state.items()}


def load(made: Engine, state: dict[str, Any]) -> None:
    for name in ("model", "optimizer"):
        item = made.state()[name]
        target = item.template(outlined(state[name]))
        fill(target, state[name])
        item.load_state_dict(target)
    made.state()["scaler"].load_state_dict(state["scaler"])


def single(steps: int, state: dict[str, Any] | None = None, first: int = 0) -> tuple[list[tuple[float, float]], Any]:
    """Trains in one process on the single backend."""
    made = Engine(Single(CPU, PRECISIONS["fp32"], Mesh()))
    torch.manual_seed(3)
    made.prepare(mlp, adamw)
    own = made.state()
    if state is not None:
        load(made, state)
    return train(made, steps, 24, first=first), saved(made, own)


def exchanged(from_single: dict[str, Any]) -> dict[str, Any]:
    """Each stage goes on from a state of the single backend and of each stage; and the states they save."""
    found: dict[str, Any] = {"states": {}, "curves": {}, "equal": {}}
    for stage in range(4):
        made = engine(stage)
        train(made, 3, 6)
        found["states"][stage] = saved(made)
        found["curves"][stage, stage] = train(made, 3, 6, first=3)
    for stage in range(4):
        for source, state in {"single": from_single, **found["states"]}.items():
            made = engine(stage, seed=11)
            train(made, 1, 6)
            load(made, state)
            again = saved(made)
            found["equal"][source, stage] = equal(again["model"], state["model"]) and equal(
                again["optimizer"]["state"], state["optimizer"]["state"]
            )
            found["curves"][source, stage, "loaded"] = train(made, 3, 6, first=3)
    return found


def wide() -> nn.Sequential:
    """24 parameters: weights of 16 KiB, and some that are smaller than there are processes."""
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(11)), nn.Linear(64, 3, bias=False), nn.Linear(3, 1))


def memory(stage: int) -> dict[str, Any]:
    """Bytes of the model, of its largest parameter, held in states, and at most while they are made and loaded."""
    # Else the library keeps such small ones whole on every process, for its own computing.
    zero = {"stage3_param_persistence_threshold": 100} if stage == 3 else {}
    made = engine(stage, model=lambda: nn.Sequential(nn.Linear(FEATURES, 64), *wide()), zero=zero)
    inputs, _ = samples(4)
    with made.accumulate(last=True):
        made.backward(made.forward(inputs).square().sum(), made.factor(16))
    made.step()
    model, optimizer = made.state()["model"], made.state()["optimizer"]
    layout = made.backend.handle._layout
    sizes = [4 * layout.shape(p).numel() for p in made.backend.handle.parameters]
    found: dict[str, Any] = {"model": sum(sizes), "largest": max(sizes), "processes": distributed.world_size()}
    for name, item in (("model", model), ("optimizer", optimizer)):
        with Bytes() as saving:
            state = item.state_dict()
        again = item.state_dict()
        mine = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
        others = {shares.own(leaf).untyped_storage()._cdata for leaf in tree_leaves(again) if isinstance(leaf, Tensor)}
        found[f"{name} held"] = held_bytes(state)
        found[f"{name} saving"] = saving.most
        # What a background thread writes is not what the next call, or a step, changes.
        found[f"{name} shared"] = sum(shares.own(leaf).untyped_storage()._cdata in others for leaf in mine)
        outline = outlined(state)
        most = []
        for _ in range(3):
            with Bytes() as loading:
                target = item.template(outline)
            found[f"{name} target"] = held_bytes(target)
            for leaf, value in zip(tree_leaves(target), tree_leaves(state), strict=True):
                if isinstance(leaf, Tensor):
                    shares.own(leaf).copy_(shares.own(value))
            with loading:
                item.load_state_dict(target)
            most.append(loading.most)
        # On a busy computer a thread of gloo's may hold what it has sent for a moment more.
        found[f"{name} loading"] = min(most)
        found[f"{name} same"] = equal(copied(item.state_dict()), copied(state))
    return found


def exact(stage: int) -> dict[str, Any]:
    """Bits that sums do not keep, in weights and moments; and a state without moments loaded over some."""
    made = engine(stage)
    train(made, 1, 3)
    state = saved(made)
    for value in (state["model"]["0.weight"], state["optimizer"]["state"]["2.bias"]["exp_avg"]):
        value.view(-1)[:4] = torch.tensor([-0.0, float("nan"), float("-inf"), 1e-45])
    state["optimizer"]["state"]["0.bias"]["exp_avg"].fill_(-0.0)
    load(made, state)
    again = saved(made)
    pairs = [
        (flattened(state)[key], flattened(again)[key])
        for key, value in flattened(state).items()
        if isinstance(value, Tensor) and value.dtype == torch.float32
    ]
    bits = all(torch.equal(a.view(-1).view(torch.int32), b.view(-1).view(torch.int32)) for a, b in pairs)
    state["optimizer"]["state"].pop("4.weight")
    load(made, state)
    left = moments(made).get("4.weight", {})  # there, and zero, where it shares a flat tensor with others
    stale = max((value.abs().max().item() for key, value in left.items() if key != "step"), default=0.0)
    load(made, {**state, "optimizer": {**state["optimizer"], "state": {}}})
    return {
        "bits": bits,
        "pairs": len(pairs),
        "stale": stale,
        "left": [key for key, held in moments(made).items() if held],
    }


def small_memory() -> dict[str, Any]:
    return {
        "memory": {stage: memory(stage) for stage in (1, 2, 3)},
        "exact": {stage: exact(stage) for stage in (1, 2, 3)},
    }


# --- models of other kinds, precision, offloading ---------------------------------------------------------------------


class Tied(nn.Module):
    """Tied weights, a frozen layer, an unused one, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(8, affine=False)
        self.out = nn.Linear(8, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.frozen(self.embed(x))))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def tied(stage: int) -> dict[str, Any]:
    made = engine(stage, model=Tied, optimizer=sgd)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(7, (16,), generator=generator), torch.randint(7, (16,), generator=generator)
    norms = []
    for _ in range(3):
        for last in (False, True):
            with made.accumulate(last):
                made.backward(loss_sum(made.forward(x), y), made.factor(64))
        norms.append(float(made.step(0.5, measure=True).grad_norm))
    state = saved(made)
    other = engine(stage, seed=9, model=Tied, optimizer=sgd)
    load(other, state)
    made.model.eval()
    other.model.eval()
    with torch.no_grad():
        same = torch.equal(made.forward(x), other.forward(x))
    return {"norms": norms, "state": state, "same": same}


def tied_by_hand() -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(3)
    model = Tied()
    optimizer = sgd(model)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(7, (16,), generator=generator), torch.randint(7, (16,), generator=generator)
    norms = []
    for _ in range(3):
        for _ in range(2):
            (loss_sum(model(x), y) / 32).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, {name: value for name, value in model.state_dict().items() if name != "out.weight"}


def broken_window(stage: int) -> list[tuple[float, float]]:
    """An error in the second micro-batch of a step, and one that simply stops: nothing of them is left."""
    made = engine(stage)
    inputs, targets = samples(6, 4)
    for fails in (True, False):
        with made.accumulate(last=False):
            made.backward(loss_sum(made.forward(inputs), targets), made.factor(24))
        if fails:
            try:
                with made.accumulate(last=False):
                    raise MemoryError
            except MemoryError:
                pass
        made.backend.handle.zero()
    return train(made, 3, 6)


def half(stage: int) -> dict[str, Any]:
    """bf16: finite, close to fp32, float32 weights in the state, the same for any accumulation."""
    made = engine(stage, "bf16")
    assert next(made.model.parameters()).dtype == torch.bfloat16
    curve = train(made, 8, 6)
    outputs = made.forward(samples(3)[0])
    assert outputs.dtype == torch.float32
    state = saved(made)
    again = engine(stage, "bf16", seed=8)
    load(again, state)
    return {
        "curve": curve,
        "state": state,
        "loaded": train(again, 2, 6, first=8) == train(made, 2, 6, first=8),
        "nan": skipping(stage, "bf16"),
    }


def compiled(how: str) -> dict[str, list[Tensor]]:
    """Outputs of evaluations after steps: of compiled blocks with checkpointing, and of the model as it is."""
    from engine.blocks import Transformer, batches

    def build(changed: bool) -> nn.Module:
        model = Transformer()
        if changed:
            checkpoint_activations(model, how)
            compile_model(model, {"scope": "block", "backend": "aot_eager"})
        return model

    found: dict[str, list[Tensor]] = {}
    for name in ("as it is", "changed"):
        recipe = {"activation_checkpointing": how}
        made = engine(3, model=partial(build, name == "changed"), optimizer=sgd, recipe=recipe)
        found[name] = []
        for inputs in batches(2):
            made.model.train()
            with made.accumulate(True):
                made.backward(made.forward(inputs).square().sum(), made.factor(40))
            made.step()
            made.model.eval()
            with torch.no_grad():
                found[name].append(made.forward(inputs))
    return found


def various() -> dict[str, Any]:
    return {
        "tied": {stage: tied(stage) for stage in range(4)},
        "broken": {stage: broken_window(stage) for stage in range(4)},
        "half": {stage: half(stage) for stage in (1, 2, 3)},
    }


def offloaded() -> dict[tuple[int, bool, int], list[tuple[float, float]]]:
    """Offloading on a CPU, which `check` refuses because it is of no use, but which takes the same ways."""
    found = {}
    for stage, parameters in ((1, False), (2, False), (3, False), (3, True)):
        options = {"offload_optimizer": True, "offload_parameters": parameters}
        for accumulation in (1, 2):
            made = engine(stage, **options)
            curve = train(made, 3, 12 // accumulation)
            other = engine(stage, seed=7, **options)
            load(other, saved(made))
            found[stage, parameters, accumulation] = curve + train(other, 3, 12 // accumulation, first=3)
        skipped = skipping(stage, **options)
        assert skipped["unchanged"]
        assert skipped["after"] == skipped["expected"]
    return found


def own_loop() -> dict[str, Any]:
    """adopt: a model with its optimizer, a frozen one beside it; and what is refused."""
    from runner.errors import InputError

    mesh = Mesh(distributed.rank(), distributed.world_size())
    backend = DeepSpeed(CPU, PRECISIONS["fp32"], mesh)
    torch.manual_seed(3)
    model, teacher = mlp(), mlp()
    models, (handle,) = backend.adopt([teacher, model], [adamw(model)])
    assert models[0] is teacher
    assert models[1] is not model
    inputs, targets = samples(24, 0)
    mine = slice(12 * mesh.data_rank, 12 * mesh.data_rank + 12)
    found = []
    for _ in range(2):
        with backend.accumulate(True):
            backend.backward(nn.functional.cross_entropy(models[1](inputs[mine]), targets[mine]), None)
        found.append(float(handle.step(0.3).grad_norm))
    refused = []
    other = mlp()
    for arguments in (([other], [adamw(other)]), ([], [adamw(other)]), ([other], [adamw(other), adamw(other)])):
        try:
            backend.adopt(*arguments)
        except InputError as error:
            refused.append(str(error))
    fresh = DeepSpeed(CPU, PRECISIONS["fp32"], mesh)
    try:
        fresh.adopt([other], [torch.optim.Adagrad(other.parameters())])
    except InputError as error:
        refused.append(str(error))
    return {"norms": found, "refused": refused, "lines": backend.describe()}


def one_after_the_other() -> list[tuple[Any, list[bool], bool]]:
    """Runs in one interpreter, each with a process group of its own: curve, what is left of it, environment clean."""
    import gc
    import os
    import weakref

    distributed.leave()
    found = []
    for stage in (3, 2, 0, 3):
        distributed.join(distributed.Ranks(), distributed.store(distributed.Ranks()), "cpu", 30.0)
        made = engine(stage)
        backend: Any = made.backend
        left = [weakref.ref(backend), weakref.ref(backend.handle._layout)]
        curve = train(made, 2, 12)
        del made, backend
        gc.collect()
        found.append((curve, [ref() is not None for ref in left], "LOCAL_RANK" not in os.environ))
        distributed.leave()
    return found
