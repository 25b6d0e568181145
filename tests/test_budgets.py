"""Budgets: what each means at a timestep, and the fraction that a limit on the cost becomes."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from config import UserError, config_from_dict
from models import architecture
from models.flops import TokenCounts, total_flops
from models.tail_drop import drop_tail, force_ends
from sampling.accounting import StepCounts
from sampling.budgets import ALL, Budget, parse_schedule
from sampling.cost_limit import (
    LARGEST_FRACTION,
    CostModel,
    CostPrediction,
    choose_fractions,
    smallest_fraction,
)
from sampling.denoising import branch_conditioning
from sampling.options import SamplingOptions

CONFIG = config_from_dict({"data": {"image_size": 64}})  # 64 tokens
STATIC = config_from_dict({"model": {"patch_size": 2}, "data": {"image_size": 64}})
NETWORK = architecture(CONFIG)


@pytest.mark.parametrize(
    "text, points",
    [
        ("0:0.5", [(0, 0.5)]),
        ("1000:0.6,300:0.2,0:0", [(0, 0), (300, 0.2), (1000, 0.6)]),
        (" 300 : .2 , 250.5:0.3 ", [(250.5, 0.3), (300, 0.2)]),
    ],
)
def test_schedules(text, points):
    assert parse_schedule(text) == points
    budget = Budget.schedule(text)
    budget.check(CONFIG)
    t = torch.tensor([0, 1, 150, 250, 299, 300, 301, 650, 999])
    want = np.interp(t.numpy(), *zip(*points))
    np.testing.assert_allclose(budget.drop_fraction(t).numpy(), want, rtol=1e-5, atol=1e-7)


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
    for unconditional, option in ((False, "--budget-schedule"), (True, "--uncond-budget-schedule")):
        with pytest.raises(UserError) as caught:
            Budget.schedule(text).check(CONFIG, unconditional)
        assert f"{option} '{text}': " in str(caught.value) and part in str(caught.value)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.77, LARGEST_FRACTION])
def test_predicted_counts_are_the_routers(fraction):
    prob = force_ends(torch.rand(50, 64) ** torch.linspace(0.1, 20, 50)[:, None])
    natural = prob > 0.5
    count = natural.sum(1)
    assert count.min() < 5 < 50 < count.max()
    kept = Budget.fraction(fraction).kept_tokens(count, torch.zeros(50))
    assert torch.equal(kept, drop_tail(prob, natural, fraction).sum(1))
    assert (Budget.tokens(9).kept_tokens(count, torch.zeros(50)) == 9).all()
    assert torch.equal(ALL.kept_tokens(count, torch.zeros(50)), count)


BUDGETS = {
    "drops nothing": ALL,
    "drops 0.4 of the kept tokens": Budget.fraction(0.4),
    "keeps 9 tokens": Budget.tokens(9),
    "costs at most 3.5 TFLOP per image": Budget.tflops(3.5),
    "drops a fraction by timestep, 900:0.5": Budget.schedule("900:0.5"),
}


@pytest.mark.parametrize("sentence, budget", BUDGETS.items(), ids=str)
def test_a_budget_is_plain_data(sentence, budget):
    budget.check(CONFIG)
    assert str(budget) == sentence
    assert Budget(**json.loads(json.dumps(dataclasses.asdict(budget)))) == budget
    if budget != ALL:
        with pytest.raises(UserError, match=f"{budget.option()} {budget.value}: a static DiT has no router"):
            budget.check(STATIC)
    else:
        budget.check(STATIC)


def test_lite_cfg_means_nothing_for_a_static_model():
    options = SamplingOptions(cfg_scale=2.0, uncond=Budget.fraction(0.5))
    options.check(CONFIG)
    with pytest.raises(UserError, match="--lite-cfg: a static DiT has no router"):
        options.check(STATIC)


def test_what_a_branch_is_told():
    """A number of tokens, or a fraction as a function of t; nothing where no branch drops."""
    labels = torch.tensor([1, 2])
    assert branch_conditioning(labels, ALL, pass_drop=False) == {"labels": labels}
    assert branch_conditioning(labels, Budget.tokens(7), pass_drop=True) == {
        "labels": labels,
        "tokens": [7, 7],
    }
    dropped = branch_conditioning(labels, Budget.fraction(0.4), pass_drop=True)["drop"]
    torch.testing.assert_close(dropped(torch.tensor([900, 0])), torch.tensor([0.4, 0.4]))
    assert [Budget.fraction(0.4).drops, Budget.schedule("9:0.1,0:0").drops] == [True, True]
    assert [ALL.drops, Budget.fraction(0.0).drops, Budget.tokens(7).drops] == [False, False, False]


def seen(t: torch.Tensor, conditional: torch.Tensor, unconditional: torch.Tensor | None) -> list[StepCounts]:
    """What the router kept (samples, steps) of both branches, as records of the steps."""
    records = []
    for k in range(len(t)):
        own = None if unconditional is None else unconditional[:, k]
        records.append(StepCounts(int(t[k]), conditional[:, k], own))
    return records


def one_pass(count: torch.Tensor) -> torch.Tensor:
    """TFLOP of a forward pass with each of these numbers of tokens."""
    counts = count.flatten().tolist()
    return torch.tensor([total_flops(NETWORK, TokenCounts(n, n**2)) / 1e12 for n in counts])


def test_prediction_where_every_step_was_seen():
    """Then it is the sum of what each sample's counts cost, and the interval leaves out steps of one branch."""
    t, natural = torch.tensor([900, 500, 100]), torch.randint(4, 64, (2, 5, 3))
    schedule = Budget.schedule("1000:0.5,0:0")
    model = CostModel(NETWORK, seen(t, *natural), t.numpy(), (100, 500))
    got = model.predict(schedule, Budget.tokens(8))
    kept = natural[0] - (natural[0].float() * t / 2000).long()
    assert got.conditional == pytest.approx(one_pass(kept).sum().item() / 5, rel=1e-6)
    assert got.unconditional == pytest.approx(2 * one_pass(torch.tensor([8])).item(), rel=1e-6)
    alone = CostModel(NETWORK, seen(t, natural[0], None), t.numpy()).predict(schedule)
    assert alone == CostPrediction(got.conditional, 0.0) and alone.total == got.conditional


