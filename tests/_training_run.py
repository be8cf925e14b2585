"""A tiny model, objective and plan for the tests of training; also the processes that they kill."""

import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tvg_lib import paths
from tvg_lib.data.batching import BatchPlan, BatchSpec, Crop, GroundingBatch
from tvg_lib.data.dataset import GroundingDataset, Query, Video
from tvg_lib.data.planted import PlantedConfig, planted
from tvg_lib.distributed import reduce_sum
from tvg_lib.losses.detection import DetectionObjective
from tvg_lib.models.snag import SnAG, SnagConfig
from tvg_lib.moments import TimeGrid
from tvg_lib.training import TrainingConfig, TrainingResult, train

CONFIG = TrainingConfig(
    epochs=4,
    warmup_epochs=1,
    learning_rate=1e-2,
    ema_decay=0.9,
    checkpoint_every=3,
    select_by="score",
    device="cpu",
    progress=False,
)


class TinyModel(nn.Module):
    """Mean of the clips times mean of the words, to two numbers; draws from torch by dropout."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.video = nn.Linear(6, 8)
        self.words = nn.Linear(5, 8)
        self.norm = nn.LayerNorm(8)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, 2)

    def forward(self, batch: GroundingBatch) -> Tensor:
        video = _mean(self.video(batch.video), batch.video_mask)
        words = _mean(self.words(batch.text), batch.text_mask)
        return self.head(self.dropout(self.norm(video[batch.query_video] * words)))


class TinyObjective(nn.Module):
    """Squared error over a running count of queries, and a part that only long videos take."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("norm", torch.tensor(4.0))
        self.long = nn.Linear(2, 1)

    def forward(self, output: Tensor, batch: GroundingBatch) -> dict[str, Tensor]:
        # A number that differs between videos, so that a mean over processes is not the sum.
        weights = batch.video_mask.sum(1)[batch.query_video].to(output)
        self.norm.mul_(0.9).add_(0.1 * reduce_sum(weights.sum()).to(self.norm))
        error = (output - batch.moments[:, 0].to(output) / 10).square().sum(-1)
        fit = (weights * error).sum() / self.norm
        long = weights > 6
        extra = self.long(output[long]).square().sum() / self.norm if long.any() else fit * 0
        return {"total": fit + extra, "fit": fit, "extra": extra}


@dataclass(frozen=True)
class SlowPlan(BatchPlan):
    """A plan that announces every batch and takes its time, so that it can be interrupted."""

    pause: float = 0.0

    def load(self, spec: BatchSpec) -> GroundingBatch:
        print(spec.epoch, spec.number, flush=True)
        time.sleep(self.pause)
        return super().load(spec)

    def __repr__(self) -> str:  # the same run as the plain plan
        return repr(plan())


class Features(dict):
    """Arrays in memory, by id."""


def dataset(videos: int = 11) -> GroundingDataset:
    """Eleven videos of 3 to 9 clips, 1 to 3 queries each."""
    rng = np.random.default_rng(0)
    grid = TimeGrid(2, 2, 1)
    clips = {f"v{i}": 3 + i % 7 for i in range(videos)}
    queries = tuple(
        Query(f"{v}q{j}", v, "a query", np.sort(rng.uniform(0, 2 * n, (1, 2))))
        for i, (v, n) in enumerate(clips.items())
        for j in range(1 + i % 3)
    )
    return GroundingDataset(
        name="tiny",
        videos={v: Video(v, 2.0 * n, grid) for v, n in clips.items()},
        queries=queries,
        video_features=Features({v: rng.normal(size=(n, 6)) for v, n in clips.items()}),
        text_features=Features({q.id: rng.normal(size=(2 + len(q.id), 5)) for q in queries}),
    )


def plan(**changes: object) -> BatchPlan:
    """Four steps an epoch; eleven videos in threes, so that the last batch is short."""
    return BatchPlan(dataset(), **{"videos_per_batch": 3, "queries_per_video": 2} | changes)


def modules(seed: int = 1, dropout: float = 0.2) -> tuple[TinyModel, TinyObjective]:
    """Model and objective with weights that depend on the seed only."""
    set_seed(seed)
    return TinyModel(dropout), TinyObjective()


