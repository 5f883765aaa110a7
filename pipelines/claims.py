"""The papers' claims, and what the results say of them.

A verdict is one of three words, and each is said of the whole 95 % interval [x − h, x + h] of our number x over seeds, with
everything signed so that higher is better. What is in none of the two regions is ``inconclusive``: these seeds and images do
not tell.

| kind | reproduced | contradicted |
| --- | --- | --- |
| ``absolute``: at least the paper's value v, give or take the tolerance t | x − h ≥ v − t | x + h < v − t |
| ``gain``: the same of a gain over the base, which is also above zero | and x − h > 0 | or x + h ≤ 0 |
| ``ordering``: one thing is better than another; x is the difference | x − h > 0 | x + h < 0, or x = h = 0 |
| ``no-worse``: one thing is not worse than another by more than t | x − h ≥ −t | x + h < −t |
| ``correlation``: two metrics rise together over groups (Spearman) | right sign, p < 0.05 | wrong sign, p < 0.05 |

``context`` is shown beside the paper's number and not judged.

A prior whose training was ended by its budget could only have got better. So nothing is held against a subject that was
still improving, and nothing is won over a rival that was: such a verdict becomes inconclusive.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import pandas as pd
from pydantic import Field, ValidationError, field_validator, model_validator

from pipelines import results, strict_yaml
from runtime.errors import UserError
from runtime.options import Options

SIGNIFICANCE = 0.05
POWER = (1.96 + 0.84) / 1.96
"""Smallest difference found with a power of 80 % at a level of 5 %, in half-widths of the 95 % interval."""

FEWEST = 5
"""Groups that a rank correlation needs: of the orders of four, two in 24 are perfect ones, and that is no significance."""

EXACT = 8
"""Groups up to which the significance of a rank correlation is counted out over all their orders."""

Text = Annotated[str, Field(min_length=1)]
Size = Annotated[int, Field(ge=1)]
Word = Literal["reproduced", "contradicted", "inconclusive"]
Standing = Literal["found", "seed", "derived", "recalled"]


class Tolerance(Options):
    """How much worse than the paper's value still counts, in the metric's unit, and why."""

    value: Annotated[float, Field(ge=0)]
    reason: Text


class Criterion(Options):
    """Since when a claim is judged the way it is.

    ``committed``: the revision, twelve hexadecimal digits, that says for the first time what is judged and how.
    ``after_result``: why the criterion is newer than the result it judges, where it is.
    """

    committed: Annotated[str, Field(pattern="^[0-9a-f]{12}$")] | None = None
    after_result: Text | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "Criterion":
        if self.committed is None and self.after_result is None:
            raise ValueError(
                "name the revision in `committed`, or say in `after_result` why there is none before the result"
            )
        return self


class Draw(Options):
    """A prior and what draws from it."""

    prior: str
    sampler: str = ""


class Subject(Options):
    """What a claim is about, or what it is compared with: rows of the results table.

    ``experiment``: whose, if not the claim's. ``less``: what the number is the difference from, seed by seed: the same
    metric of another draw in the same experiment.
    ``samples``, ``normaliser`` and ``proposals`` are S, N and M; S and N are the largest measured if absent. The bound for
    SIR is a likelihood's, of no sampler: it is named by M alone.
    """

    prior: str
    sampler: str = ""
    metric: str
    experiment: str | None = None
    less: Draw | None = None
    samples: Size | None = None
    normaliser: Size | None = None
    proposals: Size | None = None

    @field_validator("metric")
    @classmethod
    def _exists(cls, name: str) -> str:
        try:
            results.metric(name.replace("*", "k00"))
        except UserError as error:
            raise ValueError(str(error)) from None
        return name

    @property
    def reference(self) -> "Subject | None":
        """What the number is the difference from; None if it is no difference."""
        return None if self.less is None else self.model_copy(update=self.less.model_dump() | {"less": None})

    @model_validator(mode="after")
    def _named_by_size(self) -> "Subject":
        if self.metric.endswith("-sampler") and self.proposals is None:
            raise ValueError(f"{self.metric} is a bound for SIR with M proposals: name M in `proposals`")
        if self.metric.startswith(("loglik", "truth-gap")) and self.sampler:
            raise ValueError(f"{self.metric} belongs to no sampler: leave `sampler` out")
        return self


class Claim(Options):
    """One claim of one paper.

    Attributes:
        id, paper, statement, source: what is claimed and where.
        value: the paper's number; None where the claim has none.
        standing: how the number is known: ``found`` in public material, ``seed`` (a summary of the paper), ``derived`` from
            those, or ``recalled`` from memory, which is shown and never tested.
        experiment: the experiment that tests it.
        settings: in its place, several experiments that each test it.
        subject: the rows it is about; absent where nothing here measures it yet.
        against: for an ordering, the rows that the subject is to be better than; for a correlation, the other metric.
        kind, direction, tolerance: how it is judged.
        criterion: since when it is judged so.
        why: of a context, why it is not judged.
        untested: why no command can test it yet.
        expected: the verdict that we say it gets. Another one is a failure.
        finding: what we found instead, where that is not ``reproduced``. It is shown with that verdict.
        decoder: the decoder's likelihood, where the number depends on it.
    """

    id: str
    paper: Literal["NCP-VAE", "EVaLP"]
    statement: Text
    value: float | None = None
    source: Text
    standing: Standing
    experiment: str | None = None
    settings: Annotated[list[str], Field(min_length=2)] | None = None
    subject: Subject | None = None
    against: Subject | None = None
    kind: Literal["absolute", "gain", "ordering", "no-worse", "correlation", "context"]
    direction: Literal["higher", "lower"]
    tolerance: Tolerance | None = None
    criterion: Criterion | None = None
    why: Text | None = None
    untested: Text | None = None
    expected: Word = "reproduced"
    finding: Text | None = None
    decoder: Text | None = None

    @property
    def experiments(self) -> list[str]:
        """The experiments that test it."""
        return self.settings or [str(self.experiment)]

    @property
    def named(self) -> list[Subject]:
        """All that it names rows of."""
        given = [subject for subject in (self.subject, self.against) if subject is not None]
        return [*given, *(subject.reference for subject in given if subject.reference is not None)]

    @property
    def tested(self) -> bool:
        """Whether a command can judge it."""
        return self.untested is None and self.kind != "context"

    @model_validator(mode="after")
    def _complete(self) -> "Claim":
        if (self.experiment is None) == (self.settings is None):
            raise ValueError("name either one `experiment` or several `settings`")
        if self.settings is not None and len(set(self.settings)) < len(self.settings):
            raise ValueError("`settings` names an experiment twice")
        starred = [subject for subject in (self.subject, self.against) if subject is not None and "*" in subject.metric]
        if starred and self.kind != "correlation":
            raise ValueError("only a correlation is over all groups; name one group instead of *")
        if self.kind == "context" and (self.why is None or self.subject is None):
            raise ValueError("a context needs a subject, and to say in `why` it is not judged")
        if self.expected != "reproduced" and self.finding is None:
            raise ValueError(f"a claim that is expected to be {self.expected} needs a `finding`")
        if self.tested:
            self._check_tested()
        return self

    def _check_tested(self) -> None:
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
        if self.criterion is None:
            raise ValueError("a tested claim needs a `criterion`: since when is it judged so?")
        if self.kind == "absolute" and any(name.endswith("-lite") for name in self.experiments):
            raise ValueError("a -lite experiment is not the paper's protocol, so no absolute value is compared with it")


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
    return document_of(path, Targets).claims


Document = TypeVar("Document", bound=Options)


def document_of(path: Path, kind: type[Document]) -> Document:
    """A file of YAML, validated. Raises UserError with the path of the first wrong key."""
    found = strict_yaml.read(path)
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "top level"
        raise UserError(f"{path}: {key}: {first['msg'].removeprefix('Value error, ')}") from None


@dataclass(frozen=True)
class Number:
    """What one experiment says of a claim.

    Attributes:
        experiment: the experiment.
        word: the verdict on it alone; empty for a context.
        value: our number. For an ordering the difference, for a correlation Spearman's ρ.
        interval: half-width of its 95 % interval; None for a correlation.
        note: what the number is, where the claim alone does not say.
        reason: why it is inconclusive, if it is.
        conditional: whether all of it is of one VAE.
    """

    experiment: str
    word: str
    value: float
    interval: float | None
    note: str = ""
    reason: str = ""
    conditional: bool = False


@dataclass(frozen=True)
class Verdict:
    """What the results say of a claim.

    Attributes:
        claim: the claim.
        word: ``reproduced``, ``contradicted``, ``inconclusive`` or ``untested``; ``context`` for what is not judged.
        reason: what the word alone does not say.
        numbers: one for each experiment that tests it; none if untested.
    """

    claim: Claim
    word: str
    reason: str = ""
    numbers: tuple[Number, ...] = ()

    @property
    def tested(self) -> bool:
        """Whether the results judge it."""
        return self.word not in ("untested", "context")

    @property
    def failed(self) -> bool:
        """Whether the claim was tested and came out otherwise than we say it does."""
        return self.tested and self.word != self.claim.expected

    @property
    def text(self) -> str:
        """The word, its reason, what was found, and what is to be known of the criterion."""
        parts = [self.reason]
        if self.failed:
            parts.append(f"{self.claim.expected} is what targets.yaml expects")
        elif self.tested:
            parts.append(self.claim.finding or "")
        criterion = self.claim.criterion
        if self.tested and criterion is not None and criterion.after_result is not None:
            parts.append(f"the criterion is newer than the result: {criterion.after_result}")
        said = "; ".join(filter(None, parts))
        return f"{self.word}: {said}" if said else self.word


Stale = Callable[[pd.DataFrame], pd.Series]
"""For rows of the results table, what has changed since; see :func:`pipelines.results.stale_rows`."""


def judge(claims: Sequence[Claim], table: pd.DataFrame, stale: Stale | None = None) -> list[Verdict]:
    """Hold every claim against the results table (one row a seed).

    Args:
        claims: the claims.
        table: the results.
        stale: tells which rows are. Those of another configuration are refused; those of earlier code are judged, and said
            so. Without it, all rows are taken as they are.

    Raises:
        UserError: if a claim's subject names rows of several numbers.
    """
    return [_judge(claim, table, stale) for claim in claims]


def rows_of(claim: Claim, subject: Subject, table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the table that a claim's subject names."""
    names = claim.experiments if subject.experiment is None else [subject.experiment]
    return rows_named(table, names, subject)


