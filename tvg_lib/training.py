"""One training loop for every model: accelerate, exact resume, moving-average weights.

    plan.epoch(e) ─▶ specs ─▶ plan.load ─▶ batch ─▶ model ─▶ objective ─▶ AdamW ─▶ moving average
                                                                                        │
                        best (or last) weights ◀── validate(moving average), each epoch ┘

What the loop expects:

- `model(batch)` gives an output, `objective(output, batch)` a dict of scalars with "total" and its
  named terms. Both are modules; trainable parameters and buffers of both are trained and saved.
- In several processes the terms are *shares* whose sum over processes is the value of the joint
  batch: see `tvg_lib.distributed.reduce_sum`.
- `plan` has no state and draws from no global generator (`tvg_lib.data.batching.BatchPlan`), so a
  position (epoch, step) is all that a resumed run needs of it.

A run owns a folder. While it runs, `checkpoint.safetensors` holds everything: weights, moving
average, optimiser, objective, generators, position, history. When it ends, `weights.safetensors`
holds the selected weights and `training.json` the history. Calling `train` again with the same
arguments continues an interrupted run, bit by bit as if it had never stopped (same machine, device
and number of threads), and only loads a finished one. Name the folder by `run_key`.

Several GPUs. From a shell:

    accelerate launch --num_processes 2 script.py       # script.py calls train(...)
    torchrun --nproc_per_node 2 script.py               # the same; also for processes on a CPU

From a notebook, before anything has touched a GPU there:

    accelerate.notebook_launcher(function, (arguments,), num_processes=2)    # calls train(...)

and then `train(...)` in the notebook itself, which finds the run finished and loads it. Neither
needs a configuration file. Device and precision come from `TrainingConfig`, not from the launcher.
On one CPU or GPU just call `train`.
"""

import dataclasses
import hashlib
import html
import json
import logging
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    is_bf16_available,
    set_seed,
)
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from tvg_lib.checkpoints import (
    nested,
    prefixed,
    preserved_rng,
    read_state,
    rng_state,
    set_rng_state,
    write_bytes,
    write_state,
)
from tvg_lib.distributed import reduce_sum, whole_batch
from tvg_lib.errors import ConfigurationError, DataError, NonFiniteLossError
from tvg_lib.fingerprint import code_fingerprint, value_fingerprint

if TYPE_CHECKING:
    import pandas

CHECKPOINT = "checkpoint.safetensors"
WEIGHTS = "weights.safetensors"
OBJECTIVE = "objective.safetensors"
SUMMARY = "training.json"
FORMAT = 1

logger = logging.getLogger(__name__)

Validate = Callable[[nn.Module], Mapping[str, float]]


class Spec(Protocol):
    """What one step sees, without the features (`tvg_lib.data.batching.BatchSpec`)."""

    @property
    def samples(self) -> Sequence[Any]: ...

    def share(self, rank: int, world: int) -> Self: ...


class Batch(Protocol):
    """Loaded features (`tvg_lib.data.batching.GroundingBatch`)."""

    @property
    def video_ids(self) -> Sequence[str]: ...

    @property
    def query_ids(self) -> Sequence[str]: ...

    def to(self, device: torch.device) -> Self: ...


