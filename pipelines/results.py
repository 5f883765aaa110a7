"""The results table: tidy, one measured number a row. Every table, and every figure of numbers, is drawn from it."""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pandas as pd

from runtime.errors import UserError
from runtime.files import write_text


@dataclass(frozen=True)
class Metric:
    """A metric of the table: its unit, whether ``higher`` or ``lower`` is better (or neither), and what it is.

    ``drawn``: its standard error comes from what a seed draws alone, so that it averages out over seeds.
    """

    unit: str
    better: str
    meaning: str
    drawn: bool = False


METRICS: dict[str, Metric] = {
    r"loglik": Metric("nats", "higher", "log-likelihood under a prior with an exact density (importance-weighted bound)"),
    r"loglik-plugin(/N\d+)?": Metric(
        "nats", "higher", "log-likelihood with log Ẑ from N base samples plugged in; optimistic"
    ),
    r"loglik-sampler": Metric("nats", "higher", "lower bound for the distribution that SIR with M proposals draws from"),
    r"loglik-gain(-sampler|-plugin(/N\d+)?)?": Metric("nats", "higher", "paired gain in log-likelihood over the base prior"),
    r"kl/k\d\d": Metric("nats", "", "KL(q || p) of a group under the model's own prior, test examples"),
    r"elbo-gain/k\d\d": Metric("nats", "higher", "what a group's correction adds to the ELBO, SIR with the most proposals"),
    r"bits-per-dim": Metric("bits/dim", "lower", "negative log-likelihood per dimension"),
    r"ess-fraction/k\d\d": Metric("", "higher", "effective sample size over M, or over a chain's states", drawn=True),
    r"ess-floor-share/k\d\d": Metric("", "lower", "share of images with an effective sample size under 10", drawn=True),
    r"acceptance/k\d\d": Metric("", "", "share of Langevin steps that the Metropolis correction accepts", drawn=True),
    r"nce-loss/k\d\d": Metric("nats", "", "classifier's loss on test examples; 2 ln 2 = 1.386 at chance"),
    r"log-z/k\d\d(/N\d+)?": Metric(
        "nats", "", "log Ẑ from N base samples, the largest N if unnamed; 0 for an optimal classifier"
    ),
    r"mmd2/k\d\d": Metric("", "lower", "squared MMD of the prior's latents to the aggregate posterior of test examples"),
    r"off-mode-share": Metric("", "lower", "share of samples farther than 4σ from every mode", drawn=True),
    r"modes-hit": Metric("", "higher", "modes with a sample within 4σ", drawn=True),
    r"fid-[a-z0-9-]+-\d+": Metric(
        "", "lower", "Fréchet distance to the training images, by network and sample count", drawn=True
    ),
    r"kid-[a-z0-9-]+-\d+": Metric(
        "", "lower", "kernel distance to the training images, by network and sample count", drawn=True
    ),
    r"seconds-per-image": Metric("s", "lower", "time to draw one image", drawn=True),
    r"proposals-per-image": Metric("", "lower", "evaluations of r per image, over all groups", drawn=True),
    r"train-seconds": Metric("s", "lower", "time of training, all groups"),
}


def metric(name: str) -> Metric:
    """The metric of that name. Raises UserError if the table has no such metric."""
    for pattern, found in METRICS.items():
        if re.fullmatch(pattern, name):
            return found
    raise UserError(f"{name!r} is not a metric of the results table; see METRICS in pipelines/results.py")


@dataclass(frozen=True)
class Row:
    """One measured number, of one seed.

    Attributes:
        experiment, dataset, model, prior, sampler: what was measured; ``model`` names the decoder's likelihood too, and
            ``sampler`` is empty where none is involved.
        metric: a name of METRICS.
        value, stderr, n: the number, its standard error, and how many examples or samples it was computed on.
        seed, seconds, device: of the run.
        features: feature network and decoding of FID and KID, bandwidths of MMD, importance samples of likelihoods.
        target: ids of the claims that the number is held against.
        revision: of the code.
    """

    experiment: str
    dataset: str
    model: str
    prior: str
    sampler: str
    metric: str
    value: float
    stderr: float
    n: int
    seed: int
    seconds: float
    device: str
    features: str
    target: str
    revision: str

    def __post_init__(self) -> None:
        metric(self.metric)


