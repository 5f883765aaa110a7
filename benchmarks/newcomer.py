"""A newcomer's first quarter of an hour, step by step: what the README and ``docs/extending.md`` say, and what each takes.

    python benchmarks/newcomer.py FOLDER

clones this repository's HEAD into FOLDER, which must not be there yet, runs ``make repro``, opens the report in Chromium
where that is installed, samples from a pretrained model, adds the example prior of ``docs/extending.md`` to the 25
Gaussians, runs the pipeline again, and finds the new prior in the report. It stops at the first step that fails.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from timing import processor

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT, PRETRAINED = "gaussians25", "digits-nvae"
FOREIGN = ("PYTHONPATH", "VIRTUAL_ENV", "PRIORHOLE_MIRROR")  # what a newcomer's shell does not have


@contextmanager
def step(name: str) -> Iterator[None]:
    """Print what the block took."""
    started = time.monotonic()
    yield
    print(f"{time.monotonic() - started:7.1f} s  {name}", flush=True)


def add_example(checkout: Path) -> str:
    """Add the documentation's prior as it says; its name."""
    page = (checkout / "docs" / "extending.md").read_text()
    module, code = re.search(r"```python\n# priors/(\w+)\.py\n(.*?)```", page, re.DOTALL).groups()
    entry, method, prior = re.search(r"`(\"(\w+)\": (\w+),)`", page).groups()
    line = re.search(r"```yaml\n(.*?)\n```", page, re.DOTALL)[1]
    (checkout / "priors" / f"{module}.py").write_text(code)
    registry = checkout / "priors" / "registry.py"
    before, after = registry.read_text().split("PRIORS: dict[str, type[GroupPrior]] = {\n")
    head = before.rstrip() + f"\nfrom priors.{module} import {prior}\n\n"
    registry.write_text(f"{head}PRIORS: dict[str, type[GroupPrior]] = {{\n    {entry}\n{after}")
    params = checkout / "params.yaml"
    before, after = params.read_text().split(f"  {EXPERIMENT}:", 1)
    params.write_text(f"{before}  {EXPERIMENT}:" + after.replace("    priors:\n", f"    priors:\n      {line}\n", 1))
    return method


def main() -> None:
    """Go through the steps."""
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        sys.exit(__doc__)
    checkout = Path(sys.argv[1]).resolve()
    environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}

    def run(*command: str) -> None:
        with (checkout.parent / f"{checkout.name}.log").open("a") as log:
            if subprocess.run(command, cwd=checkout, env=environment, stdout=log, stderr=log).returncode:
                sys.exit(f"failed: {' '.join(command)}; see {log.name}")

    print(f"{processor()}, {len(os.sched_getaffinity(0))} cores")
    with step("git clone"):
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
    with step("make .venv/installed, the first part of make repro"):
        run("make", ".venv/installed")
    environment["PATH"] = f"{checkout / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    with step("make repro, the rest of it"):
        run("make", "repro")
    if browser := shutil.which("chromium"):
        with step("open reports/index.html"):
            run(browser, "--headless", "--no-sandbox", "--screenshot=/dev/null", str(checkout / "reports" / "index.html"))
    with step(f"priorhole sample {PRETRAINED}, from the pretrained files"):
        run("priorhole", "sample", PRETRAINED)
    trained = {
        path: path.stat().st_mtime_ns for path in (checkout / "artifacts" / EXPERIMENT).glob("priors/*/**/*.safetensors")
    }
    assert trained, f"no priors of {EXPERIMENT}"
    name = add_example(checkout)
    with step(f"make repro, once the prior {name} is added"):
        run("make", "repro")
    again = [str(path) for path, made in trained.items() if not path.exists() or path.stat().st_mtime_ns != made]
    assert not again, f"trained again: {', '.join(again)}"
    assert name in (checkout / "reports" / "results.csv").read_text(), f"no rows of {name}"
    pages = [page.name for page in (checkout / "reports").rglob("*.html") if re.search(rf"\b{name}\b", page.read_text())]
    assert pages, f"{name} is not in the report"
    print(f"in the report: {', '.join(sorted(pages))}; the other priors were not trained again")


if __name__ == "__main__":
    main()
