"""Counter-based random numbers: Philox4x32-10, a pure function of key and counter.

The same numbers come out on every device, in every batch and in every order, because nothing is remembered between
calls. A request's seed is the key, a token's position the counter, so a draw can be repeated after a retraction,
a restart or on another machine.
"""

import torch

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
_HALF = 0.5
_TO_UNIT = 2.0**-32


def philox(seeds: torch.Tensor, index: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Four 32-bit words per row for key `seeds` (rows,) and counter (index, position, 0, 0): int64 (4, rows)."""
    device = seeds.device
    multipliers = torch.tensor(MULTIPLIERS, device=device).unsqueeze(1)  # (2, 1)
    keys = _round_keys(seeds)  # (rounds, 2, rows)
    zeros = torch.zeros_like(seeds)
    even = torch.stack((index & WORD, zeros))  # counter words 0 and 2: (2, rows)
    odd = torch.stack((position & WORD, zeros))  # counter words 1 and 3: (2, rows)
    for key in keys:
        product = even * multipliers  # wraps modulo 2**64: all 64 bits are right
        high = (product >> 32) & WORD
        even = high.flip(0) ^ odd ^ key
        odd = (product & WORD).flip(0)
    return torch.stack((even[0], odd[0], even[1], odd[1]))  # (4, rows)


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One number in (0, 1) per row, float64, from 32 bits of the stream `seeds` at counter (0, positions)."""
    words = philox(seeds, torch.zeros_like(positions), positions)
    return (words[0].to(torch.float64) + _HALF) * _TO_UNIT  # (rows,)


def _round_keys(seeds: torch.Tensor) -> torch.Tensor:
    """The key of every round: (rounds, 2, rows)."""
    key = torch.stack((seeds & WORD, (seeds >> 32) & WORD))  # (2, rows)
    steps = torch.tensor(KEY_STEPS, device=seeds.device).view(1, 2, 1)
    rounds = torch.arange(ROUNDS, device=seeds.device).view(-1, 1, 1)
    return (key + rounds * steps) & WORD
