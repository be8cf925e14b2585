"""One experiment: train a point grounder, choose its weights on held-out videos, test, record.

Every notebook that trains goes through here, so that methods are compared at equal terms: the same
batches, the same selection, the same decoding, the same metrics with the same intervals.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import ModuleType
from typing import Any

from accelerate.utils import set_seed
from torch import nn

from tvg_lib import paths
from tvg_lib.data.batching import BatchPlan, Crop
from tvg_lib.data.dataset import GroundingDataset
from tvg_lib.decoding import DecodingConfig, Prediction, ground
from tvg_lib.evaluation import qvhighlights_report, recall_report
from tvg_lib.metrics import MetricReport
from tvg_lib.models.point_grounder import PointGrounder
from tvg_lib.nn.points import PointGrid
from tvg_lib.results import RunRecord, new_record, records_folder, save
from tvg_lib.training import TrainingConfig, TrainingResult, run_key, train

COMMON_MODULES = (
    "tvg_lib.data.batching",
    "tvg_lib.decoding",
    "tvg_lib.evaluation",
    "tvg_lib.training",
)


@dataclass(frozen=True)
class GroundingRecipe:
    """How a point grounder is trained and read, whatever its architecture.

    Attributes:
        training: of the loop; its seed also orders the batches and draws the first weights.
        videos_per_batch, queries_per_video, crop: of the batches.
        grid: which points answer for which moments.
        decoding: from points to ranked moments, in validation and in the test.
    """

    training: TrainingConfig = field(default_factory=TrainingConfig)
    videos_per_batch: int = 4
    queries_per_video: int = 4
    crop: Crop | None = None
    grid: PointGrid = field(default_factory=PointGrid)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)

    def with_seed(self, seed: int) -> "GroundingRecipe":
        """The same recipe from another seed."""
        return replace(self, training=replace(self.training, seed=seed))


@dataclass(frozen=True)
class Outcome:
    """What an experiment leaves in memory: the trained model and, per test set, answers."""

    training: TrainingResult
    predictions: dict[str, list[Prediction]]
    reports: dict[str, MetricReport]
    records: dict[str, RunRecord]

    @property
    def model(self) -> PointGrounder:
        """The selected weights, in evaluation mode."""
        return self.training.model


def grounding_metrics(predictions: Sequence[Prediction], dataset: GroundingDataset) -> MetricReport:
    """Recall@{1, 5} at IoU 0.3, 0.5, 0.7, mean IoU, and QVHighlights' moment metrics."""
    recall = recall_report(predictions, dataset)
    official = qvhighlights_report(predictions, dataset)
    return MetricReport(
        recall.query_ids,
        recall.values | official.values,
        recall.contributions | official.contributions,
    )


def run_grounding(
    method: str,
    model: Callable[[], PointGrounder],
    objective: Callable[[], nn.Module],
    recipe: GroundingRecipe,
    train_set: GroundingDataset,
    validation_set: GroundingDataset,
    test_sets: Mapping[str, GroundingDataset],
    *,
    scale: str,
    architecture: Any,
    modules: Sequence[ModuleType | str],
    variant: str = "main",
) -> Outcome:
    """Train (or load what is already trained), test on every test set, and write the records.

    Args:
        method, variant: names for the records, such as "snag" and "main".
        model, objective: build fresh ones; called after the generators are seeded.
        recipe: everything about training that is not the architecture.
        train_set, validation_set, test_sets: never share a video.
        scale: whose folder below `runs/` takes the run and its records.
        architecture: the configuration of the model and objective, for the key and the records.
        modules: library modules that define model and objective.
    """
    modules = (*COMMON_MODULES, *modules)
    parameters = {"architecture": _plain(architecture), "recipe": asdict(recipe)}
    key = run_key(
        parameters, code=modules, data_hash=train_set.fingerprint + validation_set.fingerprint
    )
    seed = recipe.training.seed
    set_seed(seed)
    built = model()
    result = train(
        built,
        objective(),
        BatchPlan(train_set, recipe.videos_per_batch, recipe.queries_per_video, seed, recipe.crop),
        recipe.training,
        paths.runs(scale) / "train" / f"{method}-{variant}-seed{seed}-{key}",
        validate=lambda candidate: (
            grounding_metrics(
                ground(candidate, validation_set, recipe.decoding, recipe.grid), validation_set
            ).values
        ),
        key=key,
    )
    predictions, reports, records = {}, {}, {}
    for name, dataset in test_sets.items():
        predictions[name] = ground(result.model, dataset, recipe.decoding, recipe.grid)
        reports[name] = grounding_metrics(predictions[name], dataset)
        records[name] = new_record(
            method,
            name,
            scale,
            seed,
            parameters=parameters
            | {
                "trained_on": train_set.name,
                "model_parameters": sum(p.numel() for p in result.model.parameters()),
                "selected": result.selected,
            },
            metrics=reports[name].estimates(),
            seconds=result.seconds,
            modules=modules,
            variant=variant,
            data_hash=dataset.fingerprint,
            artifacts=[result.run_dir],
        )
        save(records[name], records_folder(scale, fresh=True))
    return Outcome(result, predictions, reports, records)


def record_baseline(
    method: str,
    predictions: Sequence[Prediction],
    dataset: GroundingDataset,
    name: str,
    *,
    scale: str,
    parameters: Any,
    modules: Sequence[ModuleType | str],
    seconds: float,
) -> MetricReport:
    """Metrics of a method without training, written as a record like any other (seed 0)."""
    report = grounding_metrics(predictions, dataset)
    record = new_record(
        method,
        name,
        scale,
        0,
        parameters=parameters,
        metrics=report.estimates(),
        seconds=seconds,
        modules=modules,
        data_hash=dataset.fingerprint,
    )
    save(record, records_folder(scale, fresh=True))
    return report


def _plain(value: Any) -> Any:
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value
