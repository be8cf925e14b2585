"""Multi-head attention: full, cross, and local in a sliding window (linear in length)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tvg_lib.nn.dropout import Dropout
from tvg_lib.nn.feed_forward import FeedForward
from tvg_lib.nn.sequence import (
    LayerScale,
    MaskedConv1d,
    masked_max_pool,
    repeat_rows,
    zero_invalid,
)


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, radius: int, dropout: float = 0.0
) -> Tensor:
    """Attention of each step to the valid steps at most `radius` away.

    Queries are cut into blocks; each block meets the keys of its own stretch and `radius` more on
    both sides, so the cost is linear in T.

    Args:
        q, k, v: (B, H, T, D).
        mask: (B, T) True where valid.
        radius: half-width of the window; window size is 2 * radius + 1.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, H, T, D), zero at invalid steps.
    """
    batch, heads, steps, depth = q.shape
    block = min(max(16, 2 * radius), steps)
    blocks = -(-steps // block)
    tail = blocks * block - steps
    span = block + 2 * radius
    q = F.pad(q, (0, 0, 0, tail)).reshape(batch, heads, blocks, block, depth)
    k, v = (
        F.pad(x, (0, 0, radius, radius + tail)).unfold(2, span, block) for x in (k, v)
    )  # (B, H, blocks, D, span)
    valid = F.pad(mask, (radius, radius + tail)).unfold(1, span, block)  # (B, blocks, span)
    offset = torch.arange(span, device=q.device) - torch.arange(block, device=q.device)[:, None]
    near = (offset >= 0) & (offset <= 2 * radius)  # (block, span)
    allowed = (near & valid[:, :, None])[:, None]  # (B, 1, blocks, block, span)
    scores = (q / math.sqrt(depth)) @ k
    # A finite fill: a step with no valid neighbour gets uniform weights, not NaN, and is zeroed.
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
    weights = F.dropout(weights, dropout, training=dropout > 0)
    out = (weights @ v.transpose(-1, -2)).reshape(batch, heads, blocks * block, depth)
    return out[:, :, :steps].masked_fill(~mask[:, None, :, None], 0.0)


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention with masked keys; local when `window` is positive.

    Args:
        channels: width of queries and of the attention space.
        heads: number of heads; divides `channels`.
        key_channels: width of keys and values, where it differs.
        out_channels: width of the output, where it differs.
        window: odd window size of local self-attention; 0 attends to every valid key.
        attention_dropout, dropout: on attention weights and on the output.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        key_channels: int | None = None,
        out_channels: int | None = None,
        window: int = 0,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be shared by {heads} heads")
        if window and window % 2 == 0:
            raise ValueError(f"a local window has an odd size, found {window}")
        self.heads, self.window = heads, window
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(key_channels or channels, channels)
        self.value = nn.Linear(key_channels or channels, channels)
        self.output = nn.Linear(channels, out_channels or channels)
        self.attention_dropout = attention_dropout
        self.dropout = Dropout(dropout)
        for layer in (self.query, self.key, self.value, self.output):
            nn.init.zeros_(layer.bias)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, row: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            q: (B, T, C) queries.
            k, v: (N, K, C_k) keys and values.
            key_mask: (N, K); for local attention it masks the queries too.
            row: (N,) row of `q` that each row of `k` belongs to, where N != B; the projection of a
                query is then computed once and shared.

        Returns:
            (N, T, C_out)
        """
        drop = self.attention_dropout if self.training else 0.0
        if not self.window and self.heads * k.shape[1] < self.query.out_features < q.shape[1]:
            return self.dropout(self._attend_to_few(q, k, v, key_mask, row, drop))
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, q), (self.key, k), (self.value, v))
        )  # (., H, ., D)
        if row is not None:
            q = repeat_rows(q, row)
        if self.window:
            out = local_attention(q, k, v, key_mask, self.window // 2, drop)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=key_mask[:, None, None, :], dropout_p=drop
            )
        return self.dropout(self.output(out.transpose(1, 2).flatten(2)))

    def _attend_to_few(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, row: Tensor | None, drop: float
    ) -> Tensor:
        """The same for many queries and few keys, H * K < C, with less arithmetic.

        Products are associative: (q W_q) k^T = q (W_q k^T) and (a v) W_o = a (v W_o). The brackets
        on the right are taken once per key, those on the left once per query and with C for H * K.
        """
        heads = (self.heads, -1)
        k = self.key(k).unflatten(-1, heads) / math.sqrt(self.query.out_features // self.heads)
        v = self.value(v).unflatten(-1, heads)  # (N, K, H, D)
        into = self.query.weight.unflatten(0, heads)  # (H, D, C)
        out_of = self.output.weight.unflatten(1, heads)  # (C_out, H, D)
        keys = torch.einsum("nkhd,hdc->nhkc", k, into)
        bias = torch.einsum("nkhd,hd->nhk", k, self.query.bias.unflatten(0, heads))
        bias = bias.masked_fill(~key_mask[:, None], torch.finfo(bias.dtype).min)
        values = torch.einsum("nkhd,ohd->nhko", v, out_of).flatten(1, 2)  # (N, H K, C_out)
        q = q if row is None else repeat_rows(q, row)
        scores = torch.baddbmm(bias.flatten(1)[:, None], q, keys.flatten(1, 2).transpose(1, 2))
        weights = scores.unflatten(-1, heads).softmax(-1)  # (N, T, H, K)
        weights = F.dropout(weights, drop, training=drop > 0)
        return torch.bmm(weights.flatten(2), values).add_(self.output.bias)


class ConvolutionalProjection(nn.Module):
    """Depthwise convolution over three steps and layer norm, in front of an attention input."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.convolution = MaskedConv1d(channels, channels, 3, stride=stride, groups=channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Args: x (B, T, C), mask (B, T). Returns (B, T/stride, C)."""
        return self.norm(self.convolution(x, mask)[0])


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and feed-forward, both on scaled residual branches.

    With `convolutional`, queries, keys and values each pass a depthwise convolution first, and
    `stride` 2 halves the sequence; the skip connection is then a max pooling (MSCL, equations 2-4;
    the max pooling is read from SnAG's released code).
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        convolutional: bool = True,
        stride: int = 1,
        window: int = 0,
        expansion: int = 4,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if stride > 1 and not convolutional:
            raise ValueError("only a convolutional block can change the length")
        self.stride = stride
        self.attention_norm = nn.LayerNorm(channels)
        self.projections = nn.ModuleDict(
            {name: ConvolutionalProjection(channels, stride) for name in ("query", "key", "value")}
            if convolutional
            else {}
        )
        self.attention = MultiHeadAttention(
            channels,
            heads,
            window=window,
            attention_dropout=attention_dropout,
            dropout=dropout,
        )
        self.attention_scale = LayerScale(channels, drop_path)
        self.feed_forward_norm = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, expansion, dropout)
        self.feed_forward_scale = LayerScale(channels, drop_path)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Args: x (B, T, C), mask (B, T). Returns (B, T/stride, C) and its mask."""
        x = zero_invalid(x, mask)
        normed = self.attention_norm(x)
        if self.projections:
            q, k, v = (self.projections[n](normed, mask) for n in ("query", "key", "value"))
        else:
            q = k = v = normed
        if self.stride > 1:
            x = masked_max_pool(x, mask, self.stride)
            mask = mask[:, :: self.stride]
        x = x + self.attention_scale(self.attention(q, k, v, mask))
        x = x + self.feed_forward_scale(self.feed_forward(self.feed_forward_norm(x)))
        return zero_invalid(x, mask), mask
