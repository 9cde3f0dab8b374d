"""Where the parts of a policy are: at rest in host memory, on the device while they work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

Module = TypeVar("Module", bound=nn.Module)


class Offload:
    """Brings the modules of a part of a policy to the device and sends them away again. On a CPU nothing moves."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._homes: dict[nn.Module, dict[str, Tensor]] = {}

    def enter(self, module: nn.Module) -> None:
        """Bring a module to the device. Frozen weights keep their host copy, so that leaving costs no transfer."""
        if self.device.type == "cpu" or module in self._homes:
            return
        if isinstance(module, FSDPModule):
            module.to(self.device)  # FSDP keeps account of its shards in this call alone
            return
        home = {name: tensor.data for name, tensor in _tensors(module) if not tensor.requires_grad}
        for _, tensor in _tensors(module):
            tensor.data = tensor.data.to(self.device, non_blocking=True)
        self._homes[module] = home

    def leave(self, module: nn.Module) -> None:
        """Give a module's frozen weights their host copies back; weights that learn are copied from the device."""
        if isinstance(module, FSDPModule) and self.device.type != "cpu":
            module.to("cpu")
        home = self._homes.pop(module, None)
        if home is None:
            return
        for name, tensor in _tensors(module):
            kept = home.get(name) if not tensor.requires_grad else None
            tensor.data = tensor.data.cpu() if kept is None else kept

    @contextlib.contextmanager
    def working(self, module: Module) -> Iterator[Module]:
        """A helper module on the device for as long as it works."""
        self.enter(module)
        try:
            yield module
        finally:
            self.leave(module)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
