import numpy as np

from datamodules import rng


def test_the_same_numbers_on_every_machine_and_version():
    # Recorded once: a change would silently break the resume of runs that were started before it.
    keys = rng.sample_keys(7, 3, np.arange(3))
    assert keys.tolist() == [5674437668883865938, 6175475976628623726, 8656092063685406941]
    assert rng.uniform(keys[:1], 2, 3).tolist() == [[0.19199477498977557, 0.9915117351072946, 0.5690367962236119]]


def test_mixer_is_the_published_one():
    # First outputs of SplitMix64 with seed 1234567, as listed with the reference implementation (Vigna, public domain).
    state = (1234567 + 0x9E3779B97F4A7C15 * np.arange(1, 4).astype(object)) % 2**64
    assert rng.mix(state.astype(np.uint64)).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_words_depend_on_every_part_and_on_their_order():
    values = {rng.word(*parts) for parts in [(1, 2), (2, 1), (1,), (1, 2, 0), (-1, 2), (2**64 + 1, 2), (-(2**64), 2)]}
    assert len(values) == 7


def test_keys_fit_in_int64_and_differ():
    keys = np.concatenate([rng.sample_keys(seed, epoch, np.arange(20_000)) for seed in (0, 1) for epoch in (0, 1)])
    assert keys.min() >= 0
    assert len(np.unique(keys)) == len(keys)


def test_uniform_is_uniform_and_purposes_are_independent():
    keys = rng.sample_keys(0, 0, np.arange(50_000))
    a, b = rng.uniform(keys, 1, 2), rng.uniform(keys, 2, 2)
    assert a.min() >= 0 and a.max() < 1
    counts = np.histogram(a, bins=50, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 100  # chi-square, 49 degrees of freedom: 85 is the 0.1% point
    together = np.corrcoef(np.concatenate([a, b], axis=1).T) - np.eye(4)
    assert np.abs(together).max() < 0.02


def test_uniform_of_one_key_does_not_depend_on_its_neighbours():
    keys = rng.sample_keys(0, 0, np.arange(10))
    assert (rng.uniform(keys, 1, 4)[3:5] == rng.uniform(keys[3:5], 1, 4)).all()
