"""What a stored result was made from: its configuration, its inputs and the source code that made it."""

import ast
import hashlib
import importlib.util
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from runtime.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("runtime", "datasets", "models", "priors", "metrics", "pipelines")
CARRIERS = {
    f"runtime.{name}"
    for name in (
        *("arrays", "blocks", "checkpoints", "errors", "files", "identity", "interruption", "options", "processes"),
        *("parallel", "progress", "rowfiles"),
    )
}
"""Modules that keep numbers, share work out, and say what went wrong: a better message must not cost a trained model."""

SAME_NUMBERS = {
    "f9683e51eddd6bc7": "451893a52f719ebe",  # datasets.dataset: mapped, not read; bits, flips, views
    "f5e3c978f2ec5d3f": "03bffa8c2505b9b1",  # datasets.pictures: only what its data set needs is in a digest
    "7f8aa8da1ec56242": "e5b95cb1f7b56421",  # datasets.registry, entry gaussians25
    "216dc0c3516c42f0": "e5b95cb1f7b56421",  # datasets.registry, entry digits
    "32648be75be7621a": "e5b95cb1f7b56421",  # datasets.registry, entry mnist
    "337834c83d9ccbc3": "e5b95cb1f7b56421",  # datasets.registry, entry cifar10
    "1e4a71749ae98971": "e5b95cb1f7b56421",  # datasets.registry, entry cifar10-jpeg
    "bd2c75bd1e6a6fb7": "e5b95cb1f7b56421",  # datasets.registry, entry celeba64
    "a5c263ada9ae7671": "e5b95cb1f7b56421",  # datasets.registry, entry celeba64-140
    "40abde35f1263305": "e5b95cb1f7b56421",  # datasets.registry, entry celebahq256
    "1dbefe1db1d6cb6a": "2b770d040289aa4e",  # metrics.features: training images by index; another network
    "e4a6466d938e630d": "c7efeccda9257c66",  # metrics.frechet: another root for more features than on record; in place
    "e40cd314e3592e32": "976484f91278a5af",  # metrics.likelihood: in parts that fit a memory; divergences at a draw
    "f04622cb2d4f85cb": "3183b2e39068120a",  # models.distributions: a deterministic encoder's; NVAE's mixture as published
    "76b6665bc60af1ca": "5e6557852b216a10",  # models.layers: NVAE's norms as published
    "db9495acc0cd4628": "8872fed83b49942c",  # models.likelihoods: NVAE's as published
    "fb63d73e530e72f3": "f5cda52c0f387316",  # models.protocol: divergences at a draw; terms of a loss; settles
    "b2ca89800f109480": "722484a92656eac1",  # models.registry: flat models of images
    "91b4d825d59ec60b": "4eec4b4423b1cf6c",  # models.spectral: NVAE's as published: no other model has a row with that loss
    "9e78bf7d32820179": "8d87dd2567a910b0",  # models.trainer: divergences at a draw; options of NVAE; parts; no warm-up
    "a2be1185050ea315": "2378934ea902385e",  # priors.evalp: a held-out proposal found once where all share the context
    "3feff7a2dea838bc": "55cd2242e0c80f59",  # priors.flow: draws without gradients, half by half
    "c0c26bce6390a388": "99e61cf451017ef9",  # priors.gmm: draws in parts that fit a memory
    "57f786aaa24cb352": "60b63a7d5d365ba5",  # priors.networks: sees latents standardised, if asked
    "d57a4d39da25175c": "06f37b447cc1aee0",  # priors.protocol: fits to posterior means too; weight decay
    "91b9ceef70b4b06b": "8a01ee2bc3db2a8b",  # priors.langevin: chains that start from SIR
    "86782bc0899fae9a": "969392a3497bb9fa",  # priors.registry: chains that start from SIR
    "f2a1cd3904bc9012": "4d5e25ae03a3766f",  # priors.sir: a draw of which a weight is none is none
    "5cf6d6b8f5dba651": "ca3329d4c0473080",  # priors.sampling: decoding has a function of its own
    "580ea21e3c952cd0": "c3687b76835e918d",  # priors.trainer: reads what it needs; decay; encodes once; a graph at a time
    "1412a03cb8308e88": "3dbeda7e8161256f",  # runtime.hardware: waits before a clock is read; no TF32; who gains from bf16
    "cafbd93b9991378d": "bca9d21831cb9fba",  # runtime.randomness: parts of a batch
    "4f04c6aca17f66d2": "d62cb38a16403658",  # runtime.training: checkpoints in the background; one transfer; parts; settles
}
"""Digests of rewritten modules, and of those before them whose numbers they make to the last bit: what these made is kept.

An entry stands for a run of ``benchmarks/same_numbers.py`` in which both made the same files and the same table.
"""


