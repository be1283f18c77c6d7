import pytest
import torch

from hf_specreg.spectral.sharding import Rows, scaled


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("blocks", [1, 2, 6])
def test_every_block_of_rows_is_scaled_by_its_factor_in_its_own_layout(blocks, memory_format):
    direction = torch.randn(6, 4, 3, 3).to(memory_format=memory_format)
    factors = torch.arange(1.0, blocks + 1)
    found = scaled(direction, factors, Rows(0, 6))
    expected = torch.cat([f * d for f, d in zip(factors, direction.chunk(blocks), strict=True)])
    assert torch.equal(found, expected)
    assert found.stride() == direction.stride()
