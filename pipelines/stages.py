"""The stages of the pipeline: each reads files, writes files, and is the same function for DVC, the CLI and the tests."""

import itertools
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from datasets import dataset as data
from pipelines import blueprint, claims, evaluation, fanout, fingerprints, report, results, tracking
from pipelines.config import Config, Experiment, plain, read, validate
from pipelines.fanout import Machine, Task
from pipelines.importing import import_nvae
from pipelines.recipe import Recipe
from pipelines.removed import prune, unnamed
from pipelines.results import AGGREGATE
from pipelines.samples import row_parts, rows_per_file
from pipelines.stored import Stored
from pipelines.work import drawn_task, fetch_task, prior_task, sample_task, vae_task
from pipelines.workspace import Workspace
from priors.registry import SAMPLERS
from priors.samplers import ESS_FLOOR
from runtime import arrays, checkpoints
from runtime.errors import UserError
from runtime.files import exclusive, require_writable, write_text
from runtime.identity import require_own_code

if TYPE_CHECKING:
    from pipelines.plan import Plan

SETTINGS = {
    "train-vae": ("dataset", "images", "model", "train"),
    "train-prior": ("priors",),
    "sample": ("samplers", "sample"),
    "evaluate": ("evaluate",),
}
"""Stages that are mirrored into MLflow, and which of an experiment's settings are logged there."""


def _stage(method: Callable[..., Any]) -> Callable[..., Any]:
    """A stage of an experiment, by one process at a time, mirrored into MLflow while it runs.

    It is called with the experiment's name. The method is given the experiment and its seeds' recipes too, which are valid.
    """
    title = method.__name__.replace("_", "-")

    @wraps(method)
    def run(self: "Pipeline", name: str, *arguments: Any, **options: Any) -> Any:
        with tracking.stage(self.root, title, name):
            experiment, seeds = self._seeds(name)
            with exclusive(self.workspace.locks, f"{name}/{title}"):
                return method(self, name, experiment, seeds, *arguments, **options)

    return run


