"""Models of fake tensors: they have shapes, dtypes and a device, here or not, and compute nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default,
    aten.masked_select.default, aten.unique_consecutive.default, aten._unique2.default,
}  # fmt: skip
"""Operations whose answer the host needs before it can continue."""


class HostRead(Exception):
    """The host would have to wait for the device."""


class NoHostReads(TorchDispatchMode):
    """Raises HostRead where the host reads from another device than a CPU: .item(), .cpu(), .tolist(), bool(tensor).

    `open` is a way out for what may read: while it is set, nothing is refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.open = False
        self.seen = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.seen += 1
        if not self.open:
            self._check(function, args, kwargs)
        return function(*args, **kwargs)

    def _check(self, function: Any, args: Any, kwargs: Any) -> None:
        away = [one for one in args if isinstance(one, Tensor) and one.device.type != "cpu"]
        if function in READS and away:
            raise HostRead(f"{function}")
        if function is aten._to_copy.default and away:
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cpu":
                raise HostRead(f"{function} to the host")
        if function is aten.copy_.default and args[0].device.type == "cpu" and len(away) > 0:
            raise HostRead(f"{function} to the host")
        chosen = args[1] if function is aten.index.Tensor and away else ()
        if any(one is not None and one.dtype == torch.bool for one in chosen):
            raise HostRead(f"{function} by a boolean tensor")


def onto(module: nn.Module, device: str) -> nn.Module:
    """Put fake weights of a device in the place of a module's own; inside a FakeTensorMode."""
    made: dict[Tensor, nn.Parameter] = {}  # weights that two modules share stay one
    for part in module.modules():
        for name, weight in [*part._parameters.items()]:
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=weight.dtype, device=device)
                own = made.setdefault(weight, nn.Parameter(fake, requires_grad=weight.requires_grad))
                part._parameters[name] = own
        for name, buffer in [*part._buffers.items()]:
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return module
