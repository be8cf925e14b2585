"""The released recipes: built on the planted data's widths they train one step each."""

from dataclasses import replace

import pytest
import torch

from tvg_lib import recipes
from tvg_lib.data.batching import BatchPlan
from tvg_lib.data.planted import PlantedConfig, planted
from tvg_lib.models.hieramamba import HieraMamba
from tvg_lib.models.snag import SnAG
from tvg_lib.recipes import ReleasedRecipe

NAMES = (
    "TACOS EGO4D_SLOWFAST EGO4D_EGOVLP MAD CHARADES_C3D CHARADES_I3D ACTIVITYNET".split()  # noqa: SIM905
    + "HIERAMAMBA_TACOS HIERAMAMBA_EGO4D HIERAMAMBA_MAD HIERAMAMBA_MAD_V2".split()  # noqa: SIM905
)


@pytest.mark.parametrize("name", NAMES)
def test_a_released_recipe_makes_a_step(name: str) -> None:
    released: ReleasedRecipe = getattr(recipes, name)
    dataset = planted("train", PlantedConfig(train=4, val=1, test=1))
    narrow = replace(
        released.architecture,
        video_dim=dataset.video_features.dim,
        text_dim=dataset.text_features.dim,
        channels=16,
        text_channels=16,
    )
    kind, narrower = SnAG, {}
    if name.startswith("HIERAMAMBA"):
        kind, narrow = HieraMamba, replace(narrow, head_channels=8, state=4)
        narrower = {} if "MAD" in name.removeprefix("HIERAMAMBA") else {"channels": 16}
    recipe = released.recipe
    plan = BatchPlan(
        dataset, recipe.videos_per_batch, recipe.queries_per_video, seed=0, crop=recipe.crop
    )
    batch = plan.load(plan.epoch(0)[0])
    torch.manual_seed(0)
    model, objective = kind(narrow), released.objective(**narrower)
    # What the loss calls positive and what decoding reads must be the same points.
    assert objective.grid == recipe.grid
    loss = objective(model(batch), batch)["total"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in objective.parameters())  # as released, where there are any
