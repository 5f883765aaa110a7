import copy
import math
import threading
import time

import pytest
import torch

from runtime import checkpoints, training
from runtime.errors import UserError
from runtime.identity import Identity
from runtime.randomness import generator
from runtime.training import NonFiniteLossError, Plateau, Trainee, cosine, overfits, train


def make(tmp_path, name, ema=0.9):
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
    optimizer = torch.optim.Adam(module.parameters())
    identity = Identity("toy", 0, {"name": name})
    return Trainee(name, module, optimizer, cosine(1e-2, 0, 60, 5), tmp_path / f"{name}.safetensors", identity, 1.0, ema)


def losses(step, active):
    x = torch.randn(16, 3, generator=generator(0, "x", step=step))
    return [{"square": ((one.module(x) - x.sum(1, keepdim=True)) ** 2).mean()} for one in active]


@pytest.mark.parametrize("ema", [0.9, None])
def test_trainees_resumed_from_different_steps_equal_the_undisturbed_run(tmp_path, ema):
    (tmp_path / "whole").mkdir()
    whole = [make(tmp_path / "whole", name, ema) for name in "ab"]
    train(whole, 60, losses)
    for one in whole:
        one.finish()
    for stop, name in ((20, "a"), (35, "b")):
        started = make(tmp_path, name, ema)
        train([started], stop, losses)
        started.save_rolling()
    resumed = [make(tmp_path, name, ema) for name in "ab"]
    train(resumed, 60, losses)
    for one, other in zip(whole, resumed, strict=True):
        other.finish()
        state = other.module.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in one.module.state_dict().items())
        assert not other.rolling.exists()
    again = make(tmp_path, "a", ema)
    train([again], 60, losses)
    assert again.finished is not None
    assert torch.equal(again.module[0].weight, resumed[0].module[0].weight)


def test_a_fused_optimiser_resumes_with_parameters_in_channels_last(tmp_path):
    def trainee(name):
        torch.manual_seed(0)
        module = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(module.parameters(), fused=True)
        return Trainee(name, module, optimizer, lambda step: 1e-2, tmp_path / f"{name}.safetensors", Identity("toy", 0, {}))

    def own_losses(step, active):
        x = torch.randn(8, 3, 5, 5, generator=generator(0, "x", step=step))
        return [{"square": (one.module(x) ** 2).mean()} for one in active]

    whole, stopped, resumed = trainee("whole"), trainee("part"), trainee("part")
    train([whole], 20, own_losses)
    train([stopped], 10, own_losses)
    stopped.save_rolling()
    train([resumed], 20, own_losses)
    assert torch.equal(whole.module.weight, resumed.module.weight)


def test_the_best_held_out_state_is_kept_through_a_resumption_with_what_the_loss_carries(tmp_path):
    def scores(trainees):
        return [abs(one.step - 24) / 10 for one in trainees]  # best at the check after step 24

    def carrying(step, active):
        with torch.no_grad():
            active[0].companion.weight += 1
        return losses(step, active)

    def trainee():
        one = make(tmp_path, "a", ema=None)
        one.keep_best = True
        one.companion = torch.nn.Linear(1, 1)
        torch.nn.init.zeros_(one.companion.weight)
        return one

    first = trainee()
    train([first], 30, carrying, held_out=scores, checks=5)
    first.save_rolling()
    resumed = trainee()
    train([resumed], 60, carrying, held_out=scores, checks=10)
    assert resumed.companion.weight.item() == 60
    assert [step for step, *_ in resumed.held_out] == [6, 12, 18, 24, 30, 36, 42, 48, 54, 60]
    resumed.finish()
    (tmp_path / "other").mkdir()
    until = make(tmp_path / "other", "a", ema=None)
    train([until], 24, losses)
    kept = resumed.module.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in until.module.state_dict().items())
    again = make(tmp_path, "a", ema=None)
    again.resume()
    assert again.finished["held_out"] == resumed.held_out
    assert (again.finished["kept"], again.finished["ended"]) == (24, "budget")


