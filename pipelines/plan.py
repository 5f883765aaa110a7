"""What an experiment would take on this machine, before any of it is run: tasks, what is missing, disk, memory and time.

Times come from a few steps of the pipeline's own code, on untrained networks of the experiment's sizes, and on made data
where the data set is not prepared. What would take too long even so is measured in part and scaled by the count that it is
linear in; each stage's ``basis`` says how.
"""

import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from datasets.registry import spec
from metrics import frechet, kid, mmd
from metrics.features import BATCH, PRETRAINED, FeatureNetwork, SmallClassifier
from metrics.likelihood import BYTES_AT_ONCE, contrastive_losses, divergences, fill_pool, log_likelihoods
from models import registry as models
from models.folding import folded
from models.protocol import HierarchicalVAE
from models.trainer import evidence, train_vae
from pipelines import results
from pipelines.blueprint import Shapes
from pipelines.fanout import Machine, at_once
from pipelines.recipe import Recipe
from pipelines.samples import latent_rows, rows_per_file
from pipelines.stored import Stored
from pipelines.work import has_given_vae
from priors.protocol import FittedPrior, GroupPrior, TrainedPrior
from priors.registry import SAMPLERS
from priors.sampling import draw
from priors.trainer import Slot, TrainingBatches, learn
from runtime import checkpoints, hardware
from runtime.errors import UserError
from runtime.identity import ROOT, Identity
from runtime.progress import Report

SECONDS = 1.0
"""Of a measurement, about; one thing that takes longer is done once."""

FLOP_AT_MOST = 3e11
"""Of one thing that is measured at all; of what has more, time is derived from the rate of a convolution."""

EXAMPLES = {"gaussians25": 30_000, "digits": 1_797, "mnist": 70_000, "celebahq256": 30_000} | dict.fromkeys(
    ("cifar10", "cifar10-jpeg"), 60_000) | dict.fromkeys(("celeba64", "celeba64-140"), 202_599)  # fmt: skip
"""Images or points of a data set that is not prepared here."""

FEW_PROPOSALS, FEW_STEPS, FEW_SAMPLES = 100, 5, 16
"""Of SIR, of Langevin dynamics, and of a likelihood, to begin a measurement with."""

WIDTHS = {"own": 64, "efficientnet-lite0": 1280, "clean-fid": 2048, "pytorch-fid": 2048}


class _EnoughError(Exception):
    """So many steps were seen."""


@dataclass
class StagePlan:
    """What one stage takes.

    Attributes:
        tasks: that can run side by side.
        seconds: of all tasks together, one after the other.
        disk: bytes that it leaves.
        host, device: bytes of memory of one task, on the host and on the accelerator.
        basis: how the time was come by.
    """

    stage: str
    tasks: int
    seconds: float
    disk: int
    host: int
    device: int
    basis: list[str]

    def wall(self, workers: int) -> float:
        """Seconds with so many workers."""
        return self.seconds / max(1, min(workers, self.tasks))


@dataclass
class Plan:
    """What an experiment takes: ``missing`` is what has to be got by hand first, ``unit`` what ``hours`` are of."""

    experiment: str
    device: str
    workers: int
    missing: list[str]
    stages: list[StagePlan]
    unit: str
    hours: float = 0.0
    days: float = field(default=0.0)
    disk: int = 0

    def __post_init__(self) -> None:
        self.hours = sum(stage.seconds for stage in self.stages) / 3600
        self.days = sum(stage.wall(self.workers) for stage in self.stages) / 86400
        self.disk = sum(stage.disk for stage in self.stages)

    def json(self, settings: Any = None) -> str:
        """All of it, as JSON, and the ``settings`` that it was made for."""
        return json.dumps(asdict(self) | ({"settings": settings} if settings is not None else {}), indent=2)

    def text(self) -> str:
        """A table for people."""
        lines = [f"{self.experiment} on {self.device}, {self.workers} workers"]
        lines += [f"missing: {line}" for line in self.missing]
        lines.append(f"{'stage':12}{'tasks':>7}{'a task':>12}{'in all':>12}{'disk':>10}{'host':>10}{'device':>10}  from")
        for stage in self.stages:
            sizes = "".join(f"{_size(value):>10}" for value in (stage.disk, stage.host, stage.device))
            times = f"{_time(stage.seconds / max(1, stage.tasks)):>12}{_time(stage.seconds):>12}"
            lines.append(f"{stage.stage:12}{stage.tasks:>7}{times}{sizes}  {'; '.join(dict.fromkeys(stage.basis))}")
        lines.append(f"in all {self.hours:.3g} {self.unit}-hours, {self.days:.3g} days with {self.workers} workers, "
                     f"{_size(self.disk)} on the disk")  # fmt: skip
        return "\n".join(lines)


