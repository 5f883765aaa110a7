"""What a user reads of work that goes on."""

import json
import sys

import pytest

from pipelines import fanout


@pytest.mark.parametrize("terminal", [False, True])
def test_all_tasks_take_no_less_than_the_one_that_runs(terminal, tmp_path, monkeypatch, capsys):
    """Three tasks that were over at once say nothing of the fourth."""
    tasks = [(f"task {i}", tmp_path / f"{i}.json") for i in range(4)]
    for _, path in tasks[:3]:
        path.with_suffix(".done").touch()
    state = {"done": 24, "total": 8000, "note": "loss 1.38", "curves": {}, "pace": 1.0, "remaining": 7976.0}
    tasks[3][1].write_text(json.dumps(state))
    monkeypatch.setattr(fanout, "LINE_SECONDS", 0.05)
    monkeypatch.setattr(fanout, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "160")
    with fanout._shown(tasks):
        said = ""
        while said.count("left)") < 2:
            said += capsys.readouterr().err
    assert "all tasks" in said
    assert "24/8000" in said
    assert said.count("about 2.2 h left") == said.count("left)")


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        (None, ""),
        (5, " (about 5 s left)"),
        (119, " (about 119 s left)"),
        (6000, " (about 100 min left)"),
        (9000, " (about 2.5 h left)"),
    ],
)
def test_the_time_left_is_in_a_unit_that_suits_it(seconds, says):
    assert fanout._left(seconds) == says