def score(model: nn.Module) -> dict[str, float]:
    """A validation that draws numbers of its own, as dropout or sampling would."""
    noise = float(torch.rand(())) + float(np.random.rand())  # noqa: NPY002
    return {"score": -float(model.head.weight.square().sum()), "noise": noise}


def run(run_dir: Path, plan_: BatchPlan | None = None, config: TrainingConfig = CONFIG, **more):
    """The run that all tests of resuming compare."""
    return train(*modules(), plan_ or plan(), config, run_dir, score, **more)


def gradients(
    model: nn.Module,
    objective: nn.Module,
    plan_: BatchPlan,
    config: TrainingConfig,
    run_dir: Path,
) -> dict[str, Tensor]:
    """Gradients of every parameter at every step, where it has one, and the history."""
    names = {id(p): n for m in (model, objective) for n, p in m.named_parameters()}
    seen: dict[str, Tensor] = {}
    step = 0

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        nonlocal step
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    seen[f"{step}/{names[id(p)]}"] = p.grad.clone()
        step += 1

    handle = register_optimizer_step_pre_hook(note)
    try:
        result: TrainingResult = train(model, objective, plan_, config, run_dir)
    finally:
        handle.remove()
    for name, column in result.steps.items():
        seen[f"history/{name}"] = torch.tensor(column, dtype=torch.float64)
    return seen


def double_modules() -> tuple[TinyModel, TinyObjective]:
    """In double precision and without dropout, of which every process draws its own."""
    model, objective = modules(dropout=0.0)
    return model.double(), objective.double()


class DoublePlan(BatchPlan):
    """Features in double precision."""

    def load(self, spec: BatchSpec) -> GroundingBatch:
        return super().load(spec).to("cpu", torch.float64)


def double_plan() -> BatchPlan:
    """Batches of three, three, three and so on, the last of which has a single video."""
    return DoublePlan(dataset(10), videos_per_batch=3, queries_per_video=3)


GRADIENT_CONFIG = TrainingConfig(
    epochs=2,
    warmup_epochs=0,
    clip_norm=None,
    gradient_accumulation=2,
    device="cpu",
    progress=False,
)


SMALL_SNAG = SnagConfig(
    video_dim=16,
    text_dim=16,
    channels=16,
    heads=2,
    levels=4,
    window=5,
    max_clips=24,
    text_channels=16,
    text_heads=2,
    text_layers=1,
    fusion_layers=1,
    fusion_heads=2,
)


def snag(dropout: float = 0.1) -> tuple[SnAG, DetectionObjective]:
    """A small SnAG for `snag_plan`."""
    set_seed(3)
    config = replace(SMALL_SNAG, dropout=dropout, drop_path=dropout)
    return SnAG(config), DetectionObjective(norm_start=10)


def snag_plan() -> BatchPlan:
    """Planted moments, cropped; four batches of two videos and one of a single video an epoch."""
    data = planted("train", PlantedConfig(train=9, clips=(12, 30), queries=2, dim=16))
    return BatchPlan(data, videos_per_batch=2, queries_per_video=2, crop=Crop(max_clips=24))


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def main(command: str, target: str, *options: str) -> None:
    """What the processes do that the tests start.

    train RUN_DIR PAUSE    announces every batch, to be killed from outside
    torn RUN_DIR           kills itself while it writes a checkpoint
    wait RUN_DIR           trains or loads, and says which
    gradients FOLDER       writes the gradients of every step
    """
    torch.set_num_threads(1)
    if command == "train":
        run(Path(target), SlowPlan(dataset(), 3, 2, pause=float(options[0])))
    elif command == "torn":
        replace, written = paths.os.replace, []

        def torn(source: Path, destination: Path) -> None:
            written.append(destination)
            if len(written) == 3:
                with open(source, "r+b") as file:
                    file.truncate(os.path.getsize(source) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, destination)

        paths.os.replace = torn
        run(Path(target))
    elif command == "wait":
        print("loaded" if run(Path(target)).loaded else "trained")
    elif command == "gradients":
        folder = Path(target)
        rank = os.environ["RANK"]
        found = gradients(*double_modules(), double_plan(), GRADIENT_CONFIG, folder / "tiny")
        save_file(found, folder / f"tiny{rank}.safetensors")
        found = gradients(*snag(dropout=0.0), snag_plan(), GRADIENT_CONFIG, folder / "snag")
        save_file(found, folder / f"snag{rank}.safetensors")
