"""Every router by its name: what it keeps, and how a budget thins it. tests/test_values.py trains with it."""

import pytest
import torch

from config import load_config
from grid import Grid
from models import build_model
from models.router import ROUTERS, hash_to_unit, ordered_dither
from models.types import Routing

CONTROLS = [name for name, router in ROUTERS.items() if not router.is_learned]
WIDTH = 32


def features(batch=3, side=8):
    return torch.randn(batch, WIDTH, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ROUTERS)
def test_budgets_follow_the_order(name):
    """A smaller budget keeps a subset of the tokens of a larger one, and the ends always stay."""
    torch.manual_seed(0)
    router = ROUTERS[name](WIDTH, 4.0)
    kept = [router(features(), tokens=count).keep for count in (2, 5, 17, 40, 64)]
    for fewer, more in zip(kept, kept[1:]):
        assert not (fewer & ~more).any()
    for count, keep in zip((2, 5, 17, 40, 64), kept):
        assert keep.sum(1).tolist() == [count] * 3
        assert keep[:, [0, -1]].all()
    natural = router(features()).keep
    dropped = router(features(), drop=0.5).keep
    assert not (dropped & ~natural).any()
    candidates = natural.sum(1)
    assert dropped.sum(1).tolist() == (candidates - torch.minimum(candidates // 2, candidates - 2)).tolist()


@pytest.mark.parametrize("name", CONTROLS)
@pytest.mark.parametrize("factor", [2, 4, 8, 16])
def test_controls_keep_one_in_n_with_an_open_gate(name, factor):
    routing = ROUTERS[name](WIDTH, factor)(features())
    assert routing.keep.sum(1).tolist() == [64 // factor] * 3
    assert torch.equal(routing.prob, routing.keep.float())
    assert isinstance(routing, Routing)


def test_the_uniform_grid():
    """One token in every 2 x 2 cells at N = 4, in every 4 x 4 at N = 16, for any features; the end is extra."""
    for factor, step in ((4, 2), (16, 4)):
        keep = ROUTERS["uniform"](WIDTH, factor)(features(), tokens=64 // factor + 1).keep.view(3, 8, 8)
        grid = torch.zeros(8, 8, dtype=torch.bool)
        grid[::step, ::step] = True
        grid[-1, -1] = True
        assert torch.equal(keep, grid.expand(3, 8, 8))
    ranks = ordered_dither(Grid(12, 12), torch.device("cpu"))
    assert len(ranks.unique()) == 144


def test_random_draws_are_a_function_of_the_seed_and_spread_evenly():
    router = ROUTERS["random"](WIDTH, 4.0)
    draw = torch.tensor([5, 6, 7])
    first = router(features(), draw=draw).keep
    assert torch.equal(first, router(features() + 1, draw=draw).keep)
    assert torch.equal(first[1:2], router(features(1), draw=draw[1:2]).keep)
    assert not torch.equal(first[0], first[1])
    numbers = hash_to_unit(torch.arange(1000)[:, None], torch.arange(256))
    assert numbers.mean().item() == pytest.approx(0.5, abs=3e-3)
    assert numbers.std().item() == pytest.approx(12**-0.5, abs=3e-3)
    assert numbers.mean(0).std().item() < 0.015 and numbers.mean(1).std().item() < 0.03


def test_contrast_keeps_the_cells_that_stand_out():
    flat = torch.ones(1, WIDTH, 8, 8)
    flat[0, :, 3, 4] = 5.0
    keep = ROUTERS["contrast"](WIDTH, 64 / 3)(flat).keep
    assert keep[0].nonzero().flatten().tolist() == [0, 3 * 8 + 4, 63]


def test_hnet_compares_neighbours():
    """At the start queries and keys are the features: p is 0 inside a flat region and 1 between opposite ones."""
    router = ROUTERS["hnet"](WIDTH, 4.0)
    router.start()
    x = torch.ones(1, WIDTH, 1, 8).expand(1, WIDTH, 8, 8).clone()
    x[..., 4:] = -1
    prob = router(x).prob.view(8, 8)
    torch.testing.assert_close(prob[1:-1, [0, 1, 2, 5, 6, 7]], torch.zeros(6, 6), atol=1e-6, rtol=0)
    torch.testing.assert_close(prob[1:-1, [3, 4]], torch.full((6, 2), 0.25))


def test_random_routing_is_another_at_every_timestep():
    small = ["arch_layout=[c1,[D1],c1]", "d_model=[32,32]", "num_heads=[2,2]"]
    small = [f"model.hnet.{change}" for change in small]
    config = load_config(None, [*small, "data.image_size=64", "model.router=random"])
    model = build_model(config)
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    draw = torch.tensor([11, 12])
    early = model(x, torch.tensor([5, 5]), labels, draw=draw).routing.keep
    late = model(x, torch.tensor([6, 6]), labels, draw=draw).routing.keep
    assert not torch.equal(early, late)
    assert torch.equal(early, model(x, torch.tensor([5, 5]), labels, draw=draw).routing.keep)
