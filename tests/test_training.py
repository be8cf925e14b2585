"""Training: exact resume, distributed gradients, selection, determinism, refusals."""

import dataclasses
import gc
import json
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from _training_run import (
    CONFIG,
    GRADIENT_CONFIG,
    TinyModel,
    TinyObjective,
    double_modules,
    double_plan,
    gradients,
    modules,
    plan,
    run,
    score,
    snag,
    snag_plan,
)
from safetensors.torch import load_file
from torch import nn

from tvg_lib import training
from tvg_lib.checkpoints import preserved_rng, read_state, rng_state, set_rng_state, write_state
from tvg_lib.data.batching import BatchPlan
from tvg_lib.distributed import reduce_sum, whole_batch
from tvg_lib.errors import ConfigurationError, DataError, NonFiniteLossError
from tvg_lib.training import (
    CHECKPOINT,
    SUMMARY,
    WEIGHTS,
    TrainingConfig,
    decay_groups,
    learning_rate,
    run_key,
    train,
)

STEPS = 5 * CONFIG.epochs  # 13 samples (11 videos, two of them twice) in threes


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    torch.set_num_threads(1)
    return run(tmp_path_factory.mktemp("whole"))


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def start(*arguments: str, **environment: str) -> subprocess.Popen:
    """Another process that calls `_training_run.main`."""
    tests = Path(__file__).parent
    code = "import sys, _training_run; _training_run.main(*sys.argv[1:])"
    path = os.pathsep.join([str(tests.parent), str(tests)])
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path} | environment,
    )


class StopHereError(Exception):
    pass


class InterruptedPlan(BatchPlan):
    """Stops the run when it asks for batch `at` of the session."""

    def stop(self, at: int) -> "InterruptedPlan":
        object.__setattr__(self, "left", [at])
        return self

    def load(self, spec):
        if self.left[0] == 0:
            raise StopHereError
        self.left[0] -= 1
        return super().load(spec)

    def __repr__(self) -> str:
        return repr(plan())


def interrupted(at: int) -> BatchPlan:
    return InterruptedPlan(plan().dataset, 3, 2).stop(at)


# --- exact resume -------------------------------------------------------------------------------


def test_killed_runs_end_in_the_same_bits(tmp_path, uninterrupted):
    """SIGKILL from outside at a random batch, and from inside a half-written checkpoint."""
    at = 1 + secrets.randbelow(STEPS - 1)
    killed = start("train", str(tmp_path / "killed"), "0.03")
    torn = start("torn", str(tmp_path / "torn"))
    for number, _ in enumerate(killed.stdout):
        if number == at:
            killed.kill()
    torn.communicate()
    assert killed.wait() == torn.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / SUMMARY).exists()

    (left,) = (tmp_path / "torn").glob(".part-*")
    with pytest.raises(DataError, match=r"part-.*checkpoint\.safetensors"):
        read_state(left)  # it really is torn, ...
    _, state = read_state(tmp_path / "torn" / CHECKPOINT)
    assert (state["epoch"], state["position"]) == (1, 0)  # ... and the one before is whole

    for name in ("killed", "torn"):
        resumed = run(tmp_path / name)
        assert same_weights(resumed.model, uninterrupted.model), f"{name} at batch {at}"
        assert resumed.steps == uninterrupted.steps
        assert resumed.validations == uninterrupted.validations
        assert sorted(p.name for p in (tmp_path / name).iterdir()) == [
            ".lock", "objective.safetensors", "training.json", "weights.safetensors"
        ]  # fmt: skip


@pytest.mark.parametrize("stops", [[2], [3, 1], [5, 5], [6, 4, 7], [19]])
def test_interruptions_at_any_step_leave_no_trace(tmp_path, uninterrupted, stops):
    """Before the first checkpoint, on one, at the end of an epoch, several times."""
    for at in stops:
        with pytest.raises(StopHereError):
            run(tmp_path, interrupted(at))
    resumed = run(tmp_path)
    assert same_weights(resumed.model, uninterrupted.model)
    assert resumed.steps == uninterrupted.steps
    assert resumed.selected == uninterrupted.selected


