"""Flow matching: its path, its samplers on an analytic velocity, and a run from training to samples."""

import json
import shutil

import kills
import numpy as np
import pytest
import torch

import sample
from config import UserError
from data.streams import rng
from diffusion import OBJECTIVES, build_process
from diffusion.process import draw_timestep, evaluated_timesteps
from sampling.load import load_trained
from sampling.pipeline import DCDiTPipeline
from weights.checkpoint import load_checkpoint

FLOW = {"objective": "flow", "noise_schedule": "linear", "diffusion_steps": 1000, "learn_sigma": False}
MEAN, STD = 0.7, 0.3


def flow(steps=None, shift=1.0):
    return build_process(**FLOW, flow_shift=shift, sampling_steps=steps)


def gaussian_velocity(process):
    """The velocity that a perfect network predicts where x_0 is normal with MEAN and STD."""

    def denoise(x, t):
        sigma = process.sigma(t, x.ndim).double()
        variance = (1 - sigma) ** 2 * STD**2 + sigma**2
        centred = x - (1 - sigma) * MEAN
        noise = sigma / variance * centred
        x0 = MEAN + (1 - sigma) * STD**2 / variance * centred
        return noise - x0

    return denoise


def draw(name, steps, shift=1.0, count=20000):
    generator = torch.Generator().manual_seed(3)

    def noise():
        return torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64)

    process = flow(steps, shift)
    sampler = OBJECTIVES["flow"].samplers[name]
    taken = list(sampler(process, gaussian_velocity(process), noise(), noise))
    return taken, taken[-1].x_next


def test_the_path_and_the_velocity():
    process = flow()
    x0, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    t = torch.tensor([0, 499, 999])
    x_t = process.add_noise(x0, t, noise)
    torch.testing.assert_close(x_t[1], 0.5 * x0[1] + 0.5 * noise[1])
    torch.testing.assert_close(x_t[2], noise[2])
    torch.testing.assert_close(x_t[0], x0[0] + 0.001 * (noise[0] - x0[0]))
    assert process.losses(noise - x0, x0, x_t, t, noise)["mse"].abs().max() == 0
    # The velocity is the derivative of the path
    step = process.add_noise(x0, t[:1].expand(3) + 1, noise) - process.add_noise(x0, t[:1].expand(3), noise)
    torch.testing.assert_close(step * 1000, noise - x0, atol=1e-3, rtol=0)


def test_shift_makes_more_of_the_path_noisy():
    """sigma -> s sigma / (1 + (s - 1) sigma), with both ends in place."""
    even, shifted = flow().sigmas, flow(shift=3.0).sigmas
    np.testing.assert_allclose(shifted, 3 * even / (1 + 2 * even))
    assert shifted[-1] == 1.0 and (shifted[:-1] > even[:-1]).all()


@pytest.mark.parametrize("name", ["euler", "heun", "sde"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_samplers_reach_the_distribution(name, shift):
    taken, x = draw(name, 250, shift)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(STD, abs=0.02)
    timesteps = [step.t for step in taken]
    assert timesteps == sorted(timesteps, reverse=True)
    assert timesteps[0] == 999
    assert sorted(timesteps) == evaluated_timesteps("flow", flow(250), name).tolist()
    torch.testing.assert_close(taken[-1].x_next, taken[-1].x0_hat)


def test_heun_needs_fewer_steps_than_euler():
    """Its error falls with the square of the step."""
    exact = draw("heun", 500)[1]
    errors = {}
    for name in ("euler", "heun"):
        errors[name] = [(draw(name, steps)[1] - exact).abs().mean().item() for steps in (8, 32)]
    assert errors["heun"][0] < errors["euler"][0] / 2
    assert errors["euler"][0] / errors["euler"][1] == pytest.approx(4, rel=0.5)
    assert errors["heun"][0] / errors["heun"][1] > 8


def test_timesteps_of_training():
    draws = {}
    for name in ("uniform", "logit_normal"):
        draws[name] = np.array([draw_timestep(rng(0, "test", i), 1000, name) for i in range(4000)])
        assert draws[name].min() >= 0 and draws[name].max() <= 999
    assert np.quantile(draws["uniform"], [0.25, 0.75]) == pytest.approx([250, 750], abs=30)
    # sigmoid of a normal quartile, -0.674 and 0.674
    assert np.quantile(draws["logit_normal"], [0.25, 0.5, 0.75]) == pytest.approx([338, 500, 662], abs=25)


def test_trains_resumes_and_samples(run, tmp_path):
    changes = [
        "diffusion.objective=flow",
        "diffusion.timestep_sampling=logit_normal",
        "diffusion.flow_shift=2",
    ]
    assert run("whole", *changes, "logging.sample_every=8")[0] == [0]
    assert (tmp_path / "whole" / "samples" / "0000008.png").is_file()
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "checkpoints" / "0000008.pt").unlink()
    codes, printed = run("parts", *changes, "logging.sample_every=8")
    assert codes == [0] and "resuming from step 6" in printed
    kills.assert_same_training(tmp_path / "whole", tmp_path / "parts")

    checkpoint = tmp_path / "whole" / "checkpoints" / "0000008.pt"
    state = load_checkpoint(checkpoint)
    assert state["config"]["training"]["learn_sigma"] is False
    assert len(state["model"]["final_layer.linear.weight"]) == 4
    for name, evaluations in (("euler", 4), ("heun", 7), ("sde", 4)):
        argv = ["--ckpt", checkpoint, "--num-sampling-steps", 4, "--sampler", name, "--cfg-scale", 1.5]
        argv += ["--output", tmp_path / name, "--budget-schedule", "1000:0.6,300:0"]
        sample.main([str(word) for word in argv])
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["steps"] == len(summary["kept_by_step"]) == evaluations
    with pytest.raises(
        UserError, match="--sampler ddpm: the model was trained with diffusion.objective flow"
    ):
        sample.main(["--ckpt", str(checkpoint), "--sampler", "ddpm", "--output", str(tmp_path / "no")])
    with pytest.raises(UserError, match="draw samples with sample.py"):
        DCDiTPipeline(load_trained(checkpoint, torch.device("cpu")))
