"""The figures of the report. Numbers come from results.csv alone; pictures of samples and latents from the artifacts."""

import hashlib
import json
import math
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from PIL import Image

from datasets.registry import Truth, spec
from models.distributions import Distribution
from models.protocol import posterior_pass
from pipelines import results
from pipelines.claims import FEWEST
from pipelines.config import Config, Experiment, plain
from pipelines.fingerprints import drawing
from pipelines.results import BASELINE
from pipelines.stored import Stored
from runtime import hardware
from runtime.errors import UserError
from runtime.files import atomic_path
from runtime.randomness import Noise

mpl.use("Agg")
from matplotlib import patheffects
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import Bbox

POINTS = 2000
PLANE, CELLS = 3.5, 301  # half the side of the latent plane that is shown, and its resolution

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which colour-blind readers tell apart; without their yellow, which is too light for a line."""

CONTRAST = COLOURS[1]
MARKERS = "os^vDP*X"
MOST_LABELS = 12
HALO = patheffects.withStroke(linewidth=2, foreground="white")
"""Around a text, which lines and whiskers may pass behind."""

PICTURES = ("-hole", "-samples")
"""Ends of the names of what is drawn from artifacts, which need not be here."""


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
            "training": _training,
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


def of_artifacts(stored: Stored, folder: Path) -> Iterator[Path]:
    """Draw the pictures of one seed's latents and samples; of some of the samples where the others are not here.

    Yields:
        The paths written. A picture of all samples stays where fewer are here.
    """
    truth, drawn = spec(stored.recipe.experiment.dataset).truth, dict[tuple[str, str], torch.Tensor]()
    try:
        layout = stored.vae.layout()
    except UserError:
        return
    for prior, sampler in stored.recipe.draws():
        with suppress(UserError):
            drawn[prior, sampler] = stored.samples(prior, sampler).first(POINTS)
    path = folder / f"{stored.recipe.name}-samples.png"
    made_from: str | None = picture_digest(stored.recipe.experiment)
    if len(drawn) == len(stored.recipe.draws()):
        corrected = next((prior for prior in stored.recipe.experiment.priors if not stored.prior(prior).exact), None)
        if corrected is not None and [group.latent for group in layout] == [(2,)]:
            yield _save(_hole(stored, corrected), folder / f"{stored.recipe.name}-hole.png", made_from)
    elif not drawn or (path.exists() and _drawn_from(path) == made_from):
        return
    else:
        made_from = None  # so that it is drawn anew once there is more
    yield _save(_against_modes(drawn, truth) if truth is not None else _grids(drawn), path, made_from)


def grids(stored: Stored, folder: Path) -> None:
    """Write a PNG file of a seed's first images, up to 64, for every prior and sampler; none where samples are points."""
    if spec(stored.recipe.experiment.dataset).kind == "points":
        return
    for prior, sampler in stored.recipe.draws():
        levels = (tiled(stored.samples(prior, sampler).first(64)) * 255).round().to(torch.uint8)
        Image.fromarray(levels.numpy()).save(folder / f"{prior}-{sampler}.png")


def picture_digest(experiment: Experiment) -> str:
    """Of all that the pictures of an experiment's artifacts depend on."""
    settings = json.dumps(plain(experiment, "evaluate") | {"sample": drawing(experiment)}, sort_keys=True)
    return hashlib.blake2b(settings.encode(), digest_size=8).hexdigest()


def remove_stale(folder: Path, written: Collection[Path], config: Config) -> list[Path]:
    """Remove the figures that show what is gone.

    Args:
        folder: where the PNG files are.
        written: those drawn just now. Figures of results are all drawn anew each time, so any other is gone; pictures of
            artifacts are not, since artifacts need not be here: see :func:`stale_pictures`.
        config: what the experiments are now.

    Returns:
        The paths removed.
    """
    current = {name: picture_digest(experiment) for name, experiment in config.experiments.items()}
    gone = [path for path in folder.glob("*.png") if path not in written and not path.stem.endswith(PICTURES)]
    for path in gone:
        path.unlink()
    return gone + stale_pictures(folder, current)


