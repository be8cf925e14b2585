"""Small models, batches and data sets that several test files share."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from tvg_lib.data.batching import GroundingBatch
from tvg_lib.data.dataset import GroundingDataset, Query, Video
from tvg_lib.models.snag import SnAG, SnagConfig
from tvg_lib.moments import TimeGrid

SMALL = SnagConfig(
    video_dim=5,
    text_dim=6,
    channels=8,
    heads=2,
    levels=4,
    window=5,
    max_clips=48,
    text_channels=12,
    text_heads=2,
    text_layers=1,
    max_words=7,
)
ONE_SECOND = TimeGrid(clip_size=1, stride=1, fps=1)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 and eval mode, every parameter large enough to matter.

    Fresh models hide faults: their residual branches are scaled by 1e-4 and their biases are zero.
    """
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if parameter.dim() > 1:
                parameter.copy_(noise * (1.5 / parameter[0].numel() ** 0.5))
            else:
                parameter.copy_(0.5 + 0.2 * noise)
    return model


def small_snag(seed: int = 0, **changes: object) -> SnAG:
    """A small float64 SnAG; `changes` replace fields of `SMALL`."""
    return randomised(SnAG(replace(SMALL, **changes)), seed)


def mask_of(lengths: Sequence[int], steps: int | None = None) -> Tensor:
    """(N, T) True on the first `lengths[n]` steps."""
    return torch.arange(steps or max(lengths)) < torch.tensor(lengths)[:, None]


def make_batch(
    video_lengths: Sequence[int],
    query_video: Sequence[int],
    word_counts: Sequence[int],
    seed: int = 0,
    video_dim: int = SMALL.video_dim,
    text_dim: int = SMALL.text_dim,
) -> GroundingBatch:
    """Random float64 features with one random moment per query; zeros at padding."""
    generator = torch.Generator().manual_seed(seed)
    video_mask, text_mask = mask_of(video_lengths), mask_of(word_counts)
    video = torch.randn(*video_mask.shape, video_dim, generator=generator, dtype=torch.float64)
    text = torch.randn(*text_mask.shape, text_dim, generator=generator, dtype=torch.float64)
    rows = torch.tensor(query_video)
    spans = torch.rand(len(rows), 1, 2, generator=generator, dtype=torch.float64).sort(-1).values
    lengths = torch.tensor(video_lengths, dtype=torch.float64)
    return GroundingBatch(
        video=video * video_mask[..., None],
        video_mask=video_mask,
        text=text * text_mask[..., None],
        text_mask=text_mask,
        query_video=rows,
        moments=spans * lengths[rows][:, None, None],
        moment_mask=torch.ones(len(rows), 1, dtype=torch.bool),
        video_ids=tuple(f"v{n}" for n in range(len(video_lengths))),
        query_ids=tuple(f"q{n}" for n in range(len(rows))),
        grids=(ONE_SECOND,) * len(video_lengths),
        durations=tuple(float(n) for n in video_lengths),
    )


class MemoryStore:
    """A feature store over a dictionary that remembers what was read."""

    def __init__(self, sequences: Mapping[str, np.ndarray]) -> None:
        self.sequences = dict(sequences)
        self.reads: list[str] = []

    @property
    def dim(self) -> int:
        return next(iter(self.sequences.values())).shape[1]

    def __getitem__(self, key: str) -> np.ndarray:
        self.reads.append(key)
        return self.sequences[key].copy()

    def __contains__(self, key: object) -> bool:
        return key in self.sequences

    def __iter__(self) -> Iterator[str]:
        return iter(self.sequences)

    def __len__(self) -> int:
        return len(self.sequences)


def make_dataset(
    videos: Mapping[str, int],
    queries: Sequence[tuple[str, list[list[float]]]],
    grid: TimeGrid = ONE_SECOND,
    seed: int = 0,
    video_dim: int = SMALL.video_dim,
    text_dim: int = SMALL.text_dim,
) -> GroundingDataset:
    """A data set in memory.

    Args:
        videos: number of clips by id. Channel 0 of a clip's features is its index.
        queries: video id and moments in seconds of each; their ids are q0, q1, ...
    """
    rng = np.random.default_rng(seed)
    features = {}
    for video_id, clips in videos.items():
        features[video_id] = rng.standard_normal((clips, video_dim)).astype(np.float32)
        features[video_id][:, 0] = np.arange(clips)
    return GroundingDataset(
        name="made-up",
        videos={
            video_id: Video(video_id, grid.offset + clips * grid.step, grid)
            for video_id, clips in videos.items()
        },
        queries=tuple(
            Query(f"q{n}", video_id, f"question {n}", np.array(moments, dtype=float).reshape(-1, 2))
            for n, (video_id, moments) in enumerate(queries)
        ),
        video_features=MemoryStore(features),
        text_features=MemoryStore(
            {
                f"q{n}": rng.standard_normal((2 + n % 3, text_dim)).astype(np.float32)
                for n in range(len(queries))
            }
        ),
    )
