"""Adam on plain tensors, whose moments are part of a method's state and so survive a round and a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fedstill.weights import State, Tensors, zeros_like


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015).

    Parameters
    ----------
    lr : float
        Learning rate, alpha.
    betas : (float, float)
        Decay of the first and of the second moments.
    epsilon : float
        Added to the denominator.
    weight_decay : float
        Added to the gradient (L2, not decoupled).
    keras : bool
        Where epsilon stands. PyTorch adds it to ``sqrt(v / (1 - beta_2^t))``; Keras to ``sqrt(v)``, which is
        ``epsilon / sqrt(1 - beta_2^t)`` in PyTorch's terms and so larger in the first steps.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    keras: bool = False

    @staticmethod
    def start(params: Tensors) -> State:
        """Return the state before the first step: ``first`` and ``second`` moments, and the ``count`` of steps."""
        count = {"steps": torch.zeros((), dtype=torch.int64)}
        return {"first": zeros_like(params), "second": zeros_like(params), "count": count}

    @torch.no_grad()
    def step(self, params: Tensors, grads: Tensors, state: State) -> None:
        """Move ``params`` and ``state`` in place by one step."""
        state["count"]["steps"] += 1
        t = int(state["count"]["steps"])
        names, (b1, b2) = list(params), self.betas
        values = [params[name] for name in names]
        given = [grads[name] for name in names]
        if self.weight_decay:
            given = list(torch._foreach_add(given, values, alpha=self.weight_decay))
        first, second = ([state[group][name] for name in names] for group in ("first", "second"))
        torch._foreach_lerp_(first, given, 1 - b1)
        torch._foreach_mul_(second, b2)
        torch._foreach_addcmul_(second, given, given, value=1 - b2)
        root = math.sqrt(1 - b2**t)
        epsilon = self.epsilon / root if self.keras else self.epsilon
        below = torch._foreach_sqrt(second)
        torch._foreach_div_(below, root)
        torch._foreach_add_(below, epsilon)
        torch._foreach_addcdiv_(values, first, list(below), value=-self.lr / (1 - b1**t))
