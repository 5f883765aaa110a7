"""The results table: tidy, one measured number a row. Every table, and every figure of numbers, is drawn from it."""

import io
import math
import re
from collections.abc import Callable, Sequence
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
    r"loglik": Metric(
        "nats", "higher", "log-likelihood under a prior with an exact density (bound by S importance samples)"
    ),
    r"loglik-plugin": Metric("nats", "higher", "log-likelihood with log Ẑ from N base samples plugged in; optimistic"),
    r"loglik-sampler": Metric("nats", "higher", "lower bound for the distribution that SIR with M proposals draws from"),
    r"loglik-gain(-sampler|-plugin)?": Metric("nats", "higher", "paired gain in log-likelihood over the base prior"),
    r"truth-gap": Metric(
        "nats", "lower", "how far an exact prior's likelihood lies below the truth's own density of the same examples"
    ),
    r"truth-gap-sampler": Metric("nats", "lower", "the same, under the bound for SIR with M proposals"),
    r"kl/k\d\d": Metric("nats", "", "KL(q || p) of a group under the model's own prior, test examples"),
    r"elbo-gain/k\d\d": Metric("nats", "higher", "what a group's correction adds to the ELBO, SIR with the most proposals"),
    r"ess-fraction/k\d\d": Metric("", "higher", "effective sample size over M, or over a chain's states", drawn=True),
    r"ess-floor-share/k\d\d": Metric("", "lower", "share of images with an effective sample size under 10", drawn=True),
    r"acceptance/k\d\d": Metric("", "", "share of Langevin steps that the Metropolis correction accepts", drawn=True),
    r"nce-loss/k\d\d": Metric("nats", "", "classifier's loss on test examples; 2 ln 2 = 1.386 at chance"),
    r"log-z/k\d\d": Metric("nats", "", "log Ẑ from N base samples; 0 for an optimal classifier"),
    r"held-out/k\d\d": Metric("nats", "lower", "a prior's criterion on held-out training examples, by training step"),
    r"plateaued/k\d\d": Metric(
        "", "", "1 if training ended since the held-out criterion had stopped improving, 0 if it ran out"
    ),
    r"kept-step/k\d\d": Metric("", "", "training step of the state that was kept"),
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
    r"train-seconds": Metric("s", "lower", "time of training, all groups; of the base, the VAE's"),
}


def metric(name: str) -> Metric:
    """The metric of that name. Raises UserError if the table has no such metric."""
    for pattern, found in METRICS.items():
        if re.fullmatch(pattern, name):
            return found
    raise UserError(f"{name!r} is not a metric of the results table; see METRICS in pipelines/results.py")


BASELINE = "normal"
"""Name of the prior that every gain is measured over: the VAE's own, which no second stage trains."""

AGGREGATE = "aggregate-posterior"
"""Stands in the prior column for samples decoded from q(z): what a perfect prior would reach with this decoder."""

DATA = "data"
"""Stands in the prior column for the data themselves: the exact density, or real against real. No VAE is involved."""


@dataclass(frozen=True)
class Row:
    """One measured number, of one seed.

    Attributes:
        experiment, dataset, model, prior, sampler: what was measured; ``model`` names the decoder's likelihood too, and
            ``sampler`` is empty where none is involved. The bound of SIR with M proposals belongs to no sampler's name.
        metric: a name of METRICS.
        samples: S, importance samples an example of a likelihood; 0 where none are.
        normaliser: N, base samples a context of a plug-in or of log Ẑ; 0 where there is none.
        proposals: M of SIR, of a likelihood bound or of what a sampler drew; 0 where no proposals are.
        step: training step of a held-out criterion; 0 elsewhere.
        value, stderr, n: the number, its standard error, and how many examples or samples it was computed on.
        seed, vae_seed: of what was measured, and of the VAE, which several seeds can share.
        seconds, device, precision: of the run.
        features: feature network and decoding of FID and KID, bandwidths of MMD.
        target: ids of the claims that the number is held against.
        revision: of the code.
        fingerprint: digests of the configuration and of the code that made it, joined by ``+``.
    """

    experiment: str
    dataset: str
    model: str
    prior: str
    sampler: str
    metric: str
    samples: int
    normaliser: int
    proposals: int
    step: int
    value: float
    stderr: float
    n: int
    seed: int
    vae_seed: int
    seconds: float
    device: str
    precision: str
    features: str
    target: str
    revision: str
    fingerprint: str

    def __post_init__(self) -> None:
        metric(self.metric)


