"""The papers' claims, and what the results say of them.

A claim is judged by what it says:

- ``absolute``: our mean over seeds is at least as good as the paper's value, give or take the stated tolerance.
- ``gain``: our mean gain over the base is, likewise, and its 95 % interval excludes zero.
- ``ordering``: one thing is better than another, by more than the 95 % interval of the difference.
- ``no-worse``: one thing is not worse than another by more than the tolerance, at the far end of that interval.
- ``correlation``: two metrics rise together over groups and seeds: Spearman's rank correlation, p < 0.05.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from pipelines import results
from runtime.errors import UserError
from runtime.options import Options

SIGNIFICANCE = 0.05

Text = Annotated[str, Field(min_length=1)]


class Tolerance(Options):
    """How much worse than the paper's value still counts, in the metric's unit, and why."""

    value: Annotated[float, Field(ge=0)]
    reason: Text


class Subject(Options):
    """What a claim is about, or what it is compared with: rows of the results table."""

    prior: str
    sampler: str = ""
    metric: str

    @field_validator("metric")
    @classmethod
    def _exists(cls, name: str) -> str:
        try:
            results.metric(name.replace("*", "k00"))
        except UserError as error:
            raise ValueError(str(error)) from None
        return name


class Claim(Options):
    """One claim of one paper.

    Attributes:
        id, paper, statement, source: what is claimed and where.
        value: the paper's number; None where the claim has none.
        standing: how the number is known: ``found`` in public material, ``seed`` (a summary of the paper), ``derived`` from
            those, or ``recalled`` from memory, which is shown and never tested.
        experiment: the experiment that tests it.
        subject: the rows it is about; absent where nothing here measures it yet.
        against: for an ordering, the rows that the subject is to be better than; for a correlation, the other metric.
        kind, direction, tolerance: how it is judged.
        untested: why no command can test it yet.
        finding: what we found instead, where a tested claim does not hold here. It is shown with the verdict, and is wrong,
            and fails, if the claim does hold.
        decoder: the decoder's likelihood, where the number depends on it.
    """

    id: str
    paper: Literal["NCP-VAE", "EVaLP"]
    statement: Text
    value: float | None = None
    source: Text
    standing: Literal["found", "seed", "derived", "recalled"]
    experiment: str
    subject: Subject | None = None
    against: Subject | None = None
    kind: Literal["absolute", "gain", "ordering", "no-worse", "correlation"]
    direction: Literal["higher", "lower"]
    tolerance: Tolerance | None = None
    untested: Text | None = None
    finding: Text | None = None
    decoder: Text | None = None

    @model_validator(mode="after")
    def _testable_or_not(self) -> "Claim":
        starred = [subject for subject in (self.subject, self.against) if subject is not None and "*" in subject.metric]
        if starred and self.kind != "correlation":
            raise ValueError("only a correlation is over all groups; name one group instead of *")
        if self.untested is None:
            if self.standing == "recalled":
                raise ValueError("a recalled number is never tested; say in `untested` why")
            if self.subject is None:
                raise ValueError("a claim without `untested` needs a subject")
            if self.kind in ("absolute", "gain") and (self.value is None or self.tolerance is None):
                raise ValueError(f"a tested claim of kind {self.kind} needs a value and a tolerance")
            if self.kind == "no-worse" and self.tolerance is None:
                raise ValueError("a tested claim of kind no-worse needs a tolerance")
            if self.kind in ("ordering", "no-worse", "correlation") and self.against is None:
                raise ValueError(f"a tested claim of kind {self.kind} needs `against`")
        if self.kind == "absolute" and self.experiment.endswith("-lite") and self.untested is None:
            raise ValueError("a -lite experiment is not the paper's protocol, so no absolute value is compared with it")
        return self


class Targets(Options):
    """targets.yaml."""

    claims: list[Claim]

    @model_validator(mode="after")
    def _unique(self) -> "Targets":
        ids = [claim.id for claim in self.claims]
        for name in ids:
            if ids.count(name) > 1:
                raise ValueError(f"the id {name} occurs more than once")
        return self


def load(path: Path) -> list[Claim]:
    """The claims. Raises UserError with the path of the first wrong key."""
    try:
        return Targets.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).claims
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "top level"
        raise UserError(f"{path}: {key}: {first['msg'].removeprefix('Value error, ')}") from None


@dataclass(frozen=True)
class Verdict:
    """What the results say of a claim.

    Attributes:
        claim: the claim.
        verdict: ``reproduced``, ``not reproduced`` or ``untested: why``.
        ours: our number; None if untested. For an ordering the difference, for a correlation Spearman's ρ.
        interval: half-width of its 95 % interval; None if untested or a correlation.
        note: what the number is, where the claim alone does not say.
    """

    claim: Claim
    verdict: str
    ours: float | None = None
    interval: float | None = None
    note: str = ""

    @property
    def failed(self) -> bool:
        """Whether the claim was tested and came out otherwise than we say it does."""
        if self.ours is None:
            return False
        return (self.verdict == "reproduced") == (self.claim.finding is not None)


def judge(claims: Sequence[Claim], table: pd.DataFrame) -> list[Verdict]:
    """Hold every claim against the results table (one row a seed)."""
    return [_judge(claim, table) for claim in claims]


def rows_of(claim: Claim, subject: Subject, table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the table that a claim's subject names; a metric that ends in ``/*`` names all groups."""
    own = table[(table.experiment == claim.experiment) & (table.prior == subject.prior) & (table.sampler == subject.sampler)]
    prefix, star, _ = subject.metric.partition("*")
    return own[own.metric.str.startswith(prefix) if star else own.metric == subject.metric]


