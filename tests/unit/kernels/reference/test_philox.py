"""Philox4x32-10 in torch against published vectors and a plain-Python version."""

import torch

from quartet.kernels.reference.philox import philox, uniform


def python_philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, ...]:
    word = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & word, (p0 >> 32) ^ c3 ^ k1, p0 & word
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    return c0, c1, c2, c3


def words(seed: int, index: int, position: int) -> list[int]:
    return philox(torch.tensor([seed]), torch.tensor([index]), torch.tensor([position]))[:, 0].tolist()


def test_zero_key_and_counter_give_the_published_vector():
    assert words(0, 0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_agrees_with_plain_python_for_all_kinds_of_seeds():
    word = 0xFFFFFFFF
    for seed in (1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF):
        for index, position in ((0, 0), (7, 1), (151935, 131071)):
            expected = python_philox((seed & word, (seed >> 32) & word), (index, position, 0, 0))
            assert words(seed, index, position) == list(expected)


def test_a_number_does_not_depend_on_its_neighbours():
    seeds, positions = torch.arange(64) * 7919, torch.arange(64) + 5
    together = uniform(seeds, positions)
    alone = torch.cat([uniform(seeds[i : i + 1], positions[i : i + 1]) for i in range(64)])
    assert torch.equal(together, alone)


def test_numbers_fill_the_open_unit_interval_evenly():
    numbers = uniform(torch.zeros(20000, dtype=torch.int64), torch.arange(20000))
    assert numbers.min() > 0 and numbers.max() < 1
    counts = torch.histc(numbers.float(), bins=20, min=0, max=1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-square, 19 degrees of freedom, p = 0.0007
