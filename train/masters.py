"""The weights an optimizer steps: those of the module where they are fp32, and fp32 masters of those that are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from shards.errors import UserError


class Masters:
    """fp32 weights for an optimizer, by the names of the module's parameters.

    In bfloat16 an update of 1e-5 is rounded away, so such weights have a master, and their gradients are added up in
    fp32. A parameter that is fp32 already (LoRA, and what diffusers keeps in fp32) is its own master.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self.weights = dict(weights)
        self.parameters = {name: _master(weight) for name, weight in self.weights.items()}
        self._hooks = [
            weight.register_post_accumulate_grad_hook(_moving_gradient_to(self.parameters[name]))
            for name, weight in self._rounded()
        ]

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the module, which then computes with them."""
        for name, weight in self._rounded():
            weight.copy_(self.parameters[name])

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor], where: object) -> None:
        """Go on from stored masters, which must round to the weights of the module. UserError when they do not."""
        for name, weight in self.weights.items():
            if not torch.equal(tensors[name].to(weight), weight):
                raise UserError(
                    f"{where}: its weights are not those of the policy, first {name}",
                    "restore the policy folder of the iteration before as training left it",
                )
        for name, _ in self._rounded():
            self.parameters[name].copy_(tensors[name])

    def close(self) -> None:
        """Stop listening to the module's gradients."""
        for hook in self._hooks:
            hook.remove()

    def _rounded(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, weight) for name, weight in self.weights.items() if self.parameters[name] is not weight]


def _master(weight: nn.Parameter) -> nn.Parameter:
    return weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float().clone())


def _moving_gradient_to(master: nn.Parameter) -> Callable[[Tensor], None]:
    def move(weight: Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        weight.grad = None

    return move
