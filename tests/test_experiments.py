"""From data to record: what every training notebook goes through, on a small planted world."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from _training_run import SMALL_SNAG

from tvg_lib.baselines import ClipScores, MomentPrior, ZeroShotWindow
from tvg_lib.data.dataset import GroundingDataset
from tvg_lib.data.planted import PlantedConfig, planted
from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.experiments import (
    GroundingRecipe,
    TrainedGrounder,
    evaluate_baseline,
    evaluate_grounder,
    grounding_metrics,
    has_weights,
    read_points,
    read_ranked,
    recorded_snag,
    train_grounder,
)
from tvg_lib.losses.detection import DetectionObjective
from tvg_lib.models.snag import SnAG
from tvg_lib.results import load_records, records_folder
from tvg_lib.training import TrainingConfig

WORLD = PlantedConfig(train=12, val=6, test=6, clips=(12, 24), queries=2, dim=16)
RECIPE = GroundingRecipe(
    training=TrainingConfig(
        epochs=2, warmup_epochs=1, select_by="mIoU", device="cpu", progress=False
    )
)


@pytest.fixture(scope="module")
def data() -> dict[str, GroundingDataset]:
    return {split: planted(split, WORLD) for split in ("train", "val", "test")}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkout of its own, where runs and records go."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "notebooks").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVG_ROOT", str(root))
        yield root


def trained(data: dict[str, GroundingDataset], recipe: GroundingRecipe = RECIPE):
    return train_grounder(
        "snag",
        lambda: SnAG(SMALL_SNAG),
        lambda: DetectionObjective(norm_start=10),
        recipe,
        data["train"],
        data["val"],
        scale="cpu",
        architecture=SMALL_SNAG,
        modules=["tvg_lib.models.snag", "tvg_lib.losses.detection"],
    )


@pytest.fixture(scope="module")
def run(data: dict[str, GroundingDataset], checkout: Path) -> TrainedGrounder:
    return trained(data)


def test_the_kept_weights_are_the_best_on_the_held_out_videos(run, data) -> None:
    answers = read_points(run.model, data["val"], RECIPE)
    again = grounding_metrics(answers, data["val"]).values
    scores = [row["mIoU"] for row in run.training.validations]
    assert len(scores) == 2
    assert again["mIoU"] == pytest.approx(max(scores))
    assert run.parameters["selected"]["mIoU"] == max(scores)


def test_the_record_says_what_was_done(run, data, checkout) -> None:
    test = evaluate_grounder(run, data["test"])
    (record,) = load_records(records_folder("cpu", fresh=True))
    assert record == test.record
    assert (record.method, record.variant, record.seed) == ("snag", "main", 0)
    assert record.dataset == data["test"].name
    assert record.data_hash == data["test"].fingerprint
    assert record.parameters["trained_on"] == data["train"].name
    assert record.parameters["validated_on"] == data["val"].name
    assert record.parameters["recipe"]["training"]["epochs"] == 2
    assert record.parameters["architecture"]["levels"] == SMALL_SNAG.levels
    assert record.parameters["model_parameters"] == sum(p.numel() for p in run.model.parameters())
    assert record.seconds >= round(run.training.seconds, 2)
    (folder,) = record.artifacts
    assert (checkout / folder / "weights.safetensors").is_file()
    for name, metric in record.metrics.items():
        assert metric.value == test.report.values[name]
        assert metric.low <= metric.high
    assert {"R1@0.5", "R5@0.7", "mIoU", "MR-full-mAP"} <= record.metrics.keys()
    # the same model read another way stands beside it
    other = evaluate_grounder(
        run, data["test"], external=ClipScores(), variant="external-scores"
    ).record
    assert other.parameters["external"] == {"smoothing": 5, "temperature": 0.1}
    assert load_records(records_folder("cpu", fresh=True)) == [other, record]


def test_a_recorded_model_answers_again(run, data, checkout) -> None:
    test = evaluate_grounder(run, data["test"])
    (record,) = [r for r in load_records(records_folder("cpu", fresh=True)) if r.variant == "main"]
    assert has_weights(record)
    again = recorded_snag(record)(data["test"])
    for found, expected in zip(again, test.predictions, strict=True):
        np.testing.assert_array_equal(found.moments, expected.moments)
    nowhere, other = replace(record, artifacts=()), replace(record, method="hieramamba")
    assert not has_weights(nowhere)
    assert not has_weights(replace(record, artifacts=("runs/cpu/train/gone",)))
    with pytest.raises(DataError, match="names no run"):
        recorded_snag(nowhere)
    with pytest.raises(DataError, match="expected a record of snag"):
        recorded_snag(other)
    with pytest.raises(DataError, match="does not describe"):
        recorded_snag(replace(record, parameters={}))


def test_what_decides_a_run_names_its_folder(run, data) -> None:
    same = trained(data, replace(RECIPE, training=replace(RECIPE.training, checkpoint_every=7)))
    assert same.training.loaded
    assert same.training.run_dir == run.training.run_dir
    assert same.training.steps == run.training.steps
    for changed in (
        RECIPE.with_seed(1),
        replace(RECIPE, videos_per_batch=3),
        replace(RECIPE, training=replace(RECIPE.training, epochs=1)),
    ):
        other = trained(data, changed)
        assert not other.training.loaded
        assert other.training.run_dir != run.training.run_dir
    assert trained(data | {"train": data["val"], "val": data["train"]}).training.loaded is False


def test_a_rule_has_a_record_like_any_other(data, checkout) -> None:
    prior = MomentPrior.fitted(data["train"])
    test = evaluate_baseline(
        "prior", prior.predict, data["test"], scale="full", parameters={"keep": 10}
    )
    (record,) = load_records(records_folder("full", fresh=True))
    assert record == test.record
    assert record.parameters == {"keep": 10}
    assert record.metrics["R1@0.5"].value == test.report.values["R1@0.5"]
    assert len(test.predictions) == len(data["test"])


def test_ranked_answers_take_no_external_scores(run, data) -> None:
    with pytest.raises(ConfigurationError, match="has none"):
        read_ranked(run.model, data["test"], RECIPE, ClipScores())


def test_highlights_are_reported_only_where_every_query_is_rated(
    data: dict[str, GroundingDataset],
) -> None:
    answers = ZeroShotWindow().predict(data["val"])
    assert all(answer.saliency is not None for answer in answers)
    rated = grounding_metrics(answers, data["val"]).values
    first, *others = data["val"].queries
    unrated = replace(data["val"], queries=(replace(first, saliency=None), *others))
    plain = grounding_metrics(answers, unrated).values
    assert any(name.startswith("HL-") for name in rated)
    assert plain == {name: v for name, v in rated.items() if not name.startswith("HL-")}
