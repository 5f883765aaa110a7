"""The report is looked at in a browser: it works without a network, on a phone, in the dark, and for every reader."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import yaml
from browser import CHROMIUM, Browser

from pipelines import claims, fingerprints, results
from pipelines.config import read, validate
from pipelines.reporting import page, published
from pipelines.workspace import Workspace
from runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
browsing = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of the committed results, in a folder of its own."""
    workspace = Workspace(tmp_path_factory.mktemp("report"))
    for name in ("results.csv", "targets.yaml", "tables.yaml", "figures"):
        copy = shutil.copytree if name == "figures" else shutil.copy
        workspace.reports.mkdir(exist_ok=True)
        copy(ROOT / "reports" / name, workspace.reports / name)
    config = validate(read(ROOT / "params.yaml"))
    table = results.read(workspace.results, "")
    stale = partial(results.stale_rows, expected=fingerprints.expected(config))
    verdicts = claims.judge(claims.load(workspace.targets), table, stale)
    tables = published.load(workspace.tables)
    reader = published.Reader(table, stale)
    frame = results.over_seeds(table.assign(stale=stale(table)))
    page.Report(workspace, config, table, frame, verdicts, tables, reader).write()
    return workspace.reports


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


def pages(folder):
    return [folder / "index.html", *sorted((folder / "pages").glob("*.html"))]


def test_the_committed_pages_are_what_the_pipeline_writes(written):
    assert [path.name for path in pages(written)] == [path.name for path in pages(ROOT / "reports")]
    for path in (written / "tables.md", *pages(written)):
        committed = ROOT / "reports" / path.relative_to(written)
        assert path.read_bytes() == committed.read_bytes(), f"{committed} is not up to date; run priorhole report"


@browsing
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_every_page_is_whole_and_asks_for_nothing_elsewhere(written, browser, width, dark):
    browser.errors.clear()
    browser.requests.clear()
    for path in pages(written):
        browser.open(path.as_uri(), width, dark=dark)
        assert browser.value("document.documentElement.scrollWidth") <= width, path.name
        assert browser.value("[...document.images].filter(image => !image.naturalWidth || !image.alt).length") == 0, (
            path.name
        )
        links = browser.value("[...document.links].map(link => link.href)")
        for address in links:
            place, _, anchor = address.removeprefix("file://").partition("#")
            assert Path(place).exists(), f"{path.name}: {address}"
            assert not anchor or f'id="{anchor}"' in Path(place).read_text(), f"{path.name}: {address}"
    assert browser.errors == []
    assert [address for address in browser.requests if not address.startswith(("file:", "data:"))] == []


@browsing
def test_claims_are_filtered_by_what_is_chosen(written, browser):
    browser.open((written / "index.html").as_uri())
    rows = "[...document.querySelectorAll('.ledger tbody tr')].filter(row => row.offsetHeight)"
    shown = f"{rows}.map(row => ({{...row.dataset}}))"
    every = browser.value(shown)
    assert len(every) == len(yaml.safe_load((ROOT / "reports" / "targets.yaml").read_text())["claims"])
    for name, value in (("paper", "EVaLP"), ("verdict", "reproduced"), ("experiment", "gaussians25-priors")):
        choose = f"(form => {{ form.elements.{name}.value = '{value}'; form.dispatchEvent(new Event('change')); }})"
        browser.value(f"{choose}(document.querySelector('.filters'))")
        every = [row for row in every if value in row[name].split()]
        assert browser.value(shown) == every != []
        assert browser.value("document.querySelector('output').textContent").startswith(f"{len(every)} of ")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cells": {"NCP": {"paper": 1.0}}}, "has a `standing`"),
        ({"cells": {"gain": {"paper": 1.0, "standing": "seed"}}}, "'gain' is not among the columns: NCP"),
        ({"cells": {"NCP": {"ours": {"experiment": "flat", "prior": "ncp", "metric": "speed"}}}}, "'speed' is not a metric"),
    ],
)
def test_a_wrong_table_is_one_line(changes, says, tmp_path):
    answer = {"question": "?", "sentences": [], "experiment": "flat", "figure": "flat-hole.png", "caption": "a hole"}
    table = {
        "id": "one",
        "title": "t",
        "paper": "EVaLP",
        "source": "s",
        "columns": ["NCP"],
        "rows": [{"name": "r"} | changes],
    }
    path = tmp_path / "tables.yaml"
    path.write_text(yaml.safe_dump({"answer": answer, "tables": [table]}))
    with pytest.raises(UserError, match=says):
        published.load(path)


def test_every_number_of_the_tables_is_one_that_its_experiment_measures():
    config = validate(read(ROOT / "params.yaml"))
    for table in published.load(ROOT / "reports" / "tables.yaml").tables:
        for line in table.rows:
            for ours in (cell.ours for cell in line.cells.values() if cell.ours is not None):
                experiment = config.experiments.get(ours.experiment)
                assert experiment is not None or line.waits, f"{ours.experiment} is not in params.yaml, and nothing says why"
                assert experiment is None or ours.prior in experiment.priors
                assert experiment is None or not ours.sampler or ours.sampler in experiment.priors[ours.prior].samplers