COLUMNS = [column.name for column in fields(Row)]
NAMES = ["experiment", "dataset", "model", "prior", "sampler", "metric"]
SIZES = ["samples", "normaliser", "proposals"]
KEYS = [*NAMES, *SIZES, "step"]
"""What tells one number from another; what agrees in them differs by seed alone."""

TYPES = {column.name: column.type for column in fields(Row)}


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Rows as a table."""
    return pd.DataFrame([asdict(row) for row in rows], columns=COLUMNS)


def headline(table: pd.DataFrame, largest_proposals: bool = False) -> pd.DataFrame:
    """The rows to show where a single number is shown: of every metric of a prior those with the largest S, then N.

    Args:
        table: rows of this table or of :func:`over_seeds`.
        largest_proposals: also those with the largest M alone, in place of every M.
    """
    for size in SIZES if largest_proposals else SIZES[:2]:
        table = table[table[size] == table.groupby(NAMES)[size].transform("max")]
    return table


def write(path: Path, table: pd.DataFrame) -> None:
    """Write a table atomically, in a fixed order and with ten significant digits. Raises UserError if that fails."""
    ordered = table[COLUMNS].sort_values([*KEYS, "seed"], kind="stable")
    write_text(path, ordered.to_csv(index=False, float_format="%.10g", na_rep="nan", lineterminator="\n"))


def read(path: Path, made_by: str) -> pd.DataFrame:
    """Read a table; ``made_by`` is the command that makes it.

    Raises:
        UserError: it is missing, not one of ours, or has a row twice.
    """
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
    twice = table.duplicated([*KEYS, "seed"])
    if twice.any():
        row, line = table[twice].iloc[0], int(twice.argmax()) + 2
        raise UserError(
            f"{path} has {row.metric} of {row.experiment}, {row.prior}, seed {row.seed} twice (line {line}), as when two "
            f"versions were merged; make it anew with: {made_by}"
        )
    return table


def read_all(path: Path) -> pd.DataFrame:
    """The table of all experiments, which is under version control. Raises UserError as :func:`read` does."""
    return read(path, f"git checkout {path}; priorhole report" if path.exists() else "priorhole report")


def gains_over_samples(frame: pd.DataFrame) -> pd.DataFrame:
    """Gains over the base by the number S of importance samples.

    Args:
        frame: rows of :func:`over_seeds`, of one experiment.

    Returns:
        Of every prior that is measured with several S, a row for each of them: the gain of an exact prior, or that under the
        sampler bound with the largest M that all its S have. Plug-ins are left out.
    """
    gains = frame[frame.metric.isin(["loglik-gain", "loglik-gain-sampler"])]
    counts = gains.groupby("prior").samples.transform("nunique")
    gains = gains[counts > 1]
    common = gains.groupby(["prior", "proposals"]).samples.transform("nunique") == counts[gains.index]
    shared = gains[common]
    return shared[shared.proposals == shared.groupby("prior").proposals.transform("max")].sort_values(["prior", "samples"])


def stale_rows(table: pd.DataFrame, expected: Callable[[str, str, str, str], str | None]) -> pd.Series:
    """What has changed since each row was measured.

    Args:
        table: rows of this table.
        expected: the fingerprint that a row of (experiment, prior, sampler, metric) would get now; None if the experiment,
            the prior or the sampler no longer exists.

    Returns:
        For each row ``configuration`` if it was measured under another one, otherwise ``code`` if by other code, otherwise
        an empty text.
    """
    named = ["experiment", "prior", "sampler", "metric"]
    now = {key: expected(*key) for key in table[named].drop_duplicates().itertuples(index=False, name=None)}
    keys = table[named].itertuples(index=False, name=None)
    found = [_stale(fingerprint, now[key]) for key, fingerprint in zip(keys, table.fingerprint, strict=True)]
    return pd.Series(found, index=table.index, dtype=str)


def _stale(fingerprint: str, expected: str | None) -> str:
    if fingerprint == expected:
        return ""
    if expected is None or fingerprint.partition("+")[0] != expected.partition("+")[0]:
        return "configuration"
    return "code"


def methods(frame: pd.DataFrame) -> pd.DataFrame:
    """Every prior by every sampler, of one experiment: what it costs and how good it is.

    Args:
        frame: rows of :func:`over_seeds`. Likelihoods are those of :func:`headline`; a sampler that draws M proposals gets
            the bound of SIR with M, whatever the sampler's name.

    Returns:
        One row per prior and sampler, cheapest first, with columns ``proposals`` (M, 0 where the sampler has none),
        ``loglik`` (of an exact prior), ``loglik-plugin`` and ``loglik-sampler`` (of a corrected one), ``loglik-gain`` (of an
        exact prior, or under the sampler bound), ``train-seconds``, ``seconds-per-image``, ``proposals-per-image`` and each
        metric of image quality, another for the ``interval`` of each and for whether it is ``conditional``, and the means
        over groups of ``ess-fraction`` and ``mmd2``; NaN where there is no such number. ``attrs["qualities"]`` names the
        metrics of image quality, the one to show alone first.
    """
    frame = headline(frame)
    own = frame[frame.sampler != ""]
    # A data set's own classifier behind networks that know more than its classes.
    qualities = sorted(
        (name for name in own.metric.unique() if re.match("fid|kid|off-mode", name)),
        key=lambda name: (name[:3], any(f"-{dataset}-" in name for dataset in own.dataset.unique()), name),
    )
    wide = own.groupby(["prior", "sampler"], sort=False).proposals.max().to_frame()
    for names, rows in (
        (("loglik", "loglik-plugin", "loglik-gain", "train-seconds"), frame[frame.sampler == ""].set_index("prior")),
        (("loglik-sampler", "loglik-gain-sampler"), frame[frame.sampler == ""].set_index(["prior", "proposals"])),
        (("seconds-per-image", "proposals-per-image", *qualities), own.set_index(["prior", "sampler"])),
    ):
        index = wide.reset_index().set_index(list(rows.index.names)).index
        for name in names:
            chosen = rows[rows.metric == name].reindex(index)
            wide[name], wide[f"{name} interval"] = chosen.value.array, chosen.interval.array
            wide[f"{name} conditional"] = chosen.conditional.eq(True).array
    bounded = wide["loglik-gain"].isna()
    for column in ("loglik-gain", "loglik-gain interval", "loglik-gain conditional"):
        wide[column] = wide[column].mask(bounded, wide.pop(column.replace("gain", "gain-sampler")))
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

    Seeds that share one VAE do not show how the number would differ on another: it is ``conditional`` on that VAE, and so is
    its interval.

    A time is one of the device and the precision that most seeds were run on and in: the mean over several is none's.

    Returns:
        One row per KEYS, with ``value``, ``interval`` (half-width), ``seeds``, ``vaes`` (how many VAEs they are of), ``n``,
        ``features`` if the seeds agree, ``conditional``, and ``stale``: what :func:`stale_rows` says of any seed, where it
        is a column of the table.
    """
    summaries = []
    for key, rows in table.groupby(KEYS, sort=True):
        own = _timed_alike(rows) if metric(rows.metric.iloc[0]).unit == "s" else rows
        half_width = _half_width(own.value, own.stderr, _drawn(own))
        features = own.features.iloc[0] if own.features.nunique() == 1 else ""
        counts = len(own), own.vae_seed.nunique(), int(own.n.max())
        changed = set(own.get("stale", [""]))
        stale = next((kind for kind in ("configuration", "code") if kind in changed), "")
        summaries.append((*key, own.value.mean(skipna=False), half_width, *counts, features, conditional(own), stale))
    columns = [*KEYS, "value", "interval", "seeds", "vaes", "n", "features", "conditional", "stale"]
    found = pd.DataFrame(summaries, columns=columns)
    return found.astype({"conditional": bool})


