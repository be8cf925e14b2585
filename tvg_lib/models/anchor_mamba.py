"""The block of HieraMamba: an anchor between every two tokens, a scan, local attention, gates.

    symbol    here                                  what it is
    a_n       AnchorPooling                         summary of tokens 2n and 2n + 1
    x         interleave(anchors, tokens)           [a_0, t_0, t_1, a_1, t_2, t_3, ...]
    g, f      AnchorMambaPooling._globally          after the state-space layer, and behind its gate
    l, h      AnchorMambaPooling._locally           after local attention, and behind its gate
    y         AnchorMambaPooling._encoded           what is parted into tokens and anchors again

Notebook 20 builds it by hand. The paper's equations are not at hand here beyond the abstract; the
letters are ours, the arithmetic that of the released code (jbistanbul/hieramamba @ 03a8a95).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.nn.anchor_pooling import AnchorPooling, Pooling, group, interleave, separate
from tvg_lib.nn.attention import TransformerBlock
from tvg_lib.nn.dropout import Dropout
from tvg_lib.nn.sequence import LayerScale, zero_invalid
from tvg_lib.ssm import Hydra, Mamba2

Merge = Literal["gate", "residual", "scaled_skip"]


class Gate(nn.Linear):
    """sigmoid(W [x, y] + b), per channel: how much of a branch is let in."""

    def __init__(self, channels: int) -> None:
        super().__init__(2 * channels, channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Args: x, y (..., C). Returns (..., C) in (0, 1)."""
        old, new = self.weight.chunk(2, dim=1)  # two products cost less than a concatenation
        return (F.linear(x, old, self.bias) + F.linear(y, new)).sigmoid_()


