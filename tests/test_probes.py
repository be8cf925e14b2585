"""The linear probe: what it must find where the answer is known."""

import numpy as np
import pytest
import torch
from grounding_data import make_dataset, small_snag

from tvg_lib import paths
from tvg_lib.comparisons import compare
from tvg_lib.errors import DataError
from tvg_lib.nn.pyramid import Pyramid
from tvg_lib.probes import MomentReadings, by_length, evaluate_probe, probe_levels, read_moments
from tvg_lib.results import fresh_records


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


def test_by_length_is_the_mean_of_the_moments_of_a_length():
    content, features = linear_world((0.5, 2), count=6)
    names = ("level 0", "level 1")
    report = probe_levels(
        readings(features, content, names), readings(features, content, names, first=1000)
    )
    found = by_length(report, np.array([5.0, 10.0, 10.1, 19, 41, 400]), (0.0, 10.0, 20.0, 40.0))
    for name in names:
        shares = report.contributions[name]
        assert found.values[name] == pytest.approx(shares.mean())
        assert found.values[f"{name}, 0-10 s"] == pytest.approx(shares[:2].mean())
        assert found.values[f"{name}, 10-20 s"] == pytest.approx(shares[2:4].mean())
        assert found.values[f"{name}, over 40 s"] == pytest.approx(shares[4:].mean())
        assert f"{name}, 20-40 s" not in found.values  # no such moment
        interval = found.estimates()[f"{name}, over 40 s"]
        assert interval.n == 2
    assert found.groups == report.groups


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
    # [2, 7] s: indices 1.5 to 6.5, centre 4: level 0 takes 3, 4, 5; level 1 (stride 2) takes 2,
    # 4, 6 (at most 3 clips away); level 2 (stride 4) takes 0, 4, 8.
    assert [found.features[n][0, 0] for n in found.names] == pytest.approx([-4, 4, 4, 4])
    # [17.5, 18.4] s: centre 17.45: clips 16, 17, 18; then 16, 18 (and not 20: it has ended);
    # then 12, 16.
    assert [found.features[n][2, 0] for n in found.names] == pytest.approx([-17, 17, 17, 14])
    # Contents: halves 1.5 to 4 and 4 to 6.5: clips 2, 3, 4 and 4, 5, 6.
    width = found.content.shape[1] // 2
    assert found.content[0, [0, width]].tolist() == pytest.approx([3, 5])
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
