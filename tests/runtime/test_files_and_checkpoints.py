import errno
import os
import subprocess
import sys

import pytest
import torch

from runtime import checkpoints, files
from runtime.errors import UserError
from runtime.identity import Identity, source_digest

IDENTITY = Identity("toy", 0, {"model": {"latents": 2}, "seed": 0}, "s")
TENSORS = {"a": torch.arange(6.0).view(2, 3), "empty": torch.zeros(0), "flag": torch.tensor(True)}


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    path = tmp_path / "deep" / "c.safetensors"
    checkpoints.save(path, TENSORS, IDENTITY, step=3)
    tensors, document = checkpoints.load_verified(path, IDENTITY, "priorhole train-vae toy")
    assert document["step"] == 3
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert os.listdir(path.parent) == ["c.safetensors"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "text", "empty"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    path = tmp_path / "c.safetensors"
    checkpoints.save(path, TENSORS, IDENTITY)
    content = bytearray(path.read_bytes())
    content[-2] ^= 255
    damaged = {"truncate": content[:-9], "flip": content, "text": b"hello", "empty": b""}[damage]
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="corrupt") as error:
        checkpoints.load(path, "priorhole train-vae toy")
    assert "priorhole train-vae toy" in one_line(error)
    assert checkpoints.load_current(path, IDENTITY) is None


def test_a_missing_checkpoint_says_how_to_make_it(tmp_path):
    with pytest.raises(UserError, match=r"missing; make it with: priorhole x"):
        checkpoints.load(tmp_path / "none", "priorhole x")


def test_a_checkpoint_of_another_configuration_is_refused_with_the_key_that_differs(tmp_path):
    path = tmp_path / "c.safetensors"
    checkpoints.save(path, TENSORS, IDENTITY)
    other = Identity("toy", 0, {"model": {"latents": 20}, "seed": 0}, "s")
    with pytest.raises(UserError, match=r"model\.latents is 2 there and 20 here"):
        checkpoints.load_verified(path, other, "x")
    assert checkpoints.load_current(path, Identity("toy", 0, IDENTITY.config, "newer code")) is None


@pytest.mark.parametrize(("number", "says"), [(errno.ENOSPC, "no space left"), (errno.EROFS, "cannot be written")])
def test_a_failed_write_is_one_line_and_keeps_what_was_there(tmp_path, monkeypatch, number, says):
    path = tmp_path / "kept.txt"
    files.write_text(path, "old")

    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=says) as error:
        files.write_text(path, "new")
    one_line(error)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["kept.txt"]


def test_a_full_disk_stops_a_checkpoint_with_one_line(tmp_path):
    script = f"""
import resource, torch
from pathlib import Path
from runtime import checkpoints
from runtime.errors import UserError
from runtime.identity import Identity
path = Path({str(tmp_path)!r}) / "c.safetensors"
checkpoints.save(path, {{"a": torch.zeros(2)}}, Identity("x", 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    checkpoints.save(path, {{"a": torch.zeros(100_000)}}, Identity("x", 0))
except UserError as error:
    print(error)
print(len(checkpoints.load(path, "x")[0]["a"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    says, kept = done.stdout.splitlines()
    assert "no space left" in says
    assert kept == "2"


def test_a_lock_is_exclusive_between_holders(tmp_path):
    with files.exclusive(tmp_path, "a/b"), pytest.raises(UserError, match="another process"):  # noqa: SIM117
        with files.exclusive(tmp_path, "a/b"):
            pass
    with files.exclusive(tmp_path, "a/b"):
        pass


def test_the_source_digest_sees_code_and_not_comments(tmp_path, monkeypatch):
    package = tmp_path / "toycode"
    package.mkdir()
    (package / "__init__.py").write_text("")
    module = package / "part.py"
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for text in ("x = 1\n", '"""What it is."""\n\nx = 1  # why\n', "x = 2\n"):
        module.write_text(text)
        from runtime import identity

        identity._module_digest.cache_clear()
        digests.append(source_digest("toycode.part"))
    assert digests[0] == digests[1] != digests[2]
