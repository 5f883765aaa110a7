"""What the pipeline writes for people: one table of results, the claims' verdicts, figures, and the README's excerpt."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from datasets.registry import spec
from pipelines import claims, results
from pipelines.config import Config
from pipelines.workspace import Workspace
from runtime.files import write_text

MARKS = re.compile(r"(<!-- results -->\n).*(<!-- /results -->)", re.DOTALL)

SHOWN = (
    r"loglik(-plugin|-sampler)?|loglik-gain(-plugin|-sampler)?|truth-gap(-sampler)?|off-mode-share|modes-hit|fid-.*|kid-.*|"
    r"mmd2/k00|ess-fraction/k00|ess-floor-share/k00|nce-loss/.*|log-z/k\d\d|acceptance/k00|seconds-per-image|"
    r"proposals-per-image|train-seconds"
)


def gather(workspace: Workspace, config: Config, judged: Sequence[claims.Claim]) -> pd.DataFrame:
    """All results: the evaluated experiments' own tables; of those not evaluated here, what results.csv held already.

    Rows of experiments that ``config`` does not name are among the latter: they may be of days on another machine.
    """
    tables = []
    for name in config.experiments:
        path = workspace.evaluation(name) / "results.csv"
        if path.exists():
            tables.append(results.read(path, f"priorhole evaluate {name}"))
    fresh = {name for table in tables for name in table.experiment}
    if workspace.results.exists():
        kept = results.read_all(workspace.results)
        tables.append(kept[~kept.experiment.isin(fresh)])
    table = pd.concat(tables, ignore_index=True) if tables else results.frame([])
    return table.assign(target=_targets(table, judged))


def _targets(table: pd.DataFrame, judged: Sequence[claims.Claim]) -> pd.Series:
    """The ids of the claims that each row is held against."""
    target = pd.Series("", index=table.index)
    for claim in judged:
        for subject in claim.named:
            if claim.untested is None:
                rows = claims.rows_of(claim, subject, table).index
                target[rows] = (target[rows] + " " + claim.id).str.strip()
    return target


HEADLINES = r"loglik|loglik-gain(-sampler)?|truth-gap(-sampler)?|off-mode-share|fid-.*"


@dataclass(frozen=True)
class Grid:
    """A table as it is shown: its ``rows`` of texts under a ``header``, and what is said ``before`` and ``after`` it."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    before: str = ""
    after: tuple[str, ...] = ()

    def markdown(self) -> Iterator[str]:
        """Its lines."""
        if self.before:
            yield f"{self.before}\n"
        yield f"| {' | '.join(self.header)} |\n|" + " --- |" * len(self.header)
        yield from (f"| {' | '.join(row)} |" for row in self.rows)
        yield ""
        yield from (f"{sentence}\n" for sentence in self.after)


def tables(frame: pd.DataFrame) -> Iterator[str]:
    """Markdown: per experiment, every metric of every prior and sampler, mean over seeds and 95 % interval."""
    for (experiment, dataset, model), own in frame.groupby(["experiment", "dataset", "model"]):
        yield f"## {experiment}\n\nData set {dataset}, model {model} (decoder after the slash), {seeds(own)}.\n"
        yield from (f"{sentence}\n" for sentence in remarks(own))
        if own.conditional.any():
            yield claims.ABOUT_ONE_VAE
        for grid in (methods(own), over_samples(own), numbers(own)):
            if grid is not None:
                yield from grid.markdown()


def remarks(frame: pd.DataFrame) -> Iterator[str]:
    """What is to be known of an experiment's numbers, before they are read."""
    truth = spec(str(frame.dataset.iloc[0])).truth
    if truth is not None:
        yield f"The truth's own expected log-likelihood, which no model exceeds, is {truth.ceiling:.3f} nats."
    yield from _changed(frame)
    yield from _optimism(frame)
    yield from _unfinished(frame)