def rows_named(table: pd.DataFrame, experiments: Sequence[str], subject: Subject) -> pd.DataFrame:
    """The rows of some experiments that a subject names; a metric that ends in ``/*`` names all groups."""
    own = table[table.experiment.isin(experiments) & (table.prior == subject.prior) & (table.sampler == subject.sampler)]
    prefix, star, _ = subject.metric.partition("*")
    own = own[own.metric.str.startswith(prefix) if star else own.metric == subject.metric]
    for size in results.SIZES:
        wanted = getattr(subject, size)
        if wanted is not None:
            own = own[own[size] == wanted]
    return results.headline(own)


def _numbers_of(claim: Claim, subject: Subject, table: pd.DataFrame) -> pd.DataFrame:
    """The same rows, their values less those of the draw that the subject's number is the difference from, if it is one."""
    rows = rows_of(claim, subject, table)
    if subject.reference is None:
        return rows
    other = rows_of(claim, subject.reference, table)
    keys = ["experiment", "metric", "seed", "vae_seed"]
    both = rows.reset_index().merge(
        other[[*keys, "value", "stderr"]], on=keys, suffixes=("", "_less"), validate="one_to_one"
    )
    both = both.assign(value=both.value - both.value_less, stderr=both.stderr.combine(both.stderr_less, math.hypot))
    return both.set_index("index")[rows.columns]