def test_interrupted_validation_is_repeated(tmp_path, uninterrupted):
    calls = []

    def failing(model):
        calls.append(1)
        if len(calls) == 2:
            raise StopHereError
        return score(model)

    config = dataclasses.replace(CONFIG, checkpoint_every=1)
    with pytest.raises(StopHereError):
        train(*modules(), plan(), config, tmp_path, failing)
    _, state = read_state(tmp_path / CHECKPOINT)
    assert (state["epoch"], state["position"]) == (1, 5)
    resumed = train(*modules(), plan(), config, tmp_path, failing)
    assert resumed.validations == uninterrupted.validations
    assert same_weights(resumed.model, uninterrupted.model)


def test_resume_restores_every_generator_and_the_objective(tmp_path):
    """Without any one of them the bits would differ: each is spoiled in turn."""
    with pytest.raises(StopHereError):
        run(tmp_path, interrupted(7))
    tensors, state = read_state(tmp_path / CHECKPOINT)
    wanted = {"generators/0/torch", "generators/0/numpy", "generators/0/python"}
    wanted |= {"objective/norm", "objective/long.weight", "model/head.weight"}
    wanted |= {"average/n_averaged", "average/module.head.weight", "best/head.weight"}
    wanted |= {"optimizer/0/exp_avg", "optimizer/0/exp_avg_sq", "optimizer/0/step", "history"}
    assert wanted <= tensors.keys()
    reference = run(tmp_path / "whole")
    for name in ("objective/norm", "optimizer/0/exp_avg_sq", "average/module.head.weight"):
        spoiled = tmp_path / name.replace("/", "_")
        spoiled.mkdir()
        write_state(spoiled / CHECKPOINT, tensors | {name: tensors[name] * 1.5}, state)
        assert not same_weights(run(spoiled).model, reference.model), name
    other = torch.Generator().manual_seed(99).get_state()
    (tmp_path / "rng").mkdir()
    write_state(tmp_path / "rng" / CHECKPOINT, tensors | {"generators/0/torch": other}, state)
    assert run(tmp_path / "rng").steps != reference.steps


# --- determinism --------------------------------------------------------------------------------


def test_same_seed_same_bits_whatever_is_watched(tmp_path, uninterrupted, capsys):
    """Progress, validation and checkpoints do not touch the training."""
    watched = dataclasses.replace(
        CONFIG, progress=True, validate_every=3, checkpoint_every=1, select_by=None
    )
    result = train(*modules(), plan(), watched, tmp_path / "a", score)
    silent = train(*modules(), plan(), watched, tmp_path / "b")
    assert same_weights(result.model, silent.model)
    assert result.steps == silent.steps == uninterrupted.steps
    assert [row["epoch"] for row in result.validations] == [3, 4]
    assert silent.validations == []
    error = capsys.readouterr().err
    assert "epoch 4/4" in error
    assert "loss=" in error


def test_another_seed_other_bits(tmp_path, uninterrupted):
    other = run(tmp_path, config=dataclasses.replace(CONFIG, seed=1))
    assert other.steps["total"][0] != uninterrupted.steps["total"][0]


def test_each_validation_starts_from_the_same_generator(uninterrupted):
    noise = {row["noise"] for row in uninterrupted.validations}
    assert len(uninterrupted.validations) == 4
    assert len(noise) == 1


def test_the_callers_generators_and_settings_come_back(tmp_path):
    model, objective = modules()
    before, settings = rng_state(), torch.are_deterministic_algorithms_enabled()
    seen = []
    train(
        model, objective, plan(), CONFIG, tmp_path,
        lambda m: seen.append(torch.are_deterministic_algorithms_enabled()) or score(m),
    )  # fmt: skip
    after = rng_state()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert before[1] == after[1]
    assert all(seen)
    assert torch.are_deterministic_algorithms_enabled() == settings


def test_worker_processes_change_nothing(tmp_path, uninterrupted):
    result = run(tmp_path, config=dataclasses.replace(CONFIG, workers=1))
    assert result.steps == uninterrupted.steps


def test_rng_state_covers_python_numpy_and_torch():
    import random

    def draw():
        return random.gauss(0, 1), np.random.normal(), float(torch.randn(()))  # noqa: NPY002

    draw()  # leaves half a pair of normal numbers behind, which is part of the state
    tensors, rest = rng_state()
    first = draw()
    assert draw() != first
    set_rng_state(tensors, json.loads(json.dumps(rest)))
    assert draw() == first
    set_rng_state(tensors, rest)
    with preserved_rng():
        draw()
    assert draw() == first


