"""A trained model as a folder for the Hugging Face hub: weights, configuration, autoencoder and model card.

    python -m sampling.hub --ckpt results/B-N4/checkpoints/0400000.pt --output hub/DC-DiT-B-N4

`--push-to-hub USER/NAME` uploads the folder too. `--ckpt` and `DCDiTPipeline.from_pretrained` read it. The models
that come with the repository are such folders in `assets/`. No path of the machine that wrote the folder is in it.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download

import cli
from config import Config, UserError, config_from_dict, to_dict, to_yaml
from data.autoencoder import HUB_NAMES, Autoencoder
from data.codecs import pixel_stride
from data.files import write_json, write_text
from data.names import markdown, short_name
from models import architecture, flops
from sampling.arguments import add_weights_argument
from sampling.load import TrainedModel, load_trained
from sampling.options import possible_scale
from sampling.pipeline import DEFAULT_SCALE
from weights.checkpoint import WEIGHTS, Checkpoint, load_checkpoint, save_weights

# Budgets and sampling steps whose cost the model card gives
DROPPED_FRACTIONS = (0.0, 0.2, 0.4, 0.6)
SAMPLING_STEPS = 250

# A model card lists the names of at most this number of classes
MOST_NAMES = 20

# The autoencoder within the folder of a model
VAE = "vae"

# Models that come with the repository, a folder each
ASSETS = Path(__file__).parent.parent / "assets"


def shipped_models() -> list[Path]:
    """The folders in `assets/` that hold a model, by name."""
    return sorted(file.parent for file in ASSETS.glob(f"*/{WEIGHTS}"))


class Pretrained(
    ModelHubMixin, library_name="dc-dit", tags=["diffusion", "class-conditional-image-generation"]
):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` of a TrainedModel.

    Args:
        data_note: a sentence about the training data for the model card, such as source and licence.
    """

    def __init__(self, trained: TrainedModel, data_note: str = ""):
        self.trained = trained._replace(config=without_paths(trained.config, trained.autoencoder))
        self.data_note = data_note

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the folder; what an earlier export left in it is replaced."""
        trained = self.trained
        autoencoder = trained.autoencoder
        if (save_directory / WEIGHTS).is_file():
            shutil.rmtree(save_directory / VAE, ignore_errors=True)
        config = to_dict(trained.config)
        state: Checkpoint = {
            "step": trained.step,
            "config": config,
            "autoencoder": {**autoencoder.describe(), "name": config["data"]["vae"]},
            "features": None,
            "class_names": trained.class_names,
            "weights": None if trained.weights == "ema" else trained.weights,
            "ema": trained.model.state_dict(),
        }
        save_weights(save_directory / WEIGHTS, state)
        write_json(save_directory / "config.json", config)
        write_text(save_directory / "README.md", str(self.generate_model_card()))
        if is_own(autoencoder):
            save_autoencoder(autoencoder, save_directory / VAE)

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, device: str = "cpu", vae: str | None = None, **download: Any
    ) -> "Pretrained":
        """`model_id` is a local folder, or a repository of which everything is downloaded."""
        folder = model_id if Path(model_id).is_dir() else snapshot_download(model_id, **download)
        return cls(load_trained(folder, device, vae))

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        return ModelCard(model_card(self.trained, self.data_note))


def is_own(autoencoder: Autoencoder) -> bool:
    """Whether only this machine has it: whoever downloads the folder has the published ones, but not this one."""
    return autoencoder.name not in HUB_NAMES and pixel_stride(autoencoder.name) is None


def save_autoencoder(autoencoder: Autoencoder, folder: Path) -> None:
    """Write a diffusers folder without the place where the autoencoder was found."""
    autoencoder.codec.model.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings.pop("_name_or_path", None)
    write_json(folder / "config.json", settings)


def without_paths(config: Config, autoencoder: Autoencoder) -> Config:
    """The configuration with the last name of every absolute path. Paths decide nothing about samples."""

    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shorten(entry) for key, entry in value.items()}
        is_path = isinstance(value, str) and os.path.isabs(value)
        return Path(value).name if is_path else value

    values = shorten(to_dict(config))
    values["data"]["vae"] = VAE if is_own(autoencoder) else autoencoder.name
    return config_from_dict(values)


def model_card(trained: TrainedModel, data_note: str = "") -> str:
    """Markdown: the model, its training data, what it costs at each budget, and its configuration."""
    config = trained.config
    data = config.data
    batch = config.training.global_batch_size * config.training.gradient_accumulation_steps
    parameters = sum(p.numel() for p in trained.model.parameters())
    kinds = {"ema": "EMA weights", "model": "Trained weights"}
    weights = kinds.get(trained.weights, f"Weights of the average `{trained.weights}`")
    autoencoder = short_name(Path(trained.autoencoder.name).name).replace("`", "'")
    scale = possible_scale(DEFAULT_SCALE, config)
    kind = "Class-conditional diffusion" if scale else "Unconditional diffusion"
    classes = ""
    if trained.class_names and len(trained.class_names) <= MOST_NAMES:
        classes = f": {', '.join(markdown(name) for name in trained.class_names)}"
    return f"""---
