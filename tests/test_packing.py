"""Packing: the kept tokens of a batch in one row, and back."""

import pytest
import torch

from models.packing import pack, plan_packing, unpack


def random_masks(batch: int, length: int, share: float, seed: int = 0) -> torch.Tensor:
    """Keep masks in which, as in the router's, the first and last token are kept."""
    keep = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < share
    keep[:, 0] = keep[:, -1] = True
    return keep


@pytest.mark.parametrize("batch, share", [(1, 0.3), (5, 0.0), (5, 0.3), (5, 1.0)])
def test_plan_is_boolean_indexing(batch, share):
    keep = random_masks(batch, 16, share)
    packing = plan_packing(keep)
    sample, token = keep.nonzero(as_tuple=True)  # in raster order, sample after sample
    assert torch.equal(packing.token_index, sample * 16 + token)
    assert torch.equal(packing.sample, sample)
    assert packing.lengths.tolist() == keep.sum(1).tolist()
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.cu_seqlens.tolist() == [sum(packing.lengths[:k]) for k in range(batch + 1)]


def test_lengths_that_are_known_are_not_read():
    keep = random_masks(3, 16, 0.4)
    plan = plan_packing(keep)
    known = plan.lengths.tolist()
    for same in (plan_packing(keep, known), plan_packing(keep[:1], known[0])):
        part = slice(0, len(same.token_index))
        assert (
            torch.equal(same.token_index, plan.token_index[part])
            and same.lengths.tolist() == known[: len(same.lengths)]
        )
    with pytest.raises((NotImplementedError, RuntimeError)):
        plan_packing(keep.to("meta"))
    assert plan_packing(keep.to("meta"), 5).token_index.shape == (15,)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_pack_and_unpack(share):
    keep = random_masks(3, 25, share)
    packing, x = plan_packing(keep), torch.randn(3, 25, 6)
    tokens = pack(x, packing)
    assert torch.equal(tokens, x[keep])
    assert torch.equal(unpack(tokens, packing, 25), x * keep[:, :, None])
    assert torch.equal(pack(unpack(tokens, packing, 25), packing), tokens)


def test_gradients():
    packing = plan_packing(random_masks(3, 9, 0.4))
    x = torch.randn(3, 9, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pack(x, packing), x)
    tokens = torch.randn(sum(packing.lengths), 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda tokens: unpack(tokens, packing, 9), tokens)
