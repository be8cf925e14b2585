"""How much of a moment can be read back from each level of a pyramid: a linear probe.

MSCL starts from the claim that "information contained in representations of longer moments will
gradually degrade" from level to level. Here that is measured. What a moment holds are its clip
features: the mean of the clips in each of `parts` equal stretches of it. What a level says about
the moment is the mean of its targets there (centre-sampled, without a range, as MSCL takes them). A
ridge regression from the second to the first, fitted on training videos, is scored on held-out
videos: the share of the content's variance that it explains.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import torch

from tvg_lib.data.batching import GroundingBatch, evaluation_batches
from tvg_lib.data.dataset import GroundingDataset
from tvg_lib.errors import DataError
from tvg_lib.losses.multiscale import gather_steps, target_sets
from tvg_lib.metrics.report import MetricReport
from tvg_lib.models.point_grounder import PointGrounder
from tvg_lib.results import RunRecord, new_record, records_folder, save

PENALTIES = tuple(10.0**k for k in range(-4, 3))  # of the ridge, per training moment


@dataclass(frozen=True)
class MomentReadings:
    """Every moment of a data set as its levels show it, and what it holds.

    Attributes:
        names: of the levels: "Z0" where the encoder keeps it, then "level 0", "level 1", ...
        features: by name, (N, D).
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
    center_radius: float = 1.5,
) -> MomentReadings:
    """Read all moments of a data set from all levels.

    Args:
        model: encodes the videos, without queries; left in the mode it came in.
        dataset: its queries' moments are read. A moment asked for twice counts twice.
        parts: stretches of a moment whose clips are averaged apart. 1 asks what a moment is about,
            3 also in which order.
        center_radius: of the targets, in strides.
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
            for name, found in _levels(model, batch, center_radius).items():
                features.setdefault(name, []).append(found)
            for q, m in batch.moment_mask.nonzero().tolist():
                query = dataset.query(batch.query_ids[q])
                start, end = batch.moments[q, m].tolist()
                row = int(batch.query_video[q])
                clips = batch.video[row, batch.video_mask[row]]
                content.append(_content(clips, start, end, parts).cpu().numpy())
                seconds.append(float(np.diff(query.moments[m])[0]))
                moments.append(f"{query.id}/{m}")
                recordings.append(dataset.recording_of(query))
    finally:
        model.train(training)
    return MomentReadings(
        names=tuple(features),
        features={name: np.concatenate(found) for name, found in features.items()},
        content=np.stack(content),
        seconds=np.array(seconds),
        moments=tuple(moments),
        recordings=tuple(recordings),
    )


def _levels(
    model: PointGrounder, batch: GroundingBatch, center_radius: float
) -> dict[str, np.ndarray]:
    """By level, (N, D) the mean over each moment's targets; the nearest step if it has none."""
    pyramid = model.encode_video(batch.video, batch.video_mask)
    query, number = batch.moment_mask.nonzero(as_tuple=True)
    row = batch.query_video[query]
    moment = batch.moments[query, number] / pyramid.clips_per_step  # (N, 2)
    valid = torch.cat(pyramid.masks, dim=1)[row]
    alone = torch.ones(len(moment), 1, dtype=torch.bool, device=moment.device)
    # The printed rule, so that a short moment has targets on high levels, too.
    targets, _ = target_sets(
        pyramid.lengths, moment[:, None], alone, valid, center_radius, inside=False
    )
    found = {}
    for level, (x, chosen) in enumerate(
        zip(pyramid.levels, targets.split(pyramid.lengths, 1), strict=True)
    ):
        last = pyramid.masks[level][row].sum(1) - 1
        nearest = (moment.mean(1) / 2**level).round().long().clamp(min=0).minimum(last)
        chosen = chosen | (
            ~chosen.any(1, keepdim=True)
            & (torch.arange(chosen.shape[1], device=chosen.device) == nearest[:, None])
        )
        sources = {f"level {level}": x}
        if level == 0 and pyramid.base is not None:
            sources = {"Z0": pyramid.base} | sources
        for name, source in sources.items():
            features, mask, _ = gather_steps(source, row, chosen)
            mean = (features * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            found[name] = mean.float().cpu().numpy()
    return found


def _content(clips: torch.Tensor, start: float, end: float, parts: int) -> torch.Tensor:
    """(parts * C,) mean clip of each equal stretch; the nearest clip where a stretch holds none."""
    place = torch.arange(len(clips), device=clips.device)
    edges = np.linspace(start, end, parts + 1)
    means = []
    for low, high in pairwise(edges):
        inside = (place >= low) & (place <= high)
        if not inside.any():
            inside = place == min(max(round((low + high) / 2), 0), len(clips) - 1)
        means.append(clips[inside].float().mean(0))
    return torch.cat(means)


def probe_levels(train: MomentReadings, held_out: MomentReadings) -> MetricReport:
    """Fit a ridge regression per level on `train` and score it on `held_out`.

    The penalty of each level is chosen on a fifth of the training recordings. Both readings come
    from the same model.

    Returns:
        By level, the percentage of the variance of the held-out content that is explained (R^2
        against the training mean). Each moment's contribution is its share, so that models can be
        compared pair by pair (`minus`) and drawn by length.

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
    contributions = {}
    for name in train.names:
        x, y = train.features[name], train.content
        scores = [
            _explained(predicted, y[inner], y[~inner].mean(0)).mean()
            for predicted in _ridge(x[~inner], y[~inner], x[inner], PENALTIES)
        ]
        penalty = PENALTIES[int(np.argmax(scores))]
        (predicted,) = _ridge(x, y, held_out.features[name], (penalty,))
        contributions[name] = 100 * _explained(predicted, held_out.content, y.mean(0))
    return MetricReport(
        held_out.moments,
        {name: float(found.mean()) for name, found in contributions.items()},
        contributions,
        groups=held_out.recordings,
    )


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


def by_length(report: MetricReport, seconds: np.ndarray, edges: Sequence[float]) -> MetricReport:
    """The report, and every level again for moments of some lengths alone.

    Args:
        report: of `probe_levels`.
        seconds: (N,) length of its moments, as in `MomentReadings`.
        edges: seconds of the bins (low, high]; the last bin is open.

    Returns:
        With metrics such as "level 3, 20-40 s" and "level 3, over 40 s"; contributions of other
        moments are NaN. Bins without moments are left out.
    """
    contributions = dict(report.contributions)
    for low, high in pairwise([*edges, np.inf]):
        members = (seconds > low) & (seconds <= high)
        bin_name = f"over {low:g} s" if high == np.inf else f"{low:g}-{high:g} s"
        if members.any():
            for name, shares in report.contributions.items():
                contributions[f"{name}, {bin_name}"] = np.where(members, shares, np.nan)
    values = {name: float(np.nanmean(shares)) for name, shares in contributions.items()}
    return MetricReport(report.query_ids, values, contributions, groups=report.groups)


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
        edges: of the lengths of moments, see `by_length`.
        scale: whose folder below `runs/` takes the record.
        method, variant, seed, parameters: of the model, for the record.
        modules: library modules that define the model.
    """
    started = time.perf_counter()
    readings = read_moments(model, test_set, parts)
    levels = probe_levels(read_moments(model, train_set, parts), readings)
    report = by_length(levels, readings.seconds, edges)
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
