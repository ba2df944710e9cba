"""Counter-based random numbers."""

import random
from itertools import product

import numpy as np
import torch
from conftest import smooth
from torchvision import transforms as T

from util.rng import (
    CROP,
    MASK,
    ORDER,
    STEP,
    SampleRng,
    SeededTransform,
    generator,
    permutation,
    seed_everything,
    step_seed,
)


def test_draws_depend_only_on_seed_stream_epoch_and_index():
    first = generator(1, CROP, 2, 3).random(5)
    seed_everything(9)
    generator(1, MASK, 2, 3).random(100)
    assert np.array_equal(first, generator(1, CROP, 2, 3).random(5))


def test_draws_differ_if_one_of_the_four_numbers_differs():
    keys = product((0, 1, 2**40), (ORDER, CROP, MASK, STEP), (0, 1, 299), (0, 1, 2, 10**7))
    draws = {tuple(generator(*key).random(2)) for key in keys}
    assert len(draws) == 3 * 4 * 3 * 4


def test_sample_rng_equals_a_new_generator_for_each_sample():
    draws = SampleRng(2**63, MASK)
    for epoch, i in ((0, 0), (3, 10**7), (3, 5), (3, 10**7)):
        ours, own = draws.at(epoch, i), generator(2**63, MASK, epoch, i)
        for rng in (ours, own):
            # an odd number of 32-bit draws: the next sample must not use the half word left over
            rng.random(7, np.float32)
        assert ours.random() == own.random()
        assert np.array_equal(ours.random(5, np.float32), own.random(5, np.float32))


def test_neighbouring_samples_share_no_draws():
    a, b = (set(generator(0, MASK, 0, i).random(10_000).tolist()) for i in (0, 1))
    assert not a & b


def test_first_draws_over_samples_are_uniform_and_uncorrelated():
    firsts = np.array([generator(0, CROP, 3, i).random() for i in range(4000)])
    counts, _ = np.histogram(firsts, bins=10, range=(0, 1))
    assert abs(counts - 400).max() < 5 * (4000 * 0.1 * 0.9) ** 0.5  # 5 standard deviations
    assert abs(np.corrcoef(firsts[:-1], firsts[1:])[0, 1]) < 0.08  # 5 / sqrt(4000)


def test_permutation_has_every_sample_once_and_differs_by_epoch_and_seed():
    orders = [permutation(seed, epoch, 50) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert np.array_equal(orders[1], permutation(0, 1, 50))


def test_step_seeds_differ_by_seed_step_and_rank():
    assert len({step_seed(s, k, r) for s, k, r in product(range(3), range(50), range(8))}) == 3 * 50 * 8


def test_seeded_transform_ignores_the_global_generators():
    image = smooth(np.random.default_rng(0), 40, 30)
    augment = SeededTransform(T.Compose([T.RandomResizedCrop(16), T.ColorJitter(0.5, 0.5, 0.5)]))
    results = []
    for state in (0, 1, 2):
        random.seed(state)
        np.random.seed(state)  # noqa: NPY002  sets the global state
        torch.manual_seed(state)
        results.append(augment([image], generator(0, CROP, 0, 7)))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
    assert not np.array_equal(results[0], augment([image], generator(0, CROP, 1, 7)))


def test_seeded_transform_uses_the_same_draws_for_all_bands():
    image = smooth(np.random.default_rng(0), 40, 30)
    crop = SeededTransform(T.RandomResizedCrop(16))
    one, bands = crop([image], generator(0, CROP)), crop(image.split(), generator(0, CROP))
    assert np.array_equal(one, bands)
    out = np.zeros((16, 16, 3), np.uint8)
    crop(image.split(), generator(0, CROP), out)
    assert np.array_equal(one, out)