library_name: dc-dit
pipeline_tag: unconditional-image-generation
tags: [diffusion, model_hub_mixin]
---
# {markdown(config.model.name)}

{kind} transformer with {parameters / 1e6:.1f} M parameters.
{weights} after {trained.step:,} steps.

```bash
python sample.py --ckpt FOLDER --cfg-scale {scale:g}
```

```python
from sampling.pipeline import DCDiTPipeline

images = DCDiTPipeline.from_pretrained("FOLDER")(class_labels=[0], guidance_scale={scale}).images
```

{conditions_note(config)}## Training data

{data.image_grid} pixels, {data.num_classes} classes{classes}.
{trained.step:,} steps of {batch} images,
as latents of {data.latent_channels} channels and {config.latent_grid} cells.
Autoencoder: `{autoencoder}`, SHA-256 of its weights `{trained.autoencoder.sha256[:16]}`.
{data_note}

## Budgets and cost

{cost_table(config)}

## Configuration

```yaml
{to_yaml(config)}```
"""


def conditions_note(config: Config) -> str:
    """Markdown: what conditions samples can have beside the class; nothing for a model without conditions."""
    conditions = config.data.conditions
    if not conditions:
        return ""
    kinds = ", ".join(f"`{name}` ({kind})" for name, kind in conditions.items())
    name = next(iter(conditions))
    script = f"--condition {name}=VALUE"
    pipeline = f"conditions={{'{name}': value}}"
    return (
        f"Samples can have conditions beside the class: {kinds}.\n"
        f"The script takes `{script}`, and the pipeline `{pipeline}`.\n\n"
    )


def cost_table(config: Config) -> str:
    """Markdown table of the cost at nominal kept shares."""
    network = architecture(config)
    undropped = float(config.tokens)
    fractions: tuple[float, ...] = (0.0,)
    if not config.is_static:
        undropped = config.tokens / config.training.downsample_factor
        fractions = DROPPED_FRACTIONS
    rows = [
        f"| kept tokens dropped | tokens of {config.tokens} | GFLOP per forward pass "
        f"| TFLOP per image, {SAMPLING_STEPS} steps |",
        "|---|---|---|---|",
    ]
    for fraction in fractions:
        count = undropped * (1 - fraction)
        cost = flops.total_flops(network, flops.TokenCounts(count, count**2))
        per_image = cost * SAMPLING_STEPS / 1e12
        rows.append(f"| {fraction:.0%} | {count:.0f} | {cost / 1e9:.4g} | {per_image:.4g} |")
    rows.append("")
    rows.append(
        "Without guidance, which doubles the cost, and without the autoencoder; 2 FLOPs per multiply-add."
    )
    return "\n".join(rows)


def holds(file: Path, trained: TrainedModel) -> bool:
    """Whether a weights file is that of this model at this step."""
    try:
        state = load_checkpoint(file)
    except UserError:
        return False
    own = trained.model.state_dict()
    weights = state["ema"]
    if state["step"] != trained.step or weights.keys() != own.keys():
        return False
    return all(torch.equal(weights[name], own[name]) for name in own)


def check_folder(folder: Path, trained: TrainedModel) -> None:
    """UserError for a folder with another model or other files. One of the same model is written again."""
    if not folder.is_dir():
        return
    if (folder / WEIGHTS).is_file():
        if not holds(folder / WEIGHTS, trained):
            raise UserError(f"--output '{folder}': holds another model; give another folder, or remove it")
        return
    others = [
        path.name for path in folder.iterdir() if not path.name.startswith(".") and path.suffix != ".tmp"
    ]
    if others:
        raise UserError(
            f"--output '{folder}': holds other files, such as {short_name(min(others))}; give another folder"
        )


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--ckpt", required=True, help="checkpoint or weights file")
    parser.add_argument(
        "--vae", help="ema, mse or a local diffusers folder (default: the one that the checkpoint names)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--data-note",
        metavar="TEXT",
        default="",
        help="what the model card says about the training data: source, licence, attribution",
    )
    parser.add_argument("--push-to-hub", metavar="USER/NAME", help="upload it to this repository as well")
    add_weights_argument(parser)
    cli.add_import_argument(parser)
    args = parser.parse_args(argv)
    cli.check_output("--output", args.output)
    model = Pretrained(load_trained(args.ckpt, "cpu", args.vae, weights=args.weights), args.data_note)
    check_folder(args.output, model.trained)
    model.save_pretrained(args.output)
    names = sorted(path.name for path in args.output.iterdir())
    print(f"{args.output}: {', '.join(names)}")
    if args.push_to_hub:
        print(model.push_to_hub(args.push_to_hub))


if __name__ == "__main__":
    cli.run(main)
