"""The papers' tables in the papers' shapes: their numbers, written by hand in tables.yaml, and ours beside them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import Field, model_validator

from pipelines import claims, results
from pipelines.claims import Stale, Standing, Subject, Text
from runtime.errors import UserError
from runtime.options import Options

Side = Literal["paper", "ours"]


class Ours(Subject):
    """Rows of the results table: those of one number, one a seed."""

    experiment: Text


class Cell(Options):
    """One number: the ``paper``'s, with its ``standing`` (see :class:`pipelines.claims.Claim`), and ``ours``."""

    paper: float | None = None
    standing: Standing | None = None
    ours: Ours | None = None

    @model_validator(mode="after")
    def _complete(self) -> "Cell":
        if (self.paper is None) != (self.standing is None):
            raise ValueError("a paper's number has a `standing`, and nothing else has")
        if self.paper is None and self.ours is None:
            raise ValueError("a cell holds the paper's number, or names ours, or both")
        return self


class Line(Options):
    """One row: its ``cells`` by column, the ``protocol`` and the ``decoder``'s likelihood of its numbers.

    ``waits``: for what ours wait, or why there are none; where it is absent, the command that measures them is named.
    """

    name: Text
    protocol: str = ""
    decoder: str = ""
    cells: Annotated[dict[Text, Cell], Field(min_length=1)]
    waits: Text | None = None


class Table(Options):
    """One table of a paper. ``negate``: it shows what our metric is the negative of, as a NLL is of a log-likelihood."""

    id: Annotated[str, Field(pattern="^[a-z0-9-]+$")]
    title: Text
    paper: Literal["NCP-VAE", "EVaLP"]
    source: Text
    columns: Annotated[list[Text], Field(min_length=1)]
    note: str = ""
    negate: bool = False
    rows: Annotated[list[Line], Field(min_length=1)]

    @model_validator(mode="after")
    def _known(self) -> "Table":
        for line in self.rows:
            unknown = [name for name in line.cells if name not in self.columns]
            if unknown:
                raise ValueError(f"{line.name}: {unknown[0]!r} is not among the columns: {', '.join(self.columns)}")
        return self

    def sides(self) -> list[tuple[str, list[Side]]]:
        """The columns, each with what it has at all: the paper's numbers, ours, or both."""
        found = []
        for column in self.columns:
            cells = [line.cells[column] for line in self.rows if column in line.cells]
            sides: list[tuple[Side, bool]] = [
                ("paper", any(cell.paper is not None for cell in cells)),
                ("ours", any(cell.ours is not None for cell in cells)),
            ]
            found.append((column, [side for side, there in sides if there]))
        return found


class Sentence(Options):
    """A text, and the numbers of ours that its braces name; it is left out as long as one of them is missing."""

    text: Text
    numbers: dict[str, Ours] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _filled(self) -> "Sentence":
        try:
            self.text.format(**dict.fromkeys(self.numbers, ""))
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"the braces of a text name its numbers, and {error} is none") from None
        return self


class Answer(Options):
    """The report's first words: the question, the answer, and a figure of an experiment with its caption."""

    question: Text
    sentences: list[Sentence]
    experiment: Text
    figure: Text
    caption: Text


class Published(Options):
    """tables.yaml."""

    answer: Answer
    tables: list[Table]


def load(path: Path) -> Published:
    """The tables. Raises UserError with the path of the first wrong key."""
    return claims.document_of(path, Published)


EARLIER = "earlier code"
ABOUT_EARLIER = f"Numbers marked ({EARLIER}) were measured by other code than today's, which may find others.\n"


@dataclass(frozen=True)
class Number:
    """One of our numbers.

    Attributes:
        value, interval: mean over seeds, half-width of its 95 % interval.
        conditional: whether that holds for one VAE alone.
        earlier: whether other code than today's measured some of it.
    """

    value: float
    interval: float
    conditional: bool
    earlier: bool

    def text(self, sign: int = 1) -> str:
        """As it is shown, times ``sign``."""
        found = claims.with_interval(sign * self.value, self.interval, self.conditional)
        return f"{found} ({EARLIER})" if self.earlier else found


@dataclass(frozen=True)
class Shown:
    """One row as it is shown.

    Attributes:
        line: what tables.yaml says.
        cells: for each side of each column (:meth:`Table.sides`) the number as a text and, of ours, the experiment.
        standing: of the paper's numbers.
        waits: for what ours wait; empty if none is missing.
    """

    line: Line
    cells: tuple[tuple[str, str], ...]
    standing: str
    waits: str


