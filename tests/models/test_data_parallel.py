"""Several processes train one VAE: the same batches, draws and losses as one, by whatever number it goes on."""

import pytest
import torch
from together import train

from models.trainer import TrainOptions
from runtime.errors import UserError
from runtime.randomness import Noise

pytestmark = pytest.mark.clusters

LOSS = 1e-4
"""Nats: losses are sums in another order."""
STEPS = {"residual-hvae": 40, "nvae": 200}


def difference(losses, others):
    assert len(losses) == len(others)
    return (torch.tensor(losses) - torch.tensor(others)).abs().max()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of one process, by model, and a folder for other trainings."""
    folder = tmp_path_factory.mktemp("trainings")
    return folder, {kind: train(folder / kind, kind, 1, steps) for kind, steps in STEPS.items()}


@pytest.mark.parametrize(("kind", "steps"), STEPS.items())
def test_two_processes_train_as_one_does(alone, kind, steps):
    folder, losses = alone
    assert difference(losses[kind], train(folder / f"{kind}-2", kind, 2, steps)) < LOSS


def test_other_numbers_of_processes_go_on_with_it(alone):
    folder, losses = alone
    own, whole = folder / "resumed", losses["residual-hvae"]
    for processes, at in ((1, 10), (2, 25), (1, None)):
        assert (own / "vae.partial.safetensors").exists() == (at != 10)
        made = train(own, "residual-hvae", processes, at=at)
        end = len(whole) if at is None else at
        assert difference(made, whole[end - len(made) : end]) < LOSS
        assert len(made) < end or at == 10


def test_parts_of_a_batch_add_up_to_it(alone):
    folder, _ = alone
    plain = {"kl_balance": False}  # its weights are those of a part's own divergences
    whole = train(folder / "whole", "residual-hvae", 1, 10, **plain)
    assert difference(whole, train(folder / "parts", "residual-hvae", 1, 10, accumulate=4, **plain)) < LOSS


def test_they_train_so_on_an_accelerator_too(alone):
    folder, losses = alone
    found = train(folder / "accelerated", "nvae", 2, 3, pretend=True)
    assert difference(losses["nvae"][:1], found[:1]) < LOSS
    assert len(found) == 3


def test_batch_norms_of_their_own_make_other_numbers(alone):
    folder, losses = alone
    found = train(folder / "own", "nvae", 2, 10, sync_batch_norm=False)
    assert difference(found[:1], losses["nvae"][:1]) > 10 * LOSS


def test_what_cannot_be_shared_equally_is_refused():
    options = TrainOptions(steps=1, batch=12, learning_rate=0.1, accumulate=2)
    assert [options.parts(3, rank) for rank in range(3)] == [
        [range(0, 2), range(2, 4)],
        [range(4, 6), range(6, 8)],
        [range(8, 10), range(10, 12)],
    ]
    with pytest.raises(UserError, match="a batch of 12 cannot be shared equally by 4 processes, 2 parts each"):
        options.parts(4, 0)


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("kind", ["normal", "uniform", "gumbel"])
def test_parts_get_the_noise_that_they_have_in_the_batch(kind, lead):
    def draw(rows):
        noise = Noise(0, "x").cut(rows, 6)
        return [getattr(noise, kind)(lead, (len(rows), 2)) for _ in range(2)]

    whole = Noise(0, "x")
    expected = [getattr(whole, kind)(lead, (6, 2)) for _ in range(2)]
    for rows in (range(6), range(0, 2), range(2, 6)):
        for found, drawn in zip(draw(rows), expected, strict=True):
            assert torch.equal(found, drawn.narrow(len(lead), rows.start, len(rows)))


def test_rows_with_streams_of_their_own_are_not_cut_out():
    with pytest.raises(ValueError, match="picked"):
        Noise(0, "x", rows=[0, 1]).cut(range(1), 2)
