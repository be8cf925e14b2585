"""The tiny dual encoder of ShapeStories: its recipe, its training, its shipped weights.

It stands where CLIP stands in the papers: trained on pairs of pictures and sentences, frozen, and
good at naming what a moment shows, but not sure of it. It has never seen the combinations that test
films hold out.

    python -m tvg_lib.shapestories.encoder        trains it again, into runs/
"""

import copy
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from accelerate.utils import set_seed

from tvg_lib import paths
from tvg_lib.encoders.tiny import (
    ContrastiveObjective,
    PairPlan,
    TinyConfig,
    TinyDualEncoder,
    pair_recall,
)
from tvg_lib.shapestories import generator, language, pairs, render, world
from tvg_lib.shapestories.language import vocabulary
from tvg_lib.shapestories.pairs import PairSource
from tvg_lib.shapestories.render import PALETTE, RenderConfig
from tvg_lib.training import TrainingConfig, TrainingResult, run_key, train

WEIGHTS = Path(__file__).with_name("tiny_dual_encoder.safetensors")


@dataclass(frozen=True)
class EncoderRecipe:
    """How the shipped weights were made.

    Attributes:
        model: architecture; windows of two seconds, one a second; its cones
            start at the colours of the world.
        look: of the pictures, here and in the data sets.
        batch_size: pairs of a step.
        batches: steps of an epoch.
        training: of the loop.
    """

    model: TinyConfig = field(default_factory=lambda: TinyConfig(cones=PALETTE))
    look: RenderConfig = field(default_factory=RenderConfig)
    batch_size: int = 48
    batches: int = 200
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            epochs=12,
            warmup_epochs=0.5,
            learning_rate=2.5e-3,
            schedule="cosine",
            ema_decay=0.99,
            precision="bf16",
            progress=False,
        )
    )

    def source(self, split: generator.Split = "train") -> PairSource:
        """Where its pairs come from."""
        return PairSource(self.model.frames, self.model.window, look=self.look, split=split)


def train_encoder(recipe: EncoderRecipe, run_dir: Path) -> TrainingResult:
    """Train, continue or load a run; it is validated on pairs of validation films.

    Args:
        recipe: everything that decides the weights.
        run_dir: of the run.
    """
    set_seed(recipe.training.seed)
    model = TinyDualEncoder(recipe.model, vocabulary())
    plan = PairPlan(recipe.source(), recipe.batch_size, recipe.batches, recipe.training.seed)
    held_out = replace(plan, draw=recipe.source("val"), batches=2)
    batches = [held_out.load(spec) for spec in held_out.epoch(0)]
    modules = (__name__, generator, language, pairs, render, world)
    return train(
        model,
        ContrastiveObjective(),
        plan,
        recipe.training,
        run_dir,
        lambda candidate: pair_recall(candidate, batches),
        key=run_key(asdict(recipe), code=modules, data_hash=""),
    )


def save_encoder(model: TinyDualEncoder, recipe: EncoderRecipe, path: Path) -> None:
    """Write weights in half precision with the recipe."""
    half = copy.deepcopy(model).cpu().half()
    half.save(path, asdict(recipe))


@lru_cache(maxsize=1)
def tiny_dual_encoder() -> TinyDualEncoder:
    """The shipped encoder, in evaluation mode.

    Raises:
        DataError: the weights are missing from the package, or damaged.
    """
    return TinyDualEncoder.load(WEIGHTS)


def main() -> None:
    """Train the encoder again; the weights go below runs/ and replace nothing."""
    recipe = EncoderRecipe()
    folder = paths.runs("encoder")
    result = train_encoder(recipe, folder)
    save_encoder(result.model, recipe, folder / WEIGHTS.name)
    print(result)
    print(f"{WEIGHTS.name}: {result.seconds:.0f} s")


if __name__ == "__main__":
    main()