def stale_pictures(folder: Path, current: Mapping[str, str]) -> list[Path]:
    """Remove the pictures of artifacts whose experiment is gone or has other settings than they were drawn from.

    Args:
        folder: where the PNG files are.
        current: the digest of each experiment that there is; see :func:`picture_digest`.

    Returns:
        The paths removed. A picture that does not say what it was drawn from stays as long as its experiment does.
    """
    removed = []
    for path in sorted(folder.glob("*.png")):
        ending = next((ending for ending in PICTURES if path.stem.endswith(ending)), None)
        if ending is None:
            continue
        now = current.get(path.stem.removesuffix(ending))
        if now is None or _drawn_from(path) not in (None, now):
            path.unlink()
            removed.append(path)
    return removed


def _drawn_from(path: Path) -> str | None:
    with Image.open(path) as picture:
        return picture.info.get("Description")


def _save(figure: Figure, path: Path, description: str | None = None) -> Path:
    for axis in figure.axes:
        low, high = axis.get_xlim()
        # Over a decade or two matplotlib names the ticks between the powers of ten as well, one over the other.
        if axis.get_xscale() == "log" and np.ceil(np.log10(low)) <= np.floor(np.log10(high)):
            axis.xaxis.set_minor_formatter(NullFormatter())
    with atomic_path(path) as temporary:
        # Without a fixed metadata block the file would differ on every run.
        metadata = {"Software": None, "Description": description}
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight", metadata=metadata)
    plt.close(figure)
    return path


def _panels(count: int, size: float = 3.6) -> tuple[Figure, list[Axes]]:
    columns = min(count, 4)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(size * columns, size * rows), squeeze=False, layout="constrained")
    for spare in axes.flat[count:]:
        spare.axis("off")
    return figure, list(axes.flat[:count])


def _styles(names: Iterable[Hashable]) -> dict[Any, dict[str, Any]]:
    """A colour and a marker for each name: another colour each, and another marker where the colours begin again."""
    unique = sorted(set(names), key=str)
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i // len(COLOURS) % len(MARKERS)]}
        for i, name in enumerate(unique)
    }


def _legend_below(figure: Figure) -> None:
    """One legend of all panels, under them, where it hides no point."""
    labelled: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            labelled.setdefault(label, handle)
    if labelled:
        lengths = [len(label) for label in labelled]
        inches = 0.6 + 0.04 * (max(lengths) + sum(lengths) / len(lengths))  # of a column, of which few hold the longest
        columns = max(1, min(len(labelled), int(figure.get_figwidth() / inches)))
        figure.legend(list(labelled.values()), list(labelled), loc="outside lower center", ncols=columns, fontsize=8)


def _label(metric: str) -> str:
    """A metric's name and unit, for an axis."""
    unit = results.metric(metric).unit
    return f"{metric} ({unit})" if unit else metric


def _label_points(axis: Axes, points: Iterable[tuple[float, float, str]]) -> None:
    """Write a text beside each point (x, y, text), inside the axes and over no text, point or line; none without room."""
    points = list(points)
    if not points:
        return
    figure = axis.get_figure()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # positions are known only after the layout
    drawn = [axis.transData.transform([(x, y) for x, y, _ in points])]
    for line in axis.get_lines():
        ends = line.get_transform().transform(line.get_xydata())
        steps = np.linspace(0, len(ends) - 1, 200 if len(ends) > 1 else 1)
        drawn.append(np.stack([np.interp(steps, range(len(ends)), ends[:, side]) for side in (0, 1)], 1))
    taken = [Bbox.from_bounds(x - 2, y - 2, 4, 4) for x, y in np.concatenate(drawn) if np.isfinite((x, y)).all()]
    places = [(right, up) for up in (4, -10, 14, -20, 24, -30) for right in (4, -4)]
    for x, y, text in points:
        for right, up in places:
            side = "left" if right > 0 else "right"
            written = axis.annotate(text, (x, y), fontsize=7, xytext=(right, up), textcoords="offset points", ha=side)
            written.set_path_effects([HALO])
            written.set_in_layout(False)
            box = written.get_window_extent().padded(2)
            inside = axis.bbox.containsx(box.x0) and axis.bbox.containsx(box.x1)
            inside = inside and axis.bbox.containsy(box.y0) and axis.bbox.containsy(box.y1)
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            written.remove()