def _judge(claim: Claim, table: pd.DataFrame, stale: Stale | None) -> Verdict:
    if claim.untested is not None or claim.subject is None:
        measured = (
            [] if claim.standing == "recalled" else [name for name in claim.experiments if (table.experiment == name).any()]
        )
        now = f"; {', '.join(measured)} is measured now: judging it takes a `subject` and a `criterion` in targets.yaml"
        return Verdict(claim, "untested", (claim.untested or "") + (now if measured else ""))
    subjects = [subject for subject in (claim.subject, claim.against) if subject is not None]
    # Rows of another experiment are held against each of the claim's own.
    rows = [_numbers_of(claim, subject, table) for subject in subjects]
    wanted = [claim.experiments if subject.experiment is None else [subject.experiment] for subject in subjects]
    pairs = [(name, found) for names, found in zip(wanted, rows, strict=True) for name in names]
    missing = list(dict.fromkeys(name for name, found in pairs if (found.experiment != name).all()))
    if missing:
        names = ", ".join(missing)
        run = f"run the stages of {names}, then priorhole report"
        return Verdict(claim, "untested", f"results.csv has no such row of {names}; {run}")
    named = pd.concat([rows_of(claim, subject, table) for subject in claim.named])
    changed = named.assign(stale=lambda own: "" if stale is None else stale(own))
    other = changed[changed.stale == "configuration"].experiment.unique()
    if len(other):
        run = "; ".join(f"priorhole evaluate {name}" for name in other)
        return Verdict(claim, "untested", f"its rows are of another configuration; run {run}; priorhole report")
    earlier = changed[changed.stale == "code"].experiment.unique()
    numbers = []
    for name in claim.experiments:
        own = [
            found if subject.experiment else found[found.experiment == name]
            for subject, found in zip(subjects, rows, strict=True)
        ]
        if len({_drawn_how(found) for found in own}) > 1:
            return Verdict(
                claim, "untested", f"{name} has its two likelihoods at unequal S, or on unequal numbers of examples"
            )
        number = _number(claim, name, own)
        if number is None:
            return Verdict(claim, "untested", f"{name} has too few groups for a rank correlation; it takes {FEWEST}")
        numbers.append(_trained(claim, number, table, measured_earlier=name in earlier))
    return _over_settings(claim, numbers)


