"""The report to read: one page of answers, and one for each experiment, with no server, no network and no build.

Templates and style are in ``templates/``. The same results give the same bytes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import yaml
from PIL import Image

from pipelines import claims, report, results
from pipelines.config import Config, Experiment, plain
from pipelines.reporting.published import ABOUT_EARLIER, STANDINGS, Published, Reader, markdown
from pipelines.workspace import Workspace
from runtime.files import write_text

TEMPLATES = Path(__file__).parent / "templates"

FIGURES = {
    "hole": (
        "The hole",
        "Left: where the encoder puts test data, over one, two and three standard deviations of the prior. Middle: the "
        "learned log r, red where the prior is to gain, blue where it is to lose, cut at ± 8 nats. Right: latents of the "
        "learned prior.",
    ),
    "samples": (
        "Samples side by side",
        "The first samples of one seed, by prior and sampler; true modes, where there are such, are red circles.",
    ),
    "groups": (
        "Group by group",
        "The KL of the posterior from the model's own prior, what a correction adds to the ELBO, and the squared MMD of "
        "what is drawn to the aggregate posterior. Bars are 95 % intervals.",
    ),
    "tradeoff": (
        "Quality against time",
        "Lower and farther left is better. Lines join the numbers of proposals of one prior; dashed: what samples of the "
        "aggregate posterior, and real data, reach.",
    ),
    "convergence": (
        "Convergence of the likelihoods",
        "Gains under the sampler bound by M, by the plug-in by N, log Ẑ by N, and what the number S of importance samples "
        "does.",
    ),
    "nce-ess": (
        "Classifier's loss and effective sample size",
        "A point a prior, group and sampler; dotted: a classifier at chance.",
    ),
    "training": (
        "Training",
        "The held-out criterion by training step; a point marks the state that was kept, dotted: some seeds had ended.",
    ),
    "gain": (
        "Gain against base",
        "What a correction gains, by how good the base is, over all experiments on this data set.",
    ),
}
"""Kinds of figures, in their order: their title and caption."""

BEHIND = (
    ("nce-loss|ess-", ("nce-ess",)),
    ("off-mode|modes-hit", ("samples", "tradeoff")),
    ("mmd2|kl/|elbo-gain", ("groups", "hole", "samples")),
    ("fid|kid|seconds|proposals", ("tradeoff", "samples")),
    ("loglik|truth-gap|log-z", ("convergence", "hole")),
)
"""Metrics, by the beginnings of their names, and the kinds of figure that show what is behind them, the best first."""

VERDICTS = {
    "reproduced": ("✓", "the whole 95 % interval of our number lies on the paper's side of the margin"),
    "contradicted": ("✗", "the whole interval lies on the other side"),
    "inconclusive": (
        "~",
        "the interval lies across it, or a training that could have changed the verdict ended by its budget",
    ),
    "untested": ("…", "no command can test it yet, or its rows are not in results.csv"),
    "context": ("·", "shown beside the paper's number, and not judged"),
}


@dataclass(frozen=True)
class Picture:
    """A figure of the report: its ``kind``, its address under reports/, its size in pixels, and what it shows, in words."""

    kind: str
    address: str
    width: int
    height: int
    title: str
    caption: str
    alt: str


@dataclass(frozen=True)
class Report:
    """All that is on the pages.

    Attributes:
        workspace: where they go, and where the figures are.
        config: the experiments.
        table: the results, one row a seed.
        frame: the results over seeds.
        verdicts: on the claims.
        published: the papers' tables.
        reader: of our numbers for them.
    """

    workspace: Workspace
    config: Config
    table: pd.DataFrame
    frame: pd.DataFrame
    verdicts: Sequence[claims.Verdict]
    published: Published
    reader: Reader

    def write(self) -> list[Path]:
        """Write tables.md, index.html, its style, and a page an experiment; drop those of experiments that are gone."""
        folder = self.workspace.reports
        written = {
            folder / "tables.md": markdown(self.published, self.reader),
            folder / "style.css": (TEMPLATES / "style.css").read_text(encoding="utf-8"),
            folder / "index.html": self._environment.get_template("index.html.j2").render(self._first_page()),
        }
        template = self._environment.get_template("experiment.html.j2")
        for name, experiment in self.config.experiments.items():
            written[folder / "pages" / f"{name}.html"] = template.render(self._page_of(name, experiment))
        for path, text in written.items():
            write_text(path, text)
        for path in (folder / "pages").glob("*.html"):
            if path not in written:
                path.unlink()
        return list(written)

    @cached_property
    def _environment(self) -> jinja2.Environment:
        return jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATES),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            undefined=jinja2.StrictUndefined,
        )

    @cached_property
    def _measured(self) -> dict[str, pd.DataFrame]:
        """The results over seeds, by experiment."""
        return {str(name): own for name, own in self.frame.groupby("experiment")}

    @cached_property
    def _rows(self) -> dict[str, pd.DataFrame]:
        """The results, one row a seed, by experiment."""
        return {str(name): own for name, own in self.table.groupby("experiment")}

    @cached_property
    def _claims(self) -> dict[str, dict[str, Any]]:
        """Every claim as it is shown, by its id; the tested ones first."""
        return {verdict.claim.id: self._claim(verdict) for verdict in claims.tested_first(self.verdicts)}

    def _first_page(self) -> dict[str, Any]:
        answer = self.published.answer
        return {
            "root": "",
            "answer": answer,
            "sentences": list(self.reader.sentences(answer)),
            "hole": next(
                (picture for picture in self._pictures(answer.experiment) if picture.address.endswith(answer.figure)), None
            ),
            "counts": {word: sum(verdict.word == word for verdict in self.verdicts) for word in VERDICTS},
            "claims": list(self._claims.values()),
            "experiments": [self._overview(name, experiment) for name, experiment in self.config.experiments.items()],
            "tables": [(table, table.sides(), list(self.reader.rows(table))) for table in self.published.tables],
            "metrics": results.METRICS,
            "verdicts": VERDICTS,
            "standings": STANDINGS,
            "one_vae": claims.ABOUT_ONE_VAE,
            "earlier": ABOUT_EARLIER,
        }

    def _page_of(self, name: str, experiment: Experiment) -> dict[str, Any]:
        own = self._measured.get(name)
        context: dict[str, Any] = {
            "root": "../",
            "about": self._overview(name, experiment),
            "settings": yaml.safe_dump(plain(experiment), sort_keys=False, allow_unicode=True),
            "seeds": experiment.seeds,
            "trained_in": experiment.trained_in,
            "claims": [claim for claim in self._claims.values() if name in claim["experiments"]],
            "pictures": self._pictures(name),
            "measured": own is not None,
            "verdicts": VERDICTS,
        }
        if own is None:
            return context
        rows = self._rows[name]
        numbers = report.numbers(own)
        return context | {
            "counted": report.seeds(own),
            "remarks": list(report.remarks(own)),
            "one_vae": claims.ABOUT_ONE_VAE if own.conditional.any() else "",
            "methods": report.methods(own),
            "over_samples": report.over_samples(own),
            "numbers": numbers,
            "anchors": [_anchor(row[:3], row[5]) for row in numbers.rows],
            "cost": self._cost(own),
            "made_by": {column: sorted(set(rows[column]) - {""}) for column in ("device", "precision", "revision")},
        }

    def _overview(self, name: str, experiment: Experiment) -> dict[str, Any]:
        """What an experiment is, in one row."""
        words = [verdict.word for verdict in self.verdicts if name in verdict.claim.experiments and verdict.tested]
        return {
            "name": name,
            "dataset": experiment.dataset,
            "model": experiment.model.name,
            "decoder": getattr(experiment.model, "likelihood", ""),
            "seeds": len(experiment.seeds),
            "priors": list(experiment.priors),
            "measured": name in self._measured,
            "default": name in self.config.run,
            "words": {word: words.count(word) for word in VERDICTS if word in words},
        }

    def _cost(self, own: pd.DataFrame) -> list[tuple[str, str]]:
        """What it took to train, a seed: of the VAE and of every prior, all groups."""
        trained = own[(own.metric == "train-seconds") & (own.value > 0)]
        return [
            ("the VAE" if prior == results.BASELINE else prior, _duration(seconds))
            for prior, seconds in zip(trained.prior, trained.value, strict=True)
        ]

    def _claim(self, verdict: claims.Verdict) -> dict[str, Any]:
        claim = verdict.claim
        statement, paper, ours, interval, said = claims.cells(verdict)
        links = [
            (name, f"pages/{name}.html{self._rows_behind(name, claim)}")
            for name in claim.experiments
            if name in self.config.experiments
        ]
        return {
            "id": claim.id,
            "paper": claim.paper,
            "experiments": claim.experiments,
            "statement": claim.statement,
            "notes": statement.removeprefix(claim.statement).strip(),
            "theirs": paper,
            "ours": ours,
            "interval": interval,
            "word": verdict.word,
            "why": said.removeprefix(verdict.word).removeprefix(": "),
            "source": claim.source,
            "standing": claim.standing,
            "how": claims.how_judged(claim) if claim.tested else "",
            "links": links,
            "picture": self._picture_behind(claim) if verdict.numbers else None,
        }

    def _rows_behind(self, name: str, claim: claims.Claim) -> str:
        """The anchor of the first row that a claim rests on, on the page of one of its experiments."""
        if claim.subject is None or name not in self._measured:
            return ""
        rows = claims.rows_named(self._rows[name], [name], claim.subject)
        if rows.empty:
            return ""
        first = rows.iloc[0]
        return f"#{_anchor((first.metric, first.prior, first.sampler), str(first.proposals or ''))}"

    def _picture_behind(self, claim: claims.Claim) -> Picture | None:
        assert claim.subject is not None
        pictures = {picture.kind: picture for picture in self._pictures(claim.experiments[0])}
        kinds = next((kinds for names, kinds in BEHIND if re.match(names, claim.subject.metric)), ())
        wanted = ("gain", *kinds) if len(claim.experiments) > 1 else kinds
        return next((pictures[kind] for kind in wanted if kind in pictures), None)

    def _pictures(self, name: str) -> list[Picture]:
        """The figures of an experiment that are there."""
        if name not in self.config.experiments:
            return []
        found = []
        for kind, (title, caption) in FIGURES.items():
            stem = self.config.experiments[name].dataset if kind == "gain" else name
            path = self.workspace.reports / "figures" / f"{stem}-{kind}.png"
            if path.exists():
                with Image.open(path) as image:
                    width, height = image.size
                found.append(Picture(kind, f"figures/{path.name}", width, height, title, caption, f"{title}, {stem}"))
        return found


def _anchor(names: Sequence[str], proposals: str) -> str:
    """Of a row of numbers, by metric, prior, sampler and M."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(filter(None, ("row", *names, proposals))).lower())


def _duration(seconds: float) -> str:
    """To two digits, in the unit that fits."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"