def _dots(axis: Axes, points: torch.Tensor, size: float, **style: Any) -> None:
    axis.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=size, **style)


def _convergence(experiment: str, frame: pd.DataFrame) -> Figure | None:
    """What every corrected prior gains by the plug-in against N, and under the sampler bound against M; log Ẑ against N.

    Beside them, where they can be drawn: how far the two are apart at N = M, and the gain against S. Gains, since they are
    paired: the test set's own spread, which all priors share, would hide everything else.
    """
    largest = results.headline(frame.assign(normaliser=0)).index  # every N and M, at the largest S
    shown = frame.loc[largest]
    curves = shown[shown.metric.isin(["loglik-gain-plugin", "loglik-gain-sampler"])].copy()
    if curves.empty:
        return None
    curves["count"] = curves.normaliser + curves.proposals  # each has one of them
    over_samples = results.gains_over_samples(frame)
    pairs = curves.pivot_table(index=["prior", "count"], columns="metric", values="value").dropna()
    wanted = [True, True, len(pairs) > 0, len(over_samples) > 0]
    figure, axes = _panels(sum(wanted), 5.0)
    gain_axis, normaliser_axis = axes[:2]
    exact = shown[shown.metric == "loglik-gain"]
    styles = _styles([*curves.prior, *over_samples.prior, *exact.prior])
    for (prior, metric), curve in curves.groupby(["prior", "metric"]):
        ordered = curve.sort_values("count")
        label, line = ("_", "--") if metric == "loglik-gain-plugin" else (prior, "-")
        values, widths = ordered.value, ordered.interval
        gain_axis.errorbar(ordered["count"], values, widths, linestyle=line, capsize=3, label=label, **styles[prior])
    gain_axis.axhline(0, linewidth=1, color="0.5")
    for prior, gain in zip(exact.prior, exact.value, strict=True):
        label = "_" if prior in over_samples.prior.to_numpy() else prior
        gain_axis.axhline(gain, linestyle=":", linewidth=1.5, label=label, color=styles[prior]["color"])
    gain_axis.set_ylim(_limits(pd.concat([curves, exact])))
    gain_axis.set(xscale="log", xlabel="base samples per context, M or N", ylabel="gain over the base (nats)")
    gain_axis.set_title(
        f"{experiment}\nsampler bound against M (solid), plug-in against N (dashed), exact (dotted)", fontsize=9
    )
    _log_normaliser(normaliser_axis, shown[shown.metric.str.startswith("log-z/")], styles)
    normaliser_axis.set_title(experiment)
    if len(pairs):  # the same count stands for N and for M; the two must meet
        axis = axes[2]
        for prior, own in pairs.groupby("prior"):
            apart = own["loglik-gain-plugin"] - own["loglik-gain-sampler"]
            axis.plot(own.index.get_level_values("count"), apart, label=prior, **styles[prior])
        axis.axhline(0, linewidth=1, color="0.5")
        axis.set(xscale="log", xlabel="N = M", ylabel="plug-in − sampler bound (nats)", title=experiment)
    if len(over_samples):
        axis = axes[-1]
        for prior, own in over_samples.groupby("prior"):
            axis.errorbar(own.samples, own.value, own.interval, capsize=3, label=prior, **styles[prior])
        axis.set(xscale="log", xlabel="importance samples per example, S", ylabel="gain over the base (nats)")
        axis.set_title(f"{experiment}\nat the largest M", fontsize=10)
    _legend_below(figure)
    return figure


def _limits(gains: pd.DataFrame) -> tuple[float, float]:
    """Of an axis of gains: 0, all of them, and their whiskers, but what is far longer than most would flatten all others."""
    usual = gains.interval.median()
    widths = gains.interval.clip(upper=4 * usual).fillna(0)
    return min(0.0, (gains.value - widths).min()) - usual / 2, max(0.0, (gains.value + widths).max()) + usual / 2


