"""The hub folder and the pipeline: local folders first, nothing is downloaded or uploaded here."""

import json

import diffusers
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from config import UserError, config_from_dict, load_config, to_dict
from data.autoencoder import Autoencoder
from data.features import open_features
from diffusion import create_diffusion
from diffusion.samplers import SAMPLERS
from models import build_model
from sampling import hub
from sampling.budgets import Budget
from sampling.denoising import sampling_steps
from sampling.generate import SamplingOptions, generate_images
from sampling.load import check_autoencoder, fingerprint, load_trained
from sampling.pipeline import DCDiTPipeline
from weights.checkpoint import save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tiny_config, tmp_path_factory):
    return save(load_config(tiny_config), tmp_path_factory.mktemp("hub"))


def save(config, folder):
    """An untrained model whose output is not zero, whose router is undecided, and which names its autoencoder."""
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        model.router.residual_scorer[-1].weight.mul_(20)
        model.router.residual_scorer[-1].bias.zero_()
    store = open_features(config.data.feature_path, 32)
    state = {
        "step": 5,
        "config": to_dict(config),
        "autoencoder": store.autoencoder,
        "features": None,
        "optimizer": {},
    }
    weights = model.state_dict()
    return save_checkpoint(
        folder,
        {**state, "class_names": store.class_names, "model": weights, "ema": weights},
        keep=0,
    )


OPTIONS = SamplingOptions(num_sampling_steps=3, cfg_scale=2.0)


@pytest.mark.parametrize("dropped_labels, scale", [(0.0, 1.0), (1.0, 0.0), (0.5, 4.0)])
def test_without_a_scale_the_pipeline_takes_a_possible_one(tiny_config, tmp_path, dropped_labels, scale):
    """So does the example of the model card."""
    config = load_config(tiny_config, [f"training.class_dropout_prob={dropped_labels}"])
    trained = load_trained(save(config, tmp_path))
    pipe = DCDiTPipeline(trained)

    def images(**options):
        generator = torch.Generator().manual_seed(0)
        (image,) = pipe([1], num_inference_steps=2, generator=generator, **options).images
        return np.asarray(image)

    assert np.array_equal(images(), images(guidance_scale=scale))
    if dropped_labels in (0, 1):
        with pytest.raises(UserError, match=f"--cfg-scale 2.0: the model was trained .*; use {scale:g}"):
            images(guidance_scale=2.0)
    card = hub.model_card(trained)
    assert f"(class_labels=[0], guidance_scale={scale})" in card
    assert ("Unconditional diffusion transformer" in card) == (scale == 0)


def test_folder(checkpoint, tmp_path, capsys):
    folder = tmp_path / "hub"
    hub.main(["--ckpt", str(checkpoint), "--output", str(folder)])
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "vae",
    ]
    again = hub.Pretrained.from_pretrained(folder).trained
    run = load_trained(checkpoint)
    assert again.fingerprint == run.fingerprint and again.config.model == run.config.model and again.step == 5
    assert again.autoencoder.sha256 == run.autoencoder.sha256 and again.autoencoder.name == str(
        folder / "vae"
    )
    assert json.loads((folder / "config.json").read_text()) == to_dict(again.config)
    images = [generate_images(load_trained(source), [0, 1], OPTIONS) for source in (checkpoint, folder)]
    assert torch.equal(*images) and images[0].float().std() > 1

    card = ModelCard.load(folder / "README.md")
    assert (
        card.data.library_name == "dc-dit"
        and "3 classes: a, b, c" in card.text
        and "arch_layout" in card.text
    )
    budgets = [
        line.split("|")[1:4] for line in card.text.splitlines() if line.startswith("| ") and "%" in line
    ]
    assert [row[0].strip() for row in budgets] == ["0%", "20%", "40%", "60%"]
    costs = [float(row[2]) for row in budgets]
    assert costs == sorted(costs, reverse=True) and costs[3] < costs[0]


def test_the_folder_names_no_place_of_this_machine(checkpoint, tiny_config, tiny_vae, tmp_path):
    """Neither of the features, nor of the autoencoder, nor of the run; the note stands on the card."""
    folder = tmp_path / "hub"
    note = "Drawn by a script; CC0."
    hub.main(["--ckpt", str(checkpoint), "--output", str(folder), "--data-note", note])
    places = [load_config(tiny_config).data.feature_path, str(tiny_vae), str(tmp_path)]
    for file in folder.rglob("*.*"):
        content = file.read_bytes()
        assert not [place for place in places if place.encode() in content], file
    assert note in (folder / "README.md").read_text()


@pytest.mark.parametrize("folder", hub.shipped_models(), ids=lambda folder: folder.name)
def test_shipped_model(folder):
    """It samples from its folder alone: finite images that differ by class."""
    trained = load_trained(folder)
    assert trained.autoencoder.name == str(folder / "vae")
    images = generate_images(trained, [0, 1], SamplingOptions(num_sampling_steps=2, cfg_scale=2.0))
    assert images.float().std() > 1 and not torch.equal(*images)


