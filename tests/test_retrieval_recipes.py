"""MamFusion's released recipes: built on the planted data's widths they train one step each."""

from dataclasses import replace

import pytest
import torch

from tvg_lib.data.planted import PlantedConfig, planted
from tvg_lib.losses.retrieval import RetrievalObjective
from tvg_lib.models.mamfusion import MamFusion
from tvg_lib.retrieval import recipes
from tvg_lib.retrieval.data import RetrievalPlan
from tvg_lib.retrieval.recipes import ReleasedRetrieval, released


@pytest.mark.parametrize("as_released", [False, True])
@pytest.mark.parametrize("name", ["TVR", "ACTIVITYNET", "CHARADES"])
def test_a_released_recipe_makes_a_step(name: str, as_released: bool) -> None:
    configuration: ReleasedRetrieval = getattr(recipes, name)
    if as_released:
        configuration = released(configuration)
    recipe = configuration.recipe
    dataset = planted("train", PlantedConfig(train=4, val=1, test=1))
    narrow = replace(
        configuration.architecture,
        video_dim=dataset.video_features.dim,
        text_dim=dataset.text_features.dim,
        channels=16,
    )
    plan = RetrievalPlan(
        dataset, recipe.view, recipe.videos_per_batch, recipe.queries_per_video, seed=0
    )
    batch = plan.load(plan.epoch(0)[0])
    torch.manual_seed(0)
    model, objective = MamFusion(narrow), RetrievalObjective(**recipe.objective)
    output = model(batch)
    assert (output.fused_scores is None) == as_released
    loss = objective(output, batch)["total"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in model.fusion.parameters())
    assert recipe.training.warmup_epochs == pytest.approx(0.01 * recipe.training.epochs)
    assert (recipe.training.schedule, recipe.training.select_by) == ("linear", "SumR")
    assert recipe.training.patience == {"CHARADES": 11}.get(name, 200)
