"""FSDP in two and four processes: the training of a plain loop, and what each process holds and sends."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_ranks
from torch import nn
from torch.nn.functional import cross_entropy

from runner import distributed
from runner.engine.fsdp import FSDP
from runner.engine.mesh import Mesh
from runner.engine.model_state import ModelState, OptimizerState
from runner.engine.optimizer import fused_by_default
from runner.engine.precision import PRECISIONS
from runner.errors import InputError

sys.path.insert(0, str(Path(__file__).parent))

from sharding import (
    CPU,
    LENGTH,
    WIDTH,
    WORDS,
    Layer,
    Net,
    Normed,
    adamw,
    batch,
    by_hand,
    curve,
    engine,
    flat,
    prepared,
    same,
    step_of,
    whole,
    worst,
)


def curves(replicas: int) -> dict[str, Any]:
    """The worst differences to a plain loop (fp32) and to DDP (other precisions)."""
    expected = by_hand()
    found: dict[str, Any] = {}
    for accumulation in (1, 2, 4):
        made = prepared("fsdp", replicas=replicas)
        found[f"accumulation {accumulation}"] = worst(curve(made, accumulation=accumulation), expected)
    found["unclipped"] = worst(curve(prepared("fsdp", replicas=replicas), clip=None), by_hand(clip=None))
    found["kept"] = worst(
        curve(prepared("fsdp", replicas=replicas, reshard_after_forward=False), accumulation=2), expected
    )
    found["root only"] = worst(curve(prepared("fsdp", flat, replicas=replicas)), by_hand(flat))
    for precision in ("bf16", "fp16"):
        ddp = prepared("ddp", precision=precision, find_unused_parameters=True)
        pairs = [curve(made, clip=None) for made in (prepared("fsdp", precision=precision, replicas=replicas), ddp)]
        found[precision] = max(abs(a[0] - b[0]) / b[0] for a, b in zip(*pairs, strict=True))
        found[f"{precision} norm"] = max(abs(a[1] - b[1]) / b[1] for a, b in zip(*pairs, strict=True))
    return found


@pytest.mark.parametrize(("world", "replicas"), [(2, 1), (4, 2), (3, 1)])
def test_the_training_of_a_plain_loop(world: int, replicas: int) -> None:
    for found in run_ranks(curves, world, replicas, timeout=110):
        low = {name: found.pop(name) for name in ("bf16", "fp16", "bf16 norm", "fp16 norm")}
        assert max(found.values()) < 1e-6, found
        assert max(low.values()) < 5e-3, low


def holdings() -> dict[str, Any]:
    """What is held, sent and said in two processes."""
    from torch.distributed.tensor.debug import CommDebugMode

    found: dict[str, Any] = {}
    made = prepared("fsdp")
    found["describe"] = made.backend.describe()
    parameters = dict(made.model.named_parameters())
    found["held"] = sum(p._local_tensor.numel() if hasattr(p, "_local_tensor") else 1 for p in parameters.values())
    found["all"] = sum(p.numel() for p in parameters.values())
    found["rows of one"] = parameters["one"]._local_tensor.shape
    found["tied"] = made.model.words.weight is made.model.embed.weight
    found["start"] = same_as_plain(made.model, Net)
    x, y = batch(0)
    counts = []
    for last in (False, False, True):
        with CommDebugMode() as mode:
            with made.accumulate(last):
                made.backward(cross_entropy(made.forward(x), y, reduction="sum"), made.factor(8))
        counts.append({str(op).rpartition(".")[2]: count for op, count in mode.get_comm_counts().items()})
    found["counts"] = counts
    found["unused"] = made.model.unused.grad is None
    with CommDebugMode() as mode:
        made.exchange(torch.tensor(1.0))
        made.step(0.5)
    found["step"] = {str(op).rpartition(".")[2]: count for op, count in mode.get_comm_counts().items()}

    with torch.no_grad():
        outputs = made.forward(batch(1)[0])
    found["evaluated"] = (
        outputs.dtype,
        [name for name, p in made.model.named_parameters() if p.numel() > 1 and not hasattr(p, "_local_tensor")],
    )
    low = prepared("fsdp", precision="bf16")
    with torch.no_grad():
        found["low"] = low.forward(x).dtype, {p.dtype for p in low.model.parameters()}
    full = prepared("fsdp", precision="bf16_full")
    found["full"] = curve(full, 2), {p.dtype for p in full.model.parameters()}

    # Running means are the first process's on all, as under DDP.
    normed, ddp = prepared("fsdp", Normed), prepared("ddp", Normed)
    found["normed"] = worst(curve(normed, 5), curve(ddp, 5))
    with torch.no_grad():
        outputs = [made.forward(x) for made in (normed, ddp)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    found["means"] = normed.model.norm.running_mean.tolist(), ddp.model.module.norm.running_mean.tolist()
    found["casting"] = curve(prepared("fsdp", Normed, precision="bf16"), 3)[-1], low.backend.describe()[-1]
    found["blocks"] = refusal(lambda: prepared("fsdp", blocks=["Layr"]))
    found["by name"] = prepared("fsdp", blocks=["Layer", "Embedding"]).backend.describe()[-1]
    found["by size"] = prepared("fsdp", flat, min_parameters=200).backend.describe()[-1]
    found["meta"] = refusal(lambda: prepared("fsdp", on_meta))
    return found


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(4, 4)


def refusal(act: Any) -> str:
    with pytest.raises(InputError) as caught:
        act()
    problem = caught.value.problems[0]
    return f"{problem.key}: {problem.why} | {problem.fix}"


def same_as_plain(model: nn.Module, build: Any) -> bool:
    torch.manual_seed(0)
    return same(whole(model), build().state_dict())


def test_what_is_held_sent_and_said() -> None:
    ranks = run_ranks(holdings, 2, timeout=110)
    a, b = ranks
    assert [a["rows of one"], b["rows of one"]] == [torch.Size([1, WIDTH]), torch.Size([0, WIDTH])]
    assert a["held"] + b["held"] == a["all"] + 1  # the number is on both
    assert abs(a["held"] - b["held"]) < 0.05 * a["all"]
    for found in ranks:
        assert found["tied"]
        assert found["start"]
        assert "3 Layer" in found["describe"][1]
        assert "whole on every process: scale" in found["describe"][1]
        for counts in found["counts"][:2]:
            assert set(counts) == {"_allgather_base_"}, counts
        last = found["counts"][2]
        assert last["_reduce_scatter_base_"] == 4  # three layers and the rest
        assert last["allreduce_"] == 1  # the number's gradient
        assert found["unused"]
        assert found["step"] == {"allreduce_": 2}  # the exchange, and the norm
        assert found["evaluated"] == (torch.float32, [])
        assert found["low"] == (torch.float32, {torch.float32})
        assert found["full"][1] == {torch.bfloat16}
        assert found["normed"] < 1e-6
        assert found["means"][0] == pytest.approx(found["means"][1], rel=1e-5)
        assert found["casting"][0][0] > 0
        assert "layers.0.norm.weight" in found["casting"][1]
        assert found["blocks"].startswith("backend.blocks: no module of the model is a Layr | one of Layer, ")
        assert "3 Layer" in found["by name"]
        assert "1 Linear" in found["by size"]
        assert "meta device" in found["meta"]
    assert a["means"] == b["means"]


# Overflow ------------------------------------------------------------------------------------------------------------


def overflow() -> list[Any]:
    """An inf in one process's rows: every process skips, with the same scale, and goes on."""
    made = prepared("fsdp", precision="fp16")
    before = whole(made.model)
    x, y = batch(0)
    found: list[Any] = []
    for bad in (True, False):
        made.backward(cross_entropy(made.forward(x), y, reduction="sum"), made.factor(96))
        if bad and distributed.rank() == 1:
            made.model.layers[0].up.weight.grad._local_tensor[0, 0] = float("inf")
        known = made.exchange(torch.tensor(1.0))
        update = made.step(0.5, skip=known.skip)
        found += [update.skipped, update.overflow, made.backend.scaler.value, same(before, whole(made.model))]
    return found