def _over_settings(claim: Claim, numbers: Sequence[Number]) -> Verdict:
    """The verdict that all experiments give; inconclusive if they differ."""
    words = {number.word for number in numbers}
    if claim.kind == "context":
        return Verdict(claim, "context", claim.why or "", tuple(numbers))
    if len(numbers) == 1:
        return Verdict(claim, numbers[0].word, numbers[0].reason, tuple(numbers))
    if len(words) == 1:
        return Verdict(claim, words.pop(), f"in all {len(numbers)} settings", tuple(numbers))
    holds = [number.experiment for number in numbers if number.word == "reproduced"]
    names = f" ({', '.join(holds)})" if holds else ""
    return Verdict(claim, "inconclusive", f"holds in {len(holds)} of {len(numbers)} settings{names}", tuple(numbers))


def _number(claim: Claim, experiment: str, rows: Sequence[pd.DataFrame]) -> Number | None:
    """The number of one experiment and its verdict, by kind; None where a correlation has too few groups."""
    if claim.kind == "correlation":
        return _correlation(claim, experiment, *rows)
    for own in rows:
        if len(own.drop_duplicates(results.KEYS)) > 1:
            raise UserError(
                f"targets.yaml: {claim.id}: {experiment} has several numbers for {own.metric.iloc[0]}; name `proposals`, "
                "`normaliser` or `samples`"
            )
    sign = 1 if claim.direction == "higher" else -1
    margin = 0.0 if claim.tolerance is None else claim.tolerance.value
    if len(rows) == 2:
        value, interval = results.difference(*rows)
        note = " against ".join(f"{found.value.mean(skipna=False):.3g}" for found in rows)
        word = _word(sign * value, interval, -margin, strict=claim.kind == "ordering")
    else:
        ((value, interval),) = results.over_seeds(rows[0])[["value", "interval"]].to_numpy()
        note = ""
        if claim.kind == "context":
            return Number(experiment, "", value, interval, conditional=results.conditional(rows[0]))
        word = _word(sign * value, interval, sign * float(claim.value or 0) - margin)
        if claim.kind == "gain":
            word = _worse_of(word, _word(sign * value, interval, 0.0, strict=True))
    note = "; ".join(filter(None, (note, f"margin {margin:g}")))
    reason = _undetected(rows, value, interval) if word == "inconclusive" else ""
    return Number(experiment, word, value, interval, note, reason, any(map(results.conditional, rows)))