def numbers(frame: pd.DataFrame) -> Grid:
    """Every number of an experiment that is shown, at the largest S and N."""
    shown = results.headline(frame[frame.metric.str.fullmatch(SHOWN)])
    rows = []
    for row in shown.sort_values(["metric", "prior", "sampler", "proposals"]).to_dict("records"):
        names = [row[name] or "" for name in ("metric", "prior", "sampler", *results.SIZES)]
        interval = claims.with_mark(row["interval"], row["conditional"])
        cells = (*names, f"{row['value']:.4g}", interval, results.metric(row["metric"]).unit, row["n"])
        rows.append(tuple(map(str, cells)))
    return Grid(("metric", "prior", "sampler", "S", "N", "M", "mean", "95 % interval", "unit", "n"), tuple(rows))


def seeds(frame: pd.DataFrame) -> str:
    """How many seeds there are, and of how many VAEs."""
    measured = frame[frame.prior != results.DATA]
    count, vaes = measured.seeds.max(), measured.vaes.max()
    if count == vaes:
        return f"{count} seeds, each with its own VAE" if count > 1 else "one seed"
    return f"{count} seeds on {vaes} VAE{'s' if vaes > 1 else ''}"


def _changed(frame: pd.DataFrame) -> Iterator[str]:
    """Which numbers another code or configuration made."""
    for kind, by in (("configuration", "under another configuration"), ("code", "by earlier code")):
        own = frame[frame.stale == kind]
        if len(own):
            of = ", ".join(sorted(own.prior.unique()))
            yield f"{len(own)} of {len(frame)} numbers were measured {by} and are to be made anew; they are of {of}."


def _optimism(frame: pd.DataFrame) -> Iterator[str]:
    """Plug-in minus sampler bound of every corrected prior, at the largest N and M: what is left of the two's distance."""
    largest = results.headline(frame, largest_proposals=True)
    plugins = largest[largest.metric == "loglik-plugin"].set_index("prior")
    for bound in largest[largest.metric == "loglik-sampler"].to_dict("records"):
        if bound["prior"] in plugins.index:
            plugin = plugins.loc[bound["prior"]]
            yield (
                f"{bound['prior']}: the plug-in with N = {plugin.normaliser} exceeds the sampler bound with "
                f"M = {bound['proposals']} by {plugin.value - bound['value']:.2g} nats."
            )


def _unfinished(frame: pd.DataFrame) -> Iterator[str]:
    """Which priors' training was ended by its budget."""
    ended = frame[frame.metric.str.startswith("plateaued/") & (frame.value != 1)]
    groups = ended.assign(group=ended.metric.str.removeprefix("plateaued/")).groupby("prior").group.agg(", ".join)
    if len(groups):
        named = "; ".join(f"{prior} ({names})" for prior, names in groups.items())
        yield f"Still improving when the budget of their training ended, in one seed at least: {named}."


def over_samples(frame: pd.DataFrame) -> Grid | None:
    """Every prior's gain by the number of importance samples, at the largest M that all of them have."""
    gains = results.gains_over_samples(frame)
    if gains.empty:
        return None
    counts = sorted(gains.samples.unique())
    rows = []
    for (prior, proposals), own in gains.groupby(["prior", "proposals"]):
        found = own.set_index("samples")
        cells = [
            claims.with_interval(found.value[count], found.interval[count], found.conditional[count])
            if count in found.index
            else ""
            for count in counts
        ]
        rows.append((str(prior), str(proposals or ""), *cells))
    before = "Gain over the base in nats, by the number S of importance samples an example:"
    return Grid(("prior", "M", *map(str, counts)), tuple(rows), before)