def _size(value: float) -> str:
    return "-" if not value else f"{value / 1e9:.2f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"


def _time(seconds: float) -> str:
    units = ((86400, "d"), (3600, "h"), (60, "min"))
    return next((f"{seconds / size:.3g} {unit}" for size, unit in units if seconds >= 2 * size), f"{seconds:.3g} s")


class _MadeData:
    """Random examples of a data set's shape, as ``datasets.dataset.Dataset`` has them."""

    def __init__(self, name: str):
        self.name, self.spec = name, spec(name)
        self._shape = self.spec.shape

    def size(self, split: str) -> int:
        """About nine tenths for training."""
        total = EXAMPLES.get(self.name, 100_000)
        return {"train": 8 * total // 10, "validation": total // 10, "test": total // 10}.get(split, 9 * total // 10)

    def train_batch(self, size: int, seed: int, step: int) -> Tensor:  # noqa: ARG002
        """(size, *data shape) in {0, 1}, which every likelihood takes."""
        return torch.rand(size, *self._shape).round()

    def examples(self, split: str, rows: slice | Tensor = slice(None)) -> Tensor:  # noqa: ARG002
        """As many as ``rows`` asks for, 1 000 at most."""
        count = len(rows) if isinstance(rows, Tensor) else len(range(*rows.indices(1000)))
        return self.train_batch(count, 0, 0)

    @property
    def views(self) -> int:
        """As many as there are training images, and none of what is drawn anew or binarised."""
        return self.size("train") if self.spec.kind == "images" else 0

    def train_views(self, size: int, seed: int, step: int) -> Tensor:  # noqa: ARG002
        """(size,)."""
        return torch.arange(size)


class _FirstBatch:
    """A data set that is trained on its first batch alone: a step costs what it does once all examples were seen."""

    def __init__(self, data: Any):
        self._data, self.views, self.examples = data, data.views, data.examples

    def train_batch(self, size: int, seed: int, step: int) -> Tensor:  # noqa: ARG002
        """The first."""
        return self._data.train_batch(size, seed, 0)

    def train_views(self, size: int, seed: int, step: int) -> Tensor:  # noqa: ARG002
        """Of the first."""
        return self._data.train_views(size, seed, 0)


class _Untrained(Stored):
    """What would be stored, before it is trained."""

    @cached_property
    def dataset(self) -> Any:
        """The prepared data set, or made data of its shape."""
        try:
            return Stored(self.recipe).dataset
        except UserError:
            return _MadeData(self.recipe.experiment.dataset)

    @cached_property
    def vae(self) -> HierarchicalVAE:
        """Before training."""
        return self.new_vae().to(hardware.device()).eval().requires_grad_(False)

    def _group(self, prior: str, k: int) -> GroupPrior:
        if (prior, k) not in self._groups:
            group = self.new_group(prior, k)
            if isinstance(group, FittedPrior):
                group.fit(torch.randn(100, *group.group.latent, device=hardware.device()), 0)
            self._groups[prior, k] = folded(group.eval().requires_grad_(False))
        return self._groups[prior, k]


def plan(recipe: Recipe, machine: Machine) -> Plan:
    """Measure a little, and say what all of it would take.

    Args:
        recipe: the experiment's first seed.
        machine: the workers and threads that it would have.

    Returns:
        The plan; its times are of one worker each, its days of all of them.
    """
    hardware.reproducible(machine.threads)
    hardware.keep_freed_memory()
    measuring = _Measuring(recipe, machine)
    stages = [measuring.fetch(), measuring.train_vae(), measuring.train_prior(), measuring.sample(), measuring.evaluate()]
    starting, workers = _starting(), at_once(machine)
    for stage in stages:
        # The command itself, and its workers, which import the same.
        stage.seconds += starting * (1 + (min(workers, stage.tasks) if workers > 1 else 0))
    kind = hardware.device().type
    unit = "GPU" if kind != "cpu" else "CPU"
    return Plan(recipe.name, hardware.device_name(), workers, measuring.missing, stages, unit)


def _starting() -> float:
    """Seconds of a command that does nothing: imports, most of them MLflow's and torch's."""
    script = "import time, pipelines.stages, mlflow; print(time.process_time())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    return float(done.stdout)


def _clock() -> float:
    """Seconds. On a CPU, of one thread's work: what else runs on the machine just now is not to be planned for."""
    alone = hardware.device().type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else hardware.clock()


def _paced(run: Callable[[Report], object], most: int = 200) -> float:
    """Seconds of a step of something that reports each: the median of those that SECONDS hold, the first left out."""
    seen = [_clock()]

    def report(*_: object) -> None:
        seen.append(_clock())
        if len(seen) > most or (len(seen) > 3 and seen[-1] - seen[0] > SECONDS) or seen[-1] - seen[0] > 10 * SECONDS:
            raise _EnoughError

    with suppress(_EnoughError):
        run(report)
    steps = [after - before for before, after in itertools.pairwise(seen)]
    return median(steps[1:] or steps)


def _timed(call: Callable[[], object]) -> float:
    """Seconds of a call, once it has been made before; of the first if that takes long."""
    for _ in range(2):
        started = _clock()
        call()
        seconds = _clock() - started
        if seconds > SECONDS:
            break
    return seconds


class _Measuring:
    """The measurements of one experiment."""

    def __init__(self, recipe: Recipe, machine: Machine):
        self.recipe, self.machine, self.experiment = recipe, machine, recipe.experiment
        self.stored = _Untrained(recipe)
        self.missing: list[str] = []
        self.groups = len(self.stored.vae.layout())
        self.parameters = 4 * sum(p.numel() for p in self.stored.vae.parameters())
        self._base = psutil.Process().memory_info().rss
        self._shape = spec(self.experiment.dataset).shape
        self._recipes = [replace(recipe, seed=seed) for seed in self.experiment.seeds]
        self._seeds = len(self._recipes)
        self._slopes: dict[Any, tuple[float, float]] = {}

    def _stage(self, name: str, tasks: int, seconds: float, disk: int, memory: float, basis: Sequence[str]) -> StagePlan:
        """A stage whose task takes so many bytes beside what the libraries do, wherever its tensors are."""
        on_host = hardware.device().type == "cpu"
        host = self._base + (int(memory) if on_host else 0)
        return StagePlan(name, tasks, seconds, disk, host, 0 if on_host else int(memory), list(basis))

    def fetch(self) -> StagePlan:
        """Whether the data and the feature network's weights are here, and how large the data are."""
        name, entry = self.experiment.dataset, spec(self.experiment.dataset)
        folder = self.recipe.workspace.prepared(name)
        there = folder.exists() and any(folder.iterdir())
        if not there and (entry.checksums or not callable(entry.prepare)):
            self.missing.append(
                f"data set {name} ({entry.source}; {entry.licence}): 'priorhole fetch {self.recipe.name}' says where its "
                f"files go under {self.recipe.workspace.raw}, and prepares them"
            )
        bytes_each = math.prod(entry.shape) * (4 if entry.kind == "points" else 1)
        disk = 0 if there else EXAMPLES.get(name, 100_000) * bytes_each
        return self._stage(
            "fetch", 1, 0.0, disk, 0, ["prepared already" if there else "download and decoding: not measured"]
        )

    def train_vae(self) -> StagePlan:
        """Stage 1, one task a seed."""
        options, batch = self.experiment.train, self.experiment.train.batch
        flop, saved = self._of_a_step(batch)
        few, basis = batch, "steps at full batch"
        while few > 2 and flop * few / batch > FLOP_AT_MOST / 10:
            few //= 2
        if flop * few / batch > FLOP_AT_MOST:
            seconds, basis = flop / _rate(), f"{flop:.2g} FLOP a step at a convolution's rate"
        else:
            seconds = self._step(few) * batch / few
            if few < batch and seconds < 3 * SECONDS:
                few, seconds = batch, self._step(batch)
            basis = basis if few == batch else f"steps of {few} examples, scaled to {batch}"
        vaes = {recipe.vae_seed: recipe for recipe in self._recipes}
        tasks = sum(not has_given_vae(recipe) for recipe in vaes.values())
        copies = 4 + bool(options.ema)
        memory, disk = copies * self.parameters + saved, tasks * self.parameters
        self.seconds_per_flop = seconds / max(flop, 1)
        self.saved_per_example = saved / batch
        if not tasks:
            shared = self.experiment.trained_in
            basis, memory = "imported" if shared is None else f"that of {shared}", 0
        return self._stage("train-vae", tasks, tasks * options.steps * seconds, disk, memory, [basis])

    def _step(self, batch: int) -> float:
        options = self.experiment.train.model_copy(update={"batch": batch})
        with tempfile.TemporaryDirectory() as folder:
            model = self.stored.new_vae().to(hardware.device())
            path, identity = Path(folder) / "vae.safetensors", Identity("", 0)
            return _paced(lambda report: train_vae(model, self.stored.dataset, options, path, identity, report))

    def _of_a_step(self, batch: int) -> tuple[float, float]:
        """FLOP of a step, and bytes that its forward pass keeps for the backward one, in fp32: by shapes alone."""
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.random.fork_rng(devices=[]), torch.device("meta"), FlopCounterMode(display=False) as counted:
            model = models.build(self.experiment.model.name, self.experiment.model, self._shape).train()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                evidence(model, torch.empty(batch, *self._shape), [Shapes()] * model.groups)
        return 3.0 * counted.get_total_flops(), float(sum(kept.values()))

    def train_prior(self) -> StagePlan:
        """Stage 2: every prior of every seed, its groups in as many shards as there are."""
        seconds, disk, largest, kept, basis, shared, trained = 0.0, 0, 0, 0, list[str](), list[str](), 0
        for name, options in self.experiment.priors.items():
            seeds = sum(not self._shares(recipe, name) for recipe in self._recipes)
            if not seeds:
                shared.append(name)
                continue
            groups = [self.stored.new_group(name, k) for k in range(self.groups)]
            size = 4 * sum(p.numel() for group in groups for p in group.parameters())
            trained, disk, largest = trained + seeds, disk + seeds * size, max(largest, size)
            if isinstance(options, TrainedPrior.Options):
                steps = self._steps_made(name, options)
                encoding, features = self._first_sight(options, steps)
                step = self._prior_step(name, options, basis)
                seconds, kept = seconds + seeds * (step * steps + encoding), max(kept, features)
            elif isinstance(options, FittedPrior.Options):
                seconds += seeds * self._fit(options, groups[0], basis)
        if shared:
            basis.append(f"{', '.join(shared)}: of {self.experiment.trained_in}")
        shards = min(self.groups, self.machine.shards)
        batch = max([getattr(options, "batch", 1) for options in self.experiment.priors.values()], default=1)
        memory = self.parameters + 4 * largest / shards + batch * self.saved_per_example + kept
        return self._stage("train-prior", trained * shards, seconds, disk, memory, basis)

    def _shares(self, recipe: Recipe, prior: str) -> bool:
        """Whether all groups of a prior are another experiment's, which stage 2 leaves as they are."""
        with suppress(UserError):  # whose VAE is missing, and whose priors are therefore another's
            stored = Stored(recipe)
            return all(stored.shares_group(prior, k) for k in range(self.groups))
        return False

    def _steps_made(self, name: str, options: TrainedPrior.Options) -> float:
        """How many it took, of a trained or published prior, or as the results say; else as many as it may take."""
        made = []
        for seed in self.experiment.seeds:
            path = self.recipe.trained_file(self.recipe.workspace.prior(self.recipe.name, name, seed, self.groups - 1))
            with suppress(UserError):
                made.append(checkpoints.load_document(path, "")["step"])
        if not made and self.recipe.workspace.results.exists():
            known = results.read_all(self.recipe.workspace.results)
            rows = (known.experiment == self.recipe.name) & (known.prior == name) & (known.metric == "train-seconds")
            made = list(known[rows].n)  # a group's, on average
        return min(options.steps, sum(made) / len(made)) if made else options.steps

    def _prior_step(self, name: str, options: TrainedPrior.Options, basis: list[str]) -> float:
        """Seconds of a step of all groups, with its share of the held-out checks."""
        flop = self.seconds_per_flop * self._of_a_step(1)[0] * options.batch / 3
        few = options.batch
        while few > 2 and flop * few / options.batch > 3 * SECONDS:
            few //= 2
        short = options.model_copy(update={"batch": few})
        with tempfile.TemporaryDirectory() as folder:

            def slots() -> list[Slot]:
                made = [self.stored.new_group(name, k) for k in range(self.groups)]
                for group in made:
                    group.options = short if isinstance(group, TrainedPrior) else group.options
                return [
                    Slot(k, group, Path(folder) / f"{time.monotonic_ns()}-{k}.safetensors", Identity("", 0))
                    for k, group in enumerate(made)
                ]

            base = self.stored.base_of(name)
            data: Any = _FirstBatch(self.stored.dataset)
            step = _paced(lambda report: learn(base, slots(), data, report)) * options.batch / few
        basis.append("steps at full batch" if few == options.batch else f"steps of {few} examples, scaled")
        if options.schedule == "plateau":
            basis.append("at most, since training ends at a plateau, unless a trained prior or the results say when")
        # A check is a forward pass of the held-out examples, about a third of as many steps' work.
        checked = -(-options.held_out // options.batch) / 3
        return step * (1 + options.checks * checked / options.steps)

    def _first_sight(self, options: TrainedPrior.Options, steps: float) -> tuple[float, int]:
        """Seconds of encoding each training image, where that is done once, and bytes of what is kept of all of them.

        Where it is done again and again, a step has its part of it, and nothing is kept.
        """
        vae, data, few = self.stored.vae, self.stored.dataset, min(options.batch, 16)
        batches = TrainingBatches(vae, data, few, 0)
        features = batches.of(0)
        if not batches.keeps:
            return 0.0, 0
        seconds = _timed(lambda: TrainingBatches(vae, data, few, 0).of(0)) / few * min(data.views, steps * options.batch)
        return seconds, data.views * sum(feature[0].nbytes for feature in features)

    def _fit(self, options: FittedPrior.Options, group: GroupPrior, basis: list[str]) -> float:
        """Seconds of fitting all groups: the codes' passes, and the fit itself on random codes."""
        if not isinstance(group, FittedPrior):
            return 0.0
        few, example = min(options.codes, 2000), math.prod(group.group.latent)
        codes = torch.randn(few, *group.group.latent, device=hardware.device())
        fit = _timed(lambda: group.fit(codes, 0)) * options.codes / few
        basis.append("a fit to random codes" + ("" if few == options.codes else f", {few} of them, scaled"))
        passes = self.seconds_per_flop * self._of_a_step(1)[0] / 3 * options.codes
        return self.groups * (fit + passes) if example else 0.0

    def sample(self) -> StagePlan:
        """Files of every draw of every seed."""
        settings, seconds, basis = self.experiment.sample, 0.0, list[str]()
        for prior, sampler in self.recipe.draws():
            each = self._drawn(prior, sampler, basis)
            seconds += each * (settings.images + settings.readjust * settings.batch)
        draws = len(self.recipe.draws()) * self._seeds
        files = -(-settings.images // rows_per_file(settings.rows_per_file, settings.batch))
        layout = self.stored.vae.layout()
        pixel = 1 if settings.pixels == "uint8" and spec(self.experiment.dataset).kind != "points" else 4
        kept = min(settings.images, latent_rows(layout)) * sum(math.prod(group.latent) for group in layout) * 4
        disk = draws * (settings.images * (math.prod(self._shape) * pixel + 24 * self.groups) + kept)
        memory = self.parameters + settings.batch * self.saved_per_example + 4 * hardware.elements_at_once(
            hardware.device().type)  # fmt: skip
        return self._stage("sample", draws * files, self._seeds * seconds, int(disk), memory, basis)

    def _drawn(self, prior: str, sampler: str, basis: list[str]) -> float:
        """Seconds of an image."""
        options, learned, settings = self.experiment.samplers[sampler], self.stored.prior(prior), self.experiment.sample
        method = options.method
        key, few = next(
            ((key, few) for key, few in (("proposals", FEW_PROPOSALS), ("steps", FEW_STEPS)) if hasattr(options, key)),
            ("", 1),
        )
        full = getattr(options, key, 1)
        # Samplers that differ in how many proposals or steps they take cost alike for each.
        alike = (prior, options.model_dump_json(exclude={key, "until_ess", "step_size"}))
        if full > few and alike in self._slopes:
            fixed, slope = self._slopes[alike]
            return fixed + slope * full

        def seconds(rows: int, count: int) -> float:
            changed = options.model_copy(update={key: count} if key else {})
            drawing = SAMPLERS[method](changed)
            return _timed(lambda: draw(self.stored.vae, learned, drawing, range(rows), 0, settings.decoding))

        rows, count = 1, min(few, full)
        took = seconds(rows, count)
        while rows < settings.batch and took < SECONDS / 4:
            rows = min(settings.batch, 4 * rows)
            took = seconds(rows, count)
        if took * full / count <= 3 * SECONDS:
            took, count = seconds(rows, full), full
        elif count < full:
            slope = (seconds(rows, 2 * count) - took) / count
            basis += [f"{method} from {count} {key}, scaled"]
            self._slopes[alike] = (took - slope * count) / rows, slope / rows
            took += slope * (full - count)
        basis.append("images at full batch" if rows == settings.batch else f"{rows} images at a time, scaled")
        return took / rows

    def evaluate(self) -> StagePlan:
        """Blocks of likelihoods, features of every file, and the distances."""
        settings, basis, images = self.experiment.evaluate, list[str](), self.experiment.sample.images
        seconds, once, tasks = 0.0, 0.0, 0
        size = self.stored.dataset.size("test")
        if settings.likelihood is not None:
            count = min(settings.examples or size, size)
            seconds += self._likelihoods(count, basis)
            tasks += self._seeds * -(-count // (-(-max(settings.batch, count // 16) // settings.batch) * settings.batch))
        sets = len(self.recipe.draws()) + 1
        seconds += sets * self.groups * self._mmd()
        width = sum(WIDTHS[name] for name in settings.networks)
        for name in settings.networks:
            each, trained = self._features(name, basis)
            reference = settings.reference_images or self.stored.dataset.size(settings.reference)
            once += trained + each * (reference + size)
            seconds += each * sets * images + (sets + 1) * self._distances(WIDTHS[name])
        if settings.networks:
            tasks += self._seeds * sets * -(-images // rows_per_file(self.experiment.sample.rows_per_file, 1))
        disk = self._seeds * sets * images * (4 * width + math.prod(self._shape))
        memory = self.parameters + 3 * BYTES_AT_ONCE + 3 * images * width * 4
        return self._stage("evaluate", max(1, tasks), once + self._seeds * seconds, disk, memory, basis)

    def _likelihoods(self, count: int, basis: list[str]) -> float:
        """Seconds of the pools and of ``count`` examples under all priors."""
        options = self.experiment.evaluate.likelihood
        assert options is not None
        vae = folded(self.stored.vae)
        priors = {name: self.stored.prior(name, vae) for name in self.experiment.priors}
        corrected = {name: prior for name, prior in priors.items() if not prior.exact}
        few = min(options.pool, 2**13)
        pooling = {name: _timed(partial(fill_pool, vae, prior, 0, few)) for name, prior in corrected.items()}

        def seconds(samples: int, proposals: int, examples: int) -> float:
            counts = {
                "samples": [s for s in options.samples if s < samples] + [samples],
                "normaliser": [proposals], "proposals": [proposals], "resamples": min(options.resamples, samples),
                "pool": max(proposals, few),
            }  # fmt: skip
            chosen = options.model_copy(update=counts)
            pools = {name: fill_pool(vae, prior, 0, chosen.pool) for name, prior in corrected.items()}
            x = self.stored.dataset.examples("test", slice(examples)).to(hardware.device())

            def block() -> None:
                log_likelihoods(vae, priors, pools, x, range(examples), 0, chosen)
                for prior in corrected.values():
                    contrastive_losses(vae, prior, x, range(examples), 0)
                divergences(vae, x, range(examples), 0)

            return _timed(block)

        most, many = max(options.samples), max(*options.normaliser, *options.proposals)
        first, least = min(most, FEW_SAMPLES), 2
        fresh = self.groups > 1 and bool(corrected)
        cheap = seconds(first, least, 1)
        own = min(many, FEW_PROPOSALS if cheap < SECONDS else FEW_PROPOSALS // 10)
        more = max(0.0, seconds(first, own, 1) - cheap) if fresh and own > least else 0.0
        a_proposal = more / max(1, own - least) / min(options.resamples, first)
        above = sum(size > options.resamples for size in options.samples)
        each = cheap * most / first + a_proposal * many * options.resamples * (1 + above)
        examples = 1
        if each <= 15 * SECONDS:  # by far too much, where what a call costs outweighs what it computes
            took, whole = seconds(most, many, examples), min(count, self.experiment.evaluate.batch)
            while examples < whole and took < SECONDS:
                examples = min(whole, max(examples + 1, int(examples * SECONDS / took)))
                took = seconds(most, many, examples)
            each = took / examples
            basis.append(f"likelihoods of {examples} examples")
        else:
            basis.append(f"likelihoods from {first} samples and {own} proposals of one example, scaled")
        return each * count + sum(pooling.values()) * options.pool / few

    def _mmd(self) -> float:
        """Seconds of one."""
        group = max(self.stored.vae.layout(), key=lambda group: math.prod(group.latent))
        rows, width = min(self.experiment.sample.images, latent_rows([group])), math.prod(group.latent)
        few = min(rows, 500 if width < 1000 else 100)
        x = torch.randn(few, width)
        return _timed(lambda: mmd.mmd(x, x.flip(0))) * (rows / few) ** 2

    def _features(self, name: str, basis: list[str]) -> tuple[float, float]:
        """Seconds of an image, and of training the network of that name."""
        channels = self._shape[0]
        images, trained = torch.rand(BATCH if name == "own" else 4, channels, *self._shape[1:]), 0.0
        if name == "own":
            network = SmallClassifier(channels, 10).to(hardware.device())
            x = images[:64].to(hardware.device())
            optimizer = torch.optim.Adam(network.parameters(), fused=True)

            def step() -> None:
                optimizer.zero_grad()
                network(x).square().mean().backward()
                optimizer.step()

            folder = self.recipe.workspace.features(self.experiment.dataset)
            trained = 0.0 if (folder / "own.safetensors").exists() else 1500 * _timed(step)
            network.eval()
            with torch.no_grad():
                return _timed(lambda: network.features(images.to(hardware.device()))) / len(images), trained
        try:
            found: FeatureNetwork = PRETRAINED[name]()
        except UserError as error:
            self.missing.append(f"feature network {name}: {error}")
            basis.append("its features at 6 GFLOP an image and a convolution's rate")
            return 6e9 / _rate(), 0.0
        basis.append("features of a few images")
        return _timed(lambda: found(images)) / len(images), 0.0

    def _distances(self, width: int) -> float:
        """Seconds of an FID and a KID of so wide features; of more than 512, from those by the cube."""
        few = min(width, 512)
        seen = torch.randn(max(2 * few, 200), few)
        return _timed(lambda: (frechet.fid(seen, seen.flip(0), 0), kid.kid(seen, seen.flip(0), 0))) * (width / few) ** 3


def _rate() -> float:
    """FLOP a second of a convolution of 64 channels on this device, in fp32."""
    layer = torch.nn.Conv2d(64, 64, 3, padding=1).to(hardware.device()).requires_grad_(False)
    x = torch.randn(8, 64, 32, 32, device=hardware.device())
    return 2 * 64 * 64 * 9 * 8 * 32 * 32 / _timed(lambda: layer(x))
