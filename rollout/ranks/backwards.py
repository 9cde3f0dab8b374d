"""A backward pass for each forward, so that FSDP can scatter the gradient of a block as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Backwards:
    """Cuts forwards out of the graph of a loss, and runs their backward passes one at a time, the last forward first.

    Guidance needs two forwards. In one backward pass autograd adds up both gradients of a weight before it hands them
    on, so that between one forward and the other the gradients of all blocks wait, whole, on every rank. The price: the
    gradients of a block are scattered once per forward.
    """

    def __init__(self, announce: Callable[[bool], None] = lambda last: None) -> None:
        """`announce` gets, before each pass through a forward, whether it is the last one."""
        self._announce = announce
        self._cuts: list[tuple[Tensor, Tensor]] = []

    def cut(self, out: Tensor) -> Tensor:
        """The answer of a forward, of any shape, for a loss to be computed from."""
        if not out.requires_grad:
            return out
        leaf = out.detach().requires_grad_()
        self._cuts.append((out, leaf))
        return leaf

    def run(self, loss: Tensor) -> None:
        """Gradients of a scalar loss with respect to all weights, through the forwards since the last call."""
        cuts, self._cuts = self._cuts, []
        loss.backward()  # type: ignore[no-untyped-call]
        passes = [(out, leaf.grad) for out, leaf in cuts if leaf.grad is not None]
        del cuts
        while passes:
            out, gradient = passes.pop()
            self._announce(not passes)
            out.backward(gradient)  # type: ignore[no-untyped-call]
