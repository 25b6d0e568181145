"""Budgets: what each means at a timestep, and the fraction that a limit on the cost becomes."""

import numpy as np
import pytest
import torch

from config import UserError, config_from_dict
from models import architecture, flops
from models.router import drop_tail, force_ends
from sampling import budgets
from sampling.budgets import Budget, Prediction, Probe, parse_schedule
from sampling.generate import SamplingOptions

CONFIG = config_from_dict({"data": {"image_size": 64}})  # 64 tokens


@pytest.mark.parametrize(
    "text, points",
    [
        ("0:0.5", [(0, 0.5)]),
        ("1000:0.6,300:0.2,0:0", [(0, 0), (300, 0.2), (1000, 0.6)]),
        (" 300 : .2 , 250.5:0.3 ", [(250.5, 0.3), (300, 0.2)]),
    ],
)
def test_schedules(text, points):
    assert parse_schedule(text, 1000) == tuple(points)
    t = torch.tensor([0, 1, 150, 250, 299, 300, 301, 650, 999])
    want = np.interp(t.numpy(), *zip(*points))
    np.testing.assert_allclose(Budget(tuple(points)).drop(t).numpy(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "text, part",
    [
        ("", "must be pairs t:fraction, e.g. 1000:0.6,300:0.2,0:0"),
        ("0.5", "must be pairs t:fraction"),
        ("1000:0.6,", "must be pairs t:fraction"),
        ("1000:-0.1", "must be pairs t:fraction"),
        ("1000:nan", "must be pairs t:fraction"),
        ("1001:0.5", "t = 1001 must be from 0 to 1000, and given once"),
        ("5:0.5,5:0.4", "t = 5 must be from 0 to 1000, and given once"),
        ("5:1", "the fraction 1 must be in [0, 1)"),
    ],
)
def test_bad_schedules(text, part):
    with pytest.raises(UserError) as caught:
        parse_schedule(text, 1000, "--option")
    assert f"--option '{text}': " in str(caught.value) and part in str(caught.value)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.77, budgets.MOST])
def test_predicted_counts_are_the_routers(fraction):
    prob = force_ends(torch.rand(50, 64) ** torch.linspace(0.1, 20, 50)[:, None])
    natural = prob > 0.5
    assert natural.sum(1).min() < 5 < 50 < natural.sum(1).max()
    kept = Budget(((0.0, fraction),)).kept(natural.sum(1), torch.zeros(50))
    assert torch.equal(kept, drop_tail(prob, natural, fraction).sum(1))
    assert (Budget(tokens=9).kept(natural.sum(1), torch.zeros(50)) == 9).all()


def test_lite_cfg_means_nothing_for_a_static_model():
    options = SamplingOptions(cfg_scale=2.0, lite_cfg=True, uncond_tail_dropping_fraction=0.5)
    options.check(CONFIG)
    with pytest.raises(UserError, match="--lite-cfg: a static DiT has no router"):
        options.check(config_from_dict({"model": {"patch_size": 2}, "data": {"image_size": 64}}))


def test_options_become_budgets_of_the_branches():
    def resolve(**changes):
        return budgets.resolve(SamplingOptions(cfg_scale=2.0, **changes), CONFIG)

    assert resolve() == (Budget(), Budget()) and not Budget().drops
    assert resolve(tail_dropping_fraction=0.4) == (Budget(((0.0, 0.4),)),) * 2
    assert resolve(token_budget=7) == (Budget(tokens=7),) * 2
    assert resolve(token_budget=7, lite_cfg=True) == (Budget(tokens=7), Budget())
    twin = resolve(budget_schedule="1000:0.6,0:0", lite_cfg=True, uncond_token_budget=3)
    assert twin == (Budget(((0.0, 0.0), (1000.0, 0.6))), Budget(tokens=3)) and twin[0].drops


def cost(count: torch.Tensor) -> torch.Tensor:
    """TFLOP of a forward pass with so many tokens, each by itself."""
    return torch.tensor(
        [
            flops.total_flops(architecture(CONFIG), flops.TokenCounts(n, n**2)) / 1e12
            for n in count.flatten().tolist()
        ]
    )


def test_prediction_where_every_step_was_seen():
    """Then it is the sum of what each sample's counts cost, and the interval leaves out steps of one branch."""
    t, natural = torch.tensor([900, 500, 100]), torch.randint(4, 64, (2, 5, 3))
    probe, schedule = Probe(t, *natural), Budget(((0.0, 0.0), (1000.0, 0.5)))
    got = budgets.predict(CONFIG, probe, t.numpy(), (100, 500), (schedule, Budget(tokens=8)))
    kept = natural[0] - (natural[0].float() * t / 2000).long()
    assert got.conditional == pytest.approx(cost(kept).sum().item() / 5, rel=1e-6)
    assert got.unconditional == pytest.approx(2 * cost(torch.tensor([8])).item(), rel=1e-6)
    alone = budgets.predict(CONFIG, probe._replace(unconditional=None), t.numpy(), None, (schedule, schedule))
    assert alone == Prediction(got.conditional, 0.0) and alone.total == got.conditional


def test_smallest_fraction():
    def falling(fraction):
        return 10 - 5 * fraction

    assert budgets.smallest_fraction(falling, 8.0, "--x") == 0.4
    assert budgets.smallest_fraction(falling, 7.9999, "--x") == 0.401
    assert budgets.smallest_fraction(falling, 11.0, "--x") == 0.0
    assert budgets.smallest_fraction(falling, falling(budgets.MOST), "--x") == budgets.MOST
    with pytest.raises(UserError, match="--x 5: must be at least 5.005; dropping nothing costs 10"):
        budgets.smallest_fraction(falling, 5.0, "--x")


def test_limits_become_fractions_branch_by_branch():
    """The unconditional branch's own limit first; what is left of the image's is the conditional branch's."""
    t, natural = torch.arange(900, -1, -100), torch.full((2, 4, 10), 60)
    probe, steps = Probe(t, *natural), np.arange(999, 0, -9)
    full = budgets.predict(CONFIG, probe, steps, None, (Budget(), Budget()))
    options = SamplingOptions(cfg_scale=2.0, tflops_per_image=full.total * 0.8)
    chosen, predicted = budgets.choose_fractions(options, CONFIG, probe, steps)
    assert (
        chosen.tflops_per_image is None
        and 0 < chosen.tail_dropping_fraction < 1
        and predicted.total <= full.total * 0.8
    )
    assert predicted.conditional == predicted.unconditional
    less = Budget(((0.0, chosen.tail_dropping_fraction - 0.017),))  # one token of the 60 more
    assert budgets.predict(CONFIG, probe, steps, None, (less, less)).total > full.total * 0.8

    both = {"lite_cfg": True, "uncond_tflops_per_image": full.unconditional * 0.6}
    chosen, lite = budgets.choose_fractions(SamplingOptions(**vars(options) | both), CONFIG, probe, steps)
    assert lite.unconditional <= full.unconditional * 0.6 and lite.total <= full.total * 0.8
    assert chosen.tail_dropping_fraction < chosen.uncond_tail_dropping_fraction
    with pytest.raises(UserError, match="--tflops-per-image 1e-09: must be at least"):
        budgets.choose_fractions(SamplingOptions(cfg_scale=2.0, tflops_per_image=1e-9), CONFIG, probe, steps)
