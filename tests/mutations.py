"""Random mutations of params.yaml: each has to be refused in one line, or accepted and built.

    python tests/mutations.py [COUNT] [SEED]

An accepted one goes through a dry run, and its networks are built and take a step without numbers. What ends otherwise is
printed with the mutation that did it, and the exit code is 1.
"""

import contextlib
import copy
import io
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from pipelines import blueprint, cli, strict_yaml
from pipelines.config import validate
from runtime.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ("gaussians25", "gaussians25-priors", "digits-nvae-priors", "mnist-nvae-lite")
SECONDS = 120
"""For a mutation; more is as bad as a crash."""

NUMBERS = [0, 1, 2, 3, -1, 7, 100, 101, 1000, 2**16, 2**20, 2**31 - 1, 2**31, 2**32, 2**63, 10**30, 0.0, -0.5, 0.5, 1.0, 1.5]
NUMBERS += [1e-3, 1e-8, 1e-320, 1e10, 1e308, float("inf"), float("-inf"), float("nan")]
TEXTS = [
    "",
    "a",
    "1e-3",
    "1e-05",
    "no",
    "a/b",
    "../../esc",
    "ncp.1",
    "x+y",
    "data",
    "-x",
    "Normal",
    "é",
    "\n",
    "x" * 260,
    "$(ls)",
]
OTHERS = [None, True, False, [], {}, [1], [[1]], {"a": 1}, {1: 2}, ["a", "a"], [0, 0]]
KEYS = [
    "base",
    "groups",
    "samplers",
    "steps",
    "batch",
    "halvings",
    "features",
    "vae_seed",
    "trained_in",
    "readjust",
    "restarts",
]


class _Dumper(yaml.SafeDumper):
    """Writes every mapping where it stands."""

    def ignore_aliases(self, data: Any) -> bool:
        """Always."""
        return True


Place = tuple[Any, Any]
"""A mapping or list, and a key or an index in it."""


def places(tree: Any) -> Iterator[Place]:
    """Everything in a tree that can be changed."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from places(value)


def value_of(choice: random.Random) -> Any:
    """Any value at all, numbers most often."""
    return copy.deepcopy(choice.choice(choice.choice([NUMBERS, NUMBERS, TEXTS, OTHERS])))


def near(choice: random.Random, value: Any) -> Any:
    """A value of the same type, or one that looks like it."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return choice.choice([-value, value * 10, value + 1, value - 1, value / 2, float(value), str(value), 0, 1, 2])
    if isinstance(value, list):
        return choice.choice([value * 2, value[:1] * 2, value[::-1], value[:-1], [*value, value_of(choice)]])
    return value_of(choice)


def mutate(choice: random.Random, tree: dict[str, Any]) -> str:
    """Change one thing in a tree; says what."""
    at, key = choice.choice(list(places(tree)))
    before = at[key]
    kind = choice.choice(["set", "near", "near", "near", "near", "delete", "add", "rename", "swap", "copy"])
    if kind == "set":
        at[key] = value_of(choice)
    elif kind == "near":
        at[key] = near(choice, before)
    elif kind == "delete":
        del at[key]
    elif kind == "add" and isinstance(before, dict):
        before[choice.choice([*KEYS, *TEXTS])] = value_of(choice)
    elif kind == "rename" and isinstance(at, dict):
        renamed = choice.choice([*TEXTS, *KEYS, str(key).upper(), f"{key}-2"])
        items = [(renamed if name == key else name, value) for name, value in at.items()]
        at.clear()
        at.update(items)
    else:
        there, other = choice.choice(list(places(tree)))
        if kind == "swap" and not inside(there[other], at) and not inside(before, there):
            at[key], there[other] = there[other], before
        else:
            at[key] = copy.deepcopy(there[other])
    return f"{kind} {key!r}: {str(before)[:60]!r}"


def inside(tree: Any, wanted: Any) -> bool:
    """Whether ``wanted`` itself is ``tree`` or lies in it."""
    return tree is wanted or any(at is wanted or at[key] is wanted for at, key in places(tree))


