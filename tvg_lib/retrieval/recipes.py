"""MamFusion's released recipes, for the features that MS-SL's authors host (`layout`).

Numbers are those of the released code @ efa33f9 (three configurations, seed 9527): batch, epochs,
learning rate with 1 % of warm-up and a linear decay, weight decay 0.01, epochs without gain after
which training ends, weights of the losses, first epoch with hard negatives, words and frames. The
architectures are `models.mamfusion.TVR` and so on: with fusion over time, as the paper describes
it; `released(TVR)` has the model as released. Nothing here was trained: the features are not at
hand.

    from tvg_lib.retrieval.recipes import TVR
    trained = train_retriever(TVR.architecture, TVR.recipe, train_set, validation_set, scale="gpu")

Known differences from the released loop: AdamW instead of BertAdam (which corrects no bias of its
averages), and one norm of all gradients is clipped instead of each parameter's; embeddings, norms
and the decays of Mamba are spared weight decay; Mamba and fusion start as Mamba's paper and PyTorch
have them, where the released code draws all their linear layers anew, the steps of Mamba and the
output of attention among them (with a bias of zero); the fused contrast, which fusion over time is
trained by, has this library's weight.
"""

from dataclasses import dataclass, replace

from tvg_lib.models import mamfusion
from tvg_lib.models.mamfusion import MamFusionConfig
from tvg_lib.retrieval.data import RetrievalView
from tvg_lib.retrieval.experiments import RetrievalRecipe
from tvg_lib.training import TrainingConfig


@dataclass(frozen=True)
class ReleasedRetrieval:
    """One released configuration: the model, and how it is trained and read."""

    architecture: MamFusionConfig
    recipe: RetrievalRecipe


def released(configuration: ReleasedRetrieval) -> ReleasedRetrieval:
    """The same with the model as released: fusion over the batch, its masks, its segments."""
    architecture = replace(configuration.architecture, fusion_over="batch", masks_as_published=True)
    view = replace(configuration.recipe.view, drop_last=True)
    return ReleasedRetrieval(architecture, replace(configuration.recipe, view=view, rerank=0))


def _recipe(
    architecture: MamFusionConfig,
    videos: int,
    epochs: int,
    patience: int,
    learning_rate: float,
    hard_from: int,
    clip_contrast: float,
    frame_contrast: float,
    diverse: float,
    diverse_margin: float,
) -> ReleasedRetrieval:
    training = TrainingConfig(
        epochs=epochs,
        warmup_epochs=0.01 * epochs,
        learning_rate=learning_rate,
        weight_decay=0.01,
        schedule="linear",
        ema_decay=0.0,
        select_by="SumR",
        patience=patience,
        seed=9527,
    )
    view = RetrievalView(32, architecture.max_frames, architecture.max_words)
    objective = {
        "hard_from": hard_from,
        "hard_pool": 20,
        "margin": 0.2,
        "clip_contrast": clip_contrast,
        "frame_contrast": frame_contrast,
        "diverse": diverse,
        "diverse_margin": diverse_margin,
        "diverse_alpha": 32.0,
    }
    return ReleasedRetrieval(architecture, RetrievalRecipe(training, view, videos, None, objective))


TVR = _recipe(mamfusion.TVR, 256, 200, 200, 4.5e-4, 20, 0.027, 0.045, 0.015, 0.2)
ACTIVITYNET = _recipe(mamfusion.ACTIVITYNET, 64, 200, 200, 4.5e-4, 20, 0.027, 0.045, 0.015, 0.2)
CHARADES = _recipe(mamfusion.CHARADES, 64, 400, 11, 3.8e-4, 100, 0.008, 0.01, 0.005, 0.15)
