"""What the pipeline writes for people: one table of results, the claims' verdicts, figures, and the README's excerpt."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from datasets.registry import spec
from pipelines import claims, results
from pipelines.config import Config
from pipelines.workspace import Workspace
from runtime.files import write_text

MARKS = re.compile(r"(<!-- results -->\n).*(<!-- /results -->)", re.DOTALL)

SHOWN = (
    r"loglik(-plugin|-sampler)?|loglik-gain(-plugin|-sampler)?|off-mode-share|modes-hit|fid-.*|kid-.*|mmd2/k00|"
    r"ess-fraction/k00|ess-floor-share/k00|nce-loss/.*|log-z/k\d\d|acceptance/k00|seconds-per-image|proposals-per-image|train-seconds"
)


def gather(workspace: Workspace, config: Config, judged: Sequence[claims.Claim]) -> pd.DataFrame:
    """All results: the evaluated experiments' own tables; of those not evaluated here, what results.csv held already."""
    tables = []
    for name in config.experiments:
        path = workspace.evaluation(name) / "results.csv"
        if path.exists():
            tables.append(results.read(path, f"priorhole evaluate {name}"))
    fresh = {name for table in tables for name in table.experiment}
    if workspace.results.exists():
        kept = results.read(workspace.results, "priorhole report")
        tables.append(kept[~kept.experiment.isin(fresh) & kept.experiment.isin(list(config.experiments))])
    table = pd.concat(tables, ignore_index=True) if tables else results.frame([])
    return table.assign(target=_targets(table, judged))


def _targets(table: pd.DataFrame, judged: Sequence[claims.Claim]) -> pd.Series:
    """The ids of the claims that each row is held against."""
    target = pd.Series("", index=table.index)
    for claim in judged:
        for subject in (claim.subject, claim.against):
            if subject is not None and claim.untested is None:
                rows = claims.rows_of(claim, subject, table).index
                target[rows] = (target[rows] + " " + claim.id).str.strip()
    return target


def tables(frame: pd.DataFrame) -> Iterator[str]:
    """Markdown: per experiment, every metric of every prior and sampler, mean over seeds and 95 % interval."""
    for (experiment, dataset, model), own in frame.groupby(["experiment", "dataset", "model"]):
        seeds = own.seeds.max()
        yield f"## {experiment}\n\nData set {dataset}, model {model} (decoder after the slash), {seeds} seeds.\n"
        truth = spec(str(dataset)).truth
        if truth is not None:
            yield f"The truth's own expected log-likelihood, which no model exceeds, is {truth.ceiling:.3f} nats.\n"
        for prior, difference in _optimism(own):
            yield f"{prior}: the plug-in exceeds the sampler bound by {difference:.4f} nats at the largest N and M.\n"
        yield from _methods(own)
        shown = own[own.metric.str.fullmatch(SHOWN)]
        yield "| metric | prior | sampler | mean | 95 % interval | unit | n |\n| --- | --- | --- | --- | --- | --- | --- |"
        for row in shown.sort_values(["metric", "prior", "sampler"]).itertuples():
            cells = (row.metric, row.prior, row.sampler, f"{row.value:.4g}", f"± {row.interval:.2g}", _unit(row), row.n)
            yield f"| {' | '.join(map(str, cells))} |"
        yield ""


def _optimism(frame: pd.DataFrame) -> Iterator[tuple[str, float]]:
    """Plug-in minus sampler bound of every corrected prior, at the largest N and M: what is left of the two's distance."""
    bounds = frame[frame.metric == "loglik-sampler"].assign(
        m=lambda rows: rows.sampler.str.extract(r"(\d+)$")[0].astype(int)
    )
    for prior, own in bounds.groupby("prior"):
        plugin = frame[(frame.metric == "loglik-plugin") & (frame.prior == prior)].value.item()
        yield str(prior), plugin - own.sort_values("m").value.iloc[-1]


def _methods(frame: pd.DataFrame) -> Iterator[str]:
    """Markdown: every prior by every sampler, what it costs and what it gives."""
    table = results.methods(frame)
    if table.empty:
        return
    likelihoods = ["loglik", "loglik-plugin", "loglik-sampler", "loglik-gain"]
    shown = [*likelihoods, *table.attrs["qualities"], "seconds-per-image", "proposals-per-image", "train-seconds"]
    yield f"| prior | sampler | {' | '.join(shown)} | ess-fraction | mmd2 |\n| --- | --- |{' --- |' * (len(shown) + 2)}"
    for row in table.to_dict("records"):
        cells = ["" if math.isnan(row[name]) else _with_interval(row[name], row[f"{name} interval"]) for name in shown]
        cells += [f"{row[name]:.3g}" for name in ("ess-fraction", "mmd2")]
        yield f"| {row['prior']} | {row['sampler']} | {' | '.join(cells)} |"
    yield "\nESS as a fraction, and squared MMD, are means over the groups; log-likelihoods are in nats, times in seconds.\n"
    found = frame[frame.metric.isin(["loglik", "loglik-plugin"]) & (frame.features != "")]
    measured = found.groupby(["features", "n"]).prior
    if len(measured) > 1:
        ways = [f"{', '.join(priors.unique())} with {how} on {n} examples" for (how, n), priors in measured]
        yield f"Log-likelihoods were measured of {'; of '.join(ways)}: compare those by their gains, which are paired.\n"


def _with_interval(value: float, interval: float) -> str:
    """To the interval's first two digits, or to three of a value without one."""
    if not interval > 0:
        return f"{value:.3g}"
    places = max(0, 1 - math.floor(math.log10(interval)))
    return f"{value:.{places}f} ± {interval:.2g}"


def _unit(row: Any) -> str:
    return results.metric(row.metric).unit


def write(workspace: Workspace, table: pd.DataFrame, verdicts: Sequence[claims.Verdict]) -> list[Path]:
    """Write results.csv, results.md, claims.md and the README's excerpt; returns their paths."""
    frame = results.over_seeds(table)
    results.write(workspace.results, table)
    meanings = "".join(f"| `{name}` | {m.unit} | {m.better} | {m.meaning} |\n" for name, m in results.METRICS.items())
    glossary = f"## Metrics\n\n| name (pattern) | unit | better | meaning |\n| --- | --- | --- | --- |\n{meanings}"
    text = "# Results\n\n" + "\n".join(tables(frame)) + "\n" + glossary
    written = {
        workspace.reports / "results.md": text,
        workspace.reports / "claims.md": "# Claims\n\n" + claims.markdown(verdicts),
    }
    readme = workspace.root / "README.md"
    if readme.exists():
        excerpt = claims.markdown([verdict for verdict in verdicts if verdict.ours is not None])
        written[readme] = MARKS.sub(lambda found: f"{found[1]}{excerpt}{found[2]}", readme.read_text(encoding="utf-8"))
    for path, content in written.items():
        write_text(path, content)
    return [workspace.results, *written]