def test_overfitting_is_a_gap_to_training_without_a_new_best():
    falling = [[i, 1.3 - 0.01 * i, 1.3] for i in range(6)]
    assert not overfits(falling)
    memorising = [[0, 1.2, 1.2], [1, 1.21, 1.1], [2, 1.25, 1.0], [3, 1.3, 0.9]]
    assert overfits(memorising)
    assert not overfits(memorising[:3])
    assert not overfits([[i, 1.3, 1.29] for i in range(6)])  # no gap: it has merely converged
    late = [[0, 1.2, 1.2], [1, 1.3, 1.1], [2, 1.25, 1.0], [3, 1.1, 0.9]]
    assert not overfits(late)


def test_a_checkpoint_of_another_identity_is_wiped_and_not_resumed(tmp_path):
    first = make(tmp_path, "a")
    train([first], 10, losses)
    first.save_rolling()
    other = copy.copy(make(tmp_path, "a"))
    other.identity = Identity("toy", 0, {"name": "something else"})
    other.resume()
    assert other.step == 0
    assert not other.rolling.exists()


def test_a_loss_that_breaks_names_its_term(tmp_path):
    def broken(step, active):
        bad = float("nan") if step == 3 else 1.0
        return [{"fine": one.module(torch.ones(2, 3)).mean(), "kl/k02": torch.tensor(bad)} for one in active]

    with pytest.raises(NonFiniteLossError, match=r"kl/k02 is not finite at step 3") as error:
        train([make(tmp_path, "a")], 10, broken)
    assert "\n" not in str(error.value)


def test_rolling_checkpoints_are_written_as_time_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    one = make(tmp_path, "a")
    seen = []
    train([one], 5, losses, lambda done, total, *_: seen.append((done, total)))
    assert one.rolling.exists()
    assert seen[-1] == (5, 5)


def test_the_learning_rate_warms_up_and_falls_to_its_final_value():
    rate = cosine(1.0, 0.1, 100, 10)
    assert rate(0) == pytest.approx(0.1)
    assert rate(9) == pytest.approx(1.0)
    assert rate(100) == pytest.approx(0.1)
    assert all(rate(step + 1) <= rate(step) for step in range(10, 100))


def test_a_cycle_goes_on_from_the_averaged_weights_with_a_fresh_optimiser(tmp_path):
    first = make(tmp_path, "first")
    train([first], 30, losses)
    cycled = make(tmp_path, "cycled")
    cycled.restarts = (30,)
    train([cycled], 30, losses)
    assert not cycled.optimizer.state
    for name, tensor in cycled.module.state_dict().items():
        assert torch.equal(tensor, first.average.module.state_dict()[name])


def test_without_averages_a_cycle_goes_on_from_the_last_weights(tmp_path):
    first, cycled = make(tmp_path, "first", None), make(tmp_path, "cycled", None)
    cycled.restarts = (30,)
    train([first], 30, losses)
    train([cycled], 30, losses)
    assert not cycled.optimizer.state
    for name, tensor in cycled.module.state_dict().items():
        assert torch.equal(tensor, first.module.state_dict()[name])


def test_a_module_settles_wherever_averages_take_its_weights_place(tmp_path):
    trainee, calls = make(tmp_path, "one"), []
    trainee.restarts, trainee.settle = (10, 20), lambda: calls.append(trainee.step)
    train([trainee], 30, losses)
    trainee.finish()
    assert calls == [10, 20, 30]


def test_each_loss_is_done_with_before_the_next_is_made(tmp_path):
    first, second = make(tmp_path, "first"), make(tmp_path, "second")

    def one_by_one(step, active):
        for place, trainee in enumerate(active):
            assert [one.step for one in active] == [step + 1] * place + [step] * (len(active) - place)
            yield losses(step, [trainee])[0]

    train([first, second], 5, one_by_one)
    assert (first.step, second.step) == (5, 5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("keep_best", [True, False])
def test_a_held_out_loss_that_is_not_finite_is_never_the_best(tmp_path, broken, keep_best):
    held_out = {10: 1.3, 20: broken, 30: 1.35}

    def scores(trainees):
        return [held_out[one.step] for one in trainees]

    judged = make(tmp_path, "a", ema=None)
    judged.keep_best = keep_best
    train([judged], 30, losses, held_out=scores, checks=3)
    judged.finish()
    (tmp_path / "other").mkdir()
    kept = make(tmp_path / "other", "a", ema=None)
    train([kept], 10 if keep_best else 30, losses)
    state = judged.module.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in kept.module.state_dict().items())


