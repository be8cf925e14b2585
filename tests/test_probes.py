"""The linear probe: what it must find where the answer is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from grounding_data import make_dataset, small_snag

from tvg_lib import paths
from tvg_lib.comparisons import compare
from tvg_lib.errors import DataError
from tvg_lib.nn.pyramid import Pyramid
from tvg_lib.probes import MomentReadings, evaluate_probe, probe_levels, read_moments
from tvg_lib.results import fresh_records

BINS = {"0-10 s": slice(0, 2), "10-20 s": slice(2, 4), "over 40 s": slice(4, 6)}


def readings(features, content, names=("level 0",), first=0):
    count = len(content)
    return MomentReadings(
        names,
        dict(zip(names, features, strict=True)),
        content,
        np.ones(count),
        tuple(f"q{first + n}/0" for n in range(count)),
        tuple(f"v{first + n}" for n in range(count)),
    )


def linear_world(noise, seed=0, count=400):
    """Content, and levels that hold it up to noise of growing length."""
    rng = np.random.default_rng(seed)
    content = rng.standard_normal((count, 3))
    mixing = np.random.default_rng(99).standard_normal((3, 6))
    return content, [content @ mixing + level * rng.standard_normal((count, 6)) for level in noise]


def test_what_is_there_is_found_and_what_is_not_is_not():
    names = ("Z0", "level 0", "level 1")
    train_content, train = linear_world((0, 1, 1e3))
    held_content, held = linear_world((0, 1, 1e3), seed=1)
    report = probe_levels(
        readings(train, train_content, names), readings(held, held_content, names, first=1000)
    )
    assert report.values["Z0"] == pytest.approx(100, abs=0.1)
    assert 60 < report.values["level 0"] < 95
    assert report.values["level 1"] == pytest.approx(0, abs=3)
    for name in names:
        assert report.contributions[name].mean() == pytest.approx(report.values[name])
    estimates = report.estimates()
    assert estimates["level 0"].low < report.values["level 0"] < estimates["level 0"].high


def test_equals_least_squares_written_out():
    """With the smallest penalty the probe is ordinary least squares with an intercept."""
    content, (features,) = linear_world((0.3,))
    held_content, (held,) = linear_world((0.3,), seed=1)
    report = probe_levels(readings([features], content), readings([held], held_content, first=1000))
    design = np.column_stack([features, np.ones(len(features))])
    weights, *_ = np.linalg.lstsq(design, content, rcond=None)
    error = np.column_stack([held, np.ones(len(held))]) @ weights - held_content
    total = held_content - content.mean(0)
    expected = 100 * (1 - (error**2).sum() / (total**2).sum())
    assert report.values["level 0"] == pytest.approx(expected, abs=0.2)


def test_a_length_is_scored_on_its_own_variance():
    """Of each bin: one minus the squared errors over the squared distances, of its moments only."""
    content, (features,) = linear_world((0.7,), count=40)
    held_content, (held,) = linear_world((0.7,), seed=1, count=6)
    held_content[3:] *= 4  # other lengths, other variance
    train = readings([features], content)
    asked = replace(
        readings([held], held_content, first=1000),
        seconds=np.array([5.0, 10.0, 10.1, 19, 41, 400]),
    )
    found = probe_levels(train, asked, (0.0, 10.0, 20.0, 40.0))
    whole = probe_levels(train, asked)
    assert set(found.values) == {"level 0", *(f"level 0, {b}" for b in BINS)}  # none of 20-40 s
    assert found.values["level 0"] == pytest.approx(whole.values["level 0"])
    distances = ((held_content - content.mean(0)) ** 2).sum(1)
    errors = (1 - whole.contributions["level 0"] / 100) * distances.mean()
    for name, members in BINS.items():
        expected = 100 * (1 - errors[members].sum() / distances[members].sum())
        assert found.values[f"level 0, {name}"] == pytest.approx(expected)
        shares = found.contributions[f"level 0, {name}"]
        assert np.isnan(np.delete(shares, np.r_[members])).all()
        assert found.estimates()[f"level 0, {name}"].n == len(distances[members])


def test_the_mean_explains_nothing_of_any_length():
    """Features that say nothing leave the training mean: about 0 % of short and of long moments."""
    content, _ = linear_world((0,))
    held_content, _ = linear_world((0,), seed=1)
    train = readings([np.random.default_rng(2).standard_normal((400, 2))], content)
    held = readings([np.random.default_rng(3).standard_normal((400, 2))], held_content, first=1000)
    held = replace(held, seconds=np.linspace(1, 99, 400))
    found = probe_levels(train, held, (0.0, 10.0, 50.0))
    assert all(abs(value) < 3 for value in found.values.values()), found.values


class ClipsAsTheyAre(torch.nn.Module):
    """A model whose levels are every 2^l-th clip, so that readings can be computed by hand."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def encode_video(self, video, mask):
        steps = [1, 2, 4]
        return Pyramid(
            tuple(video[:, ::s] for s in steps), tuple(mask[:, ::s] for s in steps), base=-video
        )


