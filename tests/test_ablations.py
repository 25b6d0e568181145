"""Ablations by keys: a floor of kept tokens, no smoothing, no residual projection, a ratio target by timestep."""

import numpy as np
import pytest
import torch

from config import load_config
from models import architecture, build_model, reference
from models.flops import TokenCounts, forward_flops
from models.router import ROUTERS
from models.types import Routing
from sampling.accounting import StepCounts
from sampling.budgets import Budget
from sampling.cost_limit import CostModel
from training import schedules
from training.losses import ratio_loss, ratio_loss_by_timestep

SMALL = ["arch_layout=[c1,[D1],c1]", "d_model=[32,32]", "num_heads=[2,2]"]
SMALL = [*[f"model.hnet.{change}" for change in SMALL], "data.image_size=64", "data.num_classes=3"]
NO_SMOOTHING, NO_RESIDUAL = "model.hnet.dechunk_kernel_sigma=0", "model.residual_projection=false"
FLOOR = "model.min_tokens=9"
POINTS = "training.downsample_factor_points=0:2,500:4,1000:8"


def make_model(*changes):
    torch.manual_seed(0)
    model = build_model(load_config(None, [*SMALL, *changes]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        # About half of the tokens are boundaries: the decoder's norms would enlarge the rounding of a flat grid
        model.router.residual_scorer[-1].bias.zero_()
    return model


def inputs():
    return torch.randn(3, 4, 8, 8), torch.tensor([5, 400, 900]), torch.tensor([0, 1, 2])


def gradients(model, output):
    output.prediction.square().mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(
    "changes", [[NO_SMOOTHING], [NO_RESIDUAL], [FLOOR], [NO_SMOOTHING, NO_RESIDUAL, FLOOR]]
)
@pytest.mark.parametrize("drop", [None, 0.5])
def test_the_network_is_its_plain_twin(changes, drop):
    model, batch = make_model(*changes), inputs()
    drops = None if drop is None else torch.full((3,), drop)
    output = model(*batch, drops)
    twin = reference.forward(model, *batch, drops)
    assert torch.equal(output.routing.keep, twin.routing.keep)
    torch.testing.assert_close(output.prediction, twin.prediction, rtol=1e-4, atol=1e-5)
    own, others = gradients(model, output), gradients(model, twin)
    for name, gradient in own.items():
        expected = others[name]
        if gradient is not None or expected is not None:
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5, msg=name)


def test_without_smoothing_on_a_gpu(smooth_on_grid):
    model, batch = make_model(NO_SMOOTHING), inputs()
    twin = reference.forward(model, *batch)
    torch.testing.assert_close(model(*batch).prediction, twin.prediction, rtol=1e-4, atol=1e-5)


def test_parts_that_are_left_out_cost_nothing():
    parts = {}
    for change in ([], [NO_SMOOTHING, NO_RESIDUAL]):
        network = architecture(load_config(None, [*SMALL, *change]))
        parts[len(change)] = forward_flops(network, TokenCounts(9, 81))
    changed = {name for name in parts[0] if parts[0][name] != parts[2][name]}
    assert changed == {"dechunk", "residual_proj"}
    assert parts[2]["dechunk"] == parts[2]["residual_proj"] == 0
    assert "residual_proj.weight" not in make_model(NO_RESIDUAL).state_dict()


@pytest.mark.parametrize("name", ["learned", "uniform"])
def test_a_floor_keeps_the_first_tokens_by_order(name):
    router = ROUTERS[name](32, 16.0)
    features = torch.randn(4, 32, 8, 8)
    plain = router(features)
    most = router(features, tokens=9).keep
    router.min_tokens = 9
    for drop in (None, 0.9):
        keep = router(features, drop).keep
        assert torch.equal(keep, router_keep(router, features, drop) | most)
        assert (keep.sum(1) >= 9).all()
    # What the router decides, and a number of tokens from outside, stay
    assert torch.equal(router(features).boundary, plain.boundary)
    assert router(features, tokens=5).keep.sum(1).tolist() == [5] * 4


def router_keep(router, features, drop):
    """Without the floor."""
    floor, router.min_tokens = router.min_tokens, None
    keep = router(features, drop).keep
    router.min_tokens = floor
    return keep


def test_predicted_costs_know_the_floor():
    counts = torch.tensor([10, 12])
    steps = [StepCounts(t, counts, None) for t in (900, 100)]
    costs = {}
    for floor in (None, 9):
        change = [] if floor is None else [f"model.min_tokens={floor}"]
        network = architecture(load_config(None, [*SMALL, *change]))
        model = CostModel(network, steps, np.array([100, 900]))
        costs[floor] = [model.predict(Budget.fraction(dropped)).total for dropped in (0.0, 0.9)]
    assert costs[9][0] == costs[None][0] > costs[9][1] > costs[None][1]


# -------------------------------------------------------------------------------------- a target by timestep


def routing_of(kept, prob):
    """A routing of 12 tokens, of which the first `kept` are kept, with one probability per sample."""
    boundary = torch.arange(12) < torch.tensor(kept)[:, None]
    return Routing(torch.tensor(prob)[:, None].expand(-1, 12).clone().requires_grad_(), boundary, boundary)


def test_the_ratio_loss_by_timestep():
    routing = routing_of([6, 3, 2, 6], [0.5, 0.2, 0.1, 0.6])
    t = torch.tensor([10, 800, 900, 20])
    factors = torch.tensor([2.0, 4.0, 6.0, 2.0])
    # Groups are {10, 20} and {800, 900}, whose target is the mean of 1 / 4 and 1 / 6
    early = ratio_loss(routing_of([6, 6], [0.5, 0.6]), 2.0)
    late = ratio_loss(routing_of([3, 2], [0.2, 0.1]), 4.8)
    loss = ratio_loss_by_timestep(routing, factors, t, group_size=2)
    assert loss.item() == pytest.approx((early + late).item() / 2)
    # Both groups keep what is wanted of them, so neither is pulled
    (gradient,) = torch.autograd.grad(loss, routing.prob)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)
    one_target = ratio_loss_by_timestep(routing, torch.full((4,), 4.0), t)
    assert one_target.item() == pytest.approx(ratio_loss(routing, 4.0).item())


def test_the_points_and_the_warm_up():
    training = load_config(None, [POINTS, "training.downsample_factor_start=1.5"]).training
    t = torch.tensor([0, 250, 500, 750, 999, 1000])
    expected = [2, 3, 4, 6, 7.992, 8]
    assert schedules.downsample_factors(0, t, training).tolist() == pytest.approx(expected)
    training.downsample_factor_warmup_steps = 10
    assert schedules.downsample_factors(0, t, training).tolist() == [1.5] * 6
    half = schedules.downsample_factors(5, t, training).tolist()
    assert half == pytest.approx([(1.5 + factor) / 2 for factor in expected])
    assert schedules.downsample_factors(99, t, training).tolist() == pytest.approx(expected)
