"""The router's probabilities and decision, and tail dropping against the specification written as a loop."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.conv import to_tokens
from models.router import INITIAL_BIAS, LearnedRouter
from models.tail_drop import drop_tail, force_ends, keep_top


def drop_tail_slowly(prob, natural, fractions):
    """One sample and one token at a time; the product is float32, then truncated."""
    keep = natural.clone()
    length = prob.shape[1]
    for sample, fraction in enumerate(fractions):
        kept = [token for token in range(length) if natural[sample, token]]
        count = int(torch.tensor(float(len(kept))) * torch.tensor(fraction))
        candidates = [token for token in kept if token not in (0, length - 1)]
        candidates.sort(key=lambda token: (prob[sample, token].item(), token))
        for token in candidates[:count]:
            keep[sample, token] = False
    return keep


def random_decisions(batch=8, length=64, ties=False, seed=0):
    prob = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed))
    prob = (prob * 8).round() / 8 if ties else prob
    prob = force_ends(prob)
    return prob, prob > 1 - prob


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("drop", [0.0, 0.1, 0.35, 0.6, 0.9, 0.999])
def test_one_fraction_for_all(ties, drop):
    prob, natural = random_decisions(ties=ties)
    want = drop_tail_slowly(prob, natural, [drop] * len(prob))
    assert torch.equal(drop_tail(prob, natural, drop), want)
    assert torch.equal(drop_tail(prob, natural, torch.tensor(drop)), want)
    assert torch.equal(drop_tail(prob, natural, torch.full((len(prob),), drop)), want)


@pytest.mark.parametrize("seed", range(5))
def test_a_fraction_per_sample(seed):
    prob, natural = random_decisions(ties=seed % 2 == 0, seed=seed)
    drop = torch.rand(len(prob), generator=torch.Generator().manual_seed(seed)) * 0.999
    assert torch.equal(drop_tail(prob, natural, drop), drop_tail_slowly(prob, natural, drop.tolist()))


def test_ends_and_ties():
    """The ends stay even when others score 1 too, and among equals the lowest raster index goes first."""
    prob, natural = torch.ones(1, 10), torch.ones(1, 10, dtype=torch.bool)
    assert drop_tail(prob, natural, 0.3)[0].nonzero().flatten().tolist() == [0, 4, 5, 6, 7, 8, 9]
    assert drop_tail(prob, natural, 0.99)[0].nonzero().flatten().tolist() == [0, 9]
    prob, natural = force_ends(torch.full((1, 10), 0.4)), torch.zeros(1, 10, dtype=torch.bool)
    natural[:, 0] = natural[:, -1] = True  # only the ends
    for drop in (0.5, 0.99):
        assert torch.equal(drop_tail(prob, natural, drop), natural)


@pytest.mark.parametrize("tenths", range(1, 10))
def test_counts_are_exact_for_tenths(tenths):
    """float32(n) * float32(k / 10), truncated, is floor(n k / 10) for every count there is at 256 px."""
    length = 1024
    count = torch.arange(2, length + 1)
    natural = torch.arange(length)[None] < count[:, None] - 1
    natural[:, -1] = True
    prob = torch.full(natural.shape, 0.9)
    dropped = count - drop_tail(prob, natural, tenths / 10).sum(1)
    assert torch.equal(dropped, torch.minimum(count * tenths // 10, count - 2))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tokens", [2, 3, 17, 40, 63, 64])
def test_a_token_budget_keeps_the_most_probable(ties, tokens):
    """Exactly so many, the ends among them, the rest by falling probability and then falling raster index."""
    prob, natural = random_decisions(ties=ties)
    keep = keep_top(prob, tokens)
    for sample in range(len(prob)):
        inner = sorted(range(1, 63), key=lambda token: (prob[sample, token].item(), token), reverse=True)
        assert set(keep[sample].nonzero().flatten().tolist()) == {0, 63, *inner[: tokens - 2]}
    mixed = keep_top(prob, [tokens, 2, 64, tokens, 5, 6, 7, 8])
    assert mixed.sum(1).tolist() == [tokens, 2, 64, tokens, 5, 6, 7, 8]
    assert torch.equal(mixed[[0, 3]], keep[[0, 3]])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("drop", [0.0, 0.3, 0.8])
def test_a_token_budget_below_the_natural_count_is_tail_dropping(ties, drop):
    prob, natural = random_decisions(ties=ties)
    want = drop_tail(prob, natural, drop)
    assert torch.equal(keep_top(prob, want.sum(1).tolist()), want)


def test_zero_drops_nothing_and_nothing_changes_in_place():
    prob, natural = random_decisions()
    before = prob.clone(), natural.clone()
    assert torch.equal(drop_tail(prob, natural, 0.0), natural)
    drop_tail(prob, natural, 0.5)
    assert torch.equal(prob, before[0]) and torch.equal(natural, before[1])


def test_router_follows_its_formula():
    torch.manual_seed(0)
    router, features = LearnedRouter(32, 4.0), torch.randn(2, 32, 5, 5)
    prob, natural, keep = router(features)
    z = F.conv2d(features, router.proj.weight, router.proj.bias)
    delta = z - F.conv2d(z, router.context_predictor.weight, router.context_predictor.bias, padding=1)
    first, norm, _, last = router.residual_scorer
    hidden = F.silu(
        F.group_norm(
            F.conv2d(delta, first.weight, first.bias, padding=1), 8, norm.weight, norm.bias, eps=1e-5
        )
    )
    want = F.conv2d(hidden, last.weight, last.bias).sigmoid().flatten(1)
    want[:, 0] = want[:, -1] = 1
    torch.testing.assert_close(prob, want)
    assert torch.equal(natural, want > 0.5) and torch.equal(keep, natural)
    assert torch.equal(router(features, 0.5).keep, drop_tail(prob, natural, 0.5))
    assert to_tokens(features).shape == (2, 25, 32)


def test_a_probability_of_one_half_is_not_kept():
    router = LearnedRouter(32, 4.0)
    last = router.residual_scorer[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, 0.0)
    routing = router(torch.randn(1, 32, 4, 4))
    assert (routing.prob[0, 1:-1] == 0.5).all()
    assert routing.boundary[0].nonzero().flatten().tolist() == [0, 15]


def test_no_gradient_at_the_forced_ends():
    score = torch.randn(2, 9, requires_grad=True)
    prob = force_ends(score.sigmoid())
    prob.sum().backward()
    assert (score.grad[:, [0, -1]] == 0).all() and (score.grad[:, 1:-1] > 0).all()
    assert (prob[:, [0, -1]] == 1).all()


def test_initial_bias_is_about_a_quarter():
    assert 1 / (1 + math.exp(-INITIAL_BIAS)) == pytest.approx(0.25, abs=0.01)
