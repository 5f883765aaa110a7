"""The figures of the report. Numbers come from results.csv alone; pictures of samples and latents from the artifacts."""

import math
from collections.abc import Collection, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch

from datasets.registry import Truth, spec
from models.protocol import by_posterior, descend
from pipelines import results
from pipelines.config import BASELINE
from pipelines.evaluation import sir_of_size
from pipelines.work import Seeded
from runtime import hardware
from runtime.errors import UserError
from runtime.files import atomic_path
from runtime.randomness import Noise

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

POINTS = 2000
PLANE, CELLS = 3.5, 301  # half the side of the latent plane that is shown, and its resolution


def of_results(frame: pd.DataFrame, folder: Path, bases: Collection[str]) -> Iterator[Path]:
    """Draw the figures that need results.csv alone, one set per experiment.

    Args:
        frame: the results over seeds.
        folder: where the PNG files go.
        bases: experiments with a VAE of their own, which gains are shown against.

    Yields:
        The paths written.
    """
    for experiment, own in frame.groupby("experiment"):
        drawings = {
            "convergence": _convergence,
            "nce-ess": _nce_against_ess,
            "groups": _by_group,
            "tradeoff": _trade_off,
        }
        for name, draw in drawings.items():
            figure = draw(str(experiment), own)
            if figure is not None:
                yield _save(figure, folder / f"{experiment}-{name}.png")
    for dataset, own in frame[frame.experiment.isin(bases)].groupby("dataset"):
        figure = _gain_against_base(str(dataset), own)
        if figure is not None:
            yield _save(figure, folder / f"{dataset}-gain.png")


def of_artifacts(at: Seeded, folder: Path) -> Iterator[Path]:
    """Draw the pictures of one seed's latents and samples; nothing where its artifacts are not here.

    Yields:
        The paths written.
    """
    truth = spec(at.experiment.dataset).truth
    try:
        layout = at.vae.layout()
        drawn = {(prior, sampler): at.samples(prior, sampler)["x"] for prior, sampler in at.draws()}
    except UserError:
        return
    corrected = next((prior for prior in at.experiment.priors if not at.prior(prior).exact), None)
    if corrected is not None and [group.latent for group in layout] == [(2,)]:
        yield _save(_hole(at, corrected), folder / f"{at.name}-hole.png")
    picture = _against_modes(drawn, truth) if truth is not None else _grids(drawn)
    yield _save(picture, folder / f"{at.name}-samples.png")


def _save(figure: Figure, path: Path) -> Path:
    with atomic_path(path) as temporary:
        # Without a fixed metadata block the file would differ on every run.
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return path


def _panels(count: int, size: float = 3.6) -> tuple[Figure, list[Axes]]:
    columns = min(count, 4)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(size * columns, size * rows), squeeze=False, layout="constrained")
    for spare in axes.flat[count:]:
        spare.axis("off")
    return figure, list(axes.flat[:count])


def _dots(axis: Axes, points: torch.Tensor, size: float, **style: Any) -> None:
    axis.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=size, **style)


