"""Files of rows: killed anywhere they lose one file's work, go on to the same rows, and are never written twice."""

import itertools

import pytest
import torch

from runtime import checkpoints, rowfiles
from runtime.errors import UserError
from runtime.identity import Identity

TOTAL = 30
IDENTITY = Identity("toy", 0, {"seed": 0}, "source")
VALUES = torch.arange(TOTAL + 20).double()[:, None] ** 0.5 * torch.ones(2)
LATENT_ROWS = 11


def compute(rows):
    found = {"x": VALUES[list(rows)], "count": torch.tensor(rows)}
    left = max(0, LATENT_ROWS - rows.start)
    return found | ({"z": VALUES[list(rows)][:left]} if left else {})


def column(folder, name):
    return rowfiles.column(rowfiles.stored(folder, "x"), name, "the command")


def fill(folder, per_file=8, block=3, total=TOTAL, identity=IDENTITY, compute=compute, report=lambda *_: None):
    rowfiles.fill(folder, identity, total, per_file, block, compute, report)


def assert_whole(folder, total=TOTAL):
    files = rowfiles.stored(folder, "")
    assert rowfiles.gaps(files, total) == []
    assert torch.equal(column(folder, "x"), VALUES[:total])
    assert torch.equal(column(folder, "count"), torch.arange(total))
    assert torch.equal(column(folder, "z"), VALUES[:LATENT_ROWS])
    assert (column(folder, "seconds") >= 0).all()
    assert column(folder, "block").diff().ge(0).all()


@pytest.mark.parametrize(("per_file", "block"), list(itertools.product((1, 8, 30, 1000), (1, 3, 50))))
def test_any_size_of_files_and_blocks_holds_the_same_rows(tmp_path, per_file, block):
    fill(tmp_path, per_file, block)
    assert_whole(tmp_path)
    assert max(len(file.rows) for file in rowfiles.stored(tmp_path, "")) <= per_file


def test_blocks_are_the_same_ones_whatever_the_files(tmp_path):
    computed = {per_file: [] for per_file in (6, 9, 30)}
    for per_file, rows in computed.items():
        fill(tmp_path / str(per_file), per_file, compute=lambda block, rows=rows: rows.append(block) or compute(block))
    assert computed[6] == computed[9] == computed[30] == [range(first, first + 3) for first in range(0, 30, 3)]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("second", [(8, 3), (5, 2)])
def test_killed_anywhere_it_loses_one_file_at_most_and_goes_on_to_the_same_rows(tmp_path, monkeypatch, second):
    save = checkpoints.save
    for n in itertools.count():
        folder, passed, ended = tmp_path / str(n), 0, []

        def burn(n=n):
            nonlocal passed
            if passed == n:
                raise Killed
            passed += 1

        def dying(rows, ended=ended):
            burn()
            ended.append(rows)
            return compute(rows)

        def dying_save(*arguments, **metadata):
            burn()
            save(*arguments, **metadata)
            burn()

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "save", dying_save)
            try:
                fill(folder, compute=dying)
            except Killed:
                pass
            else:
                break
        kept = {file.path: file.path.stat().st_mtime_ns for file in rowfiles.stored(folder, "")}
        done = sum(len(file.rows) for file in rowfiles.stored(folder, ""))
        assert sum(map(len, ended)) - done <= 8
        again = []
        fill(folder, *second, compute=lambda rows: again.append(rows) or compute(rows))  # noqa: B023
        assert_whole(folder)
        assert sum(map(len, again)) == TOTAL - done
        assert {path: path.stat().st_mtime_ns for path in kept} == kept  # nothing that was done is written again
    assert n > 10


def test_more_rows_are_added_to_those_that_there_are_and_fewer_keep_them(tmp_path):
    fill(tmp_path)
    computed = []
    fill(tmp_path, total=45, compute=lambda rows: computed.append(rows) or compute(rows))
    assert_whole(tmp_path, 45)
    assert min(rows.start for rows in computed) == TOTAL
    fill(tmp_path, total=4, compute=None)
    assert torch.equal(column(tmp_path, "x"), VALUES[:45])


@pytest.mark.parametrize("fault", ["truncated", "empty", "other configuration", "older code", "odd name"])
def test_what_is_not_of_this_identity_is_made_anew(tmp_path, fault):
    fill(tmp_path)
    victim = rowfiles.stored(tmp_path, "")[1].path
    foreign = {"x": torch.full((8, 2), 7.0), "count": torch.arange(8), "seconds": torch.ones(8), "block": torch.arange(8)}
    if fault == "truncated":
        victim.write_bytes(victim.read_bytes()[:-3])
    elif fault == "empty":
        victim.write_bytes(b"")
    elif fault == "odd name":
        victim.rename(tmp_path / "rows-8-16.safetensors")
    else:
        config, source = ({"seed": 1}, "source") if fault == "other configuration" else ({"seed": 0}, "older")
        checkpoints.save(victim, foreign, Identity("toy", 0, config, source), rows=8)
    computed = []
    fill(tmp_path, compute=lambda rows: computed.append(rows) or compute(rows))
    assert [row for rows in computed for row in rows] == list(range(8, 16))
    assert_whole(tmp_path)


def test_half_a_file_is_refused_by_whoever_reads_it(tmp_path):
    fill(tmp_path)
    victim = rowfiles.stored(tmp_path, "")[1].path
    victim.write_bytes(victim.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"corrupt .*; delete it and run: the command"):
        rowfiles.stored(tmp_path, "the command")


def test_work_begun_in_another_precision_is_not_gone_on_with(tmp_path):
    fill(tmp_path)
    rowfiles.stored(tmp_path, "")[1].path.unlink()
    bf16 = Identity("toy", 0, {"seed": 0}, "source", "bf16")
    with pytest.raises(UserError, match="was begun in fp32 and this machine computes in bf16"):
        fill(tmp_path, identity=bf16)
    fill(tmp_path)
    fill(tmp_path, identity=bf16, compute=None)  # what is finished may be of any


def test_bytes_written_are_what_the_files_occupy(tmp_path, monkeypatch):
    written, save = [], checkpoints.save

    def counting(path, *arguments, **metadata):
        save(path, *arguments, **metadata)
        written.append(path.stat().st_size)

    monkeypatch.setattr(checkpoints, "save", counting)
    fill(tmp_path)
    assert sum(written) == sum(file.path.stat().st_size for file in rowfiles.stored(tmp_path, ""))


def test_progress_counts_what_was_there(tmp_path):
    fill(tmp_path)
    rowfiles.stored(tmp_path, "")[1].path.unlink()
    told = []
    fill(tmp_path, report=lambda done, total, note: told.append((done, total)))
    assert told == [(23, TOTAL), (26, TOTAL), (29, TOTAL), (30, TOTAL)]  # blocks begin at multiples of three
