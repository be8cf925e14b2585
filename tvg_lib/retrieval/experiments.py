"""One retrieval experiment: train, choose the epoch on held-out videos, test, record."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from accelerate.utils import set_seed
from torch import nn

from tvg_lib import paths
from tvg_lib.data.dataset import GroundingDataset
from tvg_lib.errors import DataError
from tvg_lib.experiments import recorded_weights
from tvg_lib.losses.retrieval import RetrievalObjective
from tvg_lib.metrics import RetrievalReport
from tvg_lib.models.mamfusion import MamFusion, MamFusionConfig
from tvg_lib.results import RunRecord, new_record, records_folder, save
from tvg_lib.retrieval.baselines import best_clip_scores, fitted_width, mean_pooled_scores
from tvg_lib.retrieval.data import RetrievalPlan, RetrievalView
from tvg_lib.retrieval.evaluation import report_of_scores, score_matrix
from tvg_lib.training import TrainingConfig, TrainingResult, run_key, train

MODULES = (
    "tvg_lib.losses.retrieval",
    "tvg_lib.models.mamfusion",
    "tvg_lib.retrieval.data",
    "tvg_lib.retrieval.evaluation",
    "tvg_lib.training",
)


@dataclass(frozen=True)
class RetrievalRecipe:
    """How a MamFusion is trained and read.

    Attributes:
        training: of the loop; its seed also orders the batches and draws the first weights.
        view: how videos and queries are cut.
        videos_per_batch, queries_per_video: of the batches.
        objective: arguments of `RetrievalObjective`, by name.
        rerank: candidates of a query that get the second score, in validation and in the test.
    """

    training: TrainingConfig = field(default_factory=TrainingConfig)
    view: RetrievalView = field(default_factory=RetrievalView)
    videos_per_batch: int = 64
    queries_per_video: int | None = None
    objective: Mapping[str, float | int | None] = field(default_factory=dict)
    rerank: int = 20

    def with_seed(self, seed: int) -> "RetrievalRecipe":
        """The same recipe from another seed."""
        return replace(self, training=replace(self.training, seed=seed))


@dataclass(frozen=True)
class TrainedRetriever:
    """A trained model and what its records must say about it.

    Attributes:
        training: the run; its model holds the selected weights, in evaluation mode.
        method, variant, scale, seed: for the records.
        recipe: of the run.
        parameters: everything that was configurable, resolved.
    """

    training: TrainingResult
    method: str
    variant: str
    scale: str
    seed: int
    recipe: RetrievalRecipe
    parameters: dict[str, Any]

    @property
    def model(self) -> MamFusion:
        """The selected weights, in evaluation mode."""
        return self.training.model


@dataclass(frozen=True)
class RetrievalTest:
    """Scores of one system on one test set, their metrics, and the record that was written."""

    scores: np.ndarray = field(repr=False)
    report: RetrievalReport
    record: RunRecord = field(repr=False)


def train_retriever(
    architecture: MamFusionConfig,
    recipe: RetrievalRecipe,
    train_set: GroundingDataset,
    validation_set: GroundingDataset,
    *,
    scale: str,
    method: str = "mamfusion",
    variant: str = "main",
) -> TrainedRetriever:
    """Train, or load what is already trained; the best epoch by SumR on held-out videos is kept.

    Args:
        architecture: of the model; ablations and the trained baselines are configurations of it.
        recipe: everything about training that is not the architecture.
        train_set, validation_set: share no recording.
        scale: whose folder below `runs/` takes the run.
        method, variant: names for the records.
    """
    parameters = {"architecture": asdict(architecture), "recipe": asdict(recipe)}
    data_hash = train_set.fingerprint + validation_set.fingerprint
    # The recipe itself, not its dict: `run_key` knows what of a `TrainingConfig` decides a run.
    key = run_key([parameters["architecture"], recipe], code=MODULES, data_hash=data_hash)
    seed = recipe.training.seed
    set_seed(seed)

    def validate(candidate: nn.Module) -> dict[str, float]:
        scores = score_matrix(candidate, validation_set, recipe.view, recipe.rerank)
        return report_of_scores(scores, validation_set).values

    result = train(
        MamFusion(architecture),
        RetrievalObjective(**recipe.objective),
        RetrievalPlan(
            train_set, recipe.view, recipe.videos_per_batch, recipe.queries_per_video, seed
        ),
        recipe.training,
        paths.runs(scale) / "train" / f"{method}-{variant}-seed{seed}-{key}",
        validate=validate,
        key=key,
    )
    parameters |= {
        "trained_on": train_set.name,
        "validated_on": validation_set.name,
        "model_parameters": sum(p.numel() for p in result.model.parameters()),
        "selected": result.selected,
    }
    return TrainedRetriever(result, method, variant, scale, seed, recipe, parameters)


def evaluate_retriever(
    trained: TrainedRetriever,
    test_set: GroundingDataset,
    *,
    rerank: int | None = None,
    variant: str | None = None,
) -> RetrievalTest:
    """Test a trained model and write its record.

    Args:
        trained: as from `train_retriever`.
        test_set: named in the record by its `name`.
        rerank: candidates that get the second score, where it is not the recipe's number.
        variant: for the record, where it is not that of the training.
    """
    started = time.perf_counter()
    rerank = trained.recipe.rerank if rerank is None else rerank
    scores = score_matrix(trained.model, test_set, trained.recipe.view, rerank)
    return _recorded(
        scores,
        test_set,
        method=trained.method,
        variant=variant or trained.variant,
        scale=trained.scale,
        seed=trained.seed,
        parameters=trained.parameters | {"rerank": rerank},
        modules=MODULES,
        seconds=trained.training.seconds + time.perf_counter() - started,
        artifacts=[trained.training.run_dir],
    )


def recorded_model(record: RunRecord) -> tuple[MamFusion, RetrievalView]:
    """The model of a record that this machine made, in evaluation mode, and its view.

    Raises:
        DataError: the record names no run, or its weights are not on this machine.
    """
    weights = recorded_weights(record)
    try:
        model = MamFusion(MamFusionConfig(**record.parameters["architecture"]))
        model.load_state_dict(weights)
        view = RetrievalView(**record.parameters["recipe"]["view"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"{record.file_name} does not describe its weights: {error}") from error
    return model.eval(), view


def evaluate_rule(
    method: str,
    score: Callable[[GroundingDataset], np.ndarray],
    test_set: GroundingDataset,
    *,
    scale: str,
    parameters: Any,
    variant: str = "main",
) -> RetrievalTest:
    """Test a rule without training; its record is like any other (seed 0)."""
    started = time.perf_counter()
    scores = score(test_set)
    return _recorded(
        scores,
        test_set,
        method=method,
        variant=variant,
        scale=scale,
        seed=0,
        parameters=parameters,
        modules=("tvg_lib.retrieval.baselines", "tvg_lib.retrieval.evaluation"),
        seconds=time.perf_counter() - started,
    )


def evaluate_rules(
    train_set: GroundingDataset, test_set: GroundingDataset, *, scale: str
) -> dict[str, RetrievalTest]:
    """Test the rules without training: mean of clips, best clip, best stretch of clips.

    Args:
        train_set: where the number of clips of a stretch is chosen, by SumR.
        test_set: what is reported on.
        scale: whose folder below `runs/` takes the records.
    """
    width = fitted_width(train_set)
    rules: dict[str, tuple[str, Callable[[GroundingDataset], np.ndarray], dict[str, int]]] = {
        "mean of clips": ("mean-pooled", mean_pooled_scores, {}),
        "best clip": ("best-clip", best_clip_scores, {"width": 1}),
        "best stretch": ("best-stretch", partial(best_clip_scores, width=width), {"width": width}),
    }
    return {
        label: evaluate_rule(method, rule, test_set, scale=scale, parameters=parameters)
        for label, (method, rule, parameters) in rules.items()
    }


def _recorded(
    scores: np.ndarray,
    test_set: GroundingDataset,
    *,
    method: str,
    variant: str,
    scale: str,
    seed: int,
    parameters: Any,
    modules: Sequence[ModuleType | str],
    seconds: float,
    artifacts: Sequence[Path] = (),
) -> RetrievalTest:
    report = report_of_scores(scores, test_set)
    record = new_record(
        method,
        test_set.name,
        scale,
        seed,
        parameters=parameters,
        metrics=report.estimates(),
        seconds=seconds,
        modules=modules,
        variant=variant,
        data_hash=test_set.fingerprint,
        artifacts=artifacts,
    )
    save(record, records_folder(scale, fresh=True))
    return RetrievalTest(scores, report, record)