def _drawn_how(rows: pd.DataFrame) -> tuple[int, ...]:
    """Of a likelihood, S and on how many examples: what it depends on beside the prior. Nothing of other numbers."""
    if not rows.metric.str.match("loglik|truth-gap").any():
        return ()
    return int(rows.samples.max()), int(rows.n.max())


def _word(value: float, half_width: float, bar: float, strict: bool = False) -> Word:
    """Where an interval lies to a bar, higher being better; ``strict``: the bar itself is not enough."""
    low, high = value - half_width, value + half_width
    if low > bar or (low == bar and not strict):
        return "reproduced"
    return "contradicted" if high < bar or (high == bar and strict) else "inconclusive"


def _worse_of(*words: Word) -> Word:
    """Of two verdicts that must both hold."""
    order: tuple[Word, ...] = ("contradicted", "inconclusive", "reproduced")
    return min(words, key=order.index)


def _undetected(rows: Sequence[pd.DataFrame], value: float, interval: float) -> str:
    """The smallest difference that would have shown."""
    if not (math.isfinite(value) and math.isfinite(interval)):
        return "a seed's number is not finite"
    seeds, examples = min(len(own) for own in rows), min(int(own.n.max()) for own in rows)
    plural = "s" if seeds > 1 else ""
    return f"{seeds} seed{plural} of n = {examples} would have shown {interval * POWER:.2g}, four times in five"


def _correlation(claim: Claim, experiment: str, first: pd.DataFrame, second: pd.DataFrame) -> Number | None:
    """Rank correlation over groups. Seeds of a VAE are not independent, nor is a group of several VAEs: means count."""
    group = {"group": lambda rows: rows.metric.str.split("/").str[1]}
    both = first.assign(**group).merge(second.assign(**group), on=["seed", "vae_seed", "group"])
    of_vaes = both.groupby(["vae_seed", "group"])[["value_x", "value_y"]].agg(_mean)
    means = of_vaes.groupby("group").agg(_mean)
    count = len(means)
    if count < FEWEST:
        return None
    rho, p, critical = _spearman(*means.rank().to_numpy().T)
    sign = 1 if claim.direction == "higher" else -1
    vaes = both.vae_seed.nunique()
    small = "p < 0.001" if p < 0.001 else f"p = {p:.1g}"
    note = f"Spearman, {small}, {count} groups of {vaes} VAE{'s' if vaes > 1 else ''}; margin p < {SIGNIFICANCE:g}"
    word, reason = "inconclusive", ""
    if p < SIGNIFICANCE:
        word = "reproduced" if sign * rho > 0 else "contradicted"
    else:
        reason = f"{count} groups show a correlation of {critical:.2f} or more"
    return Number(experiment, word, rho, None, note, reason, vaes == 1)


