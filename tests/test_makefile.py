"""The environment that make builds belongs to one folder: moved or copied, it is made anew before anything runs in it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FAKE_PYTHON = """#!/bin/sh
# `python -m venv [--clear] .venv`: scripts that name their interpreter by its path, as pip makes them
for folder; do :; done
echo made >> made.log
case "$*" in *--clear*) rm -rf "$folder";; esac
mkdir -p "$folder/bin"
ln -sf /bin/sh "$folder/bin/python"
for script in pip dvc ruff mypy pytest; do
    [ -e "$folder/bin/$script" ] && continue
    printf '#!%s/bin/python\\necho %s in %s >> ran.log\\n' "$(pwd -P)/$folder" $script "$(pwd -P)" > "$folder/bin/$script"
    chmod +x "$folder/bin/$script"
done
"""


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    folder = tmp_path / "first"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / ".git").mkdir()
    return folder


def make(folder, target):
    """Runs a target; how often an environment was made in this folder, and what ran in it."""
    command = ["make", f"PYTHON={folder.parent / 'python'}", target]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (folder / "made.log").read_text().count("made"), (folder / "ran.log").read_text()


@pytest.mark.parametrize("target", ["repro", "test", "test-clusters"])
@pytest.mark.parametrize("how", [shutil.move, shutil.copytree])
def test_a_checkout_that_was_moved_or_copied_gets_an_environment_of_its_own(checkout, how, target):
    assert make(checkout, target)[0] == 1
    assert make(checkout, target)[0] == 1
    folder = checkout.parent / "second"
    how(checkout, folder, **({"symlinks": True} if how is shutil.copytree else {}))
    (folder / "ran.log").unlink()
    made, ran = make(folder, target)
    assert made == 2
    assert set(ran.splitlines()) <= {f"{script} in {folder}" for script in ("pip", "dvc", "ruff", "mypy", "pytest")}
    assert make(folder, target)[0] == 2


def test_a_changed_requirement_is_installed(checkout):
    make(checkout, "test")
    stamp = checkout / ".venv" / "installed"
    os.utime(stamp, (0, 0))
    assert make(checkout, "test")[0] == 2