class SwiGLU(nn.Module):
    """W2 (SiLU(W_g x) * W_v x), 8/3 wide (Shazeer 2020)."""

    def __init__(self, channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = 8 * channels // 3
        self.gate_and_value = nn.Linear(channels, 2 * hidden, bias=False)
        self.output = nn.Linear(hidden, channels, bias=False)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        gate, value = self.gate_and_value(x).chunk(2, dim=-1)
        return self.dropout(self.output(F.silu(gate) * value))


class AnchorMambaPooling(nn.Module):
    """One block: anchors in, a global and a local encoder, a feed-forward, anchors out.

        x = interleave(anchors, tokens)
        g = x + scale * Global(norm(x))        f = x + gate(x, g) * (g - x)
        l = f + scale * Local(norm(f))         h = f + gate(f, l) * (l - f)
        y = h + scale * FeedForward(norm(h))

    Args:
        channels: C.
        stride: tokens per anchor.
        pooling: see `AnchorPooling`.
        anchored: put anchors between the tokens. Without (plain strided pooling, for comparison)
            the encoders see the tokens alone, and anchors are pooled from what comes out.
        bidirectional: Hydra as the global encoder, else Mamba-2, which hears only the past.
        state, expand, head_channels, taps: of the global encoder (d_state, expand, headdim,
            d_conv); `taps` None takes each layer's own default, 7 or 4.
        window: of local attention over the mixed sequence; 0 is full attention, None leaves the
            local encoder out.
        local_heads: heads of the local attention.
        merge: "gate" as above; "residual" takes g and l whole; "scaled_skip" is the released
            ungated block, which has the layer scale on the skip connection of the global encoder
            instead of its branch, so that x all but vanishes: g = Global(norm(x)) + scale * x.
        feed_forward: "linear" is one linear layer and GELU, "swiglu" a gated network; None takes
            the first behind local attention and the second without, as released.
        dropout: of the feed-forward and rate of stochastic depth.
        leak_padding: let padding into scan and anchors, as the released code does.
    """

    def __init__(
        self,
        channels: int,
        stride: int = 2,
        pooling: Pooling = "mean",
        anchored: bool = True,
        bidirectional: bool = True,
        state: int = 64,
        expand: float = 2,
        head_channels: int = 64,
        taps: int | None = None,
        window: int | None = 5,
        local_heads: int = 2,
        merge: Merge = "gate",
        feed_forward: Literal["linear", "swiglu"] | None = None,
        dropout: float = 0.1,
        leak_padding: bool = False,
    ) -> None:
        super().__init__()
        if merge not in ("gate", "residual", "scaled_skip"):
            raise ValueError(
                f"unknown merge {merge!r}; expected 'gate', 'residual' or 'scaled_skip'"
            )
        self.stride = stride
        self.anchored = anchored
        self.merge: Merge = merge
        self.leak_padding = leak_padding
        self.pooling = AnchorPooling(channels, pooling, dropout, leak_padding)
        self.global_norm = nn.RMSNorm(channels, eps=1e-6)
        layer, own_taps = (Hydra, 7) if bidirectional else (Mamba2, 4)
        self.global_encoder = layer(
            channels, d_state=state, d_conv=taps or own_taps, expand=expand, headdim=head_channels
        )
        self.global_scale = LayerScale(channels, dropout)
        self.global_gate = Gate(channels) if merge == "gate" else None
        self.local_encoder = None
        if window is not None:
            self.local_norm = nn.RMSNorm(channels, eps=1e-6)
            self.local_encoder = TransformerBlock(channels, local_heads, window=window)
            self.local_scale = LayerScale(channels, dropout)
            self.local_gate = Gate(channels) if merge == "gate" else None
        self.feed_forward_norm = nn.RMSNorm(channels, eps=1e-6)
        kind = feed_forward or ("swiglu" if window is None else "linear")
        self.feed_forward = (
            SwiGLU(channels, dropout)
            if kind == "swiglu"
            else nn.Sequential(nn.Linear(channels, channels), nn.GELU(), Dropout(dropout))
        )
        self.feed_forward_scale = LayerScale(channels, dropout)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Enrich the tokens and make their anchors.

        Args:
            x: (B, T, C), zero where `mask` (B, T) is False.

        Returns:
            tokens (B, T, C), anchors (B, N, C) and the anchors' mask (B, N), N = ceil(T / stride);
            zero where invalid.
        """
        length = x.shape[1]
        tokens, valid = group(x, mask, self.stride)
        anchor_mask = valid.any(2)
        if self.anchored:
            mixed = interleave(self.pooling(tokens, valid), tokens)
            x = self._encoded(mixed, interleave(anchor_mask, valid))
            anchors, tokens = separate(x, self.stride, length)
            anchors, tokens = zero_invalid(anchors, anchor_mask), zero_invalid(tokens, mask)
        else:
            tokens = zero_invalid(self._encoded(x, mask), mask)
            anchors = self.pooling(*group(tokens, mask, self.stride))
        return tokens, anchors, anchor_mask

    def _encoded(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self._globally(x, mask)
        if self.local_encoder is not None:
            x = self._locally(x, mask)
        return x + self.feed_forward_scale(self.feed_forward(self.feed_forward_norm(x)))

    def _globally(self, x: Tensor, mask: Tensor) -> Tensor:
        whole = self.leak_padding or (mask.device.type == "cpu" and bool(mask.all()))
        branch = self.global_encoder(self.global_norm(x), None if whole else mask)
        if self.merge == "scaled_skip":
            return zero_invalid(branch + self.global_scale(x), mask)
        return self._merged(x, self.global_scale(branch), self.global_gate)

    def _locally(self, x: Tensor, mask: Tensor) -> Tensor:
        branch, _ = self.local_encoder(self.local_norm(x), mask)
        return self._merged(x, self.local_scale(branch), self.local_gate)

    @staticmethod
    def _merged(x: Tensor, branch: Tensor, gate: Gate | None) -> Tensor:
        whole = x + branch
        return whole if gate is None else torch.addcmul(x, gate(x, whole), branch)
