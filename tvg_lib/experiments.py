"""One experiment: train a grounder, choose its weights on held-out videos, test, record.

Every notebook that trains goes through here, so that methods are compared at equal terms: the same
batches, the same selection, the same decoding, the same metrics with the same intervals.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from accelerate.utils import set_seed
from torch import Tensor, nn

from tvg_lib import paths
from tvg_lib.baselines import ClipScores
from tvg_lib.checkpoints import read_state
from tvg_lib.data.batching import BatchPlan, Crop
from tvg_lib.data.dataset import GroundingDataset
from tvg_lib.decoding import DecodingConfig, Prediction, ground
from tvg_lib.errors import ConfigurationError, DataError
from tvg_lib.evaluation import qvhighlights_report, recall_report
from tvg_lib.metrics import MetricReport
from tvg_lib.models.aligned_grounder import ground_aligned
from tvg_lib.models.snag import SnAG, SnagConfig
from tvg_lib.nn.points import PointGrid
from tvg_lib.results import RunRecord, new_record, records_folder, save
from tvg_lib.training import WEIGHTS, TrainingConfig, TrainingResult, run_key, train

COMMON_MODULES = (
    "tvg_lib.data.batching",
    "tvg_lib.decoding",
    "tvg_lib.evaluation",
    "tvg_lib.training",
)


@dataclass(frozen=True)
class GroundingRecipe:
    """How a grounder is trained and read, whatever its architecture.

    Attributes:
        training: of the loop; its seed also orders the batches and draws the first weights.
        videos_per_batch, queries_per_video, crop, similar_lengths: of the batches (`BatchPlan`).
        grid: which points answer for which moments (point grounders).
        decoding: from points to ranked moments, in validation and in the test.
        ks, thresholds: ranks and IoU of the recalls that are reported.
    """

    training: TrainingConfig = field(default_factory=TrainingConfig)
    videos_per_batch: int = 4
    queries_per_video: int = 4
    crop: Crop | None = None
    similar_lengths: bool = False
    grid: PointGrid = field(default_factory=PointGrid)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    ks: tuple[int, ...] = (1, 5)
    thresholds: tuple[float, ...] = (0.3, 0.5, 0.7)

    def with_seed(self, seed: int) -> "GroundingRecipe":
        """The same recipe from another seed."""
        return replace(self, training=replace(self.training, seed=seed))


class Reader(Protocol):
    """How a model answers every query of a data set, in the order of its queries."""

    def __call__(
        self,
        model: nn.Module,
        dataset: GroundingDataset,
        recipe: GroundingRecipe,
        external: ClipScores | None,
    ) -> list[Prediction]: ...


def read_points(
    model: nn.Module,
    dataset: GroundingDataset,
    recipe: GroundingRecipe,
    external: ClipScores | None = None,
) -> list[Prediction]:
    """Answers of a `PointGrounder`."""
    scores = None if external is None else external.of(dataset)
    return ground(model, dataset, recipe.decoding, recipe.grid, external=scores)


def read_ranked(
    model: nn.Module,
    dataset: GroundingDataset,
    recipe: GroundingRecipe,
    external: ClipScores | None = None,
) -> list[Prediction]:
    """Answers of a model whose output ranks moments itself (`RankedMoments`).

    Raises:
        ConfigurationError: external scores are given; such a model reads the similarity of clip and
            sentence already.
    """
    if external is not None:
        raise ConfigurationError("external scores multiply into points; this model has none")
    return ground_aligned(model, dataset, recipe.decoding)


@dataclass(frozen=True)
class TrainedGrounder:
    """A trained model and what its records must say about it.

    Attributes:
        training: the run; its model holds the selected weights, in evaluation mode.
        method, variant, scale, seed: for the records.
        recipe: of the run.
        parameters: everything that was configurable, resolved.
        modules: library modules that made the model.
        read: how it answers.
    """

    training: TrainingResult
    method: str
    variant: str
    scale: str
    seed: int
    recipe: GroundingRecipe
    parameters: dict[str, Any]
    modules: tuple[ModuleType | str, ...]
    read: Reader = read_points

    @property
    def model(self) -> nn.Module:
        """The selected weights, in evaluation mode."""
        return self.training.model


@dataclass(frozen=True)
class GroundingTest:
    """Answers of one system on one test set, their metrics, and the record that was written."""

    predictions: list[Prediction]
    report: MetricReport
    record: RunRecord


def grounding_metrics(
    predictions: Sequence[Prediction],
    dataset: GroundingDataset,
    ks: Sequence[int] = (1, 5),
    thresholds: Sequence[float] = (0.3, 0.5, 0.7),
) -> MetricReport:
    """Recall@K at IoU thresholds, mean IoU, and QVHighlights' moment metrics."""
    recall = recall_report(predictions, dataset, ks, thresholds)
    official = qvhighlights_report(predictions, dataset)
    return MetricReport(
        recall.query_ids,
        recall.values | official.values,
        recall.contributions | official.contributions,
        groups=recall.groups,
    )