def test_shipped_models_are_small():
    sizes = [file.stat().st_size for file in hub.ASSETS.rglob("*.*")]
    assert sum(sizes) <= 25e6


def test_no_other_model_is_replaced(checkpoint, tiny_config, tmp_path):
    """The same one is written again, as after an interruption; other files are no model."""
    folder = tmp_path / "hub"
    export = ["--output", str(folder), "--ckpt"]
    hub.main([*export, str(checkpoint)])
    (folder / "README.md").unlink()
    hub.main([*export, str(checkpoint)])
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    other = save(load_config(tiny_config, ["training.class_dropout_prob=0"]), tmp_path)
    with pytest.raises(UserError, match="--output .*hub': holds another model; give another folder"):
        hub.main([*export, str(other)])
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    (folder / "model.safetensors").write_bytes(b"another program's")
    with pytest.raises(UserError, match="holds another model"):
        hub.main([*export, str(checkpoint)])
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds other files, such as README.md"):
        hub.main([*export, str(checkpoint)])


def test_push(checkpoint, monkeypatch):
    """What would be uploaded is the folder."""
    seen = {}

    def upload(self, *, repo_id, folder_path, **options):
        seen["names"] = {path.name for path in folder_path.iterdir()}
        return f"uploaded to {repo_id}"

    created = type("Created", (), {"repo_id": "me/dc-dit"})
    monkeypatch.setattr(HfApi, "create_repo", lambda self, **options: created)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert hub.Pretrained(load_trained(checkpoint)).push_to_hub("me/dc-dit") == "uploaded to me/dc-dit"
    assert seen["names"] == {"README.md", "config.json", "model.safetensors", "vae"}


def test_an_autoencoder_of_the_hub_is_not_copied(checkpoint, tmp_path):
    """Nor is that of an earlier export into the same folder left there, nor its model card."""
    run = load_trained(checkpoint)
    hub.Pretrained(run).save_pretrained(tmp_path)
    assert "after 5 steps" in (tmp_path / "README.md").read_text()
    run.autoencoder.name = "ema"
    hub.Pretrained(run._replace(step=6)).save_pretrained(tmp_path)
    assert not (tmp_path / "vae").exists() and "after 6 steps" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "scale, drop, uncond_drop, steps, predicts",
    [
        (1.0, 0.0, None, 4, "epsilon"),
        (2.0, 0.5, None, 7, "epsilon"),
        (2.0, 0.5, None, 4, "velocity"),
        (2.0, 0.0, 0.8, 4, "velocity"),
    ],
)
def test_the_pipeline_samples_what_our_sampler_does(checkpoint, scale, drop, uncond_drop, steps, predicts):
    """DDPM with learned variances on the same noise: the same pictures, and the same tokens kept."""
    run, labels = load_trained(checkpoint), [0, 1, 2]
    run.config.diffusion.prediction = predicts
    generator = torch.Generator().manual_seed(3)
    output = DCDiTPipeline(run)(labels, scale, drop, steps, generator, uncond_drop_fraction=uncond_drop)

    generator = torch.Generator().manual_seed(3)
    options = SamplingOptions(
        cfg_scale=scale,
        num_sampling_steps=steps,
        budget=Budget.fraction(drop),
        uncond=None if uncond_drop is None else Budget.fraction(uncond_drop),
    )

    def draw():
        return torch.randn(3, 4, 8, 8, generator=generator)

    def sampler(denoise):
        return SAMPLERS["ddpm"](
            create_diffusion(sampling_steps=steps, predicts=predicts), denoise, draw(), draw
        )

    kept = []
    with torch.inference_mode():
        for step, routing in sampling_steps(run, labels, options, sampler):
            kept.append(routing.counts(step.t))
        images = run.autoencoder.decode(step.x_next).permute(0, 2, 3, 1).numpy()

    ours = np.stack([np.asarray(image) for image in output.images])
    assert ours.shape == (3, 32, 32, 3) and images.std() > 1
    assert (
        np.abs(ours.astype(int) - images.astype(int)).max() <= 1
    )  # a level, where rounding falls the other way
    for own, want in zip(output.kept, kept, strict=True):
        assert own.t == want.t and torch.equal(own.conditional, want.conditional)
        assert (own.unconditional is None) == (scale == 1)
        assert scale == 1 or torch.equal(own.unconditional, want.unconditional)


