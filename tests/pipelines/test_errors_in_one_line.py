"""Other people's exceptions, whatever their message, become one line that says something."""

import re
import threading
from pathlib import Path

import pytest
import torch

from pipelines import fanout, tracking
from pipelines.fanout import Machine
from runtime import checkpoints
from runtime.errors import UserError, first_line, last_line

ROOT = Path(__file__).resolve().parents[2]


def saying(message):
    """An exception's __str__ that returns, or raises, ``message``."""

    def text(self):
        if isinstance(message, Exception):
            raise message
        return message

    return text


MESSAGES = {
    "one line": ("it broke", "it broke", "it broke"),
    "several lines": ("first\nmiddle\n\tlast", "first", "last"),
    "blank ends": ("\n  \n  padded \r\n\n", "padded", "padded"),
    "empty": ("", "Odd", "Odd"),
    "blank": (" \n\t\n", "Odd", "Odd"),
    "unprintable": (RuntimeError("no message"), "Odd", "Odd"),
    "not a text": (None, "Odd", "Odd"),
}


def odd(kind, base=Exception):
    return type("Odd", (base,), {"__str__": saying(MESSAGES[kind][0])})()


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_line_of_any_exception(kind):
    assert (first_line(odd(kind)), last_line(odd(kind))) == MESSAGES[kind][1:]


def test_an_exception_without_arguments_is_named():
    assert first_line(KeyError()) == "KeyError"
    assert last_line(AssertionError()) == "AssertionError"


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


def record(folder):
    with tracking.stage(folder, "train-vae", "flat"):
        tracking.watch([], {}, None)
        tracking.record({0: {"loss": [[0, 1.5]]}})


@pytest.mark.parametrize("base", [Exception, OSError, UserError, RecursionError])
@pytest.mark.parametrize("kind", MESSAGES)
def test_whatever_goes_wrong_in_recording_is_one_warning(kind, base, tmp_path, monkeypatch, capsys):
    import mlflow

    monkeypatch.setattr(mlflow, "MlflowClient", raising(odd(kind, base)))
    record(tmp_path)
    said = capsys.readouterr().err
    assert said == f"warning: this stage was not recorded in MLflow: {MESSAGES[kind][1]}\n"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_who_stops_a_stage_while_it_records_stops_it(stop, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setattr(mlflow, "MlflowClient", raising(OSError()))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", raising(stop()))  # a stage waits there for what is written
        with pytest.raises(stop):
            record(tmp_path)
    for thread in threading.enumerate():
        if thread.name == "mlflow":
            thread.join()


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_checkpoint_that_does_not_fit_is_one_line(kind, monkeypatch):
    module = torch.nn.Linear(1, 1)
    monkeypatch.setattr(module, "load_state_dict", raising(odd(kind, RuntimeError)))
    with pytest.raises(UserError) as error:
        checkpoints.restore(module, {}, Path("vae.safetensors"))
    assert str(error.value) == f"vae.safetensors does not fit the model: {MESSAGES[kind][2]}"


REFUSALS = {
    "nowhere": "no Ray cluster answers at RAY_ADDRESS=nowhere ({}); start one or unset it",
    "": "Ray does not start on this machine ({}); mend that, or do without --shards",
}


@pytest.mark.parametrize("address", REFUSALS)
@pytest.mark.parametrize("base", [ConnectionError, ValueError, RuntimeError, Exception])
@pytest.mark.parametrize("kind", MESSAGES)
def test_a_cluster_that_does_not_answer_or_start_is_one_line(kind, base, address, monkeypatch):
    import ray

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "init", raising(odd(kind, base)))
    with pytest.raises(UserError) as error:
        fanout._on_ray([], Machine(shards=2))
    assert str(error.value) == REFUSALS[address].format(MESSAGES[kind][1])


def test_nothing_else_takes_a_line_that_a_message_may_not_have():
    for folder in ("runtime", "datasets", "models", "priors", "metrics", "pipelines"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"str\(\w+\)\.(split|splitlines|partition)\([^)]*\)\[", path.read_text()), path