@dataclass(frozen=True)
class Pipeline:
    """The stages over one workspace, on a machine.

    Raises:
        UserError: from any method; its text is one line that says what is wrong and what to do.
    """

    root: Path
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        require_own_code(self.root)

    @property
    def workspace(self) -> Workspace:
        """Where the files are."""
        return Workspace(self.root)

    @property
    def config(self) -> Config:
        """The validated configuration."""
        return validate(read(self.workspace.params))

    def _seeds(self, name: str) -> tuple[Experiment, list[Recipe]]:
        raw = read(self.workspace.params)
        experiment = validate(raw).experiment(name)
        blueprint.check(name, experiment)
        return experiment, [Recipe(raw, name, seed, self.root) for seed in experiment.seeds]

    def _run(self, stage: str, name: str, tasks: list[Task], **asked: Any) -> list[Any]:
        """The results of a stage's tasks; ``asked``: what the command was asked for, beside the experiment's settings."""
        folder, experiment = self.workspace.progress / f"{stage}-{name}", self.config.experiment(name)
        kind = next((known for known in SETTINGS if stage.startswith(known)), "evaluate")
        known = json.loads(self.workspace.data(name).read_text()) if self.workspace.data(name).exists() else None
        tracking.watch(
            [_watched(kind, fanout.progress_file(folder, index), **task.arguments) for index, task in enumerate(tasks)],
            {key: value for key, value in plain(experiment).items() if key in SETTINGS[kind]} | asked,
            None if known is None else (known["dataset"], known["digest"], self.workspace.data(name)),
        )
        return fanout.run(tasks, self.machine, folder)

    def plan(self, name: str) -> "Plan":
        """What the stages would take here, from a few measured steps; only the answer is kept, for ``list``."""
        from pipelines.plan import plan

        found = plan(self._seeds(name)[1][0], self.machine)
        with suppress(UserError):  # an answer that cannot be kept is an answer
            write_text(self.workspace.plan(name), found.json(plain(self.config.experiment(name))))
        return found

    def fetch(self, name: str) -> None:
        """Fetch and prepare the experiment's data set."""
        experiment = self.config.experiment(name)
        blueprint.check(name, experiment)
        dataset, written = experiment.dataset, self.workspace.data(name)
        require_writable(written.parent, self.workspace.prepared(dataset), self.workspace.raw)
        task = {"name": dataset, "workspace": self.workspace, "workers": self.machine.workers}
        # One task, here: what takes long in it has processes of its own.
        fanout.run([Task(f"data set {dataset}", fetch_task, task)], Machine(), self.workspace.progress / f"fetch-{name}")
        known: dict[str, Any] = {"dataset": dataset, "digest": data.load(dataset, self.workspace.prepared(dataset)).digest}
        if experiment.shown is not None:
            known["images"] = plain(experiment.shown)
        write_text(written, json.dumps(known) + "\n")

    @_stage
    def train_vae(self, name: str, experiment: Experiment, seeds: list[Recipe]) -> None:
        """Stage 1: train the VAE of every seed, each by as many processes as the machine says."""
        seeds = list({recipe.vae_seed: recipe for recipe in seeds}.values())
        require_writable(self.workspace.artifacts(name) / "vae")
        prune(self.workspace, self.workspace.artifacts(name) / "vae", [{f"seed-{recipe.vae_seed}" for recipe in seeds}])
        blueprint.check_batches(name, experiment, Stored(seeds[0]).dataset)
        processes = self.machine.processes
        experiment.train.parts(processes, 0)  # refused before anything is started
        tasks = [Task(f"VAE, seed {recipe.vae_seed}", vae_task, {"recipe": recipe}, processes=processes) for recipe in seeds]
        documents = self._run("train-vae", name, tasks)
        runs = {
            recipe.vae_seed: {"loss": document["history"], "train-seconds": document["seconds"]}
            for recipe, document in zip(seeds, documents, strict=True)
        }
        tracking.record(runs)

    def import_nvae(self, name: str, checkpoint: Path, seed: int | None) -> Path:
        """In place of stage 1: the VAE of one seed from a checkpoint of NVAE's released code. Returns what was written."""
        _, seeds = self._seeds(name)
        recipes = {recipe.vae_seed: recipe for recipe in seeds}
        if seed is None and len(recipes) > 1:
            known = ", ".join(map(str, recipes))
            raise UserError(f"{name} has a VAE for each of the seeds {known}; say which one this is with --seed")
        if seed is not None and seed not in recipes:
            raise UserError(f"{name} has no VAE of seed {seed}, but of {', '.join(map(str, recipes))}")
        require_writable(self.workspace.artifacts(name) / "vae")
        return import_nvae(recipes[next(iter(recipes)) if seed is None else seed], checkpoint)

    @_stage
    def train_prior(self, name: str, experiment: Experiment, seeds: list[Recipe]) -> None:
        """Stage 2: learn every prior of every seed, its groups dealt over the shards; a base before what is put on it."""
        require_writable(
            *(self.workspace.prior(name, prior, recipe.seed, 0).parent for prior in experiment.priors for recipe in seeds)
        )
        own = {f"seed-{seed}" for seed in experiment.seeds}
        prune(self.workspace, self.workspace.artifacts(name) / "priors", [experiment.priors.keys(), own])
        stored = Stored(seeds[0])
        groups = stored.groups
        blueprint.check_batches(name, experiment, stored.dataset)
        shards = [list(range(groups))[first :: self.machine.shards] for first in range(min(groups, self.machine.shards))]
        tasks: list[Task] = []
        made: dict[tuple[str, int], list[int]] = {}
        for prior, options in experiment.priors.items():  # a base is listed before what is put on it
            for recipe in seeds:
                before = made.get((options.base or "", recipe.seed), [])
                made[prior, recipe.seed] = list(range(len(tasks), len(tasks) + len(shards)))
                tasks += [
                    Task(
                        f"{prior}, seed {recipe.seed}, groups {shard}",
                        prior_task,
                        {"recipe": recipe, "prior": prior, "groups": shard},
                        before,
                    )
                    for shard in shards
                ]
        self._run("train-prior", name, tasks)
        runs = {recipe.seed: _learning_curves(Stored(recipe), experiment, groups) for recipe in seeds}
        tracking.record(runs)

    @_stage
    def sample(self, name: str, experiment: Experiment, seeds: list[Recipe]) -> None:
        """Draw samples of every prior by each of its samplers, for every seed."""
        chosen = seeds[0].draws()
        require_writable(*(self.workspace.samples(name, *key, recipe.seed) for key in chosen for recipe in seeds))
        drawn, own = {f"{prior}+{sampler}" for prior, sampler in chosen}, {f"seed-{seed}" for seed in experiment.seeds}
        prune(self.workspace, self.workspace.artifacts(name) / "samples", [drawn, own])
        keys = [(recipe, prior, sampler) for prior, sampler in chosen for recipe in seeds]
        settings = experiment.sample
        parts = row_parts(settings.images, rows_per_file(settings.rows_per_file, settings.batch))
        tasks: list[Task] = []
        last = []
        for recipe, prior, sampler in keys:
            title = f"{prior} by {sampler}, seed {recipe.seed}"
            about = {"recipe": recipe, "prior": prior, "sampler": sampler}
            if len(parts) == 1:
                tasks.append(Task(title, sample_task, about))
            else:
                before = range(len(tasks), len(tasks) + len(parts))
                tasks += [Task(f"{title}, images {first} to {end - 1}", sample_task, about | {"part": (first, end)})
                          for first, end in parts]  # fmt: skip
                tasks.append(Task(title, drawn_task, about, before))
            last.append(len(tasks) - 1)
        found = self._run("sample", name, tasks)
        shares = [found[index] for index in last]
        runs: dict[int, dict[str, float]] = {recipe.seed: {} for recipe in seeds}
        for (recipe, prior, sampler), found in zip(keys, shares, strict=True):
            runs[recipe.seed] |= {f"{prior}/{sampler}/ess-floor-share/{group}": share for group, share in found.items()}
        resampling = [key for key in chosen if _can_collapse(experiment.samplers[key[1]])]
        for prior, sampler in resampling:
            _warn_of_collapse(
                prior, sampler, [share for key, share in zip(keys, shares, strict=True) if key[1:] == (prior, sampler)]
            )
        tracking.record(runs, partial(_grids, Stored(seeds[0])))

    def publish(self, name: str) -> list[Path]:
        """Write small copies of an experiment's trained files, to be kept under version control. Returns their paths.

        What is published already and was not trained here stays as it is. Raises UserError for a file that is neither,
        and for a prior that was learned on another VAE.
        """
        experiment, seeds = self._seeds(name)
        require_writable(self.workspace.published(self.workspace.artifacts(name)))
        groups = Stored(seeds[0]).groups
        made_by = {self.workspace.vae(name, recipe.vae_seed): "train-vae" for recipe in seeds} | {
            self.workspace.prior(name, prior, recipe.seed, k): "train-prior"
            for prior in experiment.priors
            for recipe in seeds
            for k in range(groups)
        }
        for path, stage in made_by.items():
            if not path.exists() and not self.workspace.published(path).exists():
                raise UserError(f"{path} is missing; make it with: priorhole {stage} {name}")
        for recipe in seeds:
            vae, stage = Stored(recipe).vae_document, f"priorhole train-prior {name}"
            for prior, k in itertools.product(experiment.priors, range(groups)):
                path = recipe.trained_file(self.workspace.prior(name, prior, recipe.seed, k))
                learned_on = checkpoints.load_document(path, stage)["config"]["vae digest"]
                if learned_on not in (vae["digest"], vae.get("original")):
                    raise UserError(
                        f"{path} was learned on another VAE than seed {recipe.vae_seed}'s; make it anew with: {stage}"
                    )
        for path in filter(Path.exists, made_by):
            checkpoints.publish(path, self.workspace.published(path))
        return sorted(map(self.workspace.published, made_by))

    @_stage
    def evaluate(self, name: str, experiment: Experiment, seeds: list[Recipe], examples: int | None = None) -> Path:
        """Measure everything; the rows go to the experiment's own table.

        Args:
            name, experiment, seeds: the experiment.
            examples: a quick look, with likelihoods on this many test examples, in a table that no report reads.

        Returns:
            The table's path.
        """
        require_writable(
            self.workspace.evaluation(name), self.workspace.measured(name), self.workspace.features(experiment.dataset)
        )
        for recipe in seeds:
            Stored(recipe).require_vae()  # before data are fetched, and what can take a while is measured
        if not self.workspace.prepared(experiment.dataset).exists():
            self.fetch(name)  # published files can be measured right after a clone
        kept = {AGGREGATE, *(f"{prior}+{sampler}" for prior, sampler in seeds[0].draws())}
        for path in unnamed(self.workspace.measured(name), [kept, {f"seed-{seed}" for seed in experiment.seeds}]):
            shutil.rmtree(path)  # features of what is gone, to be had again
        tasks = evaluation.tasks(seeds, examples, self.machine.shares)
        found = self._run("evaluate", name, tasks, examples=examples)[-len(seeds) :]
        path = self.workspace.evaluation(name) / ("results.csv" if examples is None else f"results-{examples}.csv")
        results.write(path, results.frame([row for rows in found for row in rows]))
        runs = {
            recipe.seed: {_run_metric(row): row.value for row in rows if not row.step}
            for recipe, rows in zip(seeds, found, strict=True)
        }
        tracking.record(runs)
        return path

    def verify(self, name: str) -> tuple[int, int]:
        """Read everything that is kept of an experiment, and hold it against the digests of when it was written.

        Published copies are among it. Stages verify what they read; samples and data sets, which can be large, as far
        as they read them.

        Returns:
            How many files and folders are as they were written, and their bytes.

        Raises:
            UserError: some are not, each named in the message, or none is there.
        """
        dataset = self.config.experiment(name).dataset
        folders = [self.workspace.prepared(dataset), *sorted(self.workspace.features(dataset).glob("*/"))]
        files = itertools.chain(
            self.workspace.features(dataset).glob("*.safetensors"), self.workspace.artifacts(name).rglob("*.safetensors")
        )
        known = {"vae": "train-vae", "priors": "train-prior", "samples": "sample"}
        checks: list[tuple[Path, Callable[..., int], str]] = [
            (path, arrays.verify, f"priorhole fetch {name}") for path in folders if path.exists()
        ]
        checks += [
            (path, checkpoints.verify, f"git checkout {path}")
            for path in sorted(self.workspace.published(self.workspace.artifacts(name)).rglob("*.safetensors"))
        ]
        for path in sorted(path for path in files if not path.name.startswith(".")):
            inside = path.relative_to(self.root).parts
            stage = known.get(inside[2], "evaluate") if inside[0] == "artifacts" else "evaluate"
            checks.append((path, checkpoints.verify, f"priorhole {stage} {name}"))
        if not checks:
            raise UserError(f"nothing is kept of {name}; begin with: priorhole fetch {name}")
        total, broken = 0, []
        for path, check, made_by in checks:
            try:
                total += check(path, made_by)
            except UserError as error:
                broken.append(str(error))
        if broken:
            raise UserError("; ".join(broken))
        return len(checks), total

    def report(self) -> list[Path]:
        """Gather the results, judge the claims, draw the figures. Returns the files written."""
        from pipelines import figures
        from pipelines.reporting import page, published

        config, raw, judged = self.config, read(self.workspace.params), claims.load(self.workspace.targets)
        folder = self.workspace.reports / "figures"
        require_writable(self.workspace.reports, self.workspace.reports / "pages", folder)
        tables = published.load(self.workspace.tables)
        gathered = report.gather(self.workspace, config, judged)
        named = gathered.experiment.isin(list(config.experiments))
        table, kept_rows = gathered[named], gathered[~named]
        if len(kept_rows):
            print(
                f"note: {self.workspace.results} keeps {len(kept_rows)} rows of {', '.join(kept_rows.experiment.unique())}, "
                "which params.yaml does not name, and nothing else shows them; delete them there if they are of no use",
                file=sys.stderr,
            )
        table = table.assign(stale=self._stale(config)(table))
        verdicts = self._judge(config, judged, table)
        written = report.write(self.workspace, table, kept_rows, verdicts)
        bases = [name for name, experiment in config.experiments.items() if experiment.trained_in is None]
        frame = results.over_seeds(table)
        written += figures.of_results(frame, folder, bases)
        for name, experiment in config.experiments.items():
            written += figures.of_artifacts(Stored(Recipe(raw, name, experiment.seeds[0], self.root)), folder)
        figures.remove_stale(folder, written, config)
        here = [name for name in config.experiments if (self.workspace.evaluation(name) / "results.csv").exists()]
        kept = {name: {f"{name}-{kind}.png" for kind in page.FIGURES} for name in here}
        tracking.attach(self.root, {name: [path for path in written if path.name in kept[name]] for name in here})
        reader = published.Reader(table, self._stale(config))
        return written + page.Report(self.workspace, config, table, frame, verdicts, tables, reader).write()

    def verdicts(self) -> list[claims.Verdict]:
        """The papers' claims held against the results table, its rows against params.yaml and the code."""
        config, table = self.config, results.read_all(self.workspace.results)
        return self._judge(config, claims.load(self.workspace.targets), table)

    @staticmethod
    def _judge(config: Config, judged: Sequence[claims.Claim], table: pd.DataFrame) -> list[claims.Verdict]:
        return claims.judge(judged, table, Pipeline._stale(config))

    @staticmethod
    def _stale(config: Config) -> claims.Stale:
        """What has changed since rows were measured."""
        return partial(results.stale_rows, expected=fingerprints.expected(config))


