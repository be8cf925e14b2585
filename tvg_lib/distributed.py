"""The little that losses must know about training in several processes.

The processes of a run share every batch: each computes the loss of its own videos, and the sum
over processes is the loss of the joint batch. So an objective returns *shares*: a sum over its own
points divided by a normaliser that is the same everywhere. A normaliser counted from the batch
(number of positives, of valid queries, ...) therefore goes through `reduce_sum` first. In one
process `reduce_sum` changes nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_whole_batch: ContextVar[bool] = ContextVar("_whole_batch", default=False)


def reduce_sum(value: Tensor) -> Tensor:
    """Sum of a count or statistic over all processes; carries no gradient.

    Every process must call it equally often and in the same order: never inside a condition that
    depends on the data.

    Args:
        value: any shape, the same in every process.

    Returns:
        The same shape and dtype; a detached copy of `value` in a single process.
    """
    total = value.detach().clone()
    if not _whole_batch.get() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total


@contextmanager
def whole_batch(active: bool = True) -> Iterator[None]:
    """Within it every process holds the whole batch, so that `reduce_sum` has nothing to add.

    The training loop uses it for batches with fewer videos than there are processes.
    """
    token = _whole_batch.set(active)
    try:
        yield
    finally:
        _whole_batch.reset(token)