def _spearman(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Correlation of ranks, its two-sided p, and the smallest one that is significant; NaN where a rank is, or all are one.

    The p of few groups is exact: the usual approximation, by Student's t, calls a perfect order of four certain.
    """
    from scipy.special import stdtr, stdtrit
    from scipy.stats import permutation_test

    with np.errstate(divide="ignore", invalid="ignore"):  # perfect correlation, and none to be had: NaN, as it should be
        rho = float(np.corrcoef(x, y)[0, 1])
        if not math.isfinite(rho):
            return math.nan, math.nan, math.nan
        count = len(x)
        if count > EXACT:
            freedom = count - 2
            quantile = stdtrit(freedom, 1 - SIGNIFICANCE / 2)
            t = abs(rho) * np.sqrt(np.divide(freedom, 1 - rho**2))  # infinite where the correlation is perfect
            p = 2 * stdtr(freedom, -t)
            return rho, float(p), float(quantile / math.sqrt(freedom + quantile**2))
    away, spread = x - x.mean(), x.std() * y.std() * count

    def correlation(orders: np.ndarray, axis: int) -> np.ndarray:
        return (away * (orders - y.mean())).sum(axis) / spread

    counted = permutation_test(
        (y,), correlation, permutation_type="pairings", n_resamples=math.factorial(count), vectorized=True
    )
    sizes = np.sort(np.abs(counted.null_distribution).round(9))
    shares = 1 - np.searchsorted(sizes, sizes) / len(sizes)  # of orders that correlate as much
    return rho, float((sizes >= round(abs(rho), 9)).mean()), float(sizes[shares < SIGNIFICANCE].min(initial=1.0))


def _mean(values: pd.Series) -> float:
    """NaN if one of them is."""
    return values.mean(skipna=False)


def _trained(claim: Claim, number: Number, table: pd.DataFrame, measured_earlier: bool) -> Number:
    """The same number, where training was too short for its verdict inconclusive; and said so if of earlier code."""
    word, reason = number.word, number.reason
    assert claim.subject is not None
    subject, against = (
        None if named is None else (named.experiment or number.experiment, named.prior)
        for named in (claim.subject, claim.against)
    )
    comparable = claim.kind in ("absolute", "gain", "ordering", "no-worse") and "seconds" not in claim.subject.metric
    if comparable and subject != against:
        unfinished = subject if word == "contradicted" else against if word == "reproduced" else None
        if unfinished is not None and _improving(*unfinished, table):
            word, reason = "inconclusive", f"{unfinished[1]} was still improving when its budget ended"
    note = "; ".join(filter(None, (number.note, "measured by earlier code" if measured_earlier else "")))
    return Number(number.experiment, word, number.value, number.interval, note, reason, number.conditional)


def _improving(experiment: str, prior: str, table: pd.DataFrame) -> bool:
    """Whether the training of a prior was ended by its budget, in any group of any seed; False where nothing is trained."""
    own = table[(table.experiment == experiment) & (table.prior == prior) & table.metric.str.startswith("plateaued/")]
    return prior != results.BASELINE and bool((own.value != 1).any())


HEADER = ("claim", "paper", "ours", "95 % interval", "verdict")
ONE_VAE = "one VAE"
ABOUT_ONE_VAE = (
    f"Intervals marked ({ONE_VAE}) are of seeds that share a VAE, or of one seed: they hold for that VAE, and do not say "
    "how much another one would differ.\n"
)


def _paper(claim: Claim) -> str:
    return "" if claim.value is None else f"{claim.value:g}" + (" (unverified)" if claim.standing == "recalled" else "")


def with_mark(interval: float, conditional: bool) -> str:
    """A half-width to two digits, marked if it holds for one VAE alone."""
    return f"± {interval:.2g}" + (f" ({ONE_VAE})" if conditional else "")


def with_interval(value: float, interval: float, conditional: bool) -> str:
    """A value to the interval's first two digits, or to three of its own without one; and the interval."""
    if not interval > 0:
        return f"{value:.3g}"
    places = max(0, 1 - math.floor(math.log10(interval)))
    return f"{value:.{places}f} {with_mark(interval, conditional)}"


def _ours(verdict: Verdict) -> tuple[str, str]:
    """Our number, or the range of several; and its interval."""
    signed = verdict.claim.kind in ("ordering", "no-worse")
    values = [number.value for number in verdict.numbers]
    shown = [f"{value:+.3g}" if signed else f"{value:.3f}" for value in sorted(values)]
    if len(shown) != 1:
        return " to ".join(shown[:1] + shown[-1:]), ""
    (number,) = verdict.numbers
    return shown[0], "" if number.interval is None else with_mark(number.interval, number.conditional)


def _statement(verdict: Verdict) -> str:
    """What is claimed, and what our numbers are."""
    numbers = verdict.numbers
    if len(numbers) > 1:
        notes = [
            f"{number.experiment} {number.value:.3g}"
            + ("" if number.interval is None else f" {with_mark(number.interval, number.conditional)}")
            + "".join(f", {said}" for said in (number.word, number.note) if said)
            for number in numbers
        ]
    else:
        notes = [number.note for number in numbers if number.note]
    return f"{verdict.claim.statement} ({'; '.join(notes)})" if notes else verdict.claim.statement


def cells(verdict: Verdict) -> tuple[str, ...]:
    """What HEADER names: the statement, the paper's number, ours, its interval, and the verdict in words."""
    return _statement(verdict), _paper(verdict.claim), *_ours(verdict), verdict.text


def tested_first(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The same verdicts, those of tested claims first, and what is only context last."""
    return sorted(verdicts, key=lambda verdict: (verdict.claim.kind == "context", not verdict.tested))


def _table(header: Sequence[str], verdicts: Sequence[Verdict]) -> str:
    rows = [
        (f"{v.claim.paper}: {first}", *others, last.removeprefix("context: "))
        for v in verdicts
        for first, *others, last in [cells(v)]
    ]
    table = "".join(f"| {' | '.join(line)} |\n" for line in [header, ["---"] * len(header), *rows])
    marked = any(number.conditional and number.interval is not None for v in verdicts for number in v.numbers)
    return f"{table}\n{ABOUT_ONE_VAE}" if marked else table


def markdown(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as a Markdown table, the tested claims first; what is only context is left out."""
    return _table(HEADER, [verdict for verdict in tested_first(verdicts) if verdict.claim.kind != "context"])


def document(verdicts: Sequence[Verdict]) -> str:
    """claims.md: the verdicts, the margins they are judged by and why, and the numbers that are only context."""
    parts = [
        "# Claims\n",
        "A claim is reproduced, or contradicted, if the whole 95 % interval of our number says so; otherwise it is "
        "inconclusive. A prior that was still improving when its budget ended is not held against itself, nor counted as "
        "beaten.\n",
        markdown(verdicts),
        "## Margins\n",
        "".join(
            f"- `{claim.id}` ({claim.kind}): {how_judged(claim)}\n"
            for claim in (verdict.claim for verdict in verdicts)
            if claim.tested
        ),
    ]
    context = [verdict for verdict in verdicts if verdict.claim.kind == "context"]
    if context:
        parts += ["## Context\n", "Shown beside the paper's numbers, and not judged.\n"]
        parts += [_table((*HEADER[:-1], "why it is not judged"), context)]
    return "\n".join(parts)


def how_judged(claim: Claim) -> str:
    """By which margin, why so, and since when."""
    if claim.tolerance is not None:
        how = f"margin {claim.tolerance.value:g}: {claim.tolerance.reason}"
    elif claim.kind == "correlation":
        how = f"p < {SIGNIFICANCE:g} over groups, the seeds of a VAE averaged"
    else:
        how = "margin 0: any difference counts that the interval leaves standing"
    criterion = claim.criterion
    since = "" if criterion is None or criterion.committed is None else f" Committed in {criterion.committed}."
    after = (
        "" if criterion is None or criterion.after_result is None else f" Newer than the result: {criterion.after_result}."
    )
    return f"{how}.{since}{after}"


def plain(verdict: Verdict) -> dict[str, Any]:
    """A verdict as plain JSON values, for scripts."""
    claim = verdict.claim
    about = {"id": claim.id, "paper": claim.paper, "statement": claim.statement, "value": claim.value}
    return about | {"verdict": verdict.word, "why": verdict.text, "numbers": [asdict(number) for number in verdict.numbers]}


def console(verdicts: Sequence[Verdict]) -> Any:
    """The verdicts as a rich table, the tested claims first."""
    from rich.table import Table

    table = Table(*HEADER, title="The papers' claims", show_lines=False)
    for verdict in tested_first(verdicts):
        style = "red" if verdict.failed else "green" if verdict.tested else "dim"
        first, *rest = cells(verdict)
        table.add_row(f"{verdict.claim.paper}: {first}", *rest, style=style)
    return table
