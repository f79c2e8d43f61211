import pytest
import torch

from fastprompt.nn import AlignmentLoss
from fastprompt.nn.pooling import POOLINGS, pool

LENGTHS = [3, 1, 5, 2]
ROW = {"mean": lambda rows: rows.mean(0), "first": lambda rows: rows[0], "last": lambda rows: rows[-1]}


def sentences(left: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same sentences packed, their bounds, padded with NaN, and the mask."""
    rows = [torch.randn(length, 6, dtype=torch.float64) for length in LENGTHS]
    padded = torch.full((len(rows), max(LENGTHS), 6), torch.nan, dtype=torch.float64)
    mask = torch.zeros(padded.shape[:2], dtype=torch.long)
    for b, each in enumerate(rows):
        place = slice(-len(each), None) if left else slice(len(each))
        padded[b, place], mask[b, place] = each, 1
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return torch.cat(rows), bounds, padded, mask


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_padded_and_packed_pool_alike(pooling, left):
    packed, bounds, padded, mask = sentences(left)
    packed.requires_grad_()
    padded.requires_grad_()
    want = torch.stack([ROW[pooling](rows) for rows in packed.split(LENGTHS)])
    grad = torch.randn_like(want)
    (want_grad,) = torch.autograd.grad(want, packed, grad)
    by_bounds, by_mask = pool(packed, pooling, cu_seqlens=bounds), pool(padded, pooling, mask)
    torch.testing.assert_close(by_bounds, want)
    torch.testing.assert_close(by_mask, want)
    torch.testing.assert_close(torch.autograd.grad(by_bounds, packed, grad)[0], want_grad)
    (padded_grad,) = torch.autograd.grad(by_mask, padded, grad)
    torch.testing.assert_close(padded_grad[mask.bool()], want_grad)
    assert not padded_grad[~mask.bool()].any()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_without_mask_and_without_rows(pooling):
    hidden = torch.randn(3, 4, 2)
    torch.testing.assert_close(pool(hidden, pooling), torch.stack([ROW[pooling](rows) for rows in hidden]))
    mask = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]])
    assert not pool(hidden, pooling, mask)[0].any()
    vectors = torch.randn(3, 2)
    assert pool(vectors, pooling) is vectors


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_loss_takes_rows_of_either_kind(pooling):
    packed, bounds, padded, mask = sentences(left=True)
    loss = AlignmentLoss(6, 6, pooling=pooling, distance="infonce").double()
    teacher = torch.randn(len(LENGTHS), 6, dtype=torch.float64)
    want = loss(torch.stack([ROW[pooling](rows) for rows in packed.split(LENGTHS)]), teacher)
    torch.testing.assert_close(loss(packed, teacher, student_cu_seqlens=bounds), want)
    torch.testing.assert_close(loss(padded, teacher, student_mask=mask), want)
    other = loss(teacher, packed, teacher_cu_seqlens=bounds)
    torch.testing.assert_close(loss(teacher, padded, teacher_mask=mask), other)


@pytest.mark.parametrize(
    "arguments, match",
    [
        ((torch.ones(2, 3, 4), "max"), r"pooling must be one of \('mean', 'first', 'last'\), got 'max'"),
        ((torch.ones(2, 3, 4), "mean", torch.ones(2, 4)), r"mask must be \(2, 3\), as the rows are, got \(2, 4\)"),
        ((torch.ones(2, 4), "mean", torch.ones(2, 4)), r"mask needs padded rows \(B, L, D\), got \(2, 4\)"),
        (
            (torch.ones(2, 4), "mean", torch.ones(2, 4), torch.tensor([0, 2], dtype=torch.int32)),
            "mask must be None with cu_seqlens",
        ),
    ],
)
def test_bad_input(arguments, match):
    with pytest.raises(ValueError, match=match):
        pool(*arguments)