class Reader:
    """Reads our numbers from the results table.

    Args:
        table: the results, one row a seed.
        stale: which rows are; those of another configuration are as good as missing.
    """

    def __init__(self, table: pd.DataFrame, stale: Stale):
        changed = stale(table) if len(table) else pd.Series(dtype=str)
        current = table.assign(earlier=changed == "code")[changed != "configuration"]
        self._own = {str(name): own for name, own in current.groupby("experiment")}

    @cache  # noqa: B019 (a reader lives as long as a report is written)
    def number(self, ours: Ours) -> Number | None:
        """Ours, or None if it is not measured yet. Raises UserError if the rows are of several numbers."""
        if ours.experiment not in self._own:
            return None
        rows = claims.rows_named(self._own[ours.experiment], [ours.experiment], ours)
        if rows.empty:
            return None
        found = results.over_seeds(rows)
        if len(found) > 1:
            raise UserError(
                f"tables.yaml: {ours.experiment} has several numbers for {ours.metric} of {ours.prior}; name `proposals`, "
                "`normaliser` or `samples`"
            )
        ((value, interval, conditional),) = found[["value", "interval", "conditional"]].to_numpy()
        return Number(float(value), float(interval), bool(conditional), bool(rows.earlier.any()))

    def rows(self, table: Table) -> Iterator[Shown]:
        """The rows of a table."""
        for line in table.rows:
            cells, missing = [], []
            for column, sides in table.sides():
                cell = line.cells.get(column, Cell.model_construct())
                number = None if cell.ours is None else self.number(cell.ours)
                if cell.ours is not None and number is None:
                    missing.append(cell.ours.experiment)
                texts = {"paper": (_paper(cell), ""), "ours": _ours(cell, number, -1 if table.negate else 1)}
                cells += [texts[side] for side in sides]
            standing = ", ".join(dict.fromkeys(cell.standing for cell in line.cells.values() if cell.standing is not None))
            yield Shown(line, tuple(cells), standing, _waits(line, missing))

    def sentences(self, answer: Answer) -> Iterator[str]:
        """The sentences of the answer whose numbers are all there."""
        for sentence in answer.sentences:
            numbers = {name: self.number(ours) for name, ours in sentence.numbers.items()}
            found = {name: number.text() for name, number in numbers.items() if number is not None}
            if len(found) == len(numbers):
                yield sentence.text.format(**found)


def _paper(cell: Cell) -> str:
    return "" if cell.paper is None else f"{cell.paper:g}" + (" (unverified)" if cell.standing == "recalled" else "")


def _ours(cell: Cell, number: Number | None, sign: int) -> tuple[str, str]:
    if cell.ours is None:
        return "", ""
    return ("—", "") if number is None else (number.text(sign), cell.ours.experiment)


def _waits(line: Line, missing: Sequence[str]) -> str:
    if not missing and any(cell.ours is not None for cell in line.cells.values()):
        return ""
    return line.waits or f"the stages of {', '.join(dict.fromkeys(missing))}"


def markdown(published: Published, reader: Reader) -> str:
    """tables.md: every table, for those who read in a terminal."""
    parts = ["# The papers' tables\n"]
    for table in published.tables:
        sides = [f"{column}: {side}" for column, found in table.sides() for side in found]
        headers = ["", "protocol", "decoder", *sides, "standing", "ours wait for"]
        parts.append(f"## {table.title}\n\n{table.paper}: {table.source}. {table.note}\n")
        parts.append("\n".join([_line(headers), _line(["---"] * len(headers)), *map(_of, reader.rows(table))]) + "\n")
    return "\n".join(parts) + f"\n{claims.ABOUT_ONE_VAE}\n{ABOUT_EARLIER}"


def _of(row: Shown) -> str:
    numbers = [text for text, _ in row.cells]
    return _line([row.line.name, row.line.protocol, row.line.decoder, *numbers, row.standing, row.waits])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


STANDINGS: Mapping[str, str] = {
    "found": "read in public material: code, its comments, an author's answer, another paper's table",
    "seed": "read in a published summary of the paper; the paper's tables themselves were not at hand",
    "derived": "computed from numbers of the other kinds",
    "recalled": "from memory: shown as unverified, never tested",
}
