"""Backward passes by hand give first derivatives; this makes them refuse to pretend to more."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

Backward = TypeVar("Backward", bound=Callable[..., Any])


def first_order(backward: Backward) -> Backward:
    """Decorate the `backward` of an `autograd.Function` that cannot be differentiated again.

    PyTorch's own `once_differentiable` hangs an error behind the gradients, but `autograd.grad` by
    chosen inputs never walks there: the second derivatives come out, and are wrong.

    Raises:
        RuntimeError: by the decorated function, where a graph of the backward pass is asked for.
    """

    @wraps(backward)
    def refusing(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "second derivatives (create_graph=True) of this operation are not implemented"
            )
        return backward(ctx, *gradients)

    return refusing  # type: ignore[return-value]