@dataclass(frozen=True)
class Identity:
    """The fingerprint of one stored file.

    Attributes:
        experiment: name of the experiment in params.yaml.
        seed: the seed that the file belongs to.
        config: everything that determines the content, as plain JSON values. Inputs that are files themselves (a frozen
            VAE's weights, a data set) enter by their content digest.
        source: digest of the code that makes it (see :func:`source_digest`).
        precision: that it is computed in on this machine. A finished file may be of any, an unfinished one is not gone on
            with in another.
    """

    experiment: str
    seed: int
    config: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    precision: str = "fp32"

    def difference(self, stored: dict[str, Any]) -> str | None:
        """The first key, dotted, whose value differs from a stored file's ``config``; None if they agree."""
        mine, theirs = _flat(self.config), _flat(stored)
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                return f"{key} is {theirs.get(key, 'absent')} there and {mine.get(key, 'absent')} here"
        return None


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(tree, dict):
        return {k: v for name, value in tree.items() for k, v in _flat(value, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): json.dumps(tree)}


def source_digest(*modules: str, entries: Mapping[str, str] | None = None) -> str:
    """Digest of the given modules and of every module of this project that they import, directly or not.

    Comments, docstrings, layout and CARRIERS do not enter: only a change that can change a number makes a stored result
    stale.

    Args:
        modules: by name.
        entries: of a module with a dictionary of entries, the one of these that matters. The others, and what they alone
            import, do not enter.
    """
    seen: dict[str, str] = {}
    pending = list(modules)
    while pending:
        name = pending.pop()
        if name not in seen:
            seen[name], imported = _module_digest(name, (entries or {}).get(name))
            pending.extend(imported)
    return hashlib.blake2b(json.dumps(seen, sort_keys=True).encode(), digest_size=8).hexdigest()


@cache
def _module_digest(name: str, entry: str | None = None) -> tuple[str, tuple[str, ...]]:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(name)
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_docstring(body[0]):
            del body[0]
    if entry is not None:
        _keep_only(entry, tree)
    digest = hashlib.blake2b(ast.dump(tree).encode(), digest_size=8).hexdigest()
    return SAME_NUMBERS.get(digest, digest), tuple(_imports(tree))


def _keep_only(entry: str, tree: ast.Module) -> None:
    """Take the other entries out of the module's dictionary that has this one, and imports that nothing else uses."""
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            pairs = zip(node.value.keys, node.value.values, strict=True)
            if kept := [pair for pair in pairs if isinstance(pair[0], ast.Constant) and pair[0].value == entry]:
                node.value.keys, node.value.values = map(list, zip(*kept, strict=True))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]:
        node.names = [alias for alias in node.names if (alias.asname or alias.name).split(".")[0] in used]
        if not node.names:
            tree.body.remove(node)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = node.module in FLOORS  # from runtime import hardware
            names = [f"{node.module}.{alias.name}" for alias in node.names] if whole else [node.module]
        yield from (name for name in names if name.split(".")[0] in FLOORS and name not in CARRIERS)


@cache
def revision() -> str:
    """The git revision of this checkout, ``-dirty`` if tracked files differ from it.

    ``unversioned`` without git, and for code that only lies inside another repository, whose revisions say nothing of it.
    """
    # Who calls from a hook of git's has variables that name another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return "unversioned"
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno", *FLOORS) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unversioned"


def require_own_code(workspace: Path) -> None:
    """Refuse to work in a checkout by the code of another, as a copied one does whose environment knows the original.

    Args:
        workspace: the folder that files are read from and written to; one without code of its own can be anywhere.

    Raises:
        UserError: it holds this project's code, and another copy of that is running.
    """
    if (workspace / "pipelines" / "stages.py").is_file() and workspace.resolve() != ROOT:
        raise UserError(
            f"{workspace} holds code of its own, and that of {ROOT} is running; "
            f"make an environment here (make .venv/installed) and run .venv/bin/priorhole"
        )