class Plan(Protocol):
    """The order of training (`tvg_lib.data.batching.BatchPlan`)."""

    def epoch(self, epoch: int) -> Sequence[Spec]: ...

    def load(self, spec: Spec) -> Batch: ...


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. The defaults are SnAG's released TACoS recipe, but for `ema_warmup`.

    Attributes:
        epochs: all epochs, those of the warm-up included (released configurations give
            `epochs` *after* the warm-up: TACoS 10 + 5 is 15 here).
        warmup_epochs: linear warm-up, step by step; may be a fraction.
        learning_rate, weight_decay, betas: of AdamW; decay on matrices only (`decay_groups`).
        clip_norm: largest norm of all gradients together; None leaves them alone.
        schedule: after the warm-up, "constant" (what SnAG and HieraMamba really do: the milestone
            in their files is never reached), or "cosine" or "linear" down to 0.
        ema_decay: of the moving average of the weights, which is what is validated and returned.
        ema_warmup: let the decay grow as min(ema_decay, (1 + t) / (10 + t)) over steps t. Short
            runs need it, or their average would still be near the first weights. The released code
            has no such thing.
        precision: "bf16" is autocast; where the device lacks it, or a CPU AVX-512, "fp32" is used
            with a warning.
        device: "auto" takes CUDA where present, else the CPU.
        gradient_accumulation: batches per step; the step takes the mean of their gradients.
        validate_every: epochs between validations; the last epoch is always validated.
        select_by: metric of `validate` whose best epoch is kept (higher is better, the earlier of
            equals); None keeps the last weights.
        patience: end the training after so many epochs without a better one by `select_by`; None
            never does. The schedule stays that of all `epochs`.
        checkpoint_every: steps between checkpoints; there is also one after each validation.
        seed: of dropout and of everything else that draws from global generators.
        deterministic: ask PyTorch for deterministic algorithms (it warns where there is none).
        workers: processes that read batches ahead; 0 reads in the training process.
        progress: show a progress bar.
    """

    epochs: int = 15
    warmup_epochs: float = 5
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = 1.0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    ema_decay: float = 0.999
    ema_warmup: bool = True
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gradient_accumulation: int = 1
    validate_every: int = 1
    select_by: str | None = None
    patience: int | None = None
    checkpoint_every: int = 500
    seed: int = 0
    deterministic: bool = True
    workers: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("epochs", "gradient_accumulation", "validate_every", "checkpoint_every"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("warmup_epochs", 0 <= self.warmup_epochs <= self.epochs, "0 to `epochs`")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            self._require(name, value is None or (value > 0 and math.isfinite(value)), "positive")
        self._require("weight_decay", self.weight_decay >= 0, "0 or more")
        self._require(
            "betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two in [0, 1)"
        )
        self._require("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        self._require("patience", self.patience is None or self.patience >= 1, "at least 1")
        chosen = self.patience is None or self.select_by is not None
        self._require("patience", chosen, "None where no metric is selected by")
        self._require("workers", self.workers >= 0, "0 or more")
        self._require("seed", 0 <= self.seed < 2**31, "in [0, 2**31)")
        for name, choices in (
            ("schedule", ("constant", "cosine", "linear")),
            ("precision", ("fp32", "bf16")),
            ("device", ("auto", "cpu", "cuda")),
        ):
            self._require(name, getattr(self, name) in choices, f"one of {choices}")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigurationError(
                f"TrainingConfig.{name}: expected {expected}, found {getattr(self, name)!r}"
            )

    def identity(self) -> dict[str, Any]:
        """The fields that decide the weights; not where the run runs or what it shows."""
        elsewhere = {"device", "checkpoint_every", "workers", "progress"}
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name not in elsewhere}


def learning_rate(config: TrainingConfig, step: int, warmup_steps: int, total_steps: int) -> float:
    """Rate of a step, counted from 0: linear up to step `warmup_steps`, then the schedule."""
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if config.schedule == "linear":
        return config.learning_rate * (1 - done)
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


def decay_groups(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters with and without weight decay.

    Decayed are the matrices and kernels that multiply features: parameters whose name ends in
    "weight", with at least two axes, of anything but an embedding or a norm. Biases, norms, scales,
    embeddings, tokens and position tables are not, nor is a parameter that carries a true attribute
    `_no_weight_decay` (state-space models mark theirs so).

    Returns:
        (decayed, not decayed), in the order of the module tree, each parameter once.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    spared = (nn.Embedding, nn.EmbeddingBag, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    seen: set[int] = set()
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            matrix = name.endswith("weight") and parameter.ndim >= 2
            spare = isinstance(owner, spared) or getattr(parameter, "_no_weight_decay", False)
            (decayed if matrix and not spare else free).append(parameter)
    return decayed, free


def run_key(parameters: Any, *, code: Iterable[ModuleType | str], data_hash: str) -> str:
    """Name of a run by what decides its outcome: 16 hexadecimal digits.

    Args:
        parameters: everything configurable, as nested dicts, lists, plain values and dataclasses
            (of a `TrainingConfig` only what `identity` keeps).
        code: modules whose code (with all they import of this package) makes the run: those of the
            model, the objective and the data. The training loop is always included.
        data_hash: fingerprint of the training data.
    """
    modules = sorted({m if isinstance(m, str) else m.__name__ for m in code} | {__name__})
    plain = {
        "parameters": _plain(parameters),
        "code": code_fingerprint(*modules),
        "data": data_hash,
    }
    return value_fingerprint(plain)[:16]


@dataclass(frozen=True)
class TrainingResult:
    """What a run leaves behind.

    Attributes:
        model: with the selected weights, in evaluation mode, on the device it was trained on.
        config: of the run.
        run_dir: its folder.
        steps: columns over optimiser steps: "epoch", "step" (both from 1), "learning_rate",
            "gradient_norm" (before clipping), "total" and the objective's other terms.
        validations: one row each: "epoch", "step" and the metrics.
        selected: the row of `validations` whose weights were kept; None without selection.
        seconds: of training and validation, over all sessions of the run.
        loaded: whether the run was found finished.
    """

    model: nn.Module = field(repr=False)
    config: TrainingConfig
    run_dir: Path
    steps: dict[str, list[float]]
    validations: list[dict[str, float]]
    selected: dict[str, float] | None
    seconds: float
    loaded: bool

    def frame(self) -> "pandas.DataFrame":
        """`steps` as a table, for learning curves."""
        import pandas

        return pandas.DataFrame(self.steps).astype({"epoch": int, "step": int})

    def _facts(self) -> dict[str, str]:
        rows = list(zip(self.steps["epoch"], self.steps["total"], strict=True))
        ends = ([loss for epoch, loss in rows if epoch == at] for at in (1, self.config.epochs))
        facts = {
            "epochs": f"{self.config.epochs}",
            "steps": f"{len(rows)}",
            "loss": " → ".join(f"{sum(losses) / len(losses):.4g}" for losses in ends),
        }
        row = self.selected or (self.validations[-1] if self.validations else None)
        if row is not None:
            facts["selected" if self.selected else "validated"] = f"epoch {row['epoch']:.0f}"
            facts |= {k: f"{v:.4g}" for k, v in row.items() if k not in ("epoch", "step")}
        return facts

    def __repr__(self) -> str:
        # Neither times nor folders: machines that get the same numbers show the same text.
        return f"TrainingResult({', '.join(f'{k} {v}' for k, v in self._facts().items())})"

    def _repr_html_(self) -> str:
        facts = {html.escape(k): html.escape(v) for k, v in self._facts().items()}
        head = "".join(f"<th>{name}</th>" for name in facts)
        row = "".join(f"<td>{value}</td>" for value in facts.values())
        return (
            "<table><caption>Training run</caption>"
            f"<thead><tr>{head}</tr></thead><tbody><tr>{row}</tr></tbody></table>"
        )


def train(
    model: nn.Module,
    objective: nn.Module,
    plan: Plan,
    config: TrainingConfig,
    run_dir: Path | str,
    validate: Validate | None = None,
    *,
    key: str = "",
) -> TrainingResult:
    """Train a model, continue an interrupted run, or load a finished one.

    Random generators are seeded inside and put back to the caller's state afterwards. Build the
    model from a fixed seed too (`accelerate.utils.set_seed`): the first weights belong to the run.

    Args:
        model: trained in place; it leaves with the selected weights, in evaluation mode.
        objective: trained with it where it has parameters.
        plan: what each step sees.
        config: how to train.
        run_dir: the run's folder, made if needed. A second process that trains the same run waits
            until the first has finished.
        validate: metrics of a model in evaluation mode, on the run's device. Called in the first
            process only, without gradients, from the same generator state each time.
        key: `run_key` of whatever the other arguments do not show.

    Raises:
        ConfigurationError: the folder holds another run (the message names what differs), CUDA is
            asked for and missing, or model, objective and validation do not fit together.
        DataError: a file of the folder is damaged.
        NonFiniteLossError: a loss or gradient is NaN or infinite; names the batch. The last
            checkpoint stays.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(preserved_rng())
        stack.enter_context(_deterministic(config.deterministic))
        accelerator = stack.enter_context(_accelerator(config))
        if accelerator.is_main_process:
            stack.enter_context(_lock(run_dir))
            for left in run_dir.glob(".part-*"):  # by a killed run
                left.unlink()
        accelerator.wait_for_everyone()
        run = _Run(accelerator, model, objective, plan, config, run_dir, validate, key)
        if (run_dir / SUMMARY).exists():
            return run.load()
        run.resume()
        return run.fit()