def test_smallest_fraction():
    def falling(fraction):
        return 10 - 5 * fraction

    assert smallest_fraction(falling, 8.0, "--x") == 0.4
    assert smallest_fraction(falling, 7.9999, "--x") == 0.401
    assert smallest_fraction(falling, 11.0, "--x") == 0.0
    assert smallest_fraction(falling, falling(LARGEST_FRACTION), "--x") == LARGEST_FRACTION
    with pytest.raises(UserError, match="--x 5: must be at least 5.005; dropping nothing costs 10"):
        smallest_fraction(falling, 5.0, "--x")


def test_limits_become_fractions_branch_by_branch():
    """The unconditional branch's own limit first; what is left of the image's is the conditional branch's."""
    t, natural = torch.arange(900, -1, -100), torch.full((2, 4, 10), 60)
    model = CostModel(NETWORK, seen(t, *natural), np.arange(999, 0, -9))
    full = model.predict(ALL)
    limit = Budget.tflops(full.total * 0.8)
    budget, uncond = choose_fractions(model, limit, None)
    predicted = model.predict(budget, uncond)
    assert uncond is None and budget.unit == "fraction" and 0 < budget.value < 1
    assert predicted.total <= full.total * 0.8
    assert predicted.conditional == predicted.unconditional
    one_token_more = Budget.fraction(budget.value - 0.017)
    assert model.predict(one_token_more).total > full.total * 0.8

    budget, uncond = choose_fractions(model, limit, Budget.tflops(full.unconditional * 0.6))
    lite = model.predict(budget, uncond)
    assert lite.unconditional <= full.unconditional * 0.6 and lite.total <= full.total * 0.8
    assert budget.value < uncond.value
    with pytest.raises(UserError, match="--tflops-per-image 1e-09: must be at least"):
        choose_fractions(model, Budget.tflops(1e-9), None)
