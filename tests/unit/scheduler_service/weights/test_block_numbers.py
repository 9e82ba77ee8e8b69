import pytest
import torch

from quartet.runtime.model_files import gguf
from quartet.scheduler_service.weights.block_numbers import FORMATS, numbers_of
from quartet.scheduler_service.weights.blocks import EXPAND

TYPES = {kind.name: kind for kind in gguf.TYPES.values()}


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_and_scales_of_blocks_make_their_values(name):
    kind = TYPES[name]
    blocks = torch.randint(0, 256, (12, kind.nbytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = EXPAND[name](blocks).view(6, -1)
    part = numbers_of(name, blocks, expected.shape[1])
    scheme = part.scheme
    scales = part.scales.repeat_interleave(scheme.group_size, 1)
    values = scales * (part.numbers.float() - scheme.zero_point)
    if part.offsets is not None:
        values = scales * part.numbers.float() + part.offsets.repeat_interleave(scheme.group_size, 1)
    usual = torch.isfinite(expected)  # random bytes are not always finite scales
    assert usual.any() and int(part.numbers.max()) < 1 << scheme.bits
    torch.testing.assert_close(values[usual], expected[usual], rtol=1e-6, atol=0)