def test_an_overflow_in_one_process_skips_the_step_in_all() -> None:
    expected = [True, True, 32768.0, True, False, False, 32768.0, False]
    assert run_ranks(overflow, 2) == [expected, expected]


# Own loops -----------------------------------------------------------------------------------------------------------


def own_loop() -> dict[str, Any]:
    """Models and optimizers that exist: two of each, one optimizer that has stepped before."""
    found: dict[str, Any] = {}
    torch.manual_seed(0)
    models = [Net(), flat()]
    optimizers = [
        torch.optim.AdamW(
            [{"params": models[0].layers.parameters(), "lr": 0.02}, {"params": [models[0].embed.weight]}]
        ),
        torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9),
    ]
    twins = copy.deepcopy(models)
    plain = [
        torch.optim.AdamW([{"params": twins[0].layers.parameters(), "lr": 0.02}, {"params": [twins[0].embed.weight]}]),
        torch.optim.SGD(twins[1].parameters(), lr=0.1, momentum=0.9),
    ]
    x, y = batch(0)
    for model, optimizer in [(models[1], optimizers[1]), (twins[1], plain[1])]:
        cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    made = engine("fsdp")
    placed, handles = made.backend.adopt(models, optimizers)
    found["same"] = [a is b for a, b in zip(placed, models, strict=True)]
    found["again"] = [a is b for a, b in zip(made.backend.adopt(models, [])[0], models, strict=True)]
    size, rank = made.mesh.data_size, made.mesh.data_rank
    differences = []
    for step in range(1, 4):
        x, y = batch(step)
        for model, handle, twin, optimizer in zip(placed, handles, twins, plain, strict=True):
            mine = cross_entropy(model(x.chunk(size)[rank]), y.chunk(size)[rank])
            made.backward(mine, None)
            norm = handle.clip(0.5)
            handle.step()
            loss = cross_entropy(twin(x), y)
            loss.backward()
            held = [p for group in optimizer.param_groups for p in group["params"]]
            expected = nn.utils.clip_grad_norm_(held, 0.5)
            optimizer.step()
            twin.zero_grad()
            placed[0].zero_grad()
            placed[1].zero_grad()
            differences.append(abs(norm.item() - expected.item()) / expected.item())
    for model, twin in zip(placed, twins, strict=True):
        values = whole(model)
        differences += [(values[name] - value).abs().max().item() for name, value in twin.state_dict().items()]
    found["worst"] = max(differences)
    found["groups"] = [len(group["params"]) for group in optimizers[0].param_groups]
    found["shared"] = refusal(lambda: made.backend.adopt([Holder(placed[0].one)], []))
    return found