@pytest.mark.parametrize(("keep_best", "held_out"), [(True, [math.nan, math.nan]), (False, [1.3, math.nan])])
def test_a_state_without_a_finite_held_out_loss_is_not_saved(tmp_path, keep_best, held_out):
    one = make(tmp_path, "a", ema=None)
    one.keep_best = keep_best
    scores = iter(held_out)
    train([one], 20, losses, held_out=lambda trainees: [next(scores) for _ in trainees], checks=2)
    with pytest.raises(NonFiniteLossError, match="a: the held-out loss is not finite at step 20"):
        one.finish()
    assert not one.path.exists()


def history(*held_out):
    return [[10.0 * i, loss, 1.0] for i, loss in enumerate(held_out, 1)]


def test_a_plateau_cuts_the_rate_and_ends_the_training_when_cuts_no_longer_help():
    plateau = Plateau(patience=2)
    falling = [3.0, 2.0, 1.5, 1.2]
    assert (plateau.factor(history(*falling)), plateau.over(history(*falling))) == (1.0, False)
    assert plateau.factor(history(*falling, 1.2, 1.3)) == pytest.approx(0.3)
    assert plateau.factor(history(*falling, 1.2, 1.3, 1.1, 1.1)) == pytest.approx(0.3)  # a new best starts the wait anew
    assert not plateau.over(history(*falling, *[1.2] * 7))
    assert plateau.over(history(*falling, *[1.2] * 8))
    assert plateau.factor(history(*falling, 1.2, 1.2 - Plateau.SMALLEST_GAIN / 2)) == pytest.approx(0.3)
    assert plateau.factor(history(*falling, math.nan, math.nan)) == pytest.approx(0.3)


def test_training_ends_at_each_trainees_own_plateau_and_a_resumption_agrees(tmp_path):
    floors = {"early": 40, "late": 70}  # the step from which a trainee's held-out loss falls no more

    def scores(trainees):
        return [float(max(floors[one.name] - one.step, 0)) for one in trainees]

    def trainees(folder):
        folder.mkdir(exist_ok=True)
        made = [make(folder, name) for name in floors]
        for one in made:
            one.plateau = Plateau(patience=1)
        return made

    whole = trainees(tmp_path / "whole")
    train(whole, 200, losses, held_out=scores, checks=20)
    assert [one.step for one in whole] == [40 + 40, 70 + 40]  # CUTS cuts and the end, a check each
    stopped = trainees(tmp_path / "stopped")
    train(stopped, 80, losses, held_out=scores, checks=8)
    for one in stopped:
        one.save_rolling()
    resumed = trainees(tmp_path / "stopped")
    train(resumed, 200, losses, held_out=scores, checks=20)
    for one, other in zip(whole, resumed, strict=True):
        one.finish()
        other.finish()
        state = other.module.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in one.module.state_dict().items())
        assert checkpoints.load(other.path, "")[1]["ended"] == "plateau"


def test_a_group_of_parameters_may_have_a_learning_rate_of_its_own(tmp_path):
    module = torch.nn.ModuleList([torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)])
    groups = [{"params": list(module[0].parameters())}, {"params": list(module[1].parameters()), "scale": 0.1}]
    one = Trainee(
        "a", module, torch.optim.SGD(groups, lr=1.0), lambda step: 0.5, tmp_path / "a.safetensors", Identity("toy", 0, {})
    )
    before = [layer.weight.item() for layer in module]
    one.update({"sum": module[0].weight.sum() + module[1].weight.sum()})
    assert [old - layer.weight.item() for old, layer in zip(before, module, strict=True)] == pytest.approx([0.5, 0.05])


def test_training_begun_in_one_precision_is_not_gone_on_with_in_another(tmp_path):
    begun = make(tmp_path, "a")
    train([begun], 10, losses)
    begun.save_rolling()
    elsewhere = make(tmp_path, "a")
    elsewhere.identity = Identity("toy", 0, {"name": "a"}, precision="bf16")
    with pytest.raises(UserError, match="was begun in fp32 and this machine computes in bf16: finish it") as error:
        train([elsewhere], 20, losses)
    assert "\n" not in str(error.value)
    assert begun.rolling.exists()
    begun.finish()
    train([elsewhere], 20, losses)  # what is finished serves everywhere
    assert elsewhere.finished["precision"] == "fp32"


def writing_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("rolling-checkpoints")]


