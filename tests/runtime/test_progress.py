"""What a task reports is what its driver reads, and resumed work does not look faster than it is."""

import json

import pytest

from runtime import progress


@pytest.fixture
def at(monkeypatch, tmp_path):
    """Report ``done`` of ``total`` at a time given in seconds; returns what the file then says."""
    path, now = tmp_path / "folder" / "task.json", [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    report = progress.to_file(path)

    def at(seconds, done, total=100, note=""):
        now[0] = 1e9 + seconds
        report(done, total, note)
        return json.loads(path.read_text())

    return at


def test_the_pace_is_that_of_this_process(at):
    begun = {"done": 51, "total": 100, "note": "resumed", "curves": {}, "pace": None, "remaining": None}
    assert at(0, 51, note="resumed") == begun
    assert at(10, 61)["remaining"] == pytest.approx(39)
    assert at(20, 100)["remaining"] == 0


def test_another_piece_of_work_has_a_pace_of_its_own(at):
    at(0, 1)
    at(99, 100)
    assert at(200, 10, 1000)["remaining"] is None
    assert at(201, 20, 1000)["remaining"] == pytest.approx(98)
    assert at(300, 5, 1000)["remaining"] is None


def test_it_writes_once_a_second_and_at_the_end(at):
    at(0, 1)
    assert at(0.5, 2)["done"] == 1
    assert at(1.0, 3)["done"] == 3
    assert at(1.1, 100)["done"] == 100
