"""The stages of the pipeline: each reads files, writes files, and is the same function for DVC, the CLI and the tests."""

import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import dataset as data
from pipelines import claims, fanout, report, results, tracking
from pipelines.config import Config, Experiment, plain, read, validate
from pipelines.evaluation import base_task, evaluation_task, features_task
from pipelines.fanout import Machine, Task
from pipelines.work import Seeded, prior_task, sample_task, vae_task
from pipelines.workspace import Workspace
from priors.registry import SAMPLERS
from priors.samplers import ESS_FLOOR
from runtime import checkpoints
from runtime.errors import UserError


@dataclass(frozen=True)
class Pipeline:
    """The stages over one workspace, on a machine.

    Raises:
        UserError: from any method; its text is one line that says what is wrong and what to do.
    """

    root: Path
    machine: Machine = field(default_factory=Machine)

    @property
    def workspace(self) -> Workspace:
        """Where the files are."""
        return Workspace(self.root)

    @property
    def config(self) -> Config:
        """The validated configuration."""
        return validate(read(self.workspace.params))

    def _seeds(self, name: str) -> tuple[Experiment, list[Seeded]]:
        raw = read(self.workspace.params)
        experiment = validate(raw).experiment(name)
        return experiment, [Seeded(raw, name, seed, self.root) for seed in experiment.seeds]

    def _run(self, stage: str, name: str, tasks: list[Task]) -> list[Any]:
        return fanout.run(tasks, self.machine, self.workspace.progress / f"{stage}-{name}")

    def fetch(self, name: str) -> None:
        """Fetch and prepare the experiment's data set."""
        experiment = self.config.experiment(name)
        data.fetch(experiment.dataset, self.workspace.data(name), self.workspace.raw)

    def train_vae(self, name: str) -> None:
        """Stage 1: train the VAE of every seed."""
        experiment, seeds = self._seeds(name)
        seeds = list({at.vae_seed: at for at in seeds}.values())
        _prune(self.workspace.artifacts(name) / "vae", [[f"seed-{at.vae_seed}" for at in seeds]])
        documents = self._run(
            "train-vae", name, [Task(f"VAE, seed {at.vae_seed}", vae_task, {"at": at.fresh()}) for at in seeds]
        )
        runs = {
            at.vae_seed: {"loss": one["history"], "train-seconds": one["seconds"]}
            for at, one in zip(seeds, documents, strict=True)
        }
        tracking.record(
            self.root, "train-vae", name, runs, {"model": plain(experiment.model), "train": plain(experiment.train)}
        )

    def train_prior(self, name: str) -> None:
        """Stage 2: learn every prior of every seed, its groups dealt over the shards; a base before what is put on it."""
        experiment, seeds = self._seeds(name)
        _prune(self.workspace.artifacts(name) / "priors", [experiment.priors, seeds])
        groups = seeds[0].vae.groups
        for prior, options in experiment.priors.items():
            if max(options.groups or [0]) >= groups:
                raise UserError(
                    f"priors.{prior}.groups: {max(options.groups)} is too many; the model has groups 0 to {groups - 1}"
                )
        shards = [list(range(groups))[first :: self.machine.shards] for first in range(min(groups, self.machine.shards))]
        depth: dict[str, int] = {}
        for prior, options in experiment.priors.items():  # a base is listed before what is put on it
            depth[prior] = 0 if options.base is None else depth[options.base] + 1
        for wave in sorted(set(depth.values())):
            chosen = [(at, prior, shard) for prior in depth if depth[prior] == wave for at in seeds for shard in shards]
            tasks = [
                Task(
                    f"{prior}, seed {at.seed}, groups {shard}",
                    prior_task,
                    {"at": at.fresh(), "prior": prior, "groups": shard},
                )
                for at, prior, shard in chosen
            ]
            self._run(f"train-prior-{wave}", name, tasks)
        runs = {at.seed: _learning_curves(at, experiment, groups) for at in seeds}
        tracking.record(
            self.root, "train-prior", name, runs, {"priors": {k: plain(v) for k, v in experiment.priors.items()}}
        )

    def sample(self, name: str) -> None:
        """Draw samples of every prior by each of its samplers, for every seed."""
        experiment, seeds = self._seeds(name)
        chosen = seeds[0].draws()
        _prune(self.workspace.artifacts(name) / "samples", [[f"{prior}+{sampler}" for prior, sampler in chosen], seeds])
        keys = [(at, prior, sampler) for prior, sampler in chosen for at in seeds]
        tasks = [
            Task(
                f"{prior} by {sampler}, seed {at.seed}", sample_task, {"at": at.fresh(), "prior": prior, "sampler": sampler}
            )
            for at, prior, sampler in keys
        ]
        shares = self._run("sample", name, tasks)
        runs: dict[int, dict[str, float]] = {at.seed: {} for at in seeds}
        for (at, prior, sampler), found in zip(keys, shares, strict=True):
            runs[at.seed] |= {f"{prior}/{sampler}/ess-floor-share/{group}": share for group, share in found.items()}
        resampling = [key for key in chosen if SAMPLERS[experiment.samplers[key[1]].method].weighs]
        for prior, sampler in resampling:
            _warn_of_collapse(
                prior, sampler, [found for key, found in zip(keys, shares, strict=True) if key[1:] == (prior, sampler)]
            )
        tracking.record(self.root, "sample", name, runs, {"sample": plain(experiment.sample)})

    def publish(self, name: str) -> list[Path]:
        """Write small copies of an experiment's trained files, to be kept under version control. Returns their paths."""
        experiment, seeds = self._seeds(name)
        files = {self.workspace.vae(name, at.vae_seed) for at in seeds} | {
            self.workspace.prior(name, prior, at.seed, k)
            for prior in experiment.priors
            for at in seeds
            for k in range(at.vae.groups)
        }
        for path in files:
            checkpoints.publish(path, self.workspace.published(path))
        return sorted(self.workspace.published(path) for path in files)

    def evaluate(self, name: str, examples: int | None = None) -> Path:
        """Measure everything; the rows go to the experiment's own table.

        Args:
            name: the experiment.
            examples: a quick look, with likelihoods on this many test examples, in a table that no report reads.

        Returns:
            The table's path.
        """
        experiment, seeds = self._seeds(name)
        if not self.workspace.data(name).exists():
            self.fetch(name)  # published files can be measured right after a clone
        if experiment.evaluate.features is not None:
            self._run("features", name, [Task("feature network", features_task, {"at": seeds[0].fresh()})])
        if experiment.evaluate.likelihood.gains is not None:
            owners = {at.vae_seed: at for at in seeds}.values()
            bases = [Task(f"base, seed {at.vae_seed}", base_task, {"at": at.fresh(), "examples": examples}) for at in owners]
            self._run("base", name, bases)
        tasks = [
            Task(f"evaluation, seed {at.seed}", evaluation_task, {"at": at.fresh(), "examples": examples}) for at in seeds
        ]
        found = self._run("evaluate", name, tasks)
        path = self.workspace.evaluation(name) / ("results.csv" if examples is None else f"results-{examples}.csv")
        results.write(path, results.frame([row for rows in found for row in rows]))
        runs = {
            at.seed: {"/".join(filter(None, (row.prior, row.sampler, row.metric))): row.value for row in rows}
            for at, rows in zip(seeds, found, strict=True)
        }
        tracking.record(self.root, "evaluate", name, runs, {"evaluate": plain(experiment.evaluate), "examples": examples})
        return path

    def report(self) -> list[Path]:
        """Gather the results, judge the claims, draw the figures. Returns the files written."""
        from pipelines import figures

        config, raw, judged = self.config, read(self.workspace.params), claims.load(self.workspace.targets)
        table = report.gather(self.workspace, config, judged)
        written = report.write(self.workspace, table, claims.judge(judged, table))
        folder = self.workspace.reports / "figures"
        bases = [one for one, experiment in config.experiments.items() if experiment.trained_in is None]
        written += figures.of_results(results.over_seeds(table), folder, bases)
        for name, experiment in config.experiments.items():
            written += figures.of_artifacts(Seeded(raw, name, experiment.seeds[0], self.root), folder)
        return written


def _prune(folder: Path, keep: Sequence[Iterable[str | Seeded]]) -> None:
    """Drop what belongs to priors, samplers or seeds that the experiment no longer has; ``keep`` has an entry per level."""
    wanted = {f"seed-{one.seed}" if isinstance(one, Seeded) else one for one in keep[0]}
    for path in folder.iterdir() if folder.exists() else ():
        if path.name.split(".")[0] not in wanted:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif len(keep) > 1:
            _prune(path, keep[1:])


def _learning_curves(at: Seeded, experiment: Experiment, groups: int) -> dict[str, Any]:
    curves: dict[str, Any] = {}
    for prior in experiment.priors:
        for k in range(groups):
            document = at.prior_document(prior, k)
            curves |= {f"{prior}/loss/k{k:02d}": document["history"], f"{prior}/train-seconds/k{k:02d}": document["seconds"]}
    return curves


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
