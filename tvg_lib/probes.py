"""How much of a moment can be read back from each level of a pyramid: a linear probe.

MSCL starts from the claim that "information contained in representations of longer moments will
gradually degrade" from level to level. Here that is measured. A moment is cut into `parts` equal
stretches. What it holds are its clips, averaged over each stretch; what a level says about it are
the level's points, averaged over the same stretches (the nearest point where a stretch holds none,
as the upper levels have it for short moments). A ridge regression from the second to the first,
fitted on training videos, is scored on others: the share of the content's variance that it
explains.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import torch

from tvg_lib.data.batching import evaluation_batches
from tvg_lib.data.dataset import GroundingDataset
from tvg_lib.errors import DataError
from tvg_lib.metrics.report import MetricReport
from tvg_lib.models.point_grounder import PointGrounder
from tvg_lib.nn.pyramid import Pyramid
from tvg_lib.results import RunRecord, new_record, records_folder, save

PENALTIES = tuple(10.0**k for k in range(-4, 3))  # of the ridge, per training moment


@dataclass(frozen=True)
class MomentReadings:
    """Every moment of a data set as its levels show it, and what it holds.

    Attributes:
        names: of the levels: "Z0" where the encoder keeps it, then "level 0", "level 1", ...
        features: by name, (N, parts * D).
        content: (N, parts * C) of the input.
        seconds: (N,) length of each moment.
        moments: names of the moments, `<query id>/<number>`.
        recordings: what each moment belongs to; none is in two halves of a probe.
    """

    names: tuple[str, ...]
    features: dict[str, np.ndarray]
    content: np.ndarray
    seconds: np.ndarray
    moments: tuple[str, ...]
    recordings: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.moments)


@torch.inference_mode()
def read_moments(
    model: PointGrounder,
    dataset: GroundingDataset,
    parts: int = 1,
) -> MomentReadings:
    """Read all moments of a data set from all levels.

    Args:
        model: encodes the videos, without queries; left in the mode it came in.
        dataset: its queries' moments are read. A moment asked for twice counts twice.
        parts: stretches of a moment that are averaged apart. 1 asks what a moment is about, 3 also
            in which order.
    """
    if parts < 1:
        raise DataError(f"a moment has at least one part, found {parts}")
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    features: dict[str, list[np.ndarray]] = {}
    content, seconds, moments, recordings = [], [], [], []
    try:
        for batch in evaluation_batches(dataset):
            batch = batch.to(device)
            levels = _levels(model.encode_video(batch.video, batch.video_mask))
            for q, m in batch.moment_mask.nonzero().tolist():
                query = dataset.query(batch.query_ids[q])
                start, end = batch.moments[q, m].tolist()
                row = int(batch.query_video[q])
                clips = batch.video[row, batch.video_mask[row]]
                content.append(_stretches(clips, start, end, parts))
                for name, (points, mask, stride) in levels.items():
                    read = _stretches(points[row, mask[row]], start / stride, end / stride, parts)
                    features.setdefault(name, []).append(read)
                seconds.append(float(np.diff(query.moments[m])[0]))
                moments.append(f"{query.id}/{m}")
                recordings.append(dataset.recording_of(query))
    finally:
        model.train(training)
    return MomentReadings(
        names=tuple(features),
        features={name: np.stack(found) for name, found in features.items()},
        content=np.stack(content),
        seconds=np.array(seconds),
        moments=tuple(moments),
        recordings=tuple(recordings),
    )


def _levels(pyramid: Pyramid) -> dict[str, tuple[torch.Tensor, torch.Tensor, int]]:
    """By name: points (B, T, D), mask (B, T), and clips per point."""
    found = {}
    if pyramid.base is not None:
        found["Z0"] = pyramid.base, pyramid.masks[0], pyramid.clips_per_step
    for level, (points, mask) in enumerate(zip(pyramid.levels, pyramid.masks, strict=True)):
        found[f"level {level}"] = points, mask, pyramid.clips_per_step * 2**level
    return found


def _stretches(points: torch.Tensor, start: float, end: float, parts: int) -> np.ndarray:
    """(parts * D,) mean of the points (T, D) in each equal stretch of an interval.

    Args:
        points: one at each whole number.
        start, end: of the interval. Where a stretch holds no point, the nearest counts.
        parts: stretches.
    """
    place = torch.arange(len(points), device=points.device)
    edges = np.linspace(start, end, parts + 1)
    means = []
    for low, high in pairwise(edges):
        inside = (place >= low) & (place <= high)
        if not inside.any():
            inside = place == min(max(round((low + high) / 2), 0), len(points) - 1)
        means.append(points[inside].float().mean(0))
    return torch.cat(means).cpu().numpy()


def probe_levels(
    train: MomentReadings, held_out: MomentReadings, edges: Sequence[float] = ()
) -> MetricReport:
    """Fit a ridge regression per level on `train` and score it on `held_out`.

    The penalty of each level is chosen on a fifth of the training recordings. Both readings come
    from the same model.

    Args:
        train, held_out: readings.
        edges: seconds of the bins (low, high] of lengths; the last bin is open.

    Returns:
        By level, the percentage of the variance of the held-out content that is explained (R^2
        against the training mean). Each moment's contribution is its share, so that models can be
        compared pair by pair (`minus`). With `edges` also by level and length, such as "level 3,
        20-40 s" and "level 3, over 40 s": the same regression, scored on the variance of these
        moments alone. Bins without moments are left out.

    Raises:
        DataError: the two share a recording, or there are too few recordings to choose a penalty.
    """
    if shared := set(train.recordings) & set(held_out.recordings):
        raise DataError(
            f"a probe is scored on unseen recordings, found {sorted(shared)[0]!r} twice"
        )
    groups = sorted(set(train.recordings))
    if len(groups) < 5:
        raise DataError(f"a probe needs five training recordings or more, found {len(groups)}")
    inner = np.isin(train.recordings, groups[::5])
    bins = {"": np.ones(len(held_out), bool)}
    bins |= {f", {name}": members for name, members in length_bins(held_out.seconds, edges).items()}
    contributions = {}
    for name in train.names:
        x, y = train.features[name], train.content
        scores = [
            _explained(predicted, y[inner], y[~inner].mean(0)).mean()
            for predicted in _ridge(x[~inner], y[~inner], x[inner], PENALTIES)
        ]
        penalty = PENALTIES[int(np.argmax(scores))]
        (predicted,) = _ridge(x, y, held_out.features[name], (penalty,))
        for suffix, members in bins.items():
            shares = np.full(len(held_out), np.nan)
            shares[members] = 100 * _explained(
                predicted[members], held_out.content[members], y.mean(0)
            )
            contributions[name + suffix] = shares
    return MetricReport(
        held_out.moments,
        {name: float(np.nanmean(shares)) for name, shares in contributions.items()},
        contributions,
        groups=held_out.recordings,
    )


def length_bins(seconds: np.ndarray, edges: Sequence[float]) -> dict[str, np.ndarray]:
    """Which of some lengths (N,) each bin has, by name, such as "10-20 s" and "over 40 s".

    Args:
        seconds: the lengths.
        edges: seconds of the bins (low, high]; the last bin is open. Empty bins are left out.
    """
    bins = {}
    for low, high in pairwise([*edges, np.inf]):
        name = f"over {low:g} s" if high == np.inf else f"{low:g}-{high:g} s"
        members = (seconds > low) & (seconds <= high)
        if members.any():
            bins[name] = members
    return bins


def _ridge(
    x: np.ndarray, y: np.ndarray, unseen: np.ndarray, penalties: tuple[float, ...]
) -> list[np.ndarray]:
    """Predictions for `unseen` with each penalty; inputs are standardised, outputs centred."""
    x, y, unseen = (a.astype(np.float64) for a in (x, y, unseen))
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x, unseen = (x - mean) / scale, (unseen - mean) / scale
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    projected = vectors.T @ (x.T @ (y - y.mean(0)) / len(x))
    return [
        unseen @ (vectors @ (projected / (values.clip(min=0) + penalty)[:, None])) + y.mean(0)
        for penalty in penalties
    ]


def _explained(predicted: np.ndarray, content: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """(N,) 1 - squared error over the mean squared distance to `mean`; its mean is R^2."""
    error = ((predicted - content) ** 2).sum(1)
    return 1 - error / ((content - mean) ** 2).sum(1).mean()


@dataclass(frozen=True)
class ProbeTest:
    """What the levels of one model hold of the moments of a test set, and the record of it."""

    report: MetricReport
    record: RunRecord


def evaluate_probe(
    model: PointGrounder,
    train_set: GroundingDataset,
    test_set: GroundingDataset,
    *,
    parts: int,
    edges: Sequence[float],
    scale: str,
    method: str,
    variant: str,
    seed: int,
    parameters: Any,
    modules: Sequence[ModuleType | str],
) -> ProbeTest:
    """Probe every level of a model, and record it.

    Args:
        model: whose levels are read.
        train_set, test_set: the probe is fitted on the one and scored on the other.
        parts: see `read_moments`.
        edges: of the lengths of moments, see `probe_levels`.
        scale: whose folder below `runs/` takes the record.
        method, variant, seed, parameters: of the model, for the record.
        modules: library modules that define the model.
    """
    started = time.perf_counter()
    report = probe_levels(
        read_moments(model, train_set, parts), read_moments(model, test_set, parts), edges
    )
    record = new_record(
        method,
        test_set.name,
        scale,
        seed,
        variant=variant,
        parameters={"model": parameters, "parts": parts, "probed_on": train_set.name},
        metrics=report.estimates(),
        seconds=time.perf_counter() - started,
        modules=("tvg_lib.probes", *modules),
        data_hash=test_set.fingerprint,
    )
    save(record, records_folder(scale, fresh=True))
    return ProbeTest(report, record)
