"""Dropout that does not wait for the random generator of the CPU."""

import numpy as np
import torch
from torch import Tensor, nn

STEPS = 2**16  # resolution of the probability


def keep_at_random(shape: torch.Size, dropout: float) -> Tensor:
    """A boolean CPU tensor, False with probability `dropout` (to the nearest 1 / 65536).

    Sixteen bits decide on an element, so a random word serves four. They come from NumPy's fastest
    generator, seeded from torch's: `torch.bernoulli` spends a word or more on each element, and
    dropout then takes as long as the matrix products round it.
    """
    elements = shape.numel()
    seed = int(torch.randint(2**63 - 1, ()))
    words = np.random.SFC64(seed).random_raw(-(-elements // 4))
    bits = torch.from_numpy(words.view(np.int16)[:elements])
    return (bits >= round(dropout * STEPS) - STEPS // 2).view(shape)


class Dropout(nn.Dropout):
    """`nn.Dropout`, several times as fast on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        keep = self.draw(x.shape, x.device)
        if keep is None:
            return super().forward(x)
        return torch.where(keep, x, 0.0).mul_(self.scale)

    @property
    def scale(self) -> float:
        """By what kept elements are multiplied, so that the mean stays."""
        return 1 / (1 - self.p)

    def draw(self, shape: torch.Size, device: torch.device) -> Tensor | None:
        """What to keep of a tensor; None where all is kept, or where torch's own way is right."""
        if not self.training or not 0 < self.p < 1 or device.type != "cpu":
            return None
        return keep_at_random(shape, self.p)