def _convergence(experiment: str, frame: pd.DataFrame) -> Figure | None:
    """What every corrected prior gains by the plug-in against N, and under the sampler bound against M; log Ẑ against N.

    Gains, since they are paired: the test set's own spread, which all priors share, would hide everything else.
    """
    curves = frame[frame.metric.str.match(r"loglik-gain-plugin/N\d+$|loglik-gain-sampler$")].copy()
    if curves.empty:
        return None
    plugin = curves.metric.str.startswith("loglik-gain-plugin")
    text = curves.metric.where(plugin, curves.sampler).str.extract(r"(\d+)$")[0]
    curves["count"], curves["kind"] = text.astype(int), np.where(plugin, "plug-in", "sampler bound")
    pairs = curves.pivot_table(index=["prior", "count"], columns="kind", values="value").dropna()
    figure, (axis, below, *apart) = _panels(3 if len(pairs) else 2, 5.0)
    colours = {prior: f"C{i}" for i, prior in enumerate(sorted(curves.prior.unique()))}
    for (prior, kind), curve in curves.groupby(["prior", "kind"]):
        ordered = curve.sort_values("count")
        label, style = ("_", "o--") if kind == "plug-in" else (prior, "s-")
        colour = colours[prior]
        axis.errorbar(ordered["count"], ordered.value, ordered.interval, fmt=style, color=colour, capsize=3, label=label)
    exact = frame[frame.metric == "loglik-gain"]
    for prior, gain in [(BASELINE, 0.0), *zip(exact.prior, exact.value, strict=True)]:
        axis.axhline(gain, linestyle=":", linewidth=1, color="0.5")
        axis.annotate(prior, (0.01, gain), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    shown, margin = [0.0, *curves.value, *exact.value], 2 * curves.interval.median()
    axis.set_ylim(min(shown) - margin, max(shown) + margin)  # an estimate that broke down would flatten all others
    axis.set(xscale="log", xlabel="base samples per context", ylabel="gain over the base (nats)")
    axis.set_title(f"{experiment}\nsampler bound against M (solid), plug-in against N (dashed)", fontsize=10)
    log_z = frame[frame.metric.str.match(r"log-z/k\d\d/N")]
    for (prior, group), curve in log_z.groupby(["prior", log_z.metric.str[6:9]]):
        counts = curve.metric.str.extract(r"(\d+)$")[0].astype(int)
        ordered = curve.assign(count=counts).sort_values("count")
        below.errorbar(ordered["count"], ordered.value, ordered.interval, marker="o", capsize=3, label=f"{prior}, {group}")
    below.set(xscale="log", xlabel="base samples per context, N", ylabel="log Ẑ (nats)", title=experiment)
    for axis_apart in apart:  # the same count stands for N and for M; the two must meet
        for prior, own in pairs.groupby("prior"):
            difference = own["plug-in"] - own["sampler bound"]
            axis_apart.plot(own.index.get_level_values(1), difference, marker="o", color=colours[prior], label=str(prior))
        axis_apart.axhline(0, linewidth=1, color="0.5")
        axis_apart.set(xscale="log", xlabel="N = M", ylabel="plug-in − sampler bound (nats)", title=experiment)
    for each in (axis, below, *apart):
        each.legend(fontsize=6)
    return figure


def _by_group(experiment: str, frame: pd.DataFrame) -> Figure | None:
    """Group by group: the KL, what each correction adds to the ELBO, and the MMD of what is drawn; several groups only."""
    by_group = frame.assign(group=frame.metric.str.extract(r"/(k\d\d)$")[0]).dropna(subset="group")
    if by_group.group.nunique() < 2:
        return None
    figure, axes = _panels(3, 5.0)
    panels = {"kl": "KL(q || p) (nats)", "elbo-gain": "gain in ELBO (nats)", "mmd2": "squared MMD to q(z)"}
    for axis, (metric, label) in zip(axes, panels.items(), strict=True):
        own = by_group[by_group.metric.str.startswith(f"{metric}/")]
        for (prior, sampler), points in own.groupby(["prior", "sampler"]):
            ordered = points.sort_values("group")
            name = f"{prior} by {sampler}" if sampler else prior
            axis.errorbar(ordered.group, ordered.value, ordered.interval, marker="o", capsize=3, label=name)
        axis.set(xlabel="group", ylabel=label, title=experiment)
        if len(own):
            axis.legend(fontsize=8)
    return figure


def _gain_against_base(dataset: str, frame: pd.DataFrame) -> Figure | None:
    """What a corrected prior gains, against how good the base is: a marker per experiment, a colour per prior."""
    bases = frame[(frame.metric == "loglik") & (frame.prior == BASELINE)].set_index("experiment")
    gains = frame[frame.metric == "loglik-gain-sampler"].copy()
    gains["count"] = gains.sampler.str.extract(r"(\d+)$")[0].astype(int)
    most = gains.sort_values("count").groupby(["experiment", "prior"]).tail(1)
    most = most[most.experiment.isin(bases.index)]
    several = most.groupby("prior").experiment.nunique() > 1
    most = most[most.prior.map(several)]
    if most.empty:
        return None
    figure, (axis,) = _panels(1, 6.0)
    colours = {prior: f"C{i}" for i, prior in enumerate(sorted(most.prior.unique()))}
    ordered = bases.value[most.experiment.unique()].sort_values().index
    for experiment, marker in zip(ordered, cycle("os^vDP*X"), strict=False):
        for point in most[most.experiment == experiment].sort_values("prior").itertuples():
            base, colour = bases.loc[experiment], colours[point.prior]
            label = f"{point.prior}, {experiment}"
            axis.errorbar(
                base.value, point.value, point.interval, base.interval, marker, color=colour, capsize=3, label=label
            )
    axis.axhline(0, linewidth=1, color="0.5")
    axis.set(xlabel="log-likelihood of the base (nats)", ylabel="gain, sampler bound (nats)", title=dataset)
    axis.legend(fontsize=7)
    return figure


PAPERS_POINTS = {"M = 500": (1.25, 6.76), "M = 5 000": (10.11, 5.25)}
"""Seconds per image on a V100 and FID of SIR on CelebA-64, as NCP-VAE's authors gave them."""

MARKERS = {"ancestral": "o", "sir": "s", "sir-adaptive": "D", "sir-million": "P", "langevin": "^", "joint-langevin": "v"}
"""Of the families of samplers."""


def _trade_off(experiment: str, frame: pd.DataFrame) -> Figure | None:
    """Image quality against seconds per image, a line per prior and family of samplers; beside it the paper's two points."""
    table = results.methods(frame)
    if len(table) < 3 or not table.attrs["qualities"]:
        return None
    quality = table.attrs["qualities"][0]
    yardsticks = frame[(frame.metric == quality) & (frame.sampler == "")]
    figure, (axis, *paper) = _panels(2 if quality.startswith("fid") else 1, 6.0)
    families = table.sampler.str.replace(r"-\d+$", "", regex=True)
    lines = list(table.groupby(["prior", families]))
    colours = mpl.colormaps["turbo"](np.linspace(0.05, 0.95, len(lines)))
    for ((prior, family), points), colour in zip(lines, colours, strict=True):
        seconds, values, marker = points["seconds-per-image"], points[quality], MARKERS.get(str(family), "o")
        label = f"{prior} by {family}"
        axis.errorbar(
            seconds, values, points[f"{quality} interval"], marker=marker, color=colour, markersize=5, capsize=2, label=label
        )
        for name, x, y in zip(points.sampler, seconds, values, strict=True):
            size = name.removeprefix(f"{family}-") if name != family else ""
            axis.annotate(size, (x, y), fontsize=7, xytext=(3, 4), textcoords="offset points")
    for row in yardsticks.itertuples():
        axis.axhline(row.value, linestyle="--", linewidth=1, color="0.5")
        axis.annotate(row.prior, (0.01, row.value), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
    axis.set(xscale="log", xlabel="seconds per image", ylabel=quality, title=experiment)
    axis.legend(fontsize=6)
    for beside in paper:
        for name, point in PAPERS_POINTS.items():
            beside.plot(*point, "s", color="0.3")
            beside.annotate(name, point, fontsize=8, xytext=(5, 5), textcoords="offset points")
        beside.set(xscale="log", xlim=(0.5, 50), ylim=(0, 8), xlabel="seconds per image, V100", ylabel="FID")
        beside.set_title("the paper's points: CelebA-64, SIR")
    return figure


def _nce_against_ess(experiment: str, frame: pd.DataFrame) -> Figure | None:
    """ESS/M of SIR against the NCE loss, a point per prior, group and sampler (NCP-VAE, Fig. 5(b))."""
    by_group = frame.assign(group=frame.metric.str.extract(r"/(k\d\d)$")[0])
    losses = by_group[by_group.metric.str.startswith("nce-loss/")]
    shares = by_group[by_group.metric.str.startswith("ess-fraction/") & by_group.sampler.str.startswith("sir")]
    both = losses.merge(shares, on=["prior", "group"], suffixes=("_loss", "_ess"))
    if both.empty:
        return None
    figure, (axis,) = _panels(1, 5.0)
    for (prior, sampler), points in both.groupby(["prior", "sampler_ess"]):
        axis.errorbar(
            points.value_loss,
            points.value_ess,
            points.interval_ess,
            points.interval_loss,
            "o",
            capsize=3,
            label=f"{prior} by {sampler}",
        )
    points = both.dropna(subset=["value_loss", "value_ess"])
    if len(points) > 2 and points.value_loss.nunique() > 1:
        from scipy import stats

        rank = stats.spearmanr(points.value_loss, points.value_ess)
        experiment += f": Spearman {rank.statistic:.2f}, p = {rank.pvalue:.1g}"
    axis.axvline(2 * np.log(2), linestyle=":", color="0.5")
    axis.annotate("chance", (2 * np.log(2), 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=8, ha="right")
    axis.set(yscale="log", xlabel="NCE loss (nats)", ylabel="ESS / M", title=experiment)
    axis.legend(fontsize=8)
    return figure


@torch.no_grad()
def _hole(at: Seeded, corrected: str) -> Figure:
    """The aggregate posterior over the prior's contours, the learned log r, and what SIR draws from the learned prior."""
    device, prior, options = hardware.device(), at.prior(corrected), at.experiment.priors[corrected]
    x = at.dataset.examples("test")[:POINTS].to(device)
    rows, codes = range(len(x)), []
    by_q = by_posterior(at.vae, x, lambda k: Noise(at.seed, "figure", k, rows=rows, device=device))

    def choose(k: int, context: torch.Tensor) -> torch.Tensor:
        codes.append(by_q(k, context))
        return codes[-1]

    descend(at.vae, len(x), choose)
    sampler = max((size, name) for size, name in sir_of_size(at.experiment).items() if name in options.samplers)[1]
    drawn = at.samples(corrected, sampler)["z/k00"]
    ticks = torch.linspace(-PLANE, PLANE, CELLS)
    plane = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1).view(-1, 1, 2).to(device)
    context = at.vae.start(1)
    log_r = prior.log_ratio(0, plane, context).view(CELLS, CELLS).cpu()
    log_p = prior.base(0, context).log_prob(plane).view(CELLS, CELLS).cpu()
    figure, axes = _panels(3, 4.2)
    titles = ("q(z), and contours of the prior", f"log r(z) of {corrected}", f"{corrected} by {sampler}")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlim=(-PLANE, PLANE), ylim=(-PLANE, PLANE), aspect="equal", xticks=[], yticks=[])
        levels = log_p.max().item() - np.array([4.5, 2.0, 0.5])  # three, two and one standard deviations of N(0, I)
        axis.contour(ticks.numpy(), ticks.numpy(), log_p.numpy(), levels=levels, colors="tab:red", linewidths=1)
    _dots(axes[0], codes[0].cpu(), 2, alpha=0.5)
    axes[1].imshow(
        log_r.clamp(-8, 8).numpy(), extent=(-PLANE, PLANE, -PLANE, PLANE), origin="lower", cmap="RdBu_r", vmin=-8, vmax=8
    )
    _dots(axes[2], drawn[:POINTS], 2, alpha=0.5)
    return figure


def _against_modes(drawn: dict[tuple[str, str], torch.Tensor], truth: Truth) -> Figure:
    """Samples of every prior and sampler over the true modes."""
    figure, axes = _panels(len(drawn), 3.2)
    for axis, ((prior, sampler), x) in zip(axes, drawn.items(), strict=True):
        _dots(axis, x[:POINTS], 2, alpha=0.4)
        _dots(axis, truth.means, 12, facecolors="none", edgecolors="tab:red", linewidths=0.7)
        axis.set(title=f"{prior} by {sampler}", xlim=(-2.8, 2.8), ylim=(-2.8, 2.8), aspect="equal", xticks=[], yticks=[])
    return figure


def _grids(drawn: dict[tuple[str, str], torch.Tensor]) -> Figure:
    """The first samples, up to 64, of every prior and sampler."""
    figure, axes = _panels(len(drawn), 3.2)
    for axis, ((prior, sampler), x) in zip(axes, drawn.items(), strict=True):
        across, side = math.isqrt(min(64, len(x))), x.shape[-1]
        tiles = x[: across**2, 0].reshape(across, across, side, side).permute(0, 2, 1, 3)
        axis.imshow(tiles.reshape(across * side, across * side).numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set(title=f"{prior} by {sampler}", xticks=[], yticks=[])
    return figure
