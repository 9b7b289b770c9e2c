"""Which modules become units: by class, by size, or because they repeat."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from runner.engine.wrapping import blocks_by_size, blocks_of, units_of
from runner.errors import InputError


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.a = nn.Linear(width, width)
        self.inner = nn.Sequential(Small(), Small())


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))


class Model(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(4, 10)


def names(found: list[tuple[str, nn.Module]]) -> list[str]:
    return [name for name, _ in found]


def test_repeated_blocks_are_the_outermost_ones() -> None:
    assert names(blocks_of(Model())) == ["layers.0", "layers.1", "layers.2"]
    assert names(blocks_of(nn.Sequential(Model(), nn.ReLU()))) == ["0.layers.0", "0.layers.1", "0.layers.2"]


def test_one_block_or_layers_of_torch_do_not_repeat() -> None:
    assert blocks_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == []
    assert blocks_of(nn.Linear(2, 2)) == []
    # Of one block the blocks inside are found.
    assert names(blocks_of(Model(1))) == ["layers.0.inner.0", "layers.0.inner.1"]


def test_encoder_and_decoder_are_both_found_and_small_repetitions_are_not() -> None:
    model = nn.Transformer(8, 2, 2, 2, 16, batch_first=True)
    expected = [f"{side}.layers.{i}" for side in ("encoder", "decoder") for i in range(2)]
    assert names(blocks_of(model)) == expected
    mixed = nn.ModuleDict({"big": nn.ModuleList(Block(50) for _ in range(2)), "few": nn.ModuleList([Small(), Small()])})
    assert names(blocks_of(mixed)) == ["big.0", "big.1"]


def test_by_class_names() -> None:
    assert names(blocks_of(Model(), ["Small"]))[:2] == ["layers.0.inner.0", "layers.0.inner.1"]
    assert names(blocks_of(Model(), ["Block", "Embedding"])) == ["embed", "layers.0", "layers.1", "layers.2"]
    assert names(blocks_of(Model(), [f"{__name__}.Block"])) == ["layers.0", "layers.1", "layers.2"]
    with pytest.raises(InputError) as caught:
        blocks_of(Model(), ["Block", "Blok"])
    problem = caught.value.problems[0]
    assert problem.key == "backend.blocks"
    assert problem.why == "no module of the model is a Blok"
    assert problem.fix.startswith("one of Block, ")
    assert {"Embedding", "Linear", "Small"} <= set(problem.fix.removeprefix("one of ").split(", "))


def test_wrappers_stand_for_what_they_wrap() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Model()
    for number, block in enumerate(model.layers):
        model.layers[number] = torch.compile(checkpoint_wrapper(block), backend="eager")
    for found in (blocks_of(model), blocks_of(model, ["Block"]), units_of(model)):
        assert names(found) == ["layers.0", "layers.1", "layers.2"]
        assert found[0][1] is model.layers[0]


def test_by_size() -> None:
    model = Model()
    assert set(names(blocks_by_size(model, 20))) == {"embed", "head", *(f"layers.{i}.a" for i in range(3))}
    assert set(names(blocks_by_size(model, 24))) == {"embed", "head", *(f"layers.{i}" for i in range(3))}
    assert blocks_by_size(model, 10_000) == []


def test_units_are_outer_before_inner() -> None:
    found = names(units_of(Model(), ["Block"], min_parameters=20))
    assert found == ["embed", "layers.0", "layers.0.a", "layers.1", "layers.1.a", "layers.2", "layers.2.a", "head"]


def test_a_module_that_shares_a_parameter_with_others_is_no_unit() -> None:
    model = Model()
    model.layers[1].a.weight = model.layers[0].a.weight
    assert names(units_of(model)) == ["layers.2"]
    tied = Model()
    tied.head.weight = tied.embed.weight
    assert names(units_of(tied, ["Block", "Embedding"])) == ["layers.0", "layers.1", "layers.2"]
    inside = Model()
    inside.layers[0].inner[1].w = inside.layers[0].inner[0].w
    assert len(units_of(inside)) == 3


def test_big_layers_outside_of_blocks_are_units() -> None:
    model = Model()
    model.embed = nn.Embedding(300_000, 4)
    assert names(units_of(model)) == ["embed", "layers.0", "layers.1", "layers.2"]
    assert names(units_of(nn.Sequential(nn.Linear(1000, 1001), nn.ReLU(), nn.Linear(1001, 2)))) == ["0"]
    assert units_of(model, []) == []
