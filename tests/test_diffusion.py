"""Diffusion against recorded numbers and against identities."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusion import create_diffusion, gaussian, samplers, schedule
from diffusion.guidance import condition, guide

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module", params=["learned", "fixed"])
def golden(request):
    return request.param == "learned", load_file(
        GOLDEN / f"diffusion_linear_{request.param}_sigma.safetensors"
    )


def close(ours, want, rtol=1e-6):
    torch.testing.assert_close(ours, want, rtol=rtol, atol=rtol * want.abs().max().item())


def test_tables(golden):
    learn_sigma, want = golden
    tables = create_diffusion("linear", 1000, learn_sigma).tables
    np.testing.assert_allclose(tables["betas"], want["betas"].numpy(), rtol=1e-12)
    np.testing.assert_allclose(tables["alpha_bar"], want["alphas_cumprod"].numpy(), rtol=1e-12)


def test_training_terms(golden):
    learn_sigma, want = golden
    diffusion = create_diffusion("linear", 1000, learn_sigma)
    x0, noise, t = want["in.x_start"], want["in.noise"], want["in.t"]
    x_t = diffusion.add_noise(x0, t, noise)
    terms = diffusion.losses(want["in.model_output"], x0, x_t, t, noise)
    close(x_t, want["out.x_t"])
    close(terms["mse"], want["out.training.mse"])
    assert ("vb" in terms) == learn_sigma
    if learn_sigma:
        close(terms["vb"], want["out.training.vb"], rtol=2e-6)
    close(sum(terms.values()), want["out.training.loss"], rtol=2e-6)


def test_reverse_steps(golden):
    learn_sigma, want = golden
    for steps in {int(key.split(".")[1]) for key in want if key.startswith("respaced.")}:
        diffusion = create_diffusion("linear", 1000, learn_sigma, sampling_steps=steps)
        case = {
            key.split(".", 2)[2]: value for key, value in want.items() if key.startswith(f"respaced.{steps}.")
        }
        assert diffusion.timesteps.tolist() == case["timestep_map"].tolist()
        x_t, i, prediction = want["out.x_t"], case["in.t"], want["in.model_output"]
        mean, log_variance, x0 = diffusion.reverse(prediction, x_t, diffusion.entries(i, x_t.ndim))
        close(mean, case["out.mean"])
        close(log_variance, case["out.log_variance"])
        close(log_variance.exp(), case["out.variance"], rtol=1e-5)
        close(x0, case["out.pred_xstart"])
        for row, step in enumerate(i.tolist()):
            ours = ddim_step(diffusion, x_t[row : row + 1], step, prediction[row : row + 1])
            close(ours, case["out.ddim_eta0"][row : row + 1], rtol=2e-6)


def ddim_step(diffusion, x_t, i, prediction):
    """The single step i of the DDIM sampler, by giving it a process that ends there."""
    one = gaussian.GaussianDiffusion(np.array([0.5]), diffusion.learn_sigma)
    one.entries = lambda index, ndim: diffusion.entries(index + i, ndim)
    return next(samplers.ddim(one, lambda x, t: prediction, x_t, None)).x_next


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 999, 1000])
def test_respacing_keeps_alpha_bar(steps):
    full = create_diffusion("squaredcos_cap_v2", 1000).tables["alpha_bar"]
    short = create_diffusion("squaredcos_cap_v2", 1000, sampling_steps=steps)
    assert len(short.timesteps) == steps == len(set(short.timesteps.tolist()))
    np.testing.assert_allclose(short.tables["alpha_bar"], full[short.timesteps], rtol=1e-6)
    assert short.timesteps[-1] == 999


@pytest.mark.parametrize("steps", [0, 1001])
def test_respacing_out_of_range(steps):
    with pytest.raises(ValueError, match=r"\[1, 1000\]"):
        schedule.respaced_timesteps(1000, steps)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS.values())
@pytest.mark.parametrize("steps", [1, 5, 40])
def test_samplers_return_what_a_perfect_network_sees(sampler, steps):
    """When epsilon always points to the same x_0, every sampler must arrive there."""
    diffusion = create_diffusion(learn_sigma=False, sampling_steps=steps)
    full = create_diffusion(learn_sigma=False)
    target = torch.linspace(-1, 1, 32).view(1, 2, 4, 4)

    def denoise(x, t):
        at = full.entries(t, 4)
        signal, sigma = at["sqrt_alpha_bar"], at["sqrt_one_minus_alpha_bar"]
        return (x - signal * target) / sigma

    generator = torch.Generator().manual_seed(0)
    trace = list(
        sampler(
            diffusion,
            denoise,
            torch.randn(target.shape),
            lambda: torch.randn(target.shape, generator=generator),
        )
    )
    assert [step.t for step in trace] == diffusion.timesteps[::-1].tolist()
    torch.testing.assert_close(trace[-1].x_next, target, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(trace[-1].x_next, trace[-1].x0_hat, atol=1e-4, rtol=1e-4)


def test_variational_bound_vanishes_for_the_true_posterior():
    diffusion = create_diffusion()
    x0, noise = torch.rand(4, 3, 4, 4) * 2 - 1, torch.randn(4, 3, 4, 4)
    t = torch.tensor([1, 10, 500, 999])
    x_t = diffusion.add_noise(x0, t, noise)
    perfect = torch.cat(
        [noise, torch.full_like(noise, -1.0)], dim=1
    )  # logits of -1 choose the posterior variance
    assert diffusion.losses(perfect, x0, x_t, t, noise)["vb"].abs().max() < 1e-4


def test_discretized_likelihood_sums_to_one():
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    mean, log_scale = torch.full_like(bins, 0.3), torch.full_like(bins, math.log(0.2))
    total = gaussian.discretized_gaussian_log_likelihood(bins, mean, log_scale).exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-6)


def test_guidance_scale_one_is_the_conditional_branch():
    x, t = torch.randn(2, 4, 3, 3), torch.tensor([5, 6])

    def denoise(x, t, offset):
        return x * 2 + offset[:, None, None, None]

    here, there = {"offset": torch.tensor([1.0, 2.0])}, {"offset": torch.tensor([-3.0, 4.0])}
    alone = condition(denoise, here)(x, t)
    torch.testing.assert_close(guide(denoise, here, there, 1.0, channels=4)(x, t), alone)
    guided = guide(denoise, here, there, 3.0, channels=2)(x, t)
    torch.testing.assert_close(guided[:, 2:], alone[:, 2:])
    torch.testing.assert_close(guided[0, :2], alone[0, :2] + 2 * (1.0 - -3.0))


def test_outside_the_guidance_interval_one_branch_is_not_computed():
    calls = []

    def denoise(x, t, value):
        calls.append(len(x))
        return value[:, None].expand_as(x)

    x, here, there = torch.zeros(3, 2), {"value": torch.full((3,), 2.0)}, {"value": torch.full((3,), 1.0)}
    guided = guide(denoise, here, there, 4.0, channels=2, interval=(100, 500))
    for t, rows, result in ((99, 3, 2.0), (100, 6, 5.0), (500, 6, 5.0), (501, 3, 2.0)):
        calls.clear()
        assert (guided(x, torch.full((3,), t)) == result).all() and calls == [rows]


@pytest.mark.parametrize("sampler", [samplers.ddpm, samplers.ddim])
def test_the_guidance_interval_is_decided_without_reading_from_the_device(sampler):
    """The meta device has no values to read."""
    rows = []

    def denoise(x, t, value):
        assert t.device == x.device and len(t) == len(x)
        rows.append(len(x))
        return torch.cat([x, x], dim=1)

    here, there = {"value": torch.zeros(3, device="meta")}, {"value": lambda t: t / 1000}
    guided = guide(denoise, here, there, 4.0, channels=2, interval=(300, 600))
    x = torch.zeros(3, 2, 1, 1, device="meta")
    steps = list(sampler(create_diffusion(sampling_steps=4), guided, x, lambda: x))
    assert rows == [6 if 300 <= step.t <= 600 else 3 for step in steps] and len(set(rows)) == 2


def test_conditioning_may_be_a_list_a_function_of_t_or_of_another_kind():
    seen = []

    def denoise(x, t, **conditioning):
        seen.append(conditioning)
        return x

    x, t = torch.zeros(2, 1), torch.full((2,), 7)
    guide(
        denoise,
        {"drop": lambda t: t / 10, "k": [1, 2]},
        {"drop": lambda t: t / 7, "k": [3, 4]},
        2.0,
        channels=1,
    )(x, t)
    assert len(seen) == 1 and seen[0]["k"] == [1, 2, 3, 4]
    torch.testing.assert_close(seen[0]["drop"], torch.tensor([0.7, 0.7, 1.0, 1.0]))
    seen.clear()
    guide(denoise, {"drop": lambda t: t / 10}, {"k": [3, 4]}, 2.0, channels=1)(
        x, t
    )  # no common batch: one after the other
    assert [list(conditioning) for conditioning in seen] == [["drop"], ["k"]]


@pytest.mark.parametrize("steps", [20, 50])
def test_the_fast_solver_is_nearer_to_the_exact_path(steps):
    """For Gaussian data the best epsilon is known; DDIM in 1000 steps stands for the exact solution."""
    full = create_diffusion()
    mean, variance = torch.randn(4, 8, 8) * 2, 0.25

    def denoise(x, t):
        at = full.entries(t, 4)
        signal, sigma = at["sqrt_alpha_bar"], at["sqrt_one_minus_alpha_bar"]
        epsilon = sigma * (x - signal * mean) / (signal**2 * variance + sigma**2)
        return torch.cat([epsilon, epsilon], dim=1)

    start = torch.randn(2, 4, 8, 8)

    def sample(name, steps):
        *_, last = samplers.SAMPLERS[name](create_diffusion(sampling_steps=steps), denoise, start, None)
        return last.x_next

    exact = sample("ddim", 1000)
    errors = [(sample(name, steps) - exact).abs().mean() for name in ("ddim", "dpm++")]
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.03


def test_velocity_and_epsilon_describe_one_process():
    """A network that predicts velocity and one that predicts epsilon, both knowing x_0, take the same steps."""
    draw = torch.Generator().manual_seed(0)
    x0, noise, logits = torch.randn(3, 4, 2, 3, 3, generator=draw).unbind(0)
    t = torch.tensor([3, 400, 700, 999])
    epsilon_process = create_diffusion()
    velocity_process = create_diffusion(predicts="velocity")
    x_t = epsilon_process.add_noise(x0, t, noise)
    at = epsilon_process.entries(t, 4)
    signal, sigma = at["sqrt_alpha_bar"], at["sqrt_one_minus_alpha_bar"]
    velocity = signal * noise - sigma * x0

    by_epsilon = epsilon_process.reverse(torch.cat([noise, logits], dim=1), x_t, at)
    by_velocity = velocity_process.reverse(torch.cat([velocity, logits], dim=1), x_t, at)
    for ours, want in zip(by_velocity, by_epsilon, strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)

    # The loss of the true velocity is 0, and the bound of the variance is that of epsilon
    terms = velocity_process.losses(torch.cat([velocity, logits], dim=1), x0, x_t, t, noise)
    want = epsilon_process.losses(torch.cat([noise, logits], dim=1), x0, x_t, t, noise)
    torch.testing.assert_close(terms["mse"], torch.zeros(4))
    torch.testing.assert_close(terms["vb"], want["vb"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_samplers_take_the_same_steps_by_velocity(name):
    """For Gaussian data the best epsilon is known, and the velocity follows from it."""
    full = create_diffusion(learn_sigma=False)
    mean, variance = torch.randn(4, 3, 3), 0.25

    def epsilon(x, t):
        at = full.entries(t, 4)
        signal, sigma = at["sqrt_alpha_bar"], at["sqrt_one_minus_alpha_bar"]
        return sigma * (x - signal * mean) / (signal**2 * variance + sigma**2)

    def velocity(x, t):
        at = full.entries(t, 4)
        signal, sigma = at["sqrt_alpha_bar"], at["sqrt_one_minus_alpha_bar"]
        return (epsilon(x, t) - sigma * x) / signal

    start, noise = torch.randn(2, 2, 4, 3, 3)
    samples = {}
    for predicts, denoise in (("epsilon", epsilon), ("velocity", velocity)):
        process = create_diffusion(learn_sigma=False, sampling_steps=8, predicts=predicts)
        *_, last = samplers.SAMPLERS[name](process, denoise, start, lambda: noise)
        samples[predicts] = last.x_next
    torch.testing.assert_close(samples["velocity"], samples["epsilon"], rtol=1e-3, atol=1e-3)