def mutate_text(choice: random.Random, text: str) -> tuple[str, str]:
    """Change the text of a file, as a hand that slips does; and what was done."""
    lines = text.splitlines()
    row = choice.randrange(len(lines))
    kind = choice.choice(["twice", "drop", "indent", "cut", "insert"])
    if kind == "twice":
        lines.insert(row, lines[row])
    elif kind == "drop":
        del lines[row]
    elif kind == "indent":
        lines[row] = choice.choice(["", " ", "  ", "\t"]) + lines[row].lstrip(choice.choice([" ", ""]))
    elif kind == "cut":
        lines[row] = lines[row][: choice.randrange(len(lines[row]) + 1)]
    else:
        position = choice.randrange(len(lines[row]) + 1)
        lines[row] = lines[row][:position] + choice.choice(list("{}[]:,&*!|>'\"%@`#?-\x00é")) + lines[row][position:]
    return "\n".join(lines) + "\n", f"text, {kind} in line {row + 1}"


@dataclass
class Outcome:
    """What became of a mutation: ``refused``, ``accepted`` or another word, which is a fault; and what was said."""

    word: str
    said: str


def judge(folder: Path, name: str) -> Outcome:
    """Read, dry-run and build the experiment in ``folder``."""
    try:
        config = validate(strict_yaml.read(folder / "params.yaml") or {})
        name = name if name in config.experiments else next(iter(config.experiments), "")
        printed = io.StringIO()
        arguments = ["priorhole", "train-vae", name, "--dry-run"] if name else ["priorhole", "list"]
        patched = mock.patch.object(sys, "argv", arguments)
        with patched, contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            cli.app()
        if not printed.getvalue() and name:
            return Outcome("printed nothing", "")
        if name:
            blueprint.check(name, config.experiments[name])
        return Outcome("accepted", "")
    except UserError as error:
        return Outcome("refused" if len(str(error).splitlines()) == 1 else "several lines", str(error))
    except Exception as error:
        return Outcome("crashed", repr(error)[:300])


def _late(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def mutations(count: int, seed: int) -> Iterator[tuple[str, Outcome]]:
    """Mutate, judge, and say what became of it, ``count`` times. The current folder is a temporary one meanwhile."""
    choice, before = random.Random(seed), os.getcwd()
    raw = strict_yaml.read(ROOT / "params.yaml")
    signal.signal(signal.SIGALRM, _late)
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            for _ in range(count):
                experiment = choice.choice(EXPERIMENTS)
                wanted = {experiment, raw["experiments"][experiment].get("trained_in", experiment)}
                tree = {"run": [experiment], "experiments": {key: copy.deepcopy(raw["experiments"][key]) for key in wanted}}
                done = [mutate(choice, tree) for _ in range(choice.choice([1, 1, 2]))]
                text = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
                if choice.random() < 0.2:
                    text, slip = mutate_text(choice, text)
                    done.append(slip)
                Path("params.yaml").write_text(text, encoding="utf-8")
                signal.alarm(SECONDS)
                found = judge(Path(name), experiment)
                signal.alarm(0)
                yield f"{experiment}: {'; '.join(done)}", found
        finally:
            signal.alarm(0)
            os.chdir(before)


def main(count: int = 1000, seed: int = 0, say: Callable[[str], None] = print) -> int:
    """Run and report. Returns how many ended in a fault."""
    words, started = Counter[str](), time.monotonic()
    for what, found in mutations(count, seed):
        words[found.word] += 1
        if found.word not in ("refused", "accepted"):
            say(f"{found.word}: {what}: {found.said}")
    say(f"{count} mutations, seed {seed}, {time.monotonic() - started:.0f} s: {dict(words)}")
    return count - words["refused"] - words["accepted"]


if __name__ == "__main__":
    sys.exit(min(1, main(*map(int, sys.argv[1:]))))
