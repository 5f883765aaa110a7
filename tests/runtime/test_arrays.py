"""Folders of arrays: whole or absent, opened without being read, verified when that is asked for."""

import json

import numpy as np
import psutil
import pytest
import torch

from runtime import arrays, checkpoints
from runtime.arrays import Blocks
from runtime.errors import UserError
from runtime.identity import Identity

IDENTITY = Identity("toy", 0, {"rows": 10_000}, "source")
ARRAYS = {
    "images": torch.randint(256, (10_000, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    "labels": torch.arange(10_000),
    "points": torch.randn(10_000, 2, generator=torch.Generator().manual_seed(1)),
}


def test_what_is_mapped_is_what_was_written_and_any_tool_opens_it(tmp_path):
    arrays.save(tmp_path / "set", ARRAYS, IDENTITY)
    found, document = arrays.load_verified(tmp_path / "set", IDENTITY, "")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert torch.equal(found[name], array)
        assert np.array_equal(np.load(tmp_path / "set" / f"{name}.npy"), array.numpy())
    assert document["digest"] == checkpoints.digest(ARRAYS)
    assert arrays.verify(tmp_path / "set", "") == sum(path.stat().st_size for path in (tmp_path / "set").glob("*.npy"))


@pytest.mark.parametrize("length", [1, 999, 10_000])
def test_blocks_of_any_length_make_the_same_folder(tmp_path, length):
    arrays.save(tmp_path / "whole", ARRAYS, IDENTITY)
    blocks = {name: Blocks(tuple(array.shape), array.dtype, array.split(length)) for name, array in ARRAYS.items()}
    if length == 1:
        blocks = {"labels": blocks["labels"], "points": ARRAYS["points"], "images": ARRAYS["images"]}
    arrays.save(tmp_path / "blocks", blocks, IDENTITY)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "blocks" / path.name).read_bytes()


def test_what_is_mapped_cannot_change_the_file(tmp_path):
    arrays.save(tmp_path, ARRAYS, IDENTITY)
    arrays.load(tmp_path, "")[0]["labels"][0] = 7
    assert arrays.load(tmp_path, "")[0]["labels"][0] == 0


def test_memory_of_what_was_read_is_given_back_and_read_again(tmp_path):
    numbers = torch.arange(2**23)  # 64 MiB
    arrays.save(tmp_path, {"numbers": numbers}, IDENTITY)
    found = arrays.load(tmp_path, "")[0]
    assert found["numbers"].sum() == numbers.sum()
    resident = psutil.Process().memory_info().rss
    found.release()
    assert psutil.Process().memory_info().rss < resident - 2**25
    assert torch.equal(found["numbers"], numbers)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", range(4))
def test_killed_while_writing_it_is_absent_and_can_be_written_again(tmp_path, after):
    arrays.save(tmp_path, ARRAYS, IDENTITY)

    def dying(array, name):
        for index, rows in enumerate(array.split(3_000)):
            if index == after and name == "labels":
                raise Killed
            yield rows

    blocks = {name: Blocks(tuple(array.shape), array.dtype, dying(array, name)) for name, array in ARRAYS.items()}
    with pytest.raises(Killed):
        arrays.save(tmp_path, blocks, IDENTITY)
    assert arrays.load_current(tmp_path, IDENTITY) is None
    with pytest.raises(UserError, match="is missing; make it with: the command"):
        arrays.load(tmp_path, "the command")
    arrays.save(tmp_path, ARRAYS, IDENTITY)
    assert arrays.load_current(tmp_path, IDENTITY) is not None


@pytest.mark.parametrize("name", ARRAYS)
def test_a_flipped_bit_is_found_by_verify(tmp_path, name):
    arrays.save(tmp_path, ARRAYS, IDENTITY)
    content = bytearray((tmp_path / f"{name}.npy").read_bytes())
    content[-5] ^= 1
    (tmp_path / f"{name}.npy").write_bytes(content)
    arrays.load(tmp_path, "")
    with pytest.raises(UserError, match=r"do not match its digest.*: the command"):
        arrays.verify(tmp_path, "the command")


def test_another_configuration_is_refused_and_older_code_is_not_current(tmp_path):
    arrays.save(tmp_path, ARRAYS, IDENTITY)
    with pytest.raises(UserError, match="rows is 10000 there and 7 here"):
        arrays.load_verified(tmp_path, Identity("toy", 0, {"rows": 7}, "source"), "")
    assert arrays.load_current(tmp_path, Identity("toy", 0, {"rows": 10_000}, "newer")) is None


@pytest.mark.parametrize("document", ["", "[]", "{", "7", json.dumps({"bytes": {"images": "x"}}), json.dumps({"bytes": 3})])
def test_a_document_that_is_none_is_one_line(tmp_path, document):
    arrays.save(tmp_path, ARRAYS, IDENTITY)
    (tmp_path / arrays.DOCUMENT).write_text(document)
    with pytest.raises(UserError, match=r"corrupt or not a priorhole folder|another version") as error:
        arrays.load(tmp_path, "")
    assert "\n" not in str(error.value)