def methods(frame: pd.DataFrame) -> Grid | None:
    """Every prior by every sampler, what it costs and what it gives."""
    table = results.methods(frame)
    if table.empty:
        return None
    likelihoods = ["loglik", "loglik-plugin", "loglik-sampler", "loglik-gain"]
    shown = [*likelihoods, *table.attrs["qualities"], "seconds-per-image", "proposals-per-image", "train-seconds"]
    marked = {*likelihoods, *table.attrs["qualities"]}
    rows = []
    for row in table.to_dict("records"):
        cells = [
            ""
            if math.isnan(row[name])
            else claims.with_interval(row[name], row[f"{name} interval"], row[f"{name} conditional"] and name in marked)
            for name in shown
        ]
        cells += [f"{row[name]:.3g}" for name in ("ess-fraction", "mmd2")]
        rows.append((row["prior"], row["sampler"], str(row["proposals"] or ""), *cells))
    header = ("prior", "sampler", "M", *shown, "ess-fraction", "mmd2")
    return Grid(header, tuple(rows), after=tuple(_about_methods(frame)))


def _about_methods(frame: pd.DataFrame) -> Iterator[str]:
    yield (
        "M is the number of SIR's proposals, of what is drawn and of the bound. ESS as a fraction, and squared MMD, are "
        "means over the groups; log-likelihoods are in nats, times in seconds."
    )
    found = results.headline(frame[frame.metric.isin(["loglik", "loglik-plugin"]) & (frame.samples > 0)])
    measured = found.groupby(["samples", "n"]).prior
    ways = [f"{', '.join(priors.unique())} with S = {samples} on {n} examples" for (samples, n), priors in measured]
    if len(ways) > 1:
        yield f"Log-likelihoods were measured of {'; of '.join(ways)}: compare those by their gains, which are paired."
    elif ways:
        samples, n = found[["samples", "n"]].iloc[0]
        yield f"Log-likelihoods were measured with S = {samples} importance samples on {n} examples."


def headlines(frame: pd.DataFrame) -> dict[str, dict[str, dict[str, float]]]:
    """By experiment, prior (and sampler) and metric, the numbers to compare between revisions, at the largest S, N and M."""
    shown = results.headline(frame, largest_proposals=True)
    shown = shown[shown.metric.str.fullmatch(HEADLINES) & shown.value.notna() & (shown.stale != "configuration")]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in shown.to_dict("records"):
        whose = " by ".join(filter(None, (row["prior"], row["sampler"])))
        found.setdefault(row["experiment"], {}).setdefault(whose, {})[row["metric"]] = float(f"{row['value']:.4g}")
    return found


def excerpt(verdicts: Sequence[claims.Verdict]) -> str:
    """The README's: the claims that are decided."""
    return claims.markdown([verdict for verdict in verdicts if verdict.word in ("reproduced", "contradicted")])


def write(workspace: Workspace, table: pd.DataFrame, kept: pd.DataFrame, verdicts: Sequence[claims.Verdict]) -> list[Path]:
    """Write results.csv, results.md, metrics.json, claims.md and the README's excerpt; returns their paths.

    Args:
        workspace: where to.
        table: what is shown.
        kept: rows that results.csv has beside them.
        verdicts: on the claims.
    """
    frame = results.over_seeds(table)
    results.write(workspace.results, pd.concat([table, kept], ignore_index=True))
    meanings = "".join(f"| `{name}` | {m.unit} | {m.better} | {m.meaning} |\n" for name, m in results.METRICS.items())
    glossary = f"## Metrics\n\n| name (pattern) | unit | better | meaning |\n| --- | --- | --- | --- |\n{meanings}"
    text = "# Results\n\n" + "\n".join(tables(frame)) + "\n" + glossary
    written = {
        workspace.reports / "results.md": text,
        workspace.reports / "metrics.json": json.dumps(headlines(frame), indent=1) + "\n",
        workspace.reports / "claims.md": claims.document(verdicts),
    }
    readme = workspace.root / "README.md"
    if readme.exists():
        shown = excerpt(verdicts)
        written[readme] = MARKS.sub(lambda found: f"{found[1]}{shown}{found[2]}", readme.read_text(encoding="utf-8"))
    for path, content in written.items():
        write_text(path, content)
    return [workspace.results, *written]