def test_other_schedulers(checkpoint):
    from diffusers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        HeunDiscreteScheduler,
        UniPCMultistepScheduler,
    )

    pipe = DCDiTPipeline.from_pretrained(checkpoint)
    settings = pipe.scheduler.config
    for kind in (DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler):
        pipe.scheduler = kind.from_config(settings, variance_type=None)
        first, again = (
            pipe([0, 1], num_inference_steps=4, generator=torch.manual_seed(0)).images for _ in range(2)
        )
        assert all(np.array_equal(a, b) for a, b in zip(first, again)) and len(first) == 2
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(settings)
    with pytest.raises(UserError, match="make it with variance_type=None"):
        pipe([0])
    for mistake in (
        {"guidance_scale": 0.5},
        {"drop_fraction": 1.0},
        {"num_inference_steps": 0},
        {"class_labels": [3]},
    ):
        with pytest.raises(UserError):
            DCDiTPipeline(pipe.trained)(**{"class_labels": [0], **mistake})


MISFITS = {
    "FlowMatchEulerDiscreteScheduler": "is for another process, such as flow matching",
    "EDMEulerScheduler": "is for another process",
    "KarrasVeScheduler": "is for another process",
    "HeunDiscreteScheduler": "has another noise schedule than the model was trained with",  # if not from_config
    "RePaintScheduler": "needs mask, original_image in every step",
    "DDIMInverseScheduler": "goes from t = 0 to 666, not from noise to image",
}


@pytest.mark.parametrize("name", MISFITS)
def test_schedulers_that_do_not_fit(checkpoint, name):
    pipe = DCDiTPipeline(load_trained(checkpoint), getattr(diffusers, name)())
    with pytest.raises(UserError, match=f"^scheduler {name}: {MISFITS[name]}.*; give one that denoises"):
        pipe([0], num_inference_steps=3)


@pytest.mark.parametrize("change", [{"prediction_type": "v_prediction"}, {"use_flow_sigmas": True}])
def test_schedulers_for_another_prediction(checkpoint, change):
    pipe = DCDiTPipeline.from_pretrained(checkpoint)
    kind = diffusers.DPMSolverMultistepScheduler
    pipe.scheduler = kind.from_config(pipe.scheduler.config, variance_type=None, **change)
    with pytest.raises(UserError, match="reads a prediction of another kind"):
        pipe([0])


@pytest.fixture
def backends():
    """Those with a switch for TF32, which is put back afterwards."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    yield backends
    for backend, value in zip(backends, before):
        backend.allow_tf32 = value


@pytest.mark.parametrize("asked", [True, False])
def test_every_way_of_sampling_sets_tf32_as_the_configuration_asks(checkpoint, asked, backends):
    run = load_trained(checkpoint)
    run.config.model.hnet.fp32_router_dechunk = "tf32" if asked else True
    for sample in (
        lambda: DCDiTPipeline(run)([0], num_inference_steps=1),
        lambda: generate_images(run, [0], OPTIONS),
    ):
        for backend in backends:
            backend.allow_tf32 = not asked
        sample()
        assert {backend.allow_tf32 for backend in backends} == {asked}


def test_a_kernel_for_gpus_is_refused_on_the_cpu(checkpoint):
    run = load_trained(checkpoint)
    run.config.model.attention = "varlen"
    for sample in (lambda: DCDiTPipeline(run)([0]), lambda: generate_images(run, [0], OPTIONS)):
        with pytest.raises(UserError, match="model.attention: "):
            sample()


def test_the_fast_solver_samples(checkpoint):
    images = generate_images(
        load_trained(checkpoint),
        [0, 1],
        SamplingOptions(cfg_scale=2.0, num_sampling_steps=5, sampler="dpm++"),
    )
    assert images.shape == (2, 3, 32, 32) and images.float().std() > 1


@pytest.mark.parametrize(
    "change, same",
    [
        ("model.timestep_divisor=127", False),
        ("diffusion.diffusion_steps=500", False),
        ("data.num_workers=3", True),
    ],
)
def test_what_the_configuration_makes_of_the_weights_is_in_the_fingerprint(checkpoint, change, same):
    run = load_trained(checkpoint)
    config = config_from_dict(to_dict(run.config), [change])
    assert config != run.config and (fingerprint(run.model.state_dict(), config) == run.fingerprint) == same


def test_another_autoencoder_is_refused(checkpoint, capsys):
    """Except for the two of the hub, which share their encoder."""
    run = load_trained(checkpoint)
    known = run.autoencoder.describe() | {"sha256": "0"}
    with pytest.raises(UserError, match="has other weights than '.*tiny'"):
        check_autoencoder(run.autoencoder, known, run.config)
    run.autoencoder.name = "mse"
    check_autoencoder(run.autoencoder, known | {"name": "ema"}, run.config)
    assert "warning: --vae mse decodes" in capsys.readouterr().out


def test_the_autoencoder_of_the_folder_can_be_replaced(checkpoint, tiny_vae, tmp_path):
    hub.Pretrained(load_trained(checkpoint)).save_pretrained(tmp_path)
    assert (
        load_trained(tmp_path, vae=str(tiny_vae)).autoencoder.name
        == Autoencoder.load(str(tiny_vae), "cpu").name
    )