def _judge(claim: Claim, table: pd.DataFrame) -> Verdict:
    if claim.untested is not None or claim.subject is None:
        return Verdict(claim, f"untested: {claim.untested}")
    subjects = [subject for subject in (claim.subject, claim.against) if subject is not None]
    rows = [rows_of(claim, subject, table) for subject in subjects]
    if any(found.empty for found in rows):
        return Verdict(
            claim, f"untested: results.csv has no such row; add {claim.experiment} to run in params.yaml, then dvc repro"
        )
    if claim.kind == "correlation":
        return _correlation(claim, *rows)
    sign = 1 if claim.direction == "higher" else -1
    if claim.kind in ("ordering", "no-worse"):
        difference, interval = results.difference(*rows)
        note = " against ".join(f"{found.value.mean(skipna=False):.3g}" for found in rows)
        if claim.kind == "ordering":
            return Verdict(claim, _word(sign * difference > interval), difference, interval, note)
        assert claim.tolerance is not None
        good = sign * difference - interval >= -claim.tolerance.value
        return Verdict(claim, _word(good), difference, interval, f"{note}; tolerance {claim.tolerance.value:g}")
    assert claim.value is not None
    assert claim.tolerance is not None
    ((value, interval),) = results.over_seeds(rows[0])[["value", "interval"]].to_numpy()
    good = sign * (value - claim.value) >= -claim.tolerance.value
    if claim.kind == "gain":
        good = good and sign * value > interval
    return Verdict(claim, _word(good), value, interval, f"tolerance {claim.tolerance.value:g}")


def _correlation(claim: Claim, first: pd.DataFrame, second: pd.DataFrame) -> Verdict:
    from scipy.stats import spearmanr

    group = {"group": lambda rows: rows.metric.str.split("/").str[1]}
    both = first.assign(**group).merge(second.assign(**group), on=["seed", "group"])
    if len(both) < 4:
        return Verdict(claim, f"untested: {len(both)} groups and seeds are too few for a rank correlation")
    rho, p = spearmanr(both.value_x, both.value_y)
    sign = 1 if claim.direction == "higher" else -1
    note = f"Spearman, p = {p:.1g}, {len(both)} groups and seeds"
    return Verdict(claim, _word(sign * rho > 0 and p < SIGNIFICANCE), float(rho), None, note)


def _word(good: bool) -> str:
    return "reproduced" if good else "not reproduced"


HEADER = ("claim", "paper", "ours", "95 % interval", "verdict")


def _cells(verdict: Verdict) -> tuple[str, ...]:
    claim = verdict.claim
    paper = "" if claim.value is None else f"{claim.value:g}" + (" (unverified)" if claim.standing == "recalled" else "")
    if verdict.ours is None:
        return claim.statement, paper, "", "", verdict.verdict
    word = verdict.verdict if claim.finding is None else f"{verdict.verdict}: {claim.finding}"
    ours = f"{verdict.ours:+.3g}" if claim.kind in ("ordering", "no-worse") else f"{verdict.ours:.3f}"
    interval = "" if verdict.interval is None else f"± {verdict.interval:.2g}"
    return f"{claim.statement} ({verdict.note})", paper, ours, interval, word


def tested_first(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The same verdicts, those of tested claims first."""
    return sorted(verdicts, key=lambda verdict: verdict.ours is None)


def markdown(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as a Markdown table, the tested claims first."""
    rows = [(f"{v.claim.paper}: {cells[0]}", *cells[1:]) for v in tested_first(verdicts) for cells in [_cells(v)]]
    lines = [HEADER, ("---",) * len(HEADER), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def console(verdicts: Sequence[Verdict]) -> Any:
    """The verdicts as a rich table, the tested claims first."""
    from rich.table import Table

    table = Table(*HEADER, title="The papers' claims", show_lines=False)
    for verdict in tested_first(verdicts):
        style = "red" if verdict.failed else "green" if verdict.ours is not None else "dim"
        first, *rest = _cells(verdict)
        table.add_row(f"{verdict.claim.paper}: {first}", *rest, style=style)
    return table