class _Step(nn.Module):
    """Model and objective as one module, so that both are wrapped, and their gradients summed."""

    def __init__(self, model: nn.Module, objective: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.objective(self.model(batch), batch)


class _Run:
    """State of a run between its first and its last step."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        objective: nn.Module,
        plan: Plan,
        config: TrainingConfig,
        run_dir: Path,
        validate: Validate | None,
        key: str,
    ) -> None:
        if config.select_by is not None and validate is None:
            raise ConfigurationError(
                f"TrainingConfig.select_by={config.select_by!r} needs a `validate` function"
            )
        self.accelerator = accelerator
        self.model, self.objective = model, objective
        self.plan, self.config, self.run_dir, self.validate = plan, config, run_dir, validate
        every = config.gradient_accumulation
        orders = [list(plan.epoch(epoch)) for epoch in range(config.epochs)]
        self.epoch_steps = [math.ceil(len(order) / every) for order in orders]
        if min(self.epoch_steps) == 0:
            raise ConfigurationError("the plan has an epoch without batches")
        self.total_steps = sum(self.epoch_steps)
        whole, part = divmod(config.warmup_epochs, 1)
        self.warmup_steps = sum(self.epoch_steps[: int(whole)])
        if part:
            self.warmup_steps += round(part * self.epoch_steps[int(whole)])
        self.identity = {
            "format": FORMAT,
            "key": key,
            "config": config.identity(),
            "precision": accelerator.mixed_precision,
            "processes": accelerator.num_processes,
            "model": _describe(model),
            "objective": _describe(objective),
            "plan": {"repr": _stable_repr(plan), "order": _digest(repr(orders).encode())},
        }
        self.average = AveragedModel(model, multi_avg_fn=_averaging(config))
        self.average.to(accelerator.device)
        self.step_module = accelerator.prepare_model(_Step(model, objective))
        decayed, free = decay_groups(nn.ModuleList([model, objective]))
        self.parameters = decayed + free
        if not self.parameters:
            raise ConfigurationError("neither the model nor the objective has anything to train")
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": free, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=config.betas,
        )
        self.epoch, self.position = 0, 0
        self.steps: dict[str, list[float]] = {}
        self.validations: list[dict[str, float]] = []
        self.selected: dict[str, float] | None = None
        self.best: dict[str, Tensor] | None = None
        self.seconds = 0.0
        self.saved_step: int | None = None

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return len(self.steps.get("step", ()))

    @property
    def _out_of_patience(self) -> bool:
        """Whether the epochs since the best one are as many as are waited for."""
        if self.config.patience is None or not self.validations:
            return False
        best = self.selected["epoch"] if self.selected else 0
        return self.validations[-1]["epoch"] - best >= self.config.patience

    def fit(self) -> TrainingResult:
        """Train from the present position to the end."""
        config, started = self.config, time.monotonic() - self.seconds
        self.optimizer.zero_grad(set_to_none=True)  # whatever the caller left behind
        with self._bar() as bar:
            for epoch in range(self.epoch, config.epochs):
                if self._out_of_patience:
                    break
                bar.set_description(f"epoch {epoch + 1}/{config.epochs}", refresh=False)
                self.step_module.train()
                for groups_done in self._steps(epoch):
                    self.epoch, self.position = epoch, groups_done
                    self.seconds = time.monotonic() - started
                    bar.set_postfix(loss=f"{self.steps['total'][-1]:.4g}", refresh=False)
                    bar.update()
                    if self.step % config.checkpoint_every == 0:
                        self.save()
                due = (epoch + 1) % config.validate_every == 0 or epoch + 1 == config.epochs
                self.epoch, self.position = epoch + 1, 0
                if self.validate is not None and due:
                    self._validate()
                    self.seconds = time.monotonic() - started
                    self.save()
        return self._finish()

    def _steps(self, epoch: int) -> Iterator[int]:
        """Make the steps of an epoch that are still to be made; yields how many it has had."""
        every = self.config.gradient_accumulation
        specs = list(self.plan.epoch(epoch))[self.position * every :]
        # A generator of its own, because the loader draws a seed that nobody here uses.
        batches = iter(
            DataLoader(
                [self._share(spec) for spec in specs],
                batch_size=None,
                collate_fn=self._load,
                num_workers=self.config.workers,
                generator=torch.Generator(),
            )
        )
        first = self.position
        for group in range(math.ceil(len(specs) / every)):
            size = min(every, len(specs) - group * every)
            self._update(epoch, first + group, batches, size)
            yield first + group + 1

    def _share(self, spec: Spec) -> tuple[Spec, bool]:
        """What this process sees of a batch, and whether that is all of it."""
        world = self.accelerator.num_processes
        if len(spec.samples) < world:
            return spec, True
        return spec.share(self.accelerator.process_index, world), world == 1

    def _load(self, item: tuple[Spec, bool]) -> tuple[Batch, bool]:
        spec, whole = item
        return self.plan.load(spec), whole

    def _update(
        self, epoch: int, number: int, batches: Iterator[tuple[Batch, bool]], size: int
    ) -> None:
        """One optimiser step on the mean gradient of `size` batches."""
        accelerator, world = self.accelerator, self.accelerator.num_processes
        rate = learning_rate(self.config, self.step, self.warmup_steps, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        contents: list[str] = []
        values: list[Tensor] = []
        for position in range(size):
            batch, whole = next(batches)
            batch = batch.to(accelerator.device)
            last = position == size - 1
            with nullcontext() if last else accelerator.no_sync(self.step_module):
                with whole_batch(whole):
                    terms = self.step_module(batch)
                self._check_terms(terms)
                # Gradients are averaged over processes. Shares add up, whole batches do not.
                weight = 1 if whole else world
                accelerator.backward(terms["total"] * (weight / size))
            detached = torch.stack([term.detach().double() for term in terms.values()])
            values.append(detached * (weight / world))
            contents.append(f"videos {list(batch.video_ids)}, queries {list(batch.query_ids)}")
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        norm = accelerator.clip_grad_norm_(self.parameters, limit)
        # All numbers of the step in one go: each synchronisation with a GPU costs time.
        numbers = torch.cat([reduce_sum(torch.stack(values)).flatten(), norm.to(values[0])[None]])
        *flat, norm = numbers.tolist()
        rows = [
            dict(zip(terms, flat[start : start + len(terms)], strict=True))
            for start in range(0, len(flat), len(terms))
        ]
        self._check_finite(epoch, number, contents, rows, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # not kept during validation
        self.average.update_parameters(self.model)
        self._record(
            {"epoch": epoch + 1, "step": self.step + 1, "learning_rate": rate}
            | {"gradient_norm": norm}
            | {name: sum(row[name] for row in rows) / size for name in terms}
        )

    def _record(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self.steps.setdefault(name, []).append(value)

    def _check_terms(self, terms: Mapping[str, Tensor]) -> None:
        """Raises `ConfigurationError` if an objective's terms are not what `train` can use."""
        if "total" not in terms:
            raise ConfigurationError(f"the objective returned {sorted(terms)}, without 'total'")
        for name, term in terms.items():
            if term.ndim != 0:
                raise ConfigurationError(
                    f"the objective's term {name!r}: expected a scalar, "
                    f"found the shape {tuple(term.shape)}"
                )
        known = set(self.steps) - {"epoch", "step", "learning_rate", "gradient_norm"}
        if known and known != set(terms):
            raise ConfigurationError(
                f"the objective returned the terms {sorted(terms)}, before {sorted(known)}"
            )

    def _check_finite(
        self,
        epoch: int,
        number: int,
        contents: Sequence[str],
        rows: Sequence[Mapping[str, float]],
        norm: float,
    ) -> None:
        bad = [i for i, row in enumerate(rows) if not all(map(math.isfinite, row.values()))]
        if not bad and math.isfinite(norm):
            return
        what = "loss" if bad else f"gradient (norm {norm})"
        shown = [
            f"{contents[i]}, terms {', '.join(f'{k}={v:.6g}' for k, v in rows[i].items())}"
            for i in (bad or range(len(rows)))
        ]
        where = f"epoch {epoch + 1}, step {number + 1} of {self.epoch_steps[epoch]}"
        if self.accelerator.num_processes > 1:
            where += f", process {self.accelerator.process_index} (the batch is its share)"
        kept = (
            "no checkpoint was written yet"
            if self.saved_step is None
            else f"the checkpoint of step {self.saved_step} is kept in {self.run_dir}"
        )
        raise NonFiniteLossError(
            f"the {what} is not finite at {where}; {'; '.join(shown)}; "
            f"{self.step} steps were good; {kept}"
        )

    def _validate(self) -> None:
        """Measure the moving average, and keep its weights if they are the best so far."""
        found: list[dict[str, float]] = [{}]
        if self.accelerator.is_main_process:
            with preserved_rng(), torch.no_grad():
                set_seed(self.config.seed)
                metrics = self.validate(self.average.module.eval())
            found = [{name: float(value) for name, value in metrics.items()}]
        broadcast_object_list(found)
        row = {"epoch": self.epoch, "step": self.step} | found[0]
        self.validations.append(row)
        name = self.config.select_by
        if name is None:
            return
        if name not in found[0]:
            raise ConfigurationError(
                f"TrainingConfig.select_by={name!r} is not among the metrics {sorted(found[0])}"
            )
        beaten = self.selected is None or row[name] > self.selected[name]
        if math.isfinite(row[name]) and beaten:
            self.selected = row
            self.best = _on_cpu(self.average.module.state_dict())

    def save(self) -> None:
        """Write a checkpoint. All processes take part, the first one writes."""
        generators = gather_object([rng_state()])
        self.saved_step = self.step
        if not self.accelerator.is_main_process:
            return
        optimizer = self.optimizer.state_dict()["state"]
        tensors = {
            "history": torch.tensor(list(self.steps.values()), dtype=torch.float64),
            **prefixed(self.model.state_dict(), "model"),
            **prefixed(self.objective.state_dict(), "objective"),
            **prefixed(self.average.state_dict(), "average"),
            **prefixed(self.best or {}, "best"),
        }
        for number, entries in optimizer.items():
            tensors |= prefixed(entries, f"optimizer/{number}")
        for rank, (states, _) in enumerate(generators):
            tensors |= prefixed(states, f"generators/{rank}")
        state = {
            "identity": self.identity,
            "epoch": self.epoch,
            "position": self.position,
            "columns": list(self.steps),
            "validations": self.validations,
            "selected": self.selected,
            "seconds": self.seconds,
            "generators": [rest for _, rest in generators],
        }
        write_state(self.run_dir / CHECKPOINT, tensors, state)

    def resume(self) -> None:
        """Take up the folder's checkpoint, or start with seeded generators."""
        path = self.run_dir / CHECKPOINT
        rank = self.accelerator.process_index
        if not path.exists():
            set_seed(self.config.seed, device_specific=True)
            return
        tensors, state = read_state(path)
        self._check_identity(state.get("identity", {}), path)
        self.model.load_state_dict(nested(tensors, "model"))
        self.objective.load_state_dict(nested(tensors, "objective"))
        self.average.load_state_dict(nested(tensors, "average"))
        self.best = nested(tensors, "best") or None
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in nested(tensors, "optimizer").items():
            number, _, entry = name.partition("/")
            entries.setdefault(int(number), {})[entry] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})
        self.steps = dict(zip(state["columns"], tensors["history"].tolist(), strict=True))
        self.epoch, self.position = state["epoch"], state["position"]
        self.validations, self.selected = state["validations"], state["selected"]
        self.seconds = state["seconds"]
        self.saved_step = self.step
        set_rng_state(nested(tensors, f"generators/{rank}"), state["generators"][rank])

    def _finish(self) -> TrainingResult:
        """Leave the selected weights in the model, and in the folder."""
        self.model.load_state_dict(self.best or self.average.module.state_dict())
        if self.accelerator.is_main_process:
            state = {"identity": self.identity}
            write_state(self.run_dir / WEIGHTS, self.model.state_dict(), state)
            write_state(self.run_dir / OBJECTIVE, self.objective.state_dict(), state)
            summary = {
                "identity": self.identity,
                "steps": self.steps,
                "validations": self.validations,
                "selected": self.selected,
                "seconds": self.seconds,
            }
            # Last, because its presence says that the run is finished.
            write_bytes(self.run_dir / SUMMARY, json.dumps(summary, indent=1).encode())
            (self.run_dir / CHECKPOINT).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        return self._result(loaded=False)

    def load(self) -> TrainingResult:
        """The result of a finished run."""
        path = self.run_dir / SUMMARY
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            identity = summary["identity"]
            self.steps, self.validations = summary["steps"], summary["validations"]
            self.selected, self.seconds = summary["selected"], summary["seconds"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: expected the summary of a run, found: {error!r}") from error
        # Several processes may have trained what a single one loads.
        elsewhere = ("processes", "precision")
        self._check_identity(identity, path, elsewhere)
        for module, name in ((self.model, WEIGHTS), (self.objective, OBJECTIVE)):
            tensors, state = read_state(self.run_dir / name)
            self._check_identity(state.get("identity", {}), self.run_dir / name, elsewhere)
            module.load_state_dict(tensors)
        with self._bar() as bar:
            bar.update(self.total_steps)
        return self._result(loaded=True)

    def _result(self, loaded: bool) -> TrainingResult:
        self.model.eval()
        self.objective.eval()
        return TrainingResult(
            model=self.model,
            config=self.config,
            run_dir=self.run_dir,
            steps=self.steps,
            validations=self.validations,
            selected=self.selected,
            seconds=self.seconds,
            loaded=loaded,
        )

    def _bar(self) -> tqdm:
        hidden = not (self.config.progress and self.accelerator.is_main_process)
        bar = tqdm(total=self.total_steps, desc="training", unit="step", disable=hidden)
        # Steps of an earlier session count as done, but not for the speed.
        bar.initial = bar.n = 0 if (self.run_dir / SUMMARY).exists() else self.step
        return bar

    def _check_identity(
        self, found: Mapping[str, Any], path: Path, ignored: Sequence[str] = ()
    ) -> None:
        expected = dict(_flat(json.loads(json.dumps(self.identity))))
        other = dict(_flat(found))
        differing = [
            f"{name}: {other.get(name)!r} there, {expected.get(name)!r} here"
            for name in sorted(expected.keys() | other.keys())
            if expected.get(name) != other.get(name) and name not in ignored
        ]
        if not differing:
            return
        advice = "choose another folder (`run_key` names it), or delete this one"
        if all(item.startswith(("model.weights", "objective.weights")) for item in differing):
            advice = "only the first weights differ: build the model after `set_seed`"
        raise ConfigurationError(
            f"{path} belongs to another run; {'; '.join(differing)}. Hint: {advice}"
        )


def _averaging(config: TrainingConfig) -> Callable[..., None]:
    """Update rule of `AveragedModel`; its first update copies the weights."""
    if not config.ema_warmup:
        return get_ema_multi_avg_fn(config.ema_decay)

    def update(average: list[Tensor], weights: list[Tensor], updates: Tensor) -> None:
        done = int(updates)
        decay = min(config.ema_decay, (1 + done) / (10 + done))
        get_ema_multi_avg_fn(decay)(average, weights, updates)

    return update


def _cpu_is_fast_in_bf16() -> bool:
    """Below AVX-512 it is imitated: a convolution took fifty times as long (AMD EPYC, AVX2)."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@contextmanager
def _accelerator(config: TrainingConfig) -> Iterator[Accelerator]:
    """An Accelerator of this run's own.

    Accelerate keeps one state per process and refuses a second run with another device or
    precision, so the state is cleared before and, where no process group hangs on it, after.
    """
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise ConfigurationError(
            "TrainingConfig.device='cuda': PyTorch finds no CUDA device; use 'auto' or 'cpu'"
        )
    cpu = config.device == "cpu" or not cuda
    precision = "bf16" if config.precision == "bf16" else "no"
    if precision == "bf16" and not (_cpu_is_fast_in_bf16() if cpu else is_bf16_available()):
        warnings.warn("this device has no bf16, or a slow one: training in fp32", stacklevel=4)
        precision = "no"
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        kwargs_handlers=[
            # A term may find nothing to work on in a batch, and leave its parameters out.
            DistributedDataParallelKwargs(find_unused_parameters=True),
            # Only the first process validates; the others wait for it.
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),
        ],
    )
    try:
        if config.device == "cuda" and accelerator.device.type != "cuda":
            raise ConfigurationError(
                f"TrainingConfig.device='cuda', but the launcher chose {accelerator.device}"
            )
        yield accelerator
    finally:
        if accelerator.num_processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def _deterministic(active: bool) -> Iterator[None]:
    """Deterministic algorithms inside, the caller's choice restored after."""
    if not active:
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    # Read by cuBLAS when a process first uses it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[3:]


@contextmanager
def _lock(run_dir: Path) -> Iterator[None]:
    lock = FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("waiting for another process that trains in %s", run_dir)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _describe(module: nn.Module) -> dict[str, str]:
    """What a module is and from which weights it starts."""
    weights = hashlib.sha256()
    for name, value in module.state_dict().items():
        weights.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        weights.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "structure": _digest(_stable_repr(module).encode()),
        "weights": weights.hexdigest()[:16],
    }


def _stable_repr(value: object) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings by dotted names."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _plain(value: Any) -> Any:
    """Nested configuration as JSON values.

    Raises:
        ConfigurationError: something in it is neither a plain value nor a dataclass.
    """
    if isinstance(value, TrainingConfig):
        return _plain(value.identity())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__qualname__} | items
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise ConfigurationError(f"run_key: expected a plain value, found {value!r}")
