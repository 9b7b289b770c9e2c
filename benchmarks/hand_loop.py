"""The loop one would write by hand for recipe mlp_synthetic: data indexed by batch, fused AdamW, cosine schedule."""

from __future__ import annotations

import sys
import time

import torch
from torch import nn


def main(steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(10_000, 128, generator=generator)
    labels = torch.randint(10, (10_000,), generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    free = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    step = 0
    started = time.perf_counter()
    while step < steps:
        order = torch.randperm(len(features))
        for batch in order.split(64):
            loss = nn.functional.cross_entropy(model(features[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            step += 1
            if step == 1:
                print(f"first step {time.time():.6f}", flush=True)
            if step % 50 == 0:
                now = time.perf_counter()
                rate, started = 50 * 64 / (now - started), now
                print(
                    f"step {step} loss {loss.item():.4f} lr {scheduler.get_last_lr()[0]:.3g} {rate:.0f}/s", flush=True
                )
            if step == steps:
                break


if __name__ == "__main__":
    main(int(sys.argv[1]))
