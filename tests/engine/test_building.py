"""A model built in parts has the values, and leaves the random state, of an ordinary build."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from runner.engine.building import Rows, build_in_parts
from runner.errors import InputError, wrong


class Gpt(nn.Module):
    """Initialised in its constructor, then all over again at the end, with tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8, padding_idx=2)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(3))
        self.head = nn.Linear(8, 13, bias=False)
        self.embed.weight = self.head.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("noise", torch.rand(3))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.apply(self.start)
        for name, p in self.named_parameters():
            if name.endswith("down.weight"):
                nn.init.normal_(p, std=0.02 / math.sqrt(6))
        self.blocks[0]["up"].weight.data.div_(3.0)

    def start(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def loaded() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model.load_state_dict({name: torch.rand(value.shape) for name, value in model.state_dict().items()})
    return model


def assigned() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    values = {name: torch.rand(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(values, assign=True)
    return model


def replaced() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model[0].weight.data = torch.rand(6, 4)
    model[1].weight.data = model[1].weight.data.clone() * 2
    return model


def copies() -> nn.Module:
    layer = nn.Linear(4, 6)
    return nn.ModuleList([*(copy.deepcopy(layer) for _ in range(3)), layer])


def marked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6))
    model[0].weight.rate = 2.0  # type: ignore[assignment]
    return model


IN_PARTS: dict[str, Callable[[], nn.Module]] = {
    "gpt": Gpt,
    "another type": lambda: Gpt().to(torch.float64),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3),
    "lstm": lambda: nn.LSTM(4, 5, 2),
    "loaded": loaded,
    "replaced": replaced,
    "copies": copies,
    "marked": marked,
}


def through_numpy() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model[0].weight.data.mul_(float(model[0].weight.detach().numpy().sum()))
    return model


def one_row() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model[0].weight.data[1].mul_(2)
    return model


def through_a_view() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 4))
    view = model[0].weight.view(-1)
    model.append(nn.Linear(5, 5))
    with torch.no_grad():
        view[3] = 7.0
    return model


def through_an_alias() -> nn.Module:
    values, model = torch.empty(4, 6), nn.Linear(6, 4)
    model.weight = nn.Parameter(values)
    other = nn.Linear(5, 5)
    values.fill_(3.0)
    return nn.Sequential(model, other)


def shared_buffer() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    model.register_buffer("start", model[0].weight.data.clone())
    return model


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "assigned": assigned,
    "numpy": through_numpy,
    "one row": one_row,
    "a view": through_a_view,
    "an alias": through_an_alias,
    "a buffer": shared_buffer,
    "parametrized": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
    ),
}


def check(build: Callable[[], nn.Module], rows: Rows, room: int) -> Any:
    torch.manual_seed(3)
    expected = build()
    after = torch.rand(3)
    torch.manual_seed(3)
    built = build_in_parts(build, rows, least=0, room=room)
    assert torch.equal(torch.rand(3), after)
    names = dict(expected.named_parameters(remove_duplicate=False))
    found = dict(built.model.named_parameters(remove_duplicate=False))
    assert list(found) == list(names)
    for name, p in found.items():
        plain = names[name]
        assert type(p) is nn.Parameter
        assert (p.shape, p.dtype, p.requires_grad) == (plain.shape, plain.dtype, plain.requires_grad)
        assert vars(p) == vars(plain)
        assert torch.equal(built.rows[p], rows.of(plain)) if p.is_meta else torch.equal(p, plain), name
    for (_, a), (_, b) in zip(built.model.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(a, b)
    ties = [len({id(p) for p in values.values()}) for values in (names, found)]
    assert ties[0] == ties[1]
    assert nn.Module.register_parameter.__module__ == "torch.nn.modules.module"
    return built


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("rows", [Rows(0, 3), Rows(2, 3), Rows(19, 20)])
@pytest.mark.parametrize("name", IN_PARTS)
def test_built_in_parts(name: str, rows: Rows) -> None:
    built = check(IN_PARTS[name], rows, room=0)
    assert built.whole is None
    assert len(built.rows) > 2


@pytest.mark.parametrize("room", [0, 300, 10**6])
@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_done_in_parts_is_built_in_the_ordinary_way(name: str, room: int) -> None:
    built = check(OTHERS[name], Rows(1, 2), room)
    assert built.whole is None or built.rows == {}


def test_only_so_much_is_whole_at_a_time() -> None:
    held = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList()
            for _ in range(6):
                self.layers.append(nn.Linear(64, 64, bias=False))
                cells = [layer.weight._cell for layer in self.layers]
                held.append(sum(cell.whole is not None for cell in cells))

    size = 64 * 64 * 4
    built = build_in_parts(Watching, Rows(0, 2), least=size, room=2 * size)
    assert held == [1, 2, 3, 3, 3, 3]
    assert [part.shape[0] for part in built.rows.values()] == [32] * 6


def test_small_parameters_and_single_processes_stay_whole() -> None:
    assert build_in_parts(Gpt, Rows(0, 2)).rows == {}
    assert build_in_parts(Gpt, Rows(0, 1), least=0).rows == {}


def test_an_error_of_the_users_is_theirs() -> None:
    def broken() -> nn.Module:
        nn.Linear(3, 3)
        raise ValueError("on purpose")

    calls = []

    def refused() -> nn.Module:
        calls.append(1)
        raise wrong("model.width", "is odd")

    with pytest.raises(ValueError, match="on purpose"):
        build_in_parts(broken, Rows(0, 2), least=0)
    with pytest.raises(InputError):
        build_in_parts(refused, Rows(0, 2), least=0)
    assert calls == [1]