COLUMNS = [column.name for column in fields(Row)]
KEYS = ["experiment", "dataset", "model", "prior", "sampler", "metric"]
TYPES = {column.name: column.type for column in fields(Row)}


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Rows as a table."""
    return pd.DataFrame([asdict(row) for row in rows], columns=COLUMNS)


def write(path: Path, table: pd.DataFrame) -> None:
    """Write a table atomically, in a fixed order and with ten significant digits. Raises UserError if that fails."""
    ordered = table[COLUMNS].sort_values([*KEYS, "seed"], kind="stable")
    write_text(path, ordered.to_csv(index=False, float_format="%.10g", na_rep="nan", lineterminator="\n"))


def read(path: Path, made_by: str) -> pd.DataFrame:
    """Read a table. Raises UserError if it is missing or not one of ours; ``made_by`` is the command that makes it."""
    try:
        text = io.StringIO(path.read_text(encoding="utf-8"))
        table = pd.read_csv(text, dtype=TYPES, keep_default_na=False, na_values={"value": ["nan"], "stderr": ["nan"]})
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; make it with: {made_by}") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a results table ({' '.join(str(error).split())}); make it anew with: {made_by}"
        ) from error
    if list(table.columns) != COLUMNS:
        raise UserError(f"{path} has the wrong columns; make it anew with: {made_by}")
    return table


def methods(frame: pd.DataFrame) -> pd.DataFrame:
    """Every prior by every sampler, of one experiment: what it costs and how good it is.

    Args:
        frame: rows of :func:`over_seeds`.

    Returns:
        One row per prior and sampler, cheapest first, with columns ``loglik`` (of an exact prior), ``loglik-plugin`` and
        ``loglik-sampler`` (of a corrected one), ``loglik-gain`` (of an exact prior, or under the sampler bound),
        ``train-seconds``, ``seconds-per-image``, ``proposals-per-image`` and each metric of image quality, another for the
        ``interval`` of each, and the means over groups of ``ess-fraction`` and ``mmd2``; NaN where there is no such number.
        ``attrs["qualities"]`` names the metrics of image quality.
    """
    own = frame[(frame.sampler != "") & ~frame.metric.str.startswith("loglik")]
    qualities = sorted(name for name in own.metric.unique() if re.match("fid|kid|off-mode", name))
    wide = pd.DataFrame(index=own.set_index(["prior", "sampler"]).index.unique())
    for name in ("loglik", "loglik-plugin", "loglik-gain", "train-seconds"):
        rows = frame[frame.metric == name].set_index("prior")
        prior = wide.index.get_level_values("prior")
        wide[name], wide[f"{name} interval"] = rows.value.reindex(prior).array, rows.interval.reindex(prior).array
    for name in ("loglik-sampler", "loglik-gain-sampler", "seconds-per-image", "proposals-per-image", *qualities):
        rows = frame[(frame.metric == name) & (frame.sampler != "")].set_index(["prior", "sampler"])
        wide[name], wide[f"{name} interval"] = rows.value, rows.interval
    for column in ("loglik-gain", "loglik-gain interval"):
        wide[column] = wide[column].fillna(wide.pop(column.replace("gain", "gain-sampler")))
    for name in ("ess-fraction", "mmd2"):
        wide[name] = own[own.metric.str.startswith(f"{name}/")].groupby(["prior", "sampler"]).value.mean()
    wide = wide.reset_index()
    if len(wide):
        wide = wide.sort_values("seconds-per-image", kind="stable")
    wide.attrs["qualities"] = qualities
    return wide


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds with the half-width of a 95 % interval.

    Student's t on the spread of the seeds, and what the spread cannot show: a number that is measured on the test set has an
    error that all seeds share and that more seeds do not make smaller; it is added in quadrature. What is measured on a
    seed's own draws has no such error; there the spread of few seeds, which is itself uncertain, is not taken to be smaller
    than the draws alone make it. Of one seed alone, the interval is that of its standard error.

    Returns:
        One row per KEYS, with ``value``, ``interval`` (half-width), ``seeds``, ``n``, and ``features`` if the seeds agree.
    """
    summaries = []
    for key, own in table.groupby(KEYS, sort=True):
        half_width = _half_width(own.value, own.stderr, _drawn(own))
        features = own.features.iloc[0] if own.features.nunique() == 1 else ""
        summaries.append((*key, own.value.mean(skipna=False), half_width, len(own), int(own.n.max()), features))
    return pd.DataFrame(summaries, columns=[*KEYS, "value", "interval", "seeds", "n", "features"])


def difference(first: pd.DataFrame, second: pd.DataFrame) -> tuple[float, float]:
    """Mean of one number less that of another, and the half-width of its 95 % interval.

    Args:
        first, second: rows of one KEYS each, one row a seed. Where both have the same seeds, the difference is taken seed by
            seed: what a seed does to both of them cancels.
    """
    both = first.merge(second, on="seed", suffixes=("", "_second"), validate="one_to_one")
    if len(both) == len(first) == len(second):
        apart, errors = both.value - both.value_second, both.stderr.combine(both.stderr_second, math.hypot)
        return apart.mean(skipna=False), _half_width(apart, errors, _drawn(first) and _drawn(second))
    widths = [_half_width(rows.value, rows.stderr, _drawn(rows)) for rows in (first, second)]
    return first.value.mean(skipna=False) - second.value.mean(skipna=False), math.hypot(*widths)


def _drawn(rows: pd.DataFrame) -> bool:
    """Whether the rows of one KEYS were measured on what each seed drew: not the data, nor the aggregate posterior."""
    return metric(rows.metric.iloc[0]).drawn and rows.sampler.iloc[0] != ""


def _half_width(values: pd.Series, errors: pd.Series, drawn: bool) -> float:
    """Of the 95 % interval of the mean of one value a seed, each with its standard error; see :func:`over_seeds`."""
    from scipy.stats import t as student

    seeds = len(values)
    spread = student.ppf(0.975, seeds - 1) * values.std(skipna=False) / math.sqrt(seeds) if seeds > 1 else 0.0
    error = 1.96 * math.sqrt((errors**2).mean())
    return max(spread, error / math.sqrt(seeds)) if drawn else math.hypot(spread, error)
