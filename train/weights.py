"""The weights an optimizer steps: those of the module where they are fp32, and fp32 masters of those that are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rollout.ranks.world import local
from shards.errors import UserError


class Masters:
    """fp32 weights for an optimizer, by the names of the module's parameters.

    In bfloat16 an update of 1e-5 is rounded away, so such weights have a master, and their gradients are added up in
    fp32. A parameter that is fp32 already (LoRA, what diffusers keeps in fp32, and all that FSDP has sharded) is its
    own master; `dtypes` says what a forward rounds it to, when that is something else.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        self.weights = dict(weights)
        self.dtypes = {name: weight.dtype for name, weight in self.weights.items()} | dict(dtypes or {})
        self.parameters = {name: _master(weight) for name, weight in self.weights.items()}
        self._hooks = [
            weight.register_post_accumulate_grad_hook(_moving_gradient_to(self.parameters[name]))
            for name, weight in self._apart()
        ]

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the module, which then computes with them."""
        for name, weight in self._apart():
            weight.copy_(self.parameters[name])

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor], where: object) -> None:
        """Continue from stored masters, which must round to the weights of the module. UserError when they do not."""
        for name, weight in self.weights.items():
            stored = local(tensors[name]).to(weight.device, self.dtypes[name])
            if not torch.equal(stored, local(weight).to(self.dtypes[name])):
                raise UserError(
                    f"{where}: its weights are not those of the policy, first {name}",
                    "restore the policy folder of the iteration before as training left it; without its trainer/ a new "
                    "optimizer begins",
                )
        for name, master in self.parameters.items():
            if self.dtypes[name] != torch.float32:
                local(master).copy_(local(tensors[name]))

    def close(self) -> None:
        """Stop listening to the module's gradients."""
        for hook in self._hooks:
            hook.remove()

    def _apart(self) -> list[tuple[str, nn.Parameter]]:
        """The weights that have a master beside them."""
        return [(name, weight) for name, weight in self.weights.items() if self.parameters[name] is not weight]


class RolledOut:
    """The weights that sampled the rollouts, kept at `away` while training changes those of the module."""

    def __init__(self, weights: Mapping[str, nn.Parameter], away: torch.device) -> None:
        self.weights, self.away = weights, away
        self.kept = {name: local(value.detach()).to(away, copy=True) for name, value in weights.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the module has them, and no gradient is recorded. No backward pass may be pending."""
        with torch.no_grad():
            now = {name: local(weight).to(self.away, copy=True) for name, weight in self.weights.items()}
            try:
                self._put(self.kept)
                yield
            finally:
                self._put(now)

    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            local(weight).copy_(tensors[name])


def _master(weight: nn.Parameter) -> nn.Parameter:
    return weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float().clone())


def _moving_gradient_to(master: nn.Parameter) -> Callable[[Tensor], None]:
    def move(weight: Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        weight.grad = None

    return move
