"""Whether rewritten code makes the numbers of an earlier revision, to the last bit: a small pipeline under both.

    python benchmarks/same_numbers.py REVISION

runs two small experiments, with every method of the suite, by the code of REVISION and by that of HEAD, on this machine, and
compares all trained numbers and all rows of the results but times, revisions and fingerprints. If they agree, it prints the
modules that differ with their digests: entries for ``runtime.identity.SAME_NUMBERS``.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from tiny import tiny_beyond  # noqa: E402

from runtime import checkpoints  # noqa: E402

NOT_NUMBERS = ["seconds", "revision", "fingerprint"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PRIORHOLE_WORKERS": "1"}
STAGES = ("fetch", "train-vae", "train-prior", "sample", "evaluate")

DIGESTS = """
import json, pathlib
from datasets.registry import DATASETS
from runtime import identity
identity.SAME_NUMBERS = {}
folders = ("runtime", "datasets", "models", "priors", "metrics")
names = (f"{folder}.{path.stem}" for folder in folders for path in pathlib.Path(folder).glob("*.py"))
digests = {name: identity._module_digest(name)[0] for name in names if name not in identity.CARRIERS}
del digests["datasets.registry"]
for entry in DATASETS:
    digests[f"datasets.registry, entry {entry}"] = identity._module_digest("datasets.registry", entry)[0]
print(json.dumps(digests))
"""
FIELDS = "import json; from pipelines.config import SampleOptions; print(json.dumps(list(SampleOptions.model_fields)))"


def python(code: Path, *arguments: str) -> str:
    """The output of this interpreter with the code of a folder."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=code, env=ENVIRONMENT | {"PYTHONPATH": str(code)}, stdout=subprocess.PIPE
    )
    if done.returncode:
        sys.exit(f"{code}: exit code {done.returncode}")
    return done.stdout.decode()


def run(code: Path) -> tuple[dict[str, str], pd.DataFrame]:
    """Digests of all that was trained, by file, and all rows, by the code in a folder, whose params.yaml is overwritten."""
    params = tiny_beyond()
    fields = json.loads(python(code, "-c", FIELDS))
    for experiment in params["experiments"].values():
        experiment["sample"] |= {"images": 230, "batch": 50}
        if "pixels" in fields:
            experiment["sample"]["pixels"] = "float32"
    (code / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    tables = []
    for name in params["experiments"]:
        for stage in STAGES:
            python(code, "-c", "from pipelines.cli import main; main()", stage, name)
        tables.append(pd.read_csv(code / "artifacts" / name / "evaluation" / "results.csv"))
    folders = [folder for kind in ("vae", "priors") for folder in sorted((code / "artifacts").glob(f"*/{kind}"))]
    trained = [path for folder in folders for path in sorted(folder.rglob("*.safetensors"))]
    digests = {str(path.relative_to(code)): checkpoints.load_document(path, "")["digest"] for path in trained}
    return digests, pd.concat(tables, ignore_index=True)


def main() -> None:
    """Compare, and print."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        codes = [Path(folder) / "earlier", Path(folder) / "today"]
        for code, command in zip(codes, (["git", "archive", sys.argv[1]], ["git", "archive", "HEAD"]), strict=True):
            code.mkdir()
            archive = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
            subprocess.run(["tar", "x", "-C", str(code)], input=archive.stdout, check=True)
        modules = [json.loads(python(code, "-c", DIGESTS)) for code in codes]
        (trained, table), (trained_now, table_now) = map(run, codes)
    assert trained, "nothing was trained"
    different = sorted(name for name in trained.keys() | trained_now.keys() if trained.get(name) != trained_now.get(name))
    print(f"trained files: {len(trained)}, of which differ: {len(different)}", *different[:10])
    times = table.metric.str.contains("seconds")
    columns = [name for name in table.columns if name not in NOT_NUMBERS]
    mine, theirs = (found[~found.metric.str.contains("seconds")][columns] for found in (table, table_now))
    same = mine.reset_index(drop=True).equals(theirs.reset_index(drop=True))
    print(f"rows: {len(table)}, of which times: {times.sum()}; the others are {'the same' if same else 'NOT the same'}")
    if different or not same:
        sys.exit(1)
    earlier, today = modules
    for name in sorted(earlier.keys() & today.keys()):
        if earlier[name] != today[name]:
            print(f'    "{today[name]}": "{earlier[name]}",  # {name}')


if __name__ == "__main__":
    main()