def _timed_alike(times: pd.DataFrame) -> pd.DataFrame:
    return max((alike for _, alike in times.groupby(["device", "precision"], sort=True)), key=len)


def conditional(rows: pd.DataFrame) -> bool:
    """Whether rows of one number, one a seed, are all of one VAE; the data's own numbers are of none."""
    return rows.vae_seed.nunique() == 1 and rows.prior.iloc[0] != DATA


def difference(first: pd.DataFrame, second: pd.DataFrame) -> tuple[float, float]:
    """Mean of one number less that of another, and the half-width of its 95 % interval.

    Args:
        first, second: rows of one KEYS each, one row a seed. Where both have the same seeds, the difference is taken seed by
            seed: what a seed does to both of them cancels. Times are of one device and precision, as in :func:`over_seeds`.
    """
    first, second = (_timed_alike(rows) if metric(rows.metric.iloc[0]).unit == "s" else rows for rows in (first, second))
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
    from scipy.special import stdtrit

    seeds = len(values)
    spread = stdtrit(seeds - 1, 0.975) * values.std(skipna=False) / math.sqrt(seeds) if seeds > 1 else 0.0
    error = 1.96 * math.sqrt((errors**2).mean())
    if drawn and seeds > 1:
        return max(spread, error / math.sqrt(seeds))
    return math.hypot(spread, error)
