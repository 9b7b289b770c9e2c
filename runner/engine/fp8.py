"""Matrix products in float8, by torchao's linear layers.

Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
"""

from __future__ import annotations

import importlib.util
import logging

import torch
from torch import nn

from runner.errors import Problem, wrong

#: Sizes that the GPU's float8 products take.
_MULTIPLE = 16
#: The first generation of GPUs with them: Ada (8.9), then Hopper (9.0).
_CAPABILITY = (8, 9)

_log = logging.getLogger("runner")


def check(device: torch.device, emulate: bool) -> list[Problem]:
    """What float8 lacks here; torchao is looked for and not imported, which takes seconds."""
    problems = []
    if importlib.util.find_spec("torchao") is None:
        why = "fp8 needs the package torchao, which is not installed"
        problems.append(Problem("precision", why, "pip install 'runner[fp8]', or precision=bf16", value="fp8"))
    if emulate:
        return problems
    fix = "precision=bf16, or a GPU of the Ada or Hopper generation or newer"
    if device.type != "cuda":
        why = f"{device.type} has no float8 matrix products"
        fix += "; precision.emulate=true only imitates their rounding, for tests"
        problems.append(Problem("precision", why, fix, value="fp8"))
    elif torch.cuda.get_device_capability(device) < _CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        why = f"{name} (compute capability {major}.{minor}) has no float8 matrix products, which came with 8.9"
        problems.append(Problem("precision", why, fix, value="fp8"))
    return problems


def convert(model: nn.Module, emulate: bool = False) -> list[str]:
    """Makes the model's linear layers compute in float8, in place; returns the names of those that do.

    Weights stay as they are, with their names; each product scales its tensors by their largest element, anew each
    time. Layers whose sizes are not multiples of 16 stay as they are, and so does what is not exactly nn.Linear.
    To be called before activations are checkpointed, the model is compiled and a backend wraps it.

    Args:
        emulate: compute in the model's own type with float8's rounding, on any device; slow, for tests.
    """
    if type(model) is nn.Linear:
        raise wrong("model", "is a single linear layer, which precision=fp8 cannot replace", "put it into a module")
    everything = model.named_modules(remove_duplicate=False)
    linear = [(name, module) for name, module in everything if type(module) is nn.Linear]
    fitting = {name for name, m in linear if m.in_features % _MULTIPLE == 0 and m.out_features % _MULTIPLE == 0}
    if not fitting:
        sizes = sorted({f"{m.in_features}x{m.out_features}" for _, m in linear})
        found = f"its linear layers are {', '.join(sizes[:5])}" if sizes else "it has no nn.Linear"
        why = f"the model has no linear layer whose sizes are multiples of {_MULTIPLE}: {found}"
        raise wrong("precision", why, "precision=bf16, or sizes that are", value="fp8")
    # torchao tells of extensions that it cannot load, whether anybody wants them or not.
    logging.disable(logging.WARNING)
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    finally:
        logging.disable(logging.NOTSET)
    # Padding lets a batch have any number of samples: they are the inner size of the weight gradient's product.
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name in fitting, config=config)
    _log.info("fp8: %d of %d linear layers compute in float8", len(fitting), len(linear))
    return sorted(fitting)
