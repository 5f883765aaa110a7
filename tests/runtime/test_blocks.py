"""Work in blocks: killed anywhere it leaves a whole result or none, goes on to the same numbers, and times what it did."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from runtime import blocks, checkpoints, hardware
from runtime.blocks import in_blocks, mean_and_error_over_blocks, partial_path
from runtime.errors import UserError
from runtime.identity import Identity

TOTAL = 30
IDENTITY = Identity("toy", 0, {"images": TOTAL}, "source")
EXPECTED = {"x": torch.arange(TOTAL).double()[:, None] ** 0.5 * torch.ones(2), "count": torch.arange(TOTAL)}


def compute(rows):
    return {name: values[list(rows)] for name, values in EXPECTED.items()}


class Killed(BaseException):
    pass


class Fuse:
    """Kills the work at the n-th place where it could be killed; with ``n`` None, never."""

    def __init__(self, monkeypatch, n):
        self.n, self.rows, self._passed = n, [], 0
        save = checkpoints.save

        def guarded_save(*arguments, **metadata):
            self.burn()
            save(*arguments, **metadata)
            self.burn()

        monkeypatch.setattr(blocks, "SAVE_SECONDS", -1.0)
        monkeypatch.setattr(blocks, "checkpoints", SimpleNamespace(**vars(checkpoints) | {"save": guarded_save}))

    def burn(self):
        if self._passed == self.n:
            raise Killed
        self._passed += 1

    def run(self, path, block):
        def guarded(rows):
            self.burn()
            self.rows.append(rows)
            return compute(rows)

        return in_blocks(path, IDENTITY, TOTAL, block, guarded, lambda done, total, note: self.burn())


def stored_rows(path):
    return len(checkpoints.load(path, "")[0]["x"]) if path.exists() else 0


def assert_whole(found):
    assert found.keys() == {"x", "count", "seconds", "block"}
    assert all(torch.equal(found[name], values) for name, values in EXPECTED.items())
    assert (found["seconds"] >= 0).all()
    steps = found["block"].diff()
    assert found["block"].dtype == torch.int64
    assert found["block"][0] == 0
    assert ((steps == 0) | (steps == 1)).all()  # a resumed run's blocks are other ones than those before it
    for index in found["block"].unique():
        assert found["seconds"][found["block"] == index].unique().numel() == 1


def foreign(count, identity=IDENTITY, **more):
    """Contents that are none of this work's, all of the value 7, as a file of an identity."""
    rows = {"x": torch.full((count, 2), 7.0).double(), "count": torch.full((count,), 7)}
    return rows | {"seconds": torch.ones(count).double()} | more, identity


BLOCK_OF_ONE = {"block": torch.zeros(TOTAL, dtype=torch.int64)}
LEFT_OVER = {
    "nothing": None,
    "another configuration": foreign(TOTAL, Identity("toy", 0, {"images": TOTAL, "seed": 1}, "source"), **BLOCK_OF_ONE),
    "older code": foreign(TOTAL, Identity("toy", 0, {"images": TOTAL}, "older"), **BLOCK_OF_ONE),
    "fewer rows": foreign(7, block=torch.zeros(7, dtype=torch.int64)),
    "more rows": foreign(40, block=torch.zeros(40, dtype=torch.int64)),
    "rows without blocks": foreign(TOTAL),
}


@pytest.mark.parametrize("blocks_of", [(7, 7), (7, 4), (10, 10), (30, 30)])
def test_killed_anywhere_it_leaves_a_whole_file_or_none_and_goes_on_to_the_same_rows(tmp_path, monkeypatch, blocks_of):
    for n in itertools.count():
        path = tmp_path / str(n) / "rows.safetensors"
        fuse = Fuse(monkeypatch, n)
        try:
            fuse.run(path, blocks_of[0])
        except Killed:
            pass
        else:
            break
        monkeypatch.undo()
        if path.exists():
            assert_whole(checkpoints.load_verified(path, IDENTITY, "")[0])
        done = TOTAL if path.exists() else stored_rows(partial_path(path))
        again = Fuse(monkeypatch, None)
        assert_whole(again.run(path, blocks_of[1]))
        monkeypatch.undo()
        assert [row for rows in again.rows for row in rows] == list(range(done, TOTAL))  # only what was missing
        assert_whole(checkpoints.load_verified(path, IDENTITY, "")[0])
        assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert n > 3 * (TOTAL // blocks_of[0])


PLACES = [(place, name) for place in ("final", "partial") for name in LEFT_OVER]
PLACES.remove(("partial", "fewer rows"))  # which is as it should be


@pytest.mark.parametrize(("place", "left_over"), PLACES)
def test_what_lies_there_before_is_never_taken_for_the_result(tmp_path, monkeypatch, place, left_over):
    path = tmp_path / "rows.safetensors"
    if LEFT_OVER[left_over] is not None:
        checkpoints.save(path if place == "final" else partial_path(path), *LEFT_OVER[left_over])
    for n in (0, 4, None):  # before the first block, and after it
        fuse = Fuse(monkeypatch, n)
        if n is None:
            assert_whole(fuse.run(path, 10))
        else:
            with pytest.raises(Killed):
                fuse.run(path, 10)
            assert not path.exists()
        monkeypatch.undo()
    assert_whole(checkpoints.load(path, "")[0])


def test_a_finished_file_is_returned_as_it_is(tmp_path, monkeypatch):
    path = tmp_path / "rows.safetensors"
    first = in_blocks(path, IDENTITY, TOTAL, 7, compute)
    fuse = Fuse(monkeypatch, 0)
    again = fuse.run(path, 7)
    assert all(torch.equal(first[name], again[name]) for name in first)


class Device:
    """A clock, and a device that does nothing until it is waited for, as a GPU's calls do."""

    def __init__(self, monkeypatch, in_use):
        self.now, self.queued, self.waits = 0.0, 0.0, 0
        for module in (blocks, hardware):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)

    def synchronize(self):
        self.now, self.queued, self.waits = self.now + self.queued, 0.0, self.waits + 1


