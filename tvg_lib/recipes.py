"""The released SnAG and HieraMamba recipes, ready for the features their authors host.

Numbers are those of the configuration files of snag_release @ 44dd90e and hieramamba @ 03a8a95
(names that begin with HIERAMAMBA). Epochs count the warm-up in.
The released schedule is a linear warm-up and then a constant rate: the milestone in the files is
never reached. Nothing here was trained: the features are not at hand (the doctor says where they
are).

    from tvg_lib.recipes import TACOS
    trained = train_grounder(
        "snag", lambda: SnAG(TACOS.architecture), TACOS.objective, TACOS.recipe,
        train_set, validation_set, scale="gpu", architecture=TACOS.architecture,
        modules=["tvg_lib.recipes"],
    )

Known differences from the released loop: ActivityNet's text encoder has a tenth of the learning
rate there, and one random group of queries per video and epoch (here all are asked); MAD adds the
gradients of two micro-batches inside one loss norm; incomplete last batches are left out there;
words beyond `max_words` are cut in training there; the margin of a crop is half a clip there, half
a step here. As there, the last weights are kept, not the best (`select_by` is None).

HieraMamba's: projectors of the contrast are never trained, as released; both MAD files switch the
contrast off (they list weights of 1 and 150, and 125 and 150). TACoS is SnAG's recipe with another
video encoder and the two losses. Its loop masks a batch by the *sum* of its lengths; here every row
has its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from tvg_lib.data.batching import Crop
from tvg_lib.decoding import DecodingConfig
from tvg_lib.experiments import GroundingRecipe
from tvg_lib.losses.detection import DetectionObjective, diou_loss, iou_loss
from tvg_lib.losses.hieramamba import AnchorContrast, HieraMambaObjective, SegmentContrast
from tvg_lib.models import hieramamba, snag
from tvg_lib.nn.points import PointGrid
from tvg_lib.training import TrainingConfig


@dataclass(frozen=True)
class ReleasedRecipe:
    """One released configuration: the model, how it is trained and read, and its loss."""

    architecture: snag.SnagConfig
    recipe: GroundingRecipe
    objective: Callable[[], nn.Module]


def _training(epochs: int, learning_rate: float, weight_decay: float = 0.05) -> TrainingConfig:
    """AdamW with five epochs of warm-up, clipping at 1, averaged weights of decay 0.999."""
    return TrainingConfig(
        epochs=5 + epochs,
        warmup_epochs=5,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        schedule="constant",
        ema_warmup=False,
        seed=1234567891,
    )


def _contrastive(
    channels: int,
    detection: Callable[[], DetectionObjective],
    anchor: AnchorContrast,
    segment: SegmentContrast,
) -> HieraMambaObjective:
    return HieraMambaObjective(channels, detection(), anchor, segment, trained_projectors=False)


TACOS = ReleasedRecipe(
    snag.TACOS,
    GroundingRecipe(_training(10, 1e-3), 4, 4, Crop(2304, (0.9, 1.0))),
    partial(DetectionObjective, regression=diou_loss, norm_start=100),
)
EGO4D_SLOWFAST = ReleasedRecipe(
    snag.EGO4D_SLOWFAST,
    GroundingRecipe(_training(5, 1e-4), 1, 2, Crop(2304, None)),
    partial(DetectionObjective, regression=iou_loss, norm_start=10),
)
EGO4D_EGOVLP = ReleasedRecipe(
    snag.EGO4D_EGOVLP,
    GroundingRecipe(_training(2, 1e-4), 1, 2, Crop(2304, None)),
    partial(DetectionObjective, regression=iou_loss, norm_start=10),
)
MAD = ReleasedRecipe(
    snag.MAD,
    GroundingRecipe(
        _training(3, 1e-4),
        2,
        16,
        Crop(8192, (0.9, 1.0)),
        decoding=DecodingConfig(pre_top_k=200, keep=50),
        ks=(1, 5, 10, 50),
        thresholds=(0.1, 0.3, 0.5),
    ),
    partial(DetectionObjective, regression=diou_loss, norm_start=250),
)
_LONGER_RANGE = PointGrid(regression_range=8)
CHARADES_C3D = ReleasedRecipe(
    snag.CHARADES_C3D,
    GroundingRecipe(_training(11, 5e-4), 8, 4, grid=_LONGER_RANGE),
    partial(DetectionObjective, grid=_LONGER_RANGE, regression=diou_loss, norm_start=400),
)
CHARADES_I3D = ReleasedRecipe(
    snag.CHARADES_I3D,
    GroundingRecipe(_training(11, 5e-4, weight_decay=5e-4), 8, 4, grid=_LONGER_RANGE),
    partial(DetectionObjective, grid=_LONGER_RANGE, regression=diou_loss, norm_start=400),
)
ACTIVITYNET = ReleasedRecipe(
    snag.ACTIVITYNET,
    GroundingRecipe(_training(10, 2e-3), 16, 2),
    partial(DetectionObjective, regression=diou_loss, regression_weight=2.0, norm_start=160),
)
HIERAMAMBA_TACOS = ReleasedRecipe(
    hieramamba.TACOS,
    TACOS.recipe,
    partial(
        _contrastive,
        channels=hieramamba.TACOS.channels,
        detection=TACOS.objective,
        anchor=AnchorContrast(10.0, negative_ratio=4, gap_ratio=0.3),
        segment=SegmentContrast(1.0),
    ),
)
HIERAMAMBA_EGO4D = ReleasedRecipe(
    hieramamba.EGO4D,
    EGO4D_EGOVLP.recipe,
    partial(
        _contrastive,
        channels=hieramamba.EGO4D.channels,
        detection=EGO4D_EGOVLP.objective,
        anchor=AnchorContrast(100.0, negative_ratio=8, gap_ratio=0.2),
        segment=SegmentContrast(10.0),
    ),
)
HIERAMAMBA_MAD = ReleasedRecipe(hieramamba.MAD, MAD.recipe, MAD.objective)
HIERAMAMBA_MAD_V2 = ReleasedRecipe(hieramamba.MAD_V2, MAD.recipe, MAD.objective)
