"""Actor and critic with optimizers of their own, stepped at different rates, and losses that share a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from api.scripts.data import mlp, points, weights
from runner import Engine


def losses(actor: Any, critic: Any, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    value = critic(states).squeeze(-1)
    reward = (states.sum(-1) > 0).float() + actions.float()
    chosen = actor(states).log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)
    return -(chosen * (reward - value)).mean(), (reward - value).square().mean()


def train(**options: Any) -> dict[str, Any]:
    engine = Engine(split_batches=True, **options)
    actor, critic = mlp(1), mlp(2, last=1)
    slow = torch.optim.SGD(actor.parameters(), lr=0.05)
    quick = torch.optim.SGD(critic.parameters(), lr=0.05)
    loader = DataLoader(points(60), batch_size=12)
    actor, critic, slow, quick, loader = engine.prepare(actor, critic, slow, quick, loader)
    for number, (states, actions) in enumerate(loader):
        policy, value = losses(actor, critic, states, actions)
        engine.backward(policy + value)
        engine.clip_grad_value_(critic.parameters(), 0.2)
        quick.step()
        if number % 2:
            slow.step()
            slow.zero_grad()
        quick.zero_grad()
    return {"actor": weights(actor), "critic": weights(critic)}


def bare() -> dict[str, Any]:
    actor, critic = mlp(1), mlp(2, last=1)
    slow = torch.optim.SGD(actor.parameters(), lr=0.05)
    quick = torch.optim.SGD(critic.parameters(), lr=0.05)
    for number, (states, actions) in enumerate(DataLoader(points(60), batch_size=12)):
        policy, value = losses(actor, critic, states, actions)
        (policy + value).backward()
        torch.nn.utils.clip_grad_value_(critic.parameters(), 0.2)
        quick.step()
        if number % 2:
            slow.step()
            slow.zero_grad()
        quick.zero_grad()
    return {"actor": weights(actor), "critic": weights(critic)}
