"""torch.compile: what is refused beforehand, and that a compiled model trains alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine.blocks import Block, Transformer, batches, trained
from torch import nn

from runner.engine import compiling
from runner.engine.checkpointing import checkpoint_activations
from runner.engine.compiling import check, compile_model, cpp_compiler
from runner.errors import InputError

CPU = torch.device("cpu")


def made(options: Any, how: str = "none", **model: Any) -> Transformer:
    torch._dynamo.reset()
    torch.manual_seed(0)
    found = Transformer(**model)
    checkpoint_activations(found, how)
    compile_model(found, options)
    return found


@pytest.mark.parametrize(
    ("options", "key", "text"),
    [
        ({"scop": "block"}, "compile.scop", "did you mean scope?"),
        ({"ful_graph": True}, "compile.ful_graph", "did you mean fullgraph?"),
        ({"model": 1}, "compile.model", "no option of that name"),
        ({"scope": "layer"}, "compile.scope", "one of model, block"),
        ({"backend": "induktor"}, "compile.backend", "inductor"),
        ({"backend": "eager", "mode": "default"}, "compile.mode", "no modes"),
        ({"mode": "fastest"}, "compile.mode", "max-autotune"),
        ({"mode": "default", "options": {"max_autotune": True}}, "compile.options", "give one of the two"),
        ({"options": {"max_autotun": True}}, "compile.options.max_autotun", "max_autotune"),
        ({"fullgraph": "yes"}, "compile.fullgraph", "true or false"),
        ({"recompile_limit": True}, "compile.recompile_limit", "whole number"),
    ],
)
def test_what_is_wrong_is_told(options: Any, key: str, text: str) -> None:
    (problem,) = check(options, CPU)
    assert problem.key == key
    assert text in f"{problem.why} {problem.fix}"


@pytest.mark.parametrize("options", [False, {"backend": "aot_eager"}, {"backend": "eager", "dynamic": None}])
def test_what_is_right(options: Any) -> None:
    assert check(options, CPU) == []


def test_a_missing_compiler_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "cpp_compiler", lambda: None)
    (problem,) = check(True, CPU)
    assert problem.key == "compile"
    assert "C++ compiler" in problem.why
    assert "g++" in problem.fix
    assert "aot_eager" in problem.fix
    assert check({"backend": "aot_eager"}, CPU) == []


def test_backends_that_draw_anew_are_refused_with_checkpointing() -> None:
    assert check({"backend": "aot_eager"}, CPU, "full") == []
    (problem,) = check({"backend": "eager"}, CPU, "full")
    assert problem.key == "compile.backend"
    assert "activation_checkpointing=full" in problem.why


@pytest.mark.parametrize("scope", ["model", "block"])
@pytest.mark.parametrize("how", ["none", "full", "selective"])
def test_a_compiled_model_trains_alike(scope: str, how: str) -> None:
    options = {"backend": "aot_eager", "scope": scope}
    expected, model = trained(made(False, dropout=0.3)), made(options, how, dropout=0.3)
    names = list(Transformer().state_dict())
    assert list(model.state_dict()) == names
    assert type(model) is Transformer
    losses, _, state = trained(model)
    assert losses == pytest.approx(expected[0], rel=1e-6)
    assert all(torch.allclose(state[name], expected[2][name], atol=1e-7) for name in names)


@pytest.mark.parametrize("how", ["full", "selective"])
def test_where_the_compiler_breaks_off_in_a_block(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = made(False).eval()
    whole = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x, **kw: (torch._dynamo.graph_break(), whole(self, x, **kw))[1])
    torch._dynamo.reset()
    model = made({"backend": "aot_eager", "scope": "block"}, how).eval()
    inputs = batches(1)[0]
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), expected(inputs))


def test_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[Any] = []

    def counting(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = Transformer()
    assert compile_model(model, {"scope": "block", "backend": counting}) == ["blocks.0", "blocks.1", "blocks.2"]
    torch._dynamo.reset()
    model(batches(1)[0])
    assert len(graphs) == 1  # one graph for all blocks of a kind
    assert compile_model(Transformer(), True) == ["Transformer"]
    assert compile_model(model, False) == []
    with pytest.raises(InputError, match="no repeated blocks"):
        compile_model(nn.Linear(2, 2), {"scope": "block"})


def test_the_inductor_on_this_machine() -> None:
    if cpp_compiler() is None:
        pytest.skip("no C++ compiler here, which the inductor needs on a CPU")
    assert check(True, CPU) == []
    expected, model = trained(made(False)), made({"scope": "block"}, "selective")
    losses, gradients, _ = trained(model)
    assert losses == pytest.approx(expected[0], rel=1e-5)
    for mine, theirs in zip(gradients, expected[1], strict=True):
        assert all(torch.allclose(mine[name], theirs[name], rtol=1e-4, atol=1e-6) for name in theirs)
