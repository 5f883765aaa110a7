"""What there is of every experiment, and what is missing, for the terminal."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from pipelines import report, results
from pipelines.config import Config, Experiment, plain
from pipelines.workspace import Workspace
from runtime import rowfiles


@dataclass(frozen=True)
class Overview:
    """An experiment in one row.

    Attributes:
        name, dataset, model, priors: as params.yaml says.
        seeds: how many.
        default: whether a plain ``dvc repro`` runs it.
        pretrained: trained files that came with the checkout.
        hours, unit: what all stages take by the last ``priorhole plan`` here, in hours of ``unit``, CPU or GPU; None and ""
            where it was not asked, or for other settings.
        missing: stages that have not left all that they make, in their order; the first is the one to run next.
    """

    name: str
    dataset: str
    model: str
    seeds: int
    priors: list[str]
    default: bool
    pretrained: int
    hours: float | None
    unit: str
    missing: list[str]


def overviews(workspace: Workspace, config: Config) -> list[Overview]:
    """One for every experiment."""
    return [overview(workspace, config, name) for name in config.experiments]


def overview(workspace: Workspace, config: Config, name: str) -> Overview:
    """Of one experiment. Files are looked for, not read. Raises UserError if there is no such experiment."""
    experiment = config.experiment(name)
    return Overview(
        name,
        experiment.dataset,
        experiment.model.name,
        len(experiment.seeds),
        list(experiment.priors),
        name in config.run,
        sum(1 for _ in workspace.published(workspace.artifacts(name)).rglob("*.safetensors")),
        *_planned(workspace.plan(name), experiment),
        _missing(workspace, name, experiment),
    )


def _planned(path: Path, experiment: Experiment) -> tuple[float | None, str]:
    with suppress(OSError, ValueError):  # no plan, or half of one
        plan = json.loads(path.read_text())
        if plan["settings"] == json.loads(json.dumps(plain(experiment))):
            return plan["hours"], plan["unit"]
    return None, ""


def _missing(workspace: Workspace, name: str, experiment: Experiment) -> list[str]:
    places = [place for place in (name, experiment.trained_in) if place is not None]
    vae_seeds = experiment.seeds if experiment.vae_seed is None else [experiment.vae_seed]
    groups = sum(getattr(experiment.model, "groups_per_scale", [1]))
    draws = [(prior, sampler) for prior, options in experiment.priors.items() for sampler in options.samplers]

    def trained(*paths: Any) -> bool:
        return any(path.exists() or workspace.published(path).exists() for path in paths)

    there = {
        "fetch": workspace.prepared(experiment.dataset).exists(),
        "train-vae": all(trained(*(workspace.vae(place, seed) for place in places)) for seed in vae_seeds),
        "train-prior": all(
            trained(*(workspace.prior(place, prior, seed, k) for place in places))
            for prior in experiment.priors
            for seed in experiment.seeds
            for k in range(groups)
        ),
        "sample": all(
            sum(len(rows) for _, rows in rowfiles.spans(workspace.samples(name, *draw, seed))) >= experiment.sample.images
            for draw in draws
            for seed in experiment.seeds
        ),
        "evaluate": (workspace.evaluation(name) / "results.csv").exists(),
    }
    return [stage for stage, done in there.items() if not done]


def listed(found: Sequence[Overview]) -> Table:
    """All experiments as a table for the terminal."""
    title = "Experiments; * those that a plain 'dvc repro' runs; the cost is what 'priorhole plan' last said here"
    table = Table(title=title, title_justify="left")
    for header in ("experiment", "data set", "model", "seeds", "priors", "pretrained", "cost", "missing"):
        table.add_column(header, justify="right" if header == "seeds" else "left")
    for one in found:
        star = "*" if one.default else " "
        pretrained = f"{one.pretrained} files" if one.pretrained else ""
        missing = ", ".join(one.missing) or "nothing"
        cost = f"{one.hours:.3g} {one.unit}-hours" if one.hours is not None else ""
        known = (one.dataset, one.model, str(one.seeds), ", ".join(one.priors), pretrained, cost, missing)
        table.add_row(f"{star} {one.name}", *known)
    return table


def measured(workspace: Workspace, name: str) -> pd.DataFrame:
    """An experiment's results over seeds, those measured here before those of results.csv; empty if there are none."""
    here = workspace.evaluation(name) / "results.csv"
    for path in (here, workspace.results):
        if path.exists():
            table = results.read(path, f"priorhole evaluate {name}") if path == here else results.read_all(path)
            own = table[table.experiment == name]
            if len(own):
                return results.over_seeds(own)
    return results.over_seeds(results.frame([]))


def shown(frame: pd.DataFrame) -> list[Any]:
    """An experiment's results for the terminal: what is to be known of them, and its priors by their samplers."""
    parts: list[Any] = [f"{report.seeds(frame)}.", *report.remarks(frame)]
    if (grid := report.methods(frame)) is not None:
        table = Table()
        filled = [index for index in range(len(grid.header)) if any(row[index] for row in grid.rows)]
        for index in filled:
            table.add_column(grid.header[index], overflow="fold")
        for row in grid.rows:
            table.add_row(*(row[index] for index in filled))
        parts += [table, *grid.after]
    return parts


def document(found: Overview, frame: pd.DataFrame) -> dict[str, Any]:
    """What a script reads: the overview, and every number with its 95 % interval."""
    numbers = frame.astype(object).where(frame.notna(), None)  # JSON knows no NaN
    return asdict(found) | {"results": numbers.to_dict("records")}
