import shutil
from pathlib import Path

import pytest
from tiny import tiny, write_params

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder that looks like a checkout with tiny experiments; it is the current folder."""
    from metrics.features import OwnClassifier

    monkeypatch.setattr(OwnClassifier, "steps", 20)
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path, tiny())
    (tmp_path / "reports").mkdir()
    for name in ("targets.yaml", "tables.yaml"):
        shutil.copy(ROOT / "reports" / name, tmp_path / "reports")
    return tmp_path