def _watched(stage: str, progress: Path, recipe: Recipe, **arguments: Any) -> tracking.Watched:
    """What the mirror knows of a task, from its arguments."""
    experiment, prior = recipe.experiment, arguments.get("prior", "")
    seed = recipe.vae_seed if stage == "train-vae" else recipe.seed
    of_step = {"train-vae": experiment.train.batch, "sample": 1}
    batch = getattr(experiment.priors[prior], "batch", None) if stage == "train-prior" else of_step.get(stage)
    return tracking.Watched(progress, seed, "/".join(filter(None, (prior, arguments.get("sampler")))), batch)


def _grids(stored: Stored, folder: Path) -> None:
    from pipelines import figures

    figures.grids(stored, folder)


def _run_metric(row: results.Row) -> str:
    """What a row is called among a run's metrics: all that tells it from the others of its seed."""
    sizes = {"S": row.samples, "N": row.normaliser, "M": row.proposals}
    named = [f"{letter}{size}" for letter, size in sizes.items() if size and not row.sampler]
    return "/".join(filter(None, (row.prior, row.sampler, row.metric, *named)))


def _learning_curves(stored: Stored, experiment: Experiment, groups: int) -> dict[str, Any]:
    curves: dict[str, Any] = {}
    for prior in experiment.priors:
        for k in range(groups):
            document = stored.prior_document(prior, k)
            curves |= {f"{prior}/loss/k{k:02d}": document["history"], f"{prior}/train-seconds/k{k:02d}": document["seconds"]}
    return curves


def _can_collapse(options: Any) -> bool:
    """Whether a sampler resamples, and so many proposals that a small effective sample size says something of them."""
    return SAMPLERS[options.method].weighs and options.proposals >= 2 * ESS_FLOOR


def _warn_of_collapse(prior: str, sampler: str, shares: Sequence[dict[str, float]]) -> None:
    """Say loudly where resampling hands out a few proposals again and again; ``shares`` is one record a seed."""
    worst = {group: max(share[group] for share in shares) for group in shares[0]}
    collapsed = [f"{group} ({share:.0%})" for group, share in worst.items() if share > 0.5]
    if collapsed:
        print(
            f"warning: {prior} by {sampler} collapses: in {', '.join(collapsed)} most images have an effective sample size "
            f"under {ESS_FLOOR:g} proposals; draw more of them, or use Langevin dynamics",
            file=sys.stderr,
        )
