import torch

from runtime.randomness import Noise, generator, initialising


def test_a_stream_depends_on_each_of_its_names():
    parts = [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1)]
    draws = [torch.randn(4, generator=generator(*part)) for part in parts]
    assert all(not torch.equal(draws[0], other) for other in draws[1:])
    assert torch.equal(draws[0], torch.randn(4, generator=generator(*parts[0])))


def test_a_row_gets_the_same_noise_in_any_batch():
    def noise(rows, repeats=1):
        source = Noise(0, "x", rows=rows, repeats=repeats)
        return source.normal((5,), (len(rows) * repeats, 3)), source.gumbel((5,), (len(rows) * repeats,))

    for whole, part in zip(noise(range(10)), noise([7, 2]), strict=True):
        assert torch.equal(whole[:, [7, 2]], part)
    repeated, single = noise(range(4), repeats=3)[0], noise([2], repeats=3)[0]
    assert torch.equal(repeated.view(5, 3, 4, 3)[:, :, 2], single)


def test_nothing_touches_the_global_generator():
    before = torch.random.get_rng_state()
    with initialising(0, "init"):
        torch.nn.Linear(3, 3)
    Noise(0, "x", rows=range(3)).normal((), (3, 2))
    assert torch.equal(before, torch.random.get_rng_state())


def test_noise_has_the_right_moments():
    source = Noise(0, "moments", rows=range(200))
    normal, gumbel = source.normal((100,), (200, 4)), source.gumbel((400,), (200,))
    assert abs(normal.mean()) < 0.02
    assert abs(normal.std() - 1) < 0.02
    assert abs(gumbel.mean() - 0.5772) < 0.02
    assert torch.isfinite(gumbel).all()


def test_streams_on_a_cpu_have_32_bits_of_seed_and_experiments_all_of_theirs():
    """torch's CPU generator takes the lower half of a seed; ours come from a hash, so that experiments do not collide."""
    cpu = [torch.rand(3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1 + 2**32)]
    assert torch.equal(*cpu)  # if this fails, torch has widened its seeds, and generator's docstring can be shortened
    ours = [torch.rand(3, generator=generator(seed, "x")) for seed in (1, 1 + 2**32)]
    assert not torch.equal(*ours)
    assert "32 bits" in generator.__doc__