# --- several processes --------------------------------------------------------------------------


def test_two_processes_give_the_gradients_of_the_joint_batch(tmp_path):
    """Gloo, uneven shares, a batch of one video, accumulation, parameters unused by one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        start(
            "gradients", str(tmp_path), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1",
        )
        for rank in range(2)
    ]  # fmt: skip
    alone = tmp_path / "alone"
    tiny = gradients(*double_modules(), double_plan(), GRADIENT_CONFIG, alone / "tiny")
    model = gradients(*snag(dropout=0.0), snag_plan(), GRADIENT_CONFIG, alone / "snag")
    for process in processes:
        _, error = process.communicate()
        assert process.returncode == 0, error
    for rank in range(2):
        for kind, single, tolerance in (("tiny", tiny, 1e-9), ("snag", model, 1e-3)):
            found = load_file(tmp_path / f"{kind}{rank}.safetensors")
            assert found.keys() == single.keys()
            for name, value in single.items():
                if name.endswith(("key.bias", "key.norm.bias")):
                    continue  # shifts all scores of a softmax alike: its gradient is rounding
                atol = tolerance * float(value.abs().max())
                torch.testing.assert_close(
                    found[name], value, rtol=tolerance, atol=atol, msg=f"{kind} {name}"
                )
    for plan_, sizes in ((double_plan(), {3, 1}), (snag_plan(), {2, 1})):
        assert {len(spec.samples) for spec in plan_.epoch(0)} == sizes
    assert len({name.split("/")[0] for name in tiny if name[0].isdigit()}) == 4
    # What several processes trained, one process loads.
    assert train(*double_modules(), double_plan(), GRADIENT_CONFIG, tmp_path / "tiny").loaded


def test_snag_resumes_in_the_same_bits_and_learns(tmp_path):
    config = dataclasses.replace(CONFIG, epochs=6, select_by=None, learning_rate=2e-3)

    class Stopped(BatchPlan):
        def load(self, spec):
            if (spec.epoch, spec.number) == (3, 2) and not (tmp_path / "stopped").exists():
                (tmp_path / "stopped").touch()
                raise StopHereError
            return super().load(spec)

        def __repr__(self) -> str:
            return repr(snag_plan())

    whole = train(*snag(), snag_plan(), config, tmp_path / "a")
    stopped = Stopped(
        **{f.name: getattr(snag_plan(), f.name) for f in dataclasses.fields(BatchPlan)}
    )
    with pytest.raises(StopHereError):
        train(*snag(), stopped, config, tmp_path / "b")
    resumed = train(*snag(), stopped, config, tmp_path / "b")
    assert same_weights(whole.model, resumed.model)
    assert whole.steps == resumed.steps
    assert set(whole.steps) >= {"classification", "regression"}
    assert np.mean(whole.steps["total"][-5:]) < 0.9 * np.mean(whole.steps["total"][:5])


def test_snag_decays_its_matrices_and_nothing_else():
    model, _ = snag()
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, free = decay_groups(model)
    assert len(decayed) + len(free) == len(names)
    assert all(p.ndim >= 2 for p in decayed)
    left = {names[id(p)] for p in free if p.ndim >= 2}
    assert left == set()
    assert any("background" in names[id(p)] for p in free)


def test_reduce_sum_in_one_process_is_a_detached_copy():
    value = torch.ones(3, requires_grad=True)
    total = reduce_sum(value)
    assert torch.equal(total, value)
    assert not total.requires_grad
    total += 1
    assert value.sum() == 3
    with whole_batch():
        assert torch.equal(reduce_sum(value), value)


def test_accumulation_takes_the_mean_of_its_batches(tmp_path):
    """Against gradients of the single batches, by hand; the last group of an epoch is shorter."""

    class Plain(nn.Module):
        def forward(self, output, batch):
            return {"total": output.square().sum()}

    plan_ = plan()
    model, _ = modules(dropout=0.0)
    reference = TinyModel(0.0)
    reference.load_state_dict(model.state_dict())
    specs = plan_.epoch(0)
    config = TrainingConfig(
        epochs=1, warmup_epochs=0, gradient_accumulation=3, clip_norm=None, device="cpu",
        progress=False,
    )  # fmt: skip
    result = train(model, Plain(), plan_, config, tmp_path)
    assert result.steps["step"] == [1, 2]  # three batches, then two
    losses = [Plain()(reference(b := plan_.load(spec)), b)["total"] for spec in specs[:3]]
    mean = torch.stack(losses).mean()
    mean.backward()
    norm = torch.stack([p.grad.norm() for p in reference.parameters()]).norm()
    assert result.steps["gradient_norm"][0] == pytest.approx(float(norm), rel=1e-5)
    assert result.steps["total"][0] == pytest.approx(mean.item(), rel=1e-5)


# --- optimisation -------------------------------------------------------------------------------


def test_one_step_against_adamw_by_hand(tmp_path):
    """Clipping, warm-up, decay of matrices only, and the moving average."""
    model, objective = modules(dropout=0.0)
    plan_ = BatchPlan(plan().dataset, videos_per_batch=100, queries_per_video=3)
    config = TrainingConfig(
        epochs=2, warmup_epochs=2, learning_rate=0.1, weight_decay=0.5, clip_norm=0.25,
        ema_decay=0.75, ema_warmup=False, device="cpu", progress=False,
    )  # fmt: skip
    mirror, mirror_objective = modules(dropout=0.0)
    values = {
        id(p): (p.detach().double(), 0.0, 0.0)
        for p in (*mirror.parameters(), *mirror_objective.parameters())
    }
    trained = [*mirror.named_parameters(), *mirror_objective.named_parameters()]
    averages, norms = [], []
    for step, rate in ((1, 0.05), (2, 0.1)):
        batch = plan_.load(plan_.epoch(step - 1)[0])
        loss = mirror_objective(mirror(batch), batch)["total"]
        gradient = torch.autograd.grad(loss, [p for _, p in trained])
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient))
        norms.append(norm)
        for (name, p), g in zip(trained, gradient, strict=True):
            value, first, second = values[id(p)]
            g = g.double() * min(1, 0.25 / (norm + 1e-6))
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            if name in ("video.weight", "words.weight", "head.weight", "long.weight"):
                value = value * (1 - rate * 0.5)
            root = (second / (1 - 0.999**step)).sqrt() + 1e-8
            value = value - rate * first / (1 - 0.9**step) / root
            values[id(p)] = value, first, second
            p.data.copy_(value)
        averages.append({n: values[id(p)][0] for n, p in mirror.named_parameters()})
    result = train(model, objective, plan_, config, tmp_path)
    assert result.steps["gradient_norm"] == pytest.approx(norms, rel=1e-4)
    assert min(norms) > 0.25  # the clipping was at work
    for name, value in result.model.state_dict().items():
        expected = 0.75 * averages[0][name] + 0.25 * averages[1][name]
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5, msg=name)


def test_average_warms_up(tmp_path):
    """With a decay of nearly one the average moves only because of the warm-up."""
    warm = dataclasses.replace(CONFIG, ema_decay=0.999999, select_by=None)
    moved = {}
    for ema_warmup in (True, False):
        config = dataclasses.replace(warm, ema_warmup=ema_warmup)
        first, objective = modules()
        start_ = first.head.weight.detach().clone()
        result = train(first, objective, plan(), config, tmp_path / str(ema_warmup))
        moved[ema_warmup] = (result.model.head.weight - start_).norm().item()
    assert moved[True] > 3 * moved[False]


def test_the_objective_is_trained_too(tmp_path):
    model, objective = modules()
    before = objective.long.weight.detach().clone()
    train(model, objective, plan(), CONFIG, tmp_path, score)
    assert not torch.equal(before, objective.long.weight)


def test_learning_rate():
    config = TrainingConfig(epochs=4, warmup_epochs=1, learning_rate=2.0)
    rates = [learning_rate(config, step, 4, 12) for step in range(12)]
    assert rates == [0.5, 1.0, 1.5] + [2.0] * 9
    cosine = dataclasses.replace(config, schedule="cosine")
    rates = [learning_rate(cosine, step, 4, 12) for step in range(12)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[8] == pytest.approx(1.0)  # half way
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.1
    linear = dataclasses.replace(config, schedule="linear")
    rates = [learning_rate(linear, step, 4, 12) for step in range(12)]
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25]
    assert learning_rate(config, 0, 0, 12) == 2.0


def test_warmup_may_be_a_fraction_of_an_epoch(tmp_path):
    config = dataclasses.replace(CONFIG, warmup_epochs=1.4)
    rates = run(tmp_path, config=config).steps["learning_rate"]
    assert rates[:8] == pytest.approx([i / 7 * 1e-2 for i in range(1, 8)] + [1e-2])


def test_decay_groups():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.conv = nn.Conv1d(4, 4, 3)
            self.attention = nn.MultiheadAttention(4, 2)
            self.norm = nn.LayerNorm((4, 4))
            self.group = nn.GroupNorm(2, 4)
            self.embedding = nn.Embedding(3, 4)
            self.token = nn.Parameter(torch.zeros(1, 1, 4))
            self.positions = nn.Parameter(torch.zeros(7, 4))
            self.scale = nn.Parameter(torch.ones(4, 1))
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.transition = nn.Linear(4, 4, bias=False)
            self.transition.weight._no_weight_decay = True
            self.tied = nn.Linear(4, 4, bias=False)
            self.tied.weight = self.linear.weight

    block = Block()
    names = {id(p): n for n, p in block.named_parameters()}
    decayed, free = ([names[id(p)] for p in group] for group in decay_groups(block))
    assert sorted(decayed) == sorted(
        ["linear.weight", "conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"]
    )
    assert sorted([*decayed, *free, "frozen.weight", "frozen.bias"]) == sorted(names.values())


# --- selection, history, results ----------------------------------------------------------------


def test_the_best_epoch_is_kept_and_the_earlier_of_equals(tmp_path):
    kept = []

    def validate(model):
        kept.append({name: value.clone() for name, value in model.state_dict().items()})
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"recall": [0.2, 0.7, 0.7, math.nan][len(kept) - 1]}

    config = dataclasses.replace(CONFIG, select_by="recall")
    result = train(*modules(), plan(), config, tmp_path, validate)
    assert result.selected == {"epoch": 2, "step": 10, "recall": 0.7}
    assert not result.model.training
    assert all(torch.equal(v, kept[1][n]) for n, v in result.model.state_dict().items())
    assert not torch.equal(result.model.head.weight, kept[3]["head.weight"])
    last = train(
        *modules(), plan(), dataclasses.replace(config, select_by=None), tmp_path / "last",
        lambda model: {"recall": 0.0},
    )  # fmt: skip
    assert torch.equal(last.model.head.weight, kept[3]["head.weight"])
    assert last.selected is None


def test_training_ends_when_patience_does(tmp_path):
    def validate(model):
        scores.append(1.0)
        return {"recall": [0.2, 0.7, 0.7, 0.1, 0.9, 0.0][len(scores) - 1]}

    scores = []
    config = dataclasses.replace(CONFIG, epochs=6, select_by="recall")
    patient = dataclasses.replace(config, patience=2)
    stopped = train(*modules(), plan(), patient, tmp_path / "stopped", validate)
    assert [row["epoch"] for row in stopped.validations] == [1, 2, 3, 4]
    assert stopped.selected["epoch"] == 2

    scores = []
    whole = train(*modules(), plan(), config, tmp_path / "whole", validate)
    assert whole.selected["epoch"] == 5
    steps = len(stopped.steps["total"])
    assert stopped.steps["total"] == whole.steps["total"][:steps]
    assert stopped.steps["learning_rate"] == whole.steps["learning_rate"][:steps]

    def refused(model):
        raise AssertionError("a finished run was validated again")

    again = train(*modules(), plan(), patient, tmp_path / "stopped", refused)
    assert again.selected == stopped.selected

    # Killed after the last validation, before the run was marked as finished: nothing is added.
    class KilledError(Exception):
        pass

    def kill(self):
        raise KilledError

    scores = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tvg_lib.training._Run._finish", kill)
        with pytest.raises(KilledError):
            train(*modules(), plan(), patient, tmp_path / "killed", validate)
    resumed = train(*modules(), plan(), patient, tmp_path / "killed", refused)
    assert resumed.steps["total"] == stopped.steps["total"]
    assert resumed.selected == stopped.selected
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, stopped.model.state_dict()[name])


def test_history(tmp_path, uninterrupted):
    steps = uninterrupted.steps
    assert set(steps) == {
        "epoch", "step", "learning_rate", "gradient_norm", "total", "fit", "extra"
    }  # fmt: skip
    assert steps["step"] == list(range(1, STEPS + 1))
    assert steps["epoch"] == [1 + i // 5 for i in range(STEPS)]
    assert steps["learning_rate"][:6] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01, 0.01])
    assert np.mean(steps["total"][-5:]) < np.mean(steps["total"][:5])
    assert np.allclose(np.add(steps["fit"], steps["extra"]), steps["total"])
    saved = json.loads((uninterrupted.run_dir / SUMMARY).read_text())
    assert saved["steps"] == steps
    assert saved["validations"] == uninterrupted.validations
    frame = uninterrupted.frame()
    assert list(frame.columns) == list(steps)
    assert frame["epoch"].dtype.kind == "i"
    assert len(frame) == STEPS


def test_reprs_say_the_same_before_and_after_loading(tmp_path, uninterrupted):
    loaded = run(uninterrupted.run_dir)
    assert loaded.loaded
    assert not uninterrupted.loaded
    assert repr(loaded) == repr(uninterrupted)
    assert loaded._repr_html_() == uninterrupted._repr_html_()
    assert repr(loaded).startswith("TrainingResult(epochs 4, steps 20, loss ")
    assert "<th>score</th>" in loaded._repr_html_()
    assert str(tmp_path) not in repr(loaded)


# --- folders ------------------------------------------------------------------------------------


def test_a_finished_run_is_loaded(uninterrupted, capsys):
    model, objective = modules()

    class Untouched(BatchPlan):
        def load(self, spec):
            raise AssertionError("a finished run reads no batch")

        def __repr__(self) -> str:
            return repr(plan())

    config = dataclasses.replace(CONFIG, progress=True)  # does not make another run of it
    result = train(
        model, objective, Untouched(plan().dataset, 3, 2), config, uninterrupted.run_dir, score
    )
    assert result.loaded
    assert result.model is model
    assert same_weights(model, uninterrupted.model)
    assert not model.training
    assert result.steps == uninterrupted.steps
    assert result.seconds == uninterrupted.seconds
    assert "20/20" in capsys.readouterr().err


@pytest.mark.parametrize("finished", [True, False])
def test_another_run_in_the_folder_is_refused(tmp_path, finished):
    if finished:
        run(tmp_path)
    else:
        with pytest.raises(StopHereError):
            run(tmp_path, interrupted(7))
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ConfigurationError, match=r"config\.learning_rate: 0\.01 there, 0\.02 here"
    ) as refusal:
        run(tmp_path, config=dataclasses.replace(CONFIG, learning_rate=0.02))
    assert "epochs" not in str(refusal.value)  # only what differs
    with pytest.raises(ConfigurationError, match=r"plan\.repr.*videos_per_batch=3.*=2"):
        run(tmp_path, plan(videos_per_batch=2))
    with pytest.raises(ConfigurationError, match=r"key: '' there, 'abc' here"):
        run(tmp_path, key="abc")
    with pytest.raises(ConfigurationError, match=r"model\.structure"):
        train(*modules(dropout=0.3), plan(), CONFIG, tmp_path, score)
    with pytest.raises(ConfigurationError, match="build the model after `set_seed`"):
        train(*modules(seed=2), plan(), CONFIG, tmp_path, score)
    assert content == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        lambda data: b"",
        lambda data: b"not a checkpoint at all, but long enough to have a header length",
    ],
    ids=["truncated", "one bit", "empty", "foreign"],
)
def test_a_damaged_file_is_named(tmp_path, damage):
    with pytest.raises(StopHereError):
        run(tmp_path, interrupted(7))
    path = tmp_path / CHECKPOINT
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"checkpoint\.safetensors"):
        run(tmp_path)


def test_a_damaged_finished_run_is_named(tmp_path):
    run(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"weights\.safetensors"):
        run(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(DataError, match=r"weights\.safetensors"):
        run(tmp_path)
    (tmp_path / SUMMARY).write_text("{")
    with pytest.raises(DataError, match=r"training\.json"):
        run(tmp_path)


def test_weights_are_plain_safetensors(uninterrupted):
    weights = load_file(uninterrupted.run_dir / WEIGHTS)
    model = TinyModel()
    model.load_state_dict(weights)
    assert same_weights(model, uninterrupted.model)


def test_two_at_once_in_one_folder(tmp_path, uninterrupted):
    """The second waits, then loads what the first has trained."""
    results, inside, go_on = [], threading.Event(), threading.Event()

    def slow(model):
        inside.set()
        assert go_on.wait(300)
        return score(model)

    first = threading.Thread(
        target=lambda: results.append(train(*modules(), plan(), CONFIG, tmp_path, slow))
    )
    first.start()
    assert inside.wait(300)
    second = start("wait", str(tmp_path))
    for line in second.stderr:
        if "waiting for another process" in line:
            break
    else:
        pytest.fail("the second process did not wait")
    go_on.set()
    assert second.communicate()[0].strip() == "loaded"
    first.join()
    assert same_weights(results[0].model, uninterrupted.model)


def test_tied_weights_are_saved(tmp_path):
    class Tied(TinyModel):
        def __init__(self):
            super().__init__(0.0)
            self.again = nn.Linear(8, 2)
            self.again.weight = self.head.weight

    torch.manual_seed(0)
    result = train(Tied(), TinyObjective(), plan(), CONFIG, tmp_path, score)
    weights = load_file(tmp_path / WEIGHTS)
    assert torch.equal(weights["again.weight"], weights["head.weight"])
    assert result.model.again.weight is result.model.head.weight


def test_run_key():
    code, data = ["tvg_lib.data.batching"], "d"
    base = run_key({"model": {"width": 4}, "training": CONFIG}, code=code, data_hash=data)
    assert len(base) == 16

    def key(parameters, code=code, data=data):
        return run_key(parameters, code=code, data_hash=data)

    quiet = dataclasses.replace(CONFIG, progress=True, workers=2, device="auto")
    assert key({"training": quiet, "model": {"width": 4}}) == base
    assert key({"model": {"width": 5}, "training": CONFIG}) != base
    assert key({"model": {"width": 4}, "training": dataclasses.replace(CONFIG, seed=7)}) != base
    assert key({"model": {"width": 4}, "training": CONFIG}, data="e") != base
    assert key({"model": {"width": 4}, "training": CONFIG}, code=["tvg_lib.decoding"]) != base
    with pytest.raises(ConfigurationError, match="plain value"):
        key({"model": object()})


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("warmup_epochs", 16),
        ("warmup_epochs", -1),
        ("learning_rate", 0.0),
        ("learning_rate", math.inf),
        ("weight_decay", -0.1),
        ("betas", (0.9,)),
        ("betas", (0.9, 1.0)),
        ("clip_norm", 0.0),
        ("schedule", "stepwise"),
        ("patience", 0),
        ("patience", 3),  # without a metric to select by
        ("ema_decay", 1.0),
        ("precision", "fp16"),
        ("device", "tpu"),
        ("gradient_accumulation", 0),
        ("validate_every", 0),
        ("checkpoint_every", 0),
        ("workers", -1),
        ("seed", -1),
    ],
)
def test_bad_configuration(field, value):
    with pytest.raises(ConfigurationError, match=field):
        TrainingConfig(**{field: value})


def test_configuration_from_plain_values():
    config = TrainingConfig(**json.loads(json.dumps(dataclasses.asdict(CONFIG))))
    assert config == CONFIG
    assert hash(config) == hash(CONFIG)


class Poisoned(TinyObjective):
    """Turns a term bad at one step."""

    def __init__(self, at: int, how: str) -> None:
        super().__init__()
        self.at, self.how, self.seen = at, how, 0

    def forward(self, output, batch):
        terms = super().forward(output, batch)
        self.seen += 1
        if self.seen == self.at:
            if self.how == "gradient":  # finite itself, but d/dx sqrt(x) is infinite at 0
                terms["total"] = terms["total"] + (output * 0).sum().sqrt()
            else:
                terms["fit"] = terms["fit"] * float(self.how)
                terms["total"] = terms["fit"] + terms["extra"]
        return terms


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_that_is_not_finite_names_the_batch(tmp_path, how, accumulation):
    model, _ = modules()
    config = dataclasses.replace(
        CONFIG, gradient_accumulation=accumulation, checkpoint_every=1, select_by=None
    )
    at = 8  # second epoch, third batch
    spec = plan().epoch(1)[2]
    batch = plan().load(spec)
    step = 3 if accumulation == 1 else 2
    with pytest.raises(NonFiniteLossError) as caught:
        train(model, Poisoned(at, how), plan(), config, tmp_path)
    message = str(caught.value)
    assert f"epoch 2, step {step} of" in message
    for name in (*batch.video_ids, *batch.query_ids):
        assert repr(name) in message
    if how == "gradient":
        assert "gradient" in message
    else:
        assert f"fit={how}" in message
        assert f"total={how}" in message
    good = 7 if accumulation == 1 else 4
    assert f"checkpoint of step {good} is kept" in message
    tensors, _ = read_state(tmp_path / CHECKPOINT)
    assert tensors["history"].shape[1] == good
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_unusable_arguments(tmp_path):
    with pytest.raises(ConfigurationError, match="needs a `validate`"):
        train(*modules(), plan(), CONFIG, tmp_path / "a")
    with pytest.raises(ConfigurationError, match=r"select_by='score' is not among.*other"):
        train(*modules(), plan(), CONFIG, tmp_path / "b", lambda model: {"other": 1.0})

    class Objective(nn.Module):
        def __init__(self, terms):
            super().__init__()
            self.terms = iter(terms)

        def forward(self, output, batch):
            return next(self.terms)(output)

    for terms, message in (
        ([lambda x: {"loss": x.sum()}], r"\['loss'\], without 'total'"),
        ([lambda x: {"total": x}], r"'total': expected a scalar, found the shape \("),
        (
            [lambda x: {"total": x.sum()}, lambda x: {"total": x.sum(), "new": x.sum()}],
            r"\['new', 'total'\], before \['total'\]",
        ),
    ):
        with pytest.raises(ConfigurationError, match=message):
            train(modules()[0], Objective(terms), plan(), CONFIG, tmp_path / "c", score)
    frozen = modules()[0].requires_grad_(False)
    with pytest.raises(ConfigurationError, match="anything to train"):
        train(frozen, nn.Identity(), plan(), CONFIG, tmp_path / "d", score)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_cuda_is_said(tmp_path):
    with pytest.raises(ConfigurationError, match="no CUDA device"):
        run(tmp_path, config=dataclasses.replace(CONFIG, device="cuda"))


# --- precision, memory, state -------------------------------------------------------------------


def test_bf16_runs_under_autocast_and_both_precisions_in_one_session(
    tmp_path, uninterrupted, monkeypatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    seen = []

    class Watched(TinyModel):
        def forward(self, batch):
            output = super().forward(batch)
            seen.append(output.dtype)
            return output

    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, precision="bf16", select_by=None)
    half = train(Watched(), TinyObjective(), plan(), config, tmp_path / "half")
    assert set(seen) == {torch.bfloat16}
    assert half.model.head.weight.dtype == torch.float32
    assert half.steps["total"][-1] < half.steps["total"][0]
    assert run(tmp_path / "full").steps == uninterrupted.steps


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bf16_falls_back_where_a_device_lacks_it(monkeypatch, device):
    monkeypatch.setattr(training, "is_bf16_available", lambda: device == "cpu")
    other = {"cpu": "AVX2", "cuda": "AVX512"}[device]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: other)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    chosen = {}

    def accelerator(**options):
        chosen.update(options)
        raise StopHereError

    monkeypatch.setattr(training, "Accelerator", accelerator)
    config = TrainingConfig(precision="bf16", device=device)
    with (
        pytest.warns(UserWarning, match="training in fp32"),
        pytest.raises(StopHereError),
        training._accelerator(config),
    ):
        pass
    assert chosen["mixed_precision"] == "no"


def test_memory_does_not_grow(tmp_path):
    """The number of living tensors after each epoch stays the same."""
    living = []

    def validate(model):
        gc.collect()
        living.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
        return {}

    config = dataclasses.replace(CONFIG, epochs=8, select_by=None)
    model, objective = modules()
    train(model, objective, plan(), config, tmp_path, validate)
    assert living[1:] == [living[1]] * 7
    assert all(p.grad is None for p in (*model.parameters(), *objective.parameters()))


def test_accelerate_is_left_clean(tmp_path):
    """So that a notebook can start several processes after training in one."""
    from accelerate.state import AcceleratorState, PartialState

    run(tmp_path)
    assert AcceleratorState._shared_state == {}
    assert PartialState._shared_state == {}
