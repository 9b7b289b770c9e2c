"""What the parity runs train beside the perceptron: a small transformer without dropout on tokens of uneven count."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import TensorDataset

from runner import distributed
from runner.train.hook import Hook
from runner.train.run import Run
from runner.train.task import Task

IGNORED = -100


class Block(nn.Module):
    """Causal attention and a feed-forward part, each after a norm and beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(*qkv.unbind(0), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm_forward(x))))


class Transformer(nn.Module):
    """Tokens (batch, length) to logits (batch, length, vocabulary)."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def token_data(samples: int, length: int, vocabulary: int, seed: int = 0) -> TensorDataset:
    """Random tokens and the next ones as targets; each sample counts a different number of them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (samples, length + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    counted = torch.randint(1, length + 1, (samples, 1), generator=generator)
    targets[torch.arange(length) >= counted] = IGNORED
    return TensorDataset(tokens[:, :-1], targets)


class NextToken(Task):
    """Cross entropy, summed over the tokens that count."""

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return cross_entropy(outputs.flatten(0, 1), batch[1].flatten(), reduction="sum", ignore_index=IGNORED)

    def weight(self, batch: Any) -> Tensor:
        return (batch[1] != IGNORED).sum()


class Memory(Hook):
    """Writes memory_N.json: bytes of this process before a model exists (imports done), and at its peak."""

    def __init__(self) -> None:
        import torch.distributed.checkpoint
        import torch.distributed.fsdp
        import torch.distributed.tensor  # imports count as before

        torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
        self.before = _peak()

    def on_run_end(self, run: Run) -> None:
        path = Path(run.folder.path, f"memory_{distributed.rank()}.json")
        path.write_text(json.dumps({"before": self.before, "peak": _peak()}))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