def _log_normaliser(axis: Axes, frame: pd.DataFrame, styles: Mapping[Any, Mapping[str, Any]]) -> None:
    """log Ẑ of every group against N, in the style of its prior, paler from the first group to the last."""
    for prior, own in frame.groupby("prior"):
        groups = sorted(own.metric.unique())
        for k, group in enumerate(groups):
            ordered = own[own.metric == group].sort_values("normaliser")
            label = prior if k == 0 else "_"
            alpha = 1 - 0.7 * k / len(groups)
            axis.errorbar(
                ordered.normaliser, ordered.value, ordered.interval, capsize=3, label=label, alpha=alpha, **styles[prior]
            )
    several = frame.metric.nunique() > 1
    label = "log Ẑ (nats), paler from the first group to the last" if several else "log Ẑ (nats)"
    axis.set(xscale="log", xlabel="base samples per context, N", ylabel=label)


def _training(experiment: str, frame: pd.DataFrame) -> Figure | None:
    """The held-out criterion against the step of training, a panel a prior and a line a group, with the state that was kept.

    A line is dotted where some of the seeds had ended.
    """
    curves = frame[frame.metric.str.startswith("held-out/")]
    if curves.empty:
        return None
    kept = frame[frame.metric.str.startswith("kept-step/")]
    priors = sorted(curves.prior.unique())
    figure, axes = _panels(len(priors), 4.0)
    groups = sorted(curves.metric.unique())
    shades = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(groups))) if len(groups) > 1 else [COLOURS[0]]
    named = set(groups[:: -(-len(groups) // (MOST_LABELS - 1))])  # one more label is for the states kept
    for axis, prior in zip(axes, priors, strict=True):
        for metric, colour in zip(groups, shades, strict=True):
            curve = curves[(curves.prior == prior) & (curves.metric == metric)].sort_values("step")
            if curve.empty:
                continue
            group = metric.removeprefix("held-out/")
            label = group if metric in named else "_"
            everywhere = curve[curve.seeds == curve.seeds.max()]
            axis.plot(curve.step, curve.value, ":", linewidth=1, color=colour)
            axis.plot(everywhere.step, everywhere.value, linewidth=1.3, color=colour, label=label)
            for step in kept[(kept.prior == prior) & (kept.metric == f"kept-step/{group}")].value:
                axis.plot(step, np.interp(step, curve.step, curve.value), "o", color=colour, markersize=5)
        axis.set(xlabel="training step", ylabel="held-out criterion (nats)", title=f"{experiment}: {prior}")
        axis.title.set_fontsize(10)
        axis.ticklabel_format(useOffset=False)
        axis.locator_params(axis="x", nbins=4)  # steps of six digits would run into each other
    axes[0].plot([], [], "o", color="0.3", label="kept, mean over seeds")
    _legend_below(figure)
    return figure


def _by_group(experiment: str, frame: pd.DataFrame) -> Figure | None:
    """Group by group: the KL, what each correction adds to the ELBO, and the MMD of what is drawn; several groups only."""
    panels = {"kl": "KL(q || p) (nats)", "elbo-gain": "gain in ELBO (nats)", "mmd2": "squared MMD to q(z)"}
    parts = frame.metric.str.extract(r"^(.*)/(k\d\d)$")
    by_group = results.headline(frame.assign(kind=parts[0], group=parts[1]), largest_proposals=True)
    by_group = by_group[by_group.kind.isin(list(panels))]
    if by_group.group.nunique() < 2:
        return None
    panels = {kind: label for kind, label in panels.items() if kind in set(by_group.kind)}  # a base by itself gains nothing
    figure, axes = _panels(len(panels), 5.0)
    names = by_group.prior + by_group.sampler.map(lambda sampler: f" by {sampler}" if sampler else "")
    styles = _styles(names)
    for axis, (kind, label) in zip(axes, panels.items(), strict=True):
        own = by_group[by_group.kind == kind]
        groups = sorted(own.group.unique())
        lines = list(own.groupby(names[own.index]))
        for shift, (name, points) in zip(_beside(len(lines)), lines, strict=True):
            ordered = points.sort_values("group")
            at = np.array([groups.index(group) for group in ordered.group]) + shift
            axis.errorbar(at, ordered.value, ordered.interval, capsize=3, label=name, **styles[name])
        axis.set(xlabel="latent group", ylabel=label, title=experiment, xticks=range(len(groups)), xticklabels=groups)
    _legend_below(figure)
    return figure


def _beside(count: int) -> np.ndarray:
    """Where several whiskers of one group stand, so that none hides another: within 0.3 of it."""
    return np.linspace(-0.3, 0.3, count) if count > 1 else np.zeros(count)


def _gain_against_base(dataset: str, frame: pd.DataFrame) -> Figure | None:
    """What a corrected prior gains, against how good the base is: a marker per experiment, a colour per prior.

    The gains are those under the bound with one M, the largest that the most experiments have.
    """
    shown = results.headline(frame)
    bases = shown[(shown.metric == "loglik") & (shown.prior == BASELINE)].set_index("experiment")
    gains = shown[(shown.metric == "loglik-gain-sampler") & shown.experiment.isin(bases.index)]
    if gains.empty:
        return None
    spread = gains.groupby("proposals").experiment.nunique()
    proposals = spread[spread == spread.max()].index.max()
    gains = gains[gains.proposals == proposals]
    gains = gains[gains.groupby("prior").experiment.transform("nunique") > 1]
    if gains.empty:
        return None
    figure, (axis,) = _panels(1, 6.0)
    colours = {prior: style["color"] for prior, style in _styles(gains.prior).items()}
    ordered = bases.value[gains.experiment.unique()].sort_values().index
    texts: list[tuple[float, float, str]] = []
    for experiment, marker in zip(ordered, cycle(MARKERS), strict=False):
        base = bases.loc[experiment]
        for point in gains[gains.experiment == experiment].sort_values("prior").itertuples():
            style: dict[str, Any] = {"color": colours[point.prior], "marker": marker, "linestyle": "none", "capsize": 3}
            label = f"{point.prior}, {experiment}"
            axis.errorbar(base.value, point.value, point.interval, base.interval, label=label, **style)
            texts.append((base.value, point.value, experiment))
    axis.axhline(0, linewidth=1, color="0.5")
    axis.set(xlabel="log-likelihood of the base (nats)", ylabel=f"gain, sampler bound with M = {proposals} (nats)")
    axis.set_title(dataset)
    axis.set_ylim(_limits(gains))
    _legend_below(figure)
    _label_points(axis, texts)
    return figure


PAPERS_POINTS = {"M = 500": (1.25, 6.76), "M = 5 000": (10.11, 5.25)}
"""Seconds per image on a V100 and FID of SIR on CelebA-64, as NCP-VAE's authors gave them."""


def _families(table: pd.DataFrame) -> pd.Series:
    """What each row of :func:`pipelines.results.methods` is: ancestral, SIR that draws all M, SIR that stops, Langevin."""
    each = table["proposals-per-image"] / table.proposals.where(table.proposals > 0)
    stops = each < 0.99 * each.groupby(table.prior).transform("max")
    stops |= each < 0.99  # every proposal of one group at least would be 1
    free = (table.proposals == 0) & (table["proposals-per-image"] == 0)
    named = np.select([free, stops, table.proposals > 0], ["ancestral", "SIR that stops", "SIR"], default="Langevin")
    return pd.Series(named, index=table.index)


FAMILY_MARKERS = {"ancestral": "o", "SIR": "s", "SIR that stops": "D", "Langevin": "^"}


def _trade_off(experiment: str, frame: pd.DataFrame) -> Figure | None:
    """Image quality against seconds per image, a line per prior and family of samplers; beside it the paper's two points."""
    table = results.methods(frame)
    if len(table) < 3 or not table.attrs["qualities"]:
        return None
    quality = table.attrs["qualities"][0]
    yardsticks = frame[(frame.metric == quality) & (frame.sampler == "")]
    figure, (axis, *paper) = _panels(2 if quality.startswith("fid") else 1, 6.0)
    families = _families(table)
    styles = _styles(table.prior)
    texts: list[tuple[float, float, str]] = []
    for (prior, family), points in table.groupby(["prior", families]):
        seconds, values, widths = points["seconds-per-image"], points[quality], points[f"{quality} interval"]
        colour, filled = styles[prior]["color"], "full" if styles[prior]["marker"] == MARKERS[0] else "none"
        style: dict[str, Any] = {
            "color": colour,
            "marker": FAMILY_MARKERS[str(family)],
            "fillstyle": filled,
            "markersize": 6,
            "capsize": 2,
        }
        joined = "-" if family in ("SIR", "SIR that stops") else "none"
        label = f"{prior} by {points.sampler.iloc[0] if len(points) == 1 else family}"
        axis.errorbar(seconds, values, widths, linestyle=joined, label=label, **style)
        if len(points) > 1:
            names = points.sampler.where(points.proposals == 0, "M = " + points.proposals.astype(str))
            texts += zip(seconds, values, names, strict=True)
    for row in yardsticks.itertuples():
        axis.axhline(row.value, linestyle="--", linewidth=1, color="0.5")
    axis.set(xscale="log", xlabel="time per image (s)", ylabel=_label(quality), title=experiment)
    for beside in paper:
        for name, point in PAPERS_POINTS.items():
            beside.plot(*point, "s", color="0.3")
            beside.annotate(name, point, fontsize=8, xytext=(5, 5), textcoords="offset points")
        beside.set(xscale="log", xlim=(0.5, 50), ylim=(0, 8), xlabel="time per image on a V100 (s)", ylabel="FID")
        beside.set_title("the paper's points: CelebA-64, SIR")
    _legend_below(figure)
    left = axis.get_xlim()[0]
    _label_points(axis, [*texts, *((left, row.value, row.prior) for row in yardsticks.itertuples())])
    return figure


def _nce_against_ess(experiment: str, frame: pd.DataFrame) -> Figure | None:
    """ESS/M of SIR against the NCE loss, a point per prior, group and sampler, and the correlation (NCP-VAE, Fig. 5(b))."""
    by_group = frame.assign(group=frame.metric.str.extract(r"/(k\d\d)$")[0])
    losses = by_group[by_group.metric.str.startswith("nce-loss/")]
    shares = by_group[by_group.metric.str.startswith("ess-fraction/") & (by_group.proposals > 0)]
    both = losses.merge(shares, on=["prior", "group"], suffixes=("_loss", "_ess"))
    if both.empty:
        return None
    figure, (axis,) = _panels(1, 5.0)
    names = both.prior + " by " + both.sampler_ess
    styles = _styles(names)
    for name, points in both.groupby(names):
        errors: dict[str, Any] = {"xerr": points.interval_loss, "yerr": points.interval_ess}
        # Of one prior and sampler at a time: another sampler's points are of the same groups, and would count them twice.
        known = points.dropna(subset=["value_loss", "value_ess"])
        ranks = known[["value_loss", "value_ess"]].rank()
        told = len(known) >= FEWEST and ranks.nunique().min() > 1
        label = f"{name}, Spearman {ranks.value_loss.corr(ranks.value_ess):.2f}" if told else name
        axis.errorbar(
            points.value_loss, points.value_ess, **errors, linestyle="none", capsize=3, label=label, **styles[name]
        )
    axis.axvline(2 * np.log(2), linestyle=":", color="0.5")
    axis.annotate("chance", (2 * np.log(2), 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=8, ha="right")
    axis.set(yscale="log", xlabel="NCE loss (nats)", ylabel="ESS / M", title=experiment)
    _legend_below(figure)
    return figure


@torch.no_grad()
def _hole(stored: Stored, corrected: str) -> Figure:
    """The aggregate posterior over the prior's contours, the learned log r, and what is drawn from the learned prior."""
    device, prior, options = hardware.device(), stored.prior(corrected), stored.recipe.experiment.priors[corrected]
    x = stored.dataset.examples("test", slice(POINTS)).to(device)
    rows, codes = range(len(x)), []

    def keep(_k: int, _context: torch.Tensor, _posterior: Distribution, z: torch.Tensor) -> None:
        codes.append(z.cpu())

    posterior_pass(stored.vae, x, lambda k: Noise(stored.recipe.seed, "figure", k, rows=rows, device=device), keep)
    # SIR with the most proposals, if the prior is drawn by SIR at all.
    sampler = max(options.samplers, key=lambda name: getattr(stored.recipe.experiment.samplers[name], "proposals", 0))
    drawn = stored.samples(corrected, sampler).latents(0)
    ticks = torch.linspace(-PLANE, PLANE, CELLS)
    plane = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1).view(-1, 1, 2).to(device)
    context = stored.vae.start(1)
    log_r = prior.log_ratio(0, plane, context).view(CELLS, CELLS).cpu()
    log_p = prior.base(0, context).log_prob(plane).view(CELLS, CELLS).cpu()
    figure, axes = _panels(3, 4.2)
    titles = ("q(z), and contours of the prior", f"log r(z) of {corrected}", f"{corrected} by {sampler}")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlim=(-PLANE, PLANE), ylim=(-PLANE, PLANE), aspect="equal", xticks=[], yticks=[])
        levels = log_p.max().item() - np.array([4.5, 2.0, 0.5])  # three, two and one standard deviations of N(0, I)
        axis.contour(ticks.numpy(), ticks.numpy(), log_p.numpy(), levels=levels, colors=CONTRAST, linewidths=1)
    _dots(axes[0], codes[0], 2, color=COLOURS[0], alpha=0.5)
    axes[1].imshow(
        log_r.clamp(-8, 8).numpy(), extent=(-PLANE, PLANE, -PLANE, PLANE), origin="lower", cmap="RdBu_r", vmin=-8, vmax=8
    )
    _dots(axes[2], drawn[:POINTS], 2, color=COLOURS[0], alpha=0.5)
    return figure


def _against_modes(drawn: dict[tuple[str, str], torch.Tensor], truth: Truth) -> Figure:
    """Samples of every prior and sampler over the true modes."""
    figure, axes = _panels(len(drawn), 3.2)
    for axis, ((prior, sampler), x) in zip(axes, drawn.items(), strict=True):
        _dots(axis, x, 2, color=COLOURS[0], alpha=0.4)
        _dots(axis, truth.means, 12, facecolors="none", edgecolors=CONTRAST, linewidths=0.7)
        axis.set(title=f"{prior} by {sampler}", xlim=(-2.8, 2.8), ylim=(-2.8, 2.8), aspect="equal", xticks=[], yticks=[])
    return figure


def _grids(drawn: dict[tuple[str, str], torch.Tensor]) -> Figure:
    """The first samples, up to 64, of every prior and sampler: (n, channels, side, side), grey or RGB, clamped to [0, 1]."""
    figure, axes = _panels(len(drawn), 3.2)
    for axis, ((prior, sampler), x) in zip(axes, drawn.items(), strict=True):
        axis.imshow(tiled(x).numpy(), cmap="gray", vmin=0, vmax=1)
        axis.set(title=f"{prior} by {sampler}", xticks=[], yticks=[])
    return figure


def tiled(x: torch.Tensor) -> torch.Tensor:
    """The first images, up to 64, as one square picture.

    Args:
        x: (n, channels, height, width).

    Returns:
        (rows x height, columns x width), with a last axis of 3 for images of three channels; values in [0, 1].
    """
    across = math.isqrt(min(64, len(x)))
    channels, height, width = x.shape[1:]
    tiles = x[: across**2].clamp(0, 1).reshape(across, across, channels, height, width).permute(0, 3, 1, 4, 2)
    picture = tiles.reshape(across * height, across * width, channels)
    return picture if channels == 3 else picture[..., 0]
