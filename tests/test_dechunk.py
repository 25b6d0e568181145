"""Dechunk: smoothing against the dense formula, plug-back against a search, and the router's gradient."""

import functools

import pytest
import torch

from grid import Grid
from models.dechunk import Dechunk
from models.ops.distance import nearest_kept, nearest_token
from models.ops.smoothing import gaussian_kernel
from models.packing import pack, plan_packing
from models.tail_drop import drop_tail, force_ends
from models.types import Routing

GRID = Grid(5, 5)
LENGTH = GRID.cells
RECTANGLES = [Grid(3, 5), Grid(7, 2)]
NO_RESIDUAL = torch.zeros(())  # broadcasts


def squared_distances(grid: Grid) -> torch.Tensor:
    """(L, L) between all cells of the grid."""
    cell = torch.arange(grid.cells)
    place = torch.stack([cell // grid.columns, cell % grid.columns], dim=1)
    return (place[:, None] - place).square().sum(-1)


def nearest_by_search(keep: torch.Tensor, grid: Grid) -> torch.Tensor:
    """argmin returns the first of equals, which is the lowest raster index."""
    distance = squared_distances(grid)
    return torch.stack([distance.masked_fill(~sample, 10**6).argmin(1) for sample in keep])


def random_routing(batch=3, drop=None, seed=0, dtype=torch.float32, grid=GRID) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    prob = force_ends(torch.rand(batch, grid.cells, generator=generator, dtype=torch.float64).to(dtype))
    natural = prob > 1 - prob
    return Routing(prob, natural, natural if drop is None else drop_tail(prob, natural, drop))


def dechunk_densely(tokens, routing, sigma, grid=GRID):
    """Every sample by itself with an (M, M) matrix, as the formulas say."""
    distance = squared_distances(grid)
    outputs, start = [], 0
    for prob, natural, keep in zip(*routing):
        cells = keep.nonzero().flatten()
        u, start = tokens[start : start + len(cells)], start + len(cells)
        p = prob[cells].clamp(1e-4, 1 - 1e-4)
        weight = torch.exp(-distance[cells][:, cells].to(u.dtype) / (2 * sigma**2)) * p
        smooth = (weight / (weight.sum(1, keepdim=True) + 1e-8)) @ u
        mixed = p[:, None] * u + (1 - p)[:, None] * smooth
        plugged = mixed[distance[:, cells].argmin(1)]
        selected = torch.where(natural, prob, 1 - prob)
        outputs.append(plugged * (selected + (1 - selected).detach())[:, None])
    return torch.stack(outputs)


def use_grid(dechunk: Dechunk) -> None:
    """Smooth as on a GPU."""
    smoothing = dechunk.smoothing
    smoothing.prepare = lambda packing: functools.partial(smoothing.sum_on_grid, packing)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("drop", [None, 0.5, torch.tensor([0.0, 0.9, 0.3])])
@pytest.mark.parametrize("grid", [GRID, *RECTANGLES], ids=str)
@pytest.mark.parametrize("on_grid", [False, True])
def test_equal_to_the_dense_formula_with_gradients(sigma, drop, grid, on_grid):
    routing = random_routing(drop=drop, dtype=torch.float64, grid=grid)
    packing = plan_packing(routing.keep)
    dechunk = Dechunk(grid, sigma)
    # In float64 nothing hides in rounding
    dechunk.smoothing.row_kernel = gaussian_kernel(grid.rows, sigma)
    dechunk.smoothing.column_kernel = gaussian_kernel(grid.columns, sigma)
    if on_grid:
        use_grid(dechunk)
    tokens = torch.randn(sum(packing.lengths), 4, dtype=torch.float64, requires_grad=True)
    prob = routing.prob.clone().requires_grad_()
    weights = torch.randn(3, grid.cells, 4, dtype=torch.float64)
    results = []
    for function in (
        lambda r: dechunk(tokens, NO_RESIDUAL, r, packing),
        lambda r: dechunk_densely(tokens, r, sigma, grid),
    ):
        output = function(routing._replace(prob=prob))
        results.append((output, *torch.autograd.grad((output * weights).sum(), (tokens, prob))))
    # The lists end at 5.65 sigma, which may be inside the grid
    tolerance = 1e-9 if on_grid or sigma > 1 else 5e-6
    for ours, dense in zip(*results):
        torch.testing.assert_close(ours, dense, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cells, sigma", [(Grid(16, 16), 1.0), (Grid(24, 24), 2.0), (Grid(9, 30), 1.0)])
def test_neighbour_lists_on_a_grid_larger_than_their_reach(cells, sigma):
    """float32, outputs and gradients within 1e-5 of the sum over all pairs."""
    generator = torch.Generator().manual_seed(4)
    prob = force_ends(torch.rand(2, cells.cells, generator=generator) * 0.6)
    routing = Routing(prob.requires_grad_(), prob > 0.5, prob > 0.5)
    packing = plan_packing(routing.keep)
    tokens = torch.randn(sum(packing.lengths), 8, requires_grad=True)
    ours, grid = Dechunk(cells, sigma), Dechunk(cells, sigma)
    use_grid(grid)
    weights = torch.randn(2, cells.cells, 8)
    results = []
    for dechunk in (ours, grid):
        output = dechunk(tokens, NO_RESIDUAL, routing, packing)
        results.append((output, *torch.autograd.grad((output * weights).sum(), (tokens, routing.prob))))
    for lists, products in zip(*results):
        torch.testing.assert_close(lists, products, rtol=1e-5, atol=1e-5 * products.abs().max().item())


def test_in_float32():
    routing = random_routing(seed=3)
    packing = plan_packing(routing.keep)
    tokens = torch.randn(sum(packing.lengths), 4)
    torch.testing.assert_close(
        Dechunk(GRID, 1.0)(tokens, NO_RESIDUAL, routing, packing),
        dechunk_densely(tokens, routing, 1.0),
        rtol=1e-5,
        atol=1e-5,
    )


def test_lonely_tokens_are_not_smoothed():
    """With all tokens far apart, v = p u + (1 - p) u: each cell gets its nearest token unchanged."""
    prob, natural = force_ends(torch.full((1, LENGTH), 0.3)), torch.zeros(1, LENGTH, dtype=torch.bool)
    natural[:, 0] = natural[:, -1] = True
    routing = Routing(prob, natural, natural)
    packing = plan_packing(natural)
    tokens = torch.randn(2, 4)
    output = Dechunk(GRID, 0.3)(tokens, NO_RESIDUAL, routing, packing)
    torch.testing.assert_close(output, tokens[nearest_token(natural, GRID)])


def test_a_sample_does_not_see_its_batch_mates():
    routing = random_routing()
    packing = plan_packing(routing.keep)
    grid = torch.randn(3, LENGTH, 4)
    together = Dechunk(GRID, 1.0)(pack(grid, packing), NO_RESIDUAL, routing, packing)
    for k in range(3):
        alone = Routing(*(x[k : k + 1] for x in routing))
        single = plan_packing(alone.keep)
        torch.testing.assert_close(
            Dechunk(GRID, 1.0)(pack(grid[k : k + 1], single), NO_RESIDUAL, alone, single)[0], together[k]
        )


@pytest.mark.parametrize(
    "grid", [Grid(2, 2), Grid(3, 3), Grid(7, 7), Grid(16, 16), Grid(3, 5), Grid(20, 2)], ids=str
)
@pytest.mark.parametrize("share", [0.0, 0.03, 0.1, 0.3, 0.8, 1.0])
def test_nearest_kept_against_a_search(grid, share):
    """A share of 0 keeps the two ends only; ties are everywhere, and go to the lowest raster index."""
    keep = torch.rand(40, grid.cells, generator=torch.Generator().manual_seed(grid.rows)) < share
    keep[:, 0] = keep[:, -1] = True
    assert torch.equal(nearest_kept(keep, grid), nearest_by_search(keep, grid))


def test_nearest_kept_for_a_single_token_anywhere():
    """Nothing depends on the ends being kept."""
    keep = torch.eye(16, dtype=torch.bool)
    for grid in (Grid(4, 4), Grid(2, 8), Grid(16, 1), Grid(1, 16)):
        assert torch.equal(nearest_kept(keep, grid), torch.arange(16)[:, None].expand(16, 16))


def test_nearest_token_counts_over_the_batch():
    keep = random_routing().keep
    packing = plan_packing(keep)
    where = packing.token_index[nearest_token(keep, GRID)]  # row of the flattened tokens
    assert torch.equal(where - torch.arange(3)[:, None] * LENGTH, nearest_kept(keep, GRID))


def test_straight_through_gradient_reaches_the_natural_decision():
    """+ d loss / d factor at boundary tokens, also where the budget dropped them; - elsewhere; none at the ends."""
    routing = random_routing(drop=0.6)
    assert (routing.boundary & ~routing.keep).any()
    score = torch.logit(routing.prob.clamp(0.01, 0.99)).requires_grad_()
    prob = force_ends(score.sigmoid())
    prob.retain_grad()
    packing = plan_packing(routing.keep)
    tokens = torch.randn(sum(packing.lengths), 4)
    output = Dechunk(GRID, 1.0)(tokens, NO_RESIDUAL, routing._replace(prob=prob), packing)
    gradient = torch.rand(output.shape) + 1
    output.backward(gradient)
    sign = torch.where(routing.boundary, 1.0, -1.0)
    dropped = ~routing.keep  # kept tokens have the gradient of their mixing weight besides
    torch.testing.assert_close(prob.grad[dropped], (sign * (gradient * output).sum(-1))[dropped])
    assert (score.grad[:, [0, -1]] == 0).all() and (score.grad[:, 1:-1] != 0).all()


def test_straight_through_gradient_is_the_plugged_token():
    """d loss / d confidence = sum over channels of gradient times v, at every cell, kept or not."""
    routing = random_routing(batch=1)
    packing = plan_packing(routing.keep)
    tokens = torch.randn(sum(packing.lengths), 4)
    dechunk = Dechunk(GRID, 1.0)
    prob = routing.prob.clone().requires_grad_()
    gradient = torch.randn(1, LENGTH, 4)
    output = dechunk(tokens, NO_RESIDUAL, routing._replace(prob=prob), packing)
    (grad,) = torch.autograd.grad(output, prob, gradient)
    unkept = ~routing.boundary[0]
    want = -(gradient * output.detach()).sum(-1)[0]
    torch.testing.assert_close(grad[0, unkept], want[unkept])


def test_clamped_probabilities_have_no_gradient_as_weights():
    """The forced tokens mix with 0.9999. Only the straight-through path reaches their p, which is clamped."""
    routing = random_routing(batch=1)
    packing = plan_packing(routing.keep)
    tokens = torch.randn(sum(packing.lengths), 4)
    prob = routing.prob.clone().requires_grad_()
    output = Dechunk(GRID, 1.0)(tokens, NO_RESIDUAL, routing._replace(prob=prob), packing)
    (grad,) = torch.autograd.grad(output.sum(), prob)
    torch.testing.assert_close(grad[0, 0], output[0, 0].sum().detach())