def train_grounder(
    method: str,
    model: Callable[[], nn.Module],
    objective: Callable[[], nn.Module],
    recipe: GroundingRecipe,
    train_set: GroundingDataset,
    validation_set: GroundingDataset,
    *,
    scale: str,
    architecture: Any,
    modules: Sequence[ModuleType | str],
    variant: str = "main",
    read: Reader = read_points,
) -> TrainedGrounder:
    """Train, or load what is already trained; the best epoch on held-out videos is kept.

    Args:
        method, variant: names for the records, such as "snag" and "main".
        model, objective: build fresh ones; called after the generators are seeded.
        recipe: everything about training that is not the architecture.
        train_set, validation_set: share no video.
        scale: whose folder below `runs/` takes the run.
        architecture: the configuration of the model and objective, for the key and the records.
        modules: library modules that define model and objective.
        read: how the model answers, in validation and in the test.
    """
    modules = (*COMMON_MODULES, *modules)
    parameters = {"architecture": _plain(architecture), "recipe": asdict(recipe)}
    data_hash = train_set.fingerprint + validation_set.fingerprint
    # The recipe itself, not its dict: `run_key` knows what of a `TrainingConfig` decides a run.
    key = run_key([parameters["architecture"], recipe], code=modules, data_hash=data_hash)
    seed = recipe.training.seed
    set_seed(seed)
    built = model()
    result = train(
        built,
        objective(),
        BatchPlan(
            train_set,
            recipe.videos_per_batch,
            recipe.queries_per_video,
            seed,
            recipe.crop,
            similar_lengths=recipe.similar_lengths,
        ),
        recipe.training,
        paths.runs(scale) / "train" / f"{method}-{variant}-seed{seed}-{key}",
        validate=lambda candidate: (
            grounding_metrics(
                read(candidate, validation_set, recipe, None),
                validation_set,
                recipe.ks,
                recipe.thresholds,
            ).values
        ),
        key=key,
    )
    parameters |= {
        "trained_on": train_set.name,
        "validated_on": validation_set.name,
        "model_parameters": sum(p.numel() for p in result.model.parameters()),
        "selected": result.selected,
    }
    return TrainedGrounder(
        result, method, variant, scale, seed, recipe, parameters, tuple(modules), read
    )


def evaluate_grounder(
    trained: TrainedGrounder,
    test_set: GroundingDataset,
    *,
    external: ClipScores | None = None,
    variant: str | None = None,
) -> GroundingTest:
    """Test a trained model and write its record.

    Args:
        trained: as from `train_grounder`.
        test_set: named in the record by its `name`.
        external: clip scores multiplied into those of the points.
        variant: for the record, where it is not that of the training.
    """
    started = time.perf_counter()
    recipe = trained.recipe
    predictions = trained.read(trained.model, test_set, recipe, external)
    report = grounding_metrics(predictions, test_set, recipe.ks, recipe.thresholds)
    record = new_record(
        trained.method,
        test_set.name,
        trained.scale,
        trained.seed,
        parameters=trained.parameters | {"external": _plain(external)},
        metrics=report.estimates(),
        seconds=trained.training.seconds + time.perf_counter() - started,
        modules=trained.modules,
        variant=variant or trained.variant,
        data_hash=test_set.fingerprint,
        artifacts=[trained.training.run_dir],
    )
    save(record, records_folder(trained.scale, fresh=True))
    return GroundingTest(predictions, report, record)


def has_weights(record: RunRecord) -> bool:
    """Whether the trained weights of a record are on this machine."""
    return bool(record.artifacts) and _weights_file(record).is_file()


def recorded_weights(record: RunRecord) -> dict[str, Tensor]:
    """The trained weights of a record that this machine made.

    Raises:
        DataError: the record names no run, or its weights are not on this machine.
    """
    if not record.artifacts:
        raise DataError(f"{record.file_name} names no run with weights")
    return read_state(_weights_file(record))[0]


def _weights_file(record: RunRecord) -> Path:
    return paths.root() / record.artifacts[0] / WEIGHTS


def recorded_snag(record: RunRecord) -> Callable[[GroundingDataset], list[Prediction]]:
    """The answers of a SnAG that this machine trained, without external scores, to any data set.

    Args:
        record: of method "snag"; it says what the model is and how its points become moments.

    Raises:
        DataError: the record is of another method, or its weights are not on this machine.
    """
    if record.method != "snag":
        raise DataError(f"{record.file_name}: expected a record of snag")
    weights = recorded_weights(record)
    try:
        recipe = record.parameters["recipe"]
        model = SnAG(SnagConfig(**record.parameters["architecture"]))
        model.load_state_dict(weights)
        decoding, grid = DecodingConfig(**recipe["decoding"]), PointGrid(**recipe["grid"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"{record.file_name} does not describe its weights: {error}") from error
    return partial(ground, model.eval(), config=decoding, grid=grid)


def evaluate_baseline(
    method: str,
    predict: Callable[[GroundingDataset], list[Prediction]],
    test_set: GroundingDataset,
    *,
    scale: str,
    parameters: Any,
    modules: Sequence[ModuleType | str] = ("tvg_lib.baselines",),
    variant: str = "main",
) -> GroundingTest:
    """Test a method without training; its record is like any other (seed 0).

    Args:
        method, variant: names for the record.
        predict: the answers to all queries of a data set, in their order.
        test_set: named in the record by its `name`.
        scale: whose folder below `runs/` takes the record.
        parameters: everything configurable, for the record.
        modules: library modules that define the method.
    """
    started = time.perf_counter()
    predictions = predict(test_set)
    report = grounding_metrics(predictions, test_set)
    record = new_record(
        method,
        test_set.name,
        scale,
        0,
        parameters=_plain(parameters),
        metrics=report.estimates(),
        seconds=time.perf_counter() - started,
        modules=(*COMMON_MODULES, *modules),
        variant=variant,
        data_hash=test_set.fingerprint,
    )
    save(record, records_folder(scale, fresh=True))
    return GroundingTest(predictions, report, record)


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) else value
