"""How the tokens of a step are grouped by adapter."""

import random

from quartet.kernels.reference.adapters import TILE_TOKENS, most_tiles, tiles_of


def test_tokens_of_one_adapter_share_tiles_wherever_they_stand():
    tiles, order = tiles_of([(1, 0, 2), (0, 3, 4), (1, 10, 12)], ranks=[8, 4])
    assert tiles == [[0, 0, 1, 8], [1, 1, 4, 4]]
    assert order == [3, 0, 1, 10, 11]


def test_every_token_is_in_one_tile_of_its_adapter_and_there_is_room_for_all_tiles():
    dice = random.Random(0)
    for _ in range(200):
        slots = dice.randint(1, 6)
        lengths = [dice.choice([1, 1, 5, 16, 40]) for _ in range(dice.randint(1, 20))]
        owners = [dice.randint(-1, slots - 1) for _ in lengths]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        runs = [(o, s, s + n) for o, s, n in zip(owners, starts, lengths, strict=True) if o >= 0]
        tiles, order = tiles_of(runs, ranks=list(range(1, slots + 1)))
        found = {}
        for slot, begin, count, rank in tiles:
            assert 0 < count <= TILE_TOKENS and rank == slot + 1
            found |= dict.fromkeys(order[begin : begin + count], slot)
        assert found == {token: slot for slot, begin, end in runs for token in range(begin, end)}
        assert len(order) == len(found) and len(tiles) <= most_tiles(sum(lengths), slots)