class Holder(nn.Module):
    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.held = parameter


def test_models_and_optimizers_that_exist() -> None:
    for found in run_ranks(own_loop, 2):
        assert found["same"] == found["again"] == [True, True]
        assert found["worst"] < 1e-5
        assert found["groups"] == [18, 1]
        assert "shares the parameter held" in found["shared"]


def stepped(kind: type[torch.optim.Optimizer], **options: Any) -> float:
    """The worst difference of three steps to those of a plain loop, with the implementation that a recipe gets."""
    torch.manual_seed(0)
    twin = nn.Linear(6, 4)
    plain = kind(twin.parameters(), lr=0.1, **options)
    options = {**fused_by_default(kind, list(options), CPU, FSDP.fused), **options}
    made = engine("fsdp")
    made.prepare(lambda: copy.deepcopy(twin), lambda model: kind(model.parameters(), lr=0.1, **options))
    for _ in range(3):
        twin(torch.ones(2, 6)).sum().backward()
        made.backward(made.forward(torch.ones(2, 6)).sum(), None)
        plain.step()
        plain.zero_grad()
        made.step()
    values = whole(made.model)
    return max((values[name] - value).abs().max().item() for name, value in twin.state_dict().items())


def all_stepped() -> dict[str, Any]:
    sgd, adagrad, adamw = torch.optim.SGD, torch.optim.Adagrad, torch.optim.AdamW
    return {
        "worst": max(stepped(sgd, momentum=0.9), stepped(adagrad), stepped(adamw), stepped(adamw, fused=True)),
        "refused": [refusal(lambda: stepped(sgd, fused=True)), refusal(lambda: stepped(adagrad, fused=True))],
    }


def test_optimizers_whose_fused_kernels_take_no_shards() -> None:
    for found in run_ranks(all_stepped, 2):
        assert found["worst"] < 1e-6
        for words, kind in zip(found["refused"], ("SGD", "Adagrad"), strict=True):
            assert words.startswith(f"optimizer.fused: torch's fused {kind} cannot step")


# Before a model exists ------------------------------------------------------------------------------------------------


def test_what_cannot_work_is_said_before_a_model_exists() -> None:
    def problems(**options: Any) -> list[str]:
        mesh = Mesh(0, options.pop("size", 4), options.pop("replicas", 1))
        return [f"{p.key} {p.why} {p.fix}" for p in FSDP(CPU, PRECISIONS["fp32"], mesh, **options).check()]

    assert problems() == problems(size=1) == problems(replicas=2) == []
    assert problems(replicas=3) == ["backend.replicas 4 processes cannot be 3 groups of equal size one of 1, 2, 4"]
    (offload,) = problems(cpu_offload=True)
    assert offload.startswith("backend.cpu_offload on a CPU the weights are in the host's memory already")
    assert FSDP.grouped


def test_the_adapter_is_described() -> None:
    lines = FSDP(CPU, PRECISIONS["bf16"], Mesh(0, 4, 2)).describe()
    assert lines == [
        "FSDP over 2 shards in 2 replicas; whole parameters are freed after forward; shards float32, weights of "
        "matrix products travel as bfloat16, sums of gradients float32"
    ]