def test_readings_by_hand():
    dataset = make_dataset(
        {"a": 12, "b": 20}, [("a", [[2.0, 7.0]]), ("b", [[0.0, 20.0], [17.5, 18.4]])]
    )
    model = ClipsAsTheyAre().train()
    found = read_moments(model, dataset, parts=2)
    assert model.training
    assert found.names == ("Z0", "level 0", "level 1", "level 2")
    assert found.moments == ("q0/0", "q1/0", "q1/1")
    assert found.recordings == ("a", "b", "b")
    assert found.seconds.tolist() == pytest.approx([5.0, 20.0, 0.9])
    # Channel 0 of a clip is its index; second s is at index s - 0.5 on this grid.
    # [2, 7] s: indices 1.5 to 6.5, halves 1.5 to 4 and 4 to 6.5: clips 2, 3, 4 and 4, 5, 6; level 1
    # has 2, 4 and 4, 6; level 2 has 4 in both.
    width = found.content.shape[1] // 2
    assert found.content[0, [0, width]].tolist() == pytest.approx([3, 5])
    read = [found.features[n][0, [0, width]].tolist() for n in found.names]
    assert read == [[-3, -5], [3, 5], [3, 5], [4, 4]]
    # [17.5, 18.4] s: indices 17 to 17.9, halves 17 to 17.45 and 17.45 to 17.9: clip 17, and none,
    # so the nearest, 18. Level 1 has 16 and 18: 8.5 to 8.725 and 8.725 to 8.95 are nearest to 9.
    # Level 2: 4.25 to 4.3625 and on are nearest to 4, which is clip 16.
    read = [found.features[n][2, [0, width]].tolist() for n in found.names]
    assert read == [[-17, -18], [17, 18], [18, 18], [16, 16]]
    # A stretch without a clip takes the nearest: 17 to 17.45 holds clip 17, the next none.
    assert found.content[2, [0, width]].tolist() == pytest.approx([17, 18])


def test_a_real_model_and_its_errors():
    dataset = make_dataset(
        {f"v{n}": 24 for n in range(12)},
        [(f"v{n}", [[float(n % 5), 6.0 + n]]) for n in range(12)],
    )
    model = small_snag().float()
    train = read_moments(model, dataset.subset([f"v{n}" for n in range(8)], "train"))
    held = read_moments(model, dataset.subset([f"v{n}" for n in range(8, 12)], "held"))
    report = probe_levels(train, held)
    assert list(report.values) == ["Z0", "level 0", "level 1", "level 2", "level 3"]
    assert all(value <= 100 for value in report.values.values())
    with pytest.raises(DataError, match="unseen recordings"):
        probe_levels(train, train)
    with pytest.raises(DataError, match="five training recordings"):
        probe_levels(held, train)
    with pytest.raises(DataError, match="at least one part"):
        read_moments(model, dataset, parts=0)


def test_a_probe_is_recorded_and_two_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "root", lambda: tmp_path)
    dataset = make_dataset(
        {f"v{n}": 24 for n in range(12)},
        [(f"v{n}", [[float(n % 5), 6.0 + n]]) for n in range(12)],
    )
    train = dataset.subset([f"v{n}" for n in range(8)], "train")
    held = dataset.subset([f"v{n}" for n in range(8, 12)], "held")
    first, second = (
        evaluate_probe(
            small_snag().float(),
            train,
            held,
            parts=2,
            edges=(0.0, 10.0),
            scale="cpu",
            method=method,
            variant="probe",
            seed=3,
            parameters={"channels": 8},
            modules=["tvg_lib.models.snag"],
        )
        for method in ("snag", "mscl")
    )
    assert first.record.metrics["level 2, over 10 s"].value == pytest.approx(
        first.report.values["level 2, over 10 s"]
    )
    *_, difference = compare([second], [first], modules=["tvg_lib.models.snag"]).values()
    assert set(difference) == set(first.report.values)
    recorded = {(r.method, r.variant, r.seed) for r in fresh_records("cpu")}
    assert ("snag", "probe", 3) in recorded
    assert ("mscl-probe-minus-snag-probe", "main", 3) in recorded