def test_every_checkpoint_written_in_the_background_resumes_to_the_same_numbers(tmp_path, monkeypatch):
    whole = make(tmp_path, "a")
    train([whole], 30, losses)
    assert not whole.rolling.exists()
    kept, save = [], checkpoints.save

    def keeping(path, tensors, identity, **metadata):
        time.sleep(0.01)  # the weights move on meanwhile
        save(path, tensors, identity, **metadata)
        kept.append(path.read_bytes())

    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(checkpoints, "save", keeping)
    train([make(tmp_path, "a")], 30, losses)
    monkeypatch.undo()
    assert kept
    for content in kept:
        resumed = make(tmp_path, "a")
        resumed.rolling.write_bytes(content)
        train([resumed], 30, losses)
        for name, tensor in whole.average.state_dict().items():
            assert torch.equal(tensor, resumed.average.state_dict()[name])
        assert [row for row in whole.history if row not in resumed.history] == []


def test_training_goes_on_while_a_checkpoint_is_written_and_waits_for_it_at_the_end(tmp_path, monkeypatch):
    begun, go_on, seen, save = threading.Event(), threading.Event(), [], checkpoints.save

    def slow(path, tensors, identity, **metadata):
        begun.set()
        assert go_on.wait(60)
        seen.append(metadata["step"])
        save(path, tensors, identity, **metadata)

    def watched(step, active):
        if step == 1:
            assert begun.wait(60)
        if step == 8:  # no second one was begun beside the first
            assert len(writing_threads()) == 1
            assert not seen
            go_on.set()
        return losses(step, active)

    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training, "SAVE_BYTES_A_SECOND", math.inf)
    monkeypatch.setattr(checkpoints, "save", slow)
    one = make(tmp_path, "a")
    train([one], 9, watched)
    assert seen[0] == 1
    assert one.rolling.exists()
    assert not writing_threads()


@pytest.mark.parametrize("error", [NonFiniteLossError("broken"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_no_thread_writes_on_when_training_is_broken_off(tmp_path, monkeypatch, error):
    save, begun, written = checkpoints.save, threading.Event(), []

    def slow(*arguments, **metadata):
        begun.set()
        time.sleep(0.3)
        save(*arguments, **metadata)
        written.append(metadata["step"])

    def breaking(step, active):
        if step == 3:
            assert begun.wait(60)
            raise error
        return losses(step, active)

    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training, "SAVE_BYTES_A_SECOND", math.inf)
    monkeypatch.setattr(checkpoints, "save", slow)
    with pytest.raises(type(error)):
        train([make(tmp_path, "a")], 10, breaking)
    assert written
    assert not writing_threads()


@pytest.mark.parametrize("last", [False, True])
def test_a_checkpoint_that_cannot_be_written_stops_the_training_with_its_reason(tmp_path, monkeypatch, last):
    failed = threading.Event()

    def failing(*arguments, **metadata):
        failed.set()
        raise UserError("a.partial.safetensors: no space left on the device")

    def watched(step, active):
        if step == (9 if last else 2):
            monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
        if step == 5 and not last:
            assert failed.wait(60)
        assert step < 100
        return losses(step, active)

    monkeypatch.setattr(training, "SAVE_BYTES_A_SECOND", math.inf)
    monkeypatch.setattr(checkpoints, "save", failing)
    with pytest.raises(UserError, match="no space left on the device"):
        train([make(tmp_path, "a")], 10 if last else 10_000, watched)
    assert not writing_threads()


@pytest.mark.parametrize(("size", "seconds"), [(1e3, 20), (200e6, 20), (2e9, 200), (6e9, 600)])
def test_large_states_are_written_more_seldom(tmp_path, monkeypatch, size, seconds):
    clock, saved = [0.0], []

    class Large(Trainee):
        def state(self):
            return {"large": torch.empty(int(size), dtype=torch.uint8, device="meta")}

        def snapshot(self):
            saved.append(clock[0])
            return lambda: None

    one = Large("a", torch.nn.Linear(1, 1), None, None, tmp_path / "a.safetensors", Identity("toy", 0, {}))
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    with training._Saver() as saver:
        for passed in range(1, 3 * seconds + 10):
            clock[0] = float(passed)
            if saver._writing is not None:
                saver._writing.result()
            saver.save_if_due([one])
    assert saved == [seconds + 1, 2 * (seconds + 1), 3 * (seconds + 1)]