# State ----------------------------------------------------------------------------------------------------------------


def going_on(folder: str, kind: str, save: bool) -> list[tuple[float, float]]:
    """Three steps and a save, or a load; then three more."""
    made = prepared(kind)
    states = {"model": ModelState(made.model), "optimizer": OptimizerState(made.model, made.optimizer)}
    if save:
        curve(made, 3)
        write(folder, states)
    else:
        read(folder, states)
    return [step_of(made, step)[:2] for step in range(3, 6)]


def write(folder: str, states: Any) -> None:
    from runner.checkpoint.manifest import Manifest
    from runner.checkpoint.peers import Peers
    from runner.checkpoint.storage import own_part, write_checkpoint
    from runner.checkpoint.tree import split

    document, tensors = split({name: state.state_dict() for name, state in states.items()})
    write_checkpoint(Path(folder), own_part(tensors), Manifest(3, {}), {"state.json": document}, Peers())


def read(folder: str, states: Any) -> None:
    import json

    from runner.checkpoint.manifest import Manifest
    from runner.checkpoint.storage import read_tensors
    from runner.checkpoint.tree import join, tensors_of

    path = Path(folder) / "step_00000003"
    manifest = Manifest.read(path)
    document = json.loads((path / "state.json").read_text())

    def outline(name: str) -> torch.Tensor:
        entry = manifest.tensors[name]
        return torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device="meta")

    saved = join(document, outline)
    targets = tensors_of({name: state.template(saved[name]) for name, state in states.items()})
    read_tensors(path, manifest, targets)
    loaded = join(document, targets.__getitem__)
    for name, state in states.items():
        state.load_state_dict(loaded[name])


def test_a_checkpoint_goes_from_shards_to_one_process_and_back(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("fsdp", "single")]
    for folder in folders:
        folder.mkdir()
    saved = run_ranks(going_on, 2, str(folders[0]), "fsdp", True)
    again = run_ranks(going_on, 2, str(folders[0]), "fsdp", False)
    assert saved == again  # bit for bit on the same processes
    (single,) = run_ranks(going_on, 1, str(folders[0]), "single", False)
    assert worst(single, saved[0]) < 1e-6
    (one,) = run_ranks(going_on, 1, str(folders[1]), "single", True)
    back = run_ranks(going_on, 2, str(folders[1]), "fsdp", False)
    assert worst(back[0], one) < 1e-6


def loading_whole() -> bool:
    """A plain state fits a sharded model, and the other way round."""
    torch.manual_seed(5)
    other = Net()
    made = prepared("fsdp")
    ModelState(made.model).load_state_dict(ModelState(other).state_dict())
    fits = same(whole(made.model), other.state_dict())
    plain = Net()
    ModelState(plain).load_state_dict(ModelState(made.model).state_dict())
    return fits and same(plain.state_dict(), other.state_dict())


def test_a_whole_state_fits_a_sharded_model() -> None:
    assert run_ranks(loading_whole, 2) == [True, True]


def cut_while_built() -> dict[str, Any]:
    from runner.engine import building

    building.LEAST = building.ROOM = 0
    FSDP.prepare.__globals__["build_in_parts"] = lambda build, rows: building.build_in_parts(build, rows, 0, 0)
    made = prepared("fsdp")
    return {
        "start": same_as_plain(made.model, Net),
        "tied": made.model.words.weight is made.model.embed.weight,
        "random": torch.rand(3).tolist(),
        "worst": worst(curve(made, 5), by_hand(steps=5)),
        "frozen": made.model.frozen.weight.requires_grad,
        "describe": made.backend.describe()[1],
    }


def test_a_model_is_cut_while_it_is_built() -> None:
    torch.manual_seed(0)
    Net()
    after = torch.rand(3).tolist()
    for found in run_ranks(cut_while_built, 2):
        assert found["start"]
        assert found["tied"]
        assert found["random"] == after
        assert found["worst"] < 1e-6
        assert not found["frozen"]
        assert "parameters were cut while the model was built" in found["describe"]


def one_process() -> float:
    return worst(curve(prepared("fsdp"), 5), by_hand(steps=5))


def test_one_process() -> None:
    assert run_ranks(one_process, 1)[0] < 1e-6


def test_the_small_models_are_what_they_say() -> None:
    assert sum(p.numel() for p in Layer().parameters()) > 500
    assert batch(0)[0].shape == (48, LENGTH)
    assert batch(0)[0].max() < WORDS
    assert adamw(nn.Linear(1, 1)).defaults["weight_decay"] == 0.1