def test_a_block_is_timed_until_the_device_has_done_its_work_and_from_when_it_was_idle(tmp_path, monkeypatch):
    device = Device(monkeypatch, in_use=True)
    device.queued = 1000.0  # of what came before, none of which the first block is to pay for

    def slow(rows):
        device.queued += 2.0 * len(rows) + rows.start
        return compute(rows)

    def report(done, total, note):
        device.queued += 500.0

    found = in_blocks(tmp_path / "rows.safetensors", IDENTITY, TOTAL, 7, slow, report)
    for index in range(5):
        own = found["seconds"][found["block"] == index]
        assert own.sum().item() == pytest.approx(2.0 * len(own) + 7 * index)


def test_a_device_that_is_not_in_use_is_not_waited_for(tmp_path, monkeypatch):
    device = Device(monkeypatch, in_use=False)
    in_blocks(tmp_path / "rows.safetensors", IDENTITY, TOTAL, 7, compute)
    assert device.waits == 0


def times(repeat, sizes):
    """Seconds and block of each row: a block's rows share one draw of a log-normal time."""
    each = np.random.default_rng(repeat).lognormal(0, 0.5, len(sizes))
    return torch.from_numpy(np.repeat(each, sizes)), torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


@pytest.mark.parametrize("sizes", [[1] * 40, [10] * 20, [50] * 7 + [13], [30, 20, 25, 10] * 6])
def test_the_error_over_blocks_is_the_spread_that_repetition_shows(sizes):
    found = np.array([mean_and_error_over_blocks(*times(repeat, sizes)) for repeat in range(2000)])
    spread = found[:, 0].std(ddof=1)
    assert math.sqrt((found[:, 1] ** 2).mean()) == pytest.approx(spread, rel=0.1)
    assert (found[:, 2] == len(sizes)).all()


def test_equal_blocks_have_the_error_of_the_mean_of_their_times_whatever_their_names_and_order():
    seconds, block = times(0, [10] * 20)
    mean, error, count = mean_and_error_over_blocks(seconds, block)
    each = seconds[::10]
    assert (mean, count) == (pytest.approx(seconds.mean().item()), 20)
    assert error == pytest.approx((each.std() / 20**0.5).item())
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    renamed = mean_and_error_over_blocks(seconds[order], 1000 - 3 * block[order])
    assert renamed == (pytest.approx(mean), pytest.approx(error), 20)


def test_one_block_alone_says_nothing_of_the_error():
    mean, error, count = mean_and_error_over_blocks(torch.full((9,), 2.0).double(), torch.zeros(9, dtype=torch.int64))
    assert (mean, count) == (2.0, 1)
    assert math.isnan(error)


def test_work_begun_in_one_precision_is_not_gone_on_with_in_another(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    with pytest.raises(Killed):
        Fuse(monkeypatch, 8).run(path, 5)
    assert partial_path(path).exists()
    monkeypatch.undo()
    elsewhere = Identity(IDENTITY.experiment, IDENTITY.seed, IDENTITY.config, IDENTITY.source, "bf16")
    with pytest.raises(UserError, match="was begun in fp32 and this machine computes in bf16: finish it"):
        in_blocks(path, elsewhere, TOTAL, 5, compute)
    assert_whole(in_blocks(path, IDENTITY, TOTAL, 5, compute))
    assert_whole(in_blocks(path, elsewhere, TOTAL, 5, compute))  # what is finished serves everywhere
