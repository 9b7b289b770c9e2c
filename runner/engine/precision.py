"""Number formats of a run, as a frozen value: it describes, it does nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runner.errors import Problem


@dataclass(frozen=True)
class LossScaling:
    """Options of dynamic loss scaling (Micikevicius et al., "Mixed Precision Training", 2018)."""

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    floor: float = 1.0


@dataclass(frozen=True)
class Precision:
    """Types of weights, of arithmetic under autocast and of gradient sums; TF32 or not; loss scaling or not."""

    name: str = "fp32"
    param_dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype = torch.float32
    reduce_dtype: torch.dtype = torch.float32
    tf32: bool = False
    float8: bool = False
    emulate: bool = False
    loss_scaling: LossScaling | None = None

    @property
    def autocast(self) -> bool:
        """Whether arithmetic runs in another type than the weights have."""
        return self.compute_dtype != self.param_dtype

    @property
    def _uses_bf16(self) -> bool:
        return torch.bfloat16 in (self.param_dtype, self.compute_dtype)

    def check(self, device: torch.device) -> list[Problem]:
        """What this device cannot do."""
        if self.float8:
            from runner.engine import fp8

            return fp8.check(device, self.emulate)
        why = None
        if self.tf32 and device.type != "cuda":
            why = f"{device.type} has no TF32"
        elif self.tf32 and torch.cuda.get_device_capability(device)[0] < 8:
            why = f"{torch.cuda.get_device_name(device)} has no TF32, which came with the Ampere generation"
        elif self._uses_bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            why = f"{torch.cuda.get_device_name(device)} has no bfloat16 arithmetic"
        if why is None:
            return []
        works = [name for name, other in PRECISIONS.items() if name != self.name and not other.check(device)]
        return [Problem("precision", why, f"use one of {', '.join(works)}, or another device", value=self.name)]


PRECISIONS = {
    "fp32": Precision(),
    "tf32": Precision("tf32", tf32=True),
    "bf16": Precision("bf16", compute_dtype=torch.bfloat16),
    "fp16": Precision("fp16", compute_dtype=torch.float16, loss_scaling=LossScaling()),
    "fp8": Precision("fp8", compute_dtype=torch.bfloat16, float8=True),
    "bf16_full": Precision("bf16_full", torch.bfloat16, torch.bfloat16, torch.bfloat16),
}
