"""An entry of the registry is one data set's own matter."""

import ast
from pathlib import Path

import pytest

from datasets import registry
from pipelines.config import read, validate
from pipelines.identities import group_source, vae_source
from priors.registry import PRIORS
from runtime import identity

ROOT = Path(__file__).resolve().parents[2]
ANOTHER = """
    "moons": DatasetSpec(
        shape=(2,), kind="points", licence="none", source="drawn here", prepare=moons.prepare, fresh=moons.fresh
    ),
"""
DIGITS_SHIFT, CELEBA_LICENCE = "shift=1,", 'licence="non-commercial research only",'


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """Digests of the code behind every data set, its VAEs and its classifiers, once the registry's text has been edited."""
    config = validate(read(ROOT / "params.yaml"))
    text = Path(registry.__file__).read_text()
    find = identity.importlib.util.find_spec

    def digests(*edits: tuple[str, str]) -> dict[str, tuple[str, ...]]:
        edited = text
        for before, after in edits:
            assert before in edited
            edited = edited.replace(before, after)
        ast.parse(edited)
        copy = tmp_path / "registry.py"
        copy.write_text(edited)
        (tmp_path / "moons.py").write_text("def prepare(): ...\n")
        elsewhere = {"datasets.registry": copy, "datasets.moons": tmp_path / "moons.py"}

        def spec(name: str):
            path = elsewhere.get(name)
            return identity.importlib.util.spec_from_file_location(name, path) if path else find(name)

        monkeypatch.setattr(identity.importlib.util, "find_spec", spec)
        identity._module_digest.cache_clear()
        try:
            return {
                experiment.dataset: (
                    registry.source_for(experiment.dataset, "datasets.registry"),
                    vae_source(experiment),
                    group_source(experiment, PRIORS["ncp"]),
                )
                for experiment in config.experiments.values()
            }
        finally:
            identity._module_digest.cache_clear()

    return digests


def test_another_data_set_makes_nothing_stale(sources):
    imported = ("import digits, gaussians25, mnist", "import digits, gaussians25, mnist, moons")
    opening = "DATASETS: dict[str, DatasetSpec] = {"
    assert sources((opening, opening + ANOTHER), imported) == sources()


@pytest.mark.parametrize(
    ("before", "after", "stale"),
    [
        (DIGITS_SHIFT, "shift=2,", {"digits"}),
        (CELEBA_LICENCE, 'licence="ask",', {"celeba64", "celeba64-140"}),
        ("return DATASETS[name]", "return dict(DATASETS)[name]", None),
    ],
)
def test_a_change_makes_stale_what_it_is_about(sources, before, after, stale):
    today, changed = sources(), sources((before, after))
    assert {name for name in today if today[name] != changed[name]} == (set(today) if stale is None else stale)
    assert all(old != new for name in stale or today for old, new in zip(today[name], changed[name], strict=True))
