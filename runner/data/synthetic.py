"""Random data for experiments and tests that need no download."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset


def random_classification(samples: int, features: int, classes: int, seed: int = 0) -> TensorDataset:
    """Standard normal features (samples, features) in float32 and uniform int64 labels (samples,)."""
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(samples, features, generator=generator),
        torch.randint(classes, (samples,), generator=generator),
    )


def separable_classification(
    samples: int, features: int, classes: int, seed: int = 0, noise: float = 0.5
) -> TensorDataset:
    """Labels that can be learnt: each class has a centre (the same for every `seed`), samples lie around theirs."""
    centres = torch.randn(classes, features, generator=torch.Generator().manual_seed(classes * 1_000_003 + features))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=generator)
    return TensorDataset(centres[labels] + noise * torch.randn(samples, features, generator=generator), labels)
