"""Networks that turn images into the features whose distributions are compared: Inception, a TorchScript file, a timm folder.

An extractor is called with images (B, 3, H, W) uint8 on its device and returns `Outputs`. Its `name` says kind and content of
the weights: features with equal names may be compared, others must not be.
"""

import hashlib
import io
import pickle
import warnings
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from config import UserError

SPATIAL_CHANNELS = 7  # of mixed_6/conv, 17 x 17: 2023 values

TIMM_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")  # in timm's order


class Outputs(NamedTuple):
    """What an extractor says of a batch, float32."""

    features: Tensor  # (B, D)
    logits: Tensor | None  # (B, K) of its classes
    spatial: Tensor | None  # (B, 2023), Inception only


def load_extractor(
    features: str, inception_weights: str | None, device: torch.device
) -> "Inception | Scripted | Timm":
    """The extractor that --features names: "inception", a TorchScript file or the folder of a timm model.

    Raises:
        UserError: a missing package or file, or content that is something else.
    """
    path = Path(features)
    if features == "inception":
        return Inception(inception_weights, device)
    if inception_weights:
        raise UserError(
            f"--inception-weights '{inception_weights}': has no meaning with --features '{features}'; leave it out"
        )
    if (path / "config.json").is_file():
        return Timm(path, device)
    if path.is_file():
        return Scripted(path, device)
    raise UserError(
        f"--features '{features}': is neither 'inception', a TorchScript file nor the folder of a timm model"
    )


class Inception:
    """The Inception graph of 2015 that FID is defined by, in torch-fidelity's conversion: TensorFlow's resize included."""

    is_inception = True

    def __init__(self, weights: str | None, device: torch.device):
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as inception
        except ImportError:
            raise UserError(
                "--features inception: needs the package torch-fidelity; run `pip install torch-fidelity`"
            ) from None
        path = Path(weights) if weights else download(inception.URL_INCEPTION_V3)
        try:
            data = path.read_bytes()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of files that turn out to be something else
                torch.load(
                    io.BytesIO(data), map_location="cpu", weights_only=True
                )  # torch-fidelity's own load would run code
            network = inception.FeatureExtractorInceptionV3("inception", ["2048"], io.BytesIO(data))
        except OSError as error:
            raise UserError(
                f"--inception-weights '{path}': cannot be read ({error.strerror}); get it from {inception.URL_INCEPTION_V3}"
            ) from None
        except (
            RuntimeError,
            pickle.UnpicklingError,
            EOFError,
            TypeError,
            AttributeError,
            ValueError,
        ) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"--inception-weights '{path}': does not hold the Inception weights ({reason}); get them from "
                f"{inception.URL_INCEPTION_V3}"
            ) from None
        self.name, self.device = f"inception:{hashlib.sha256(data).hexdigest()}", device
        self.network = network.to(device)
        self.network.Mixed_6d.branch1x1.register_forward_hook(
            self._keep_spatial
        )  # TensorFlow calls its output mixed_6/conv

    def _keep_spatial(self, module: nn.Module, inputs, output: Tensor) -> None:
        self.spatial = (
            output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        )  # TensorFlow's order: row, column, channel

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Outputs:
        (features,) = self.network(images)
        return Outputs(
            features, features @ self.network.fc.weight.T, self.spatial
        )  # ADM's softmax leaves the bias out


def download(url: str) -> Path:
    """The file behind a URL in torch's hub folder, fetched if it is not there; its name ends in the start of its SHA-256."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[-1])
        except (URLError, OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"--inception-weights is not given and {url} cannot be downloaded ({reason}); fetch that file on a machine "
                f"with internet access and give it as --inception-weights, or put it at {path}"
            ) from None
    return path


class Scripted:
    """A TorchScript file: images (B, 3, H, W) uint8 -> features (B, D), or (features, logits (B, K))."""

    is_inception = False

    def __init__(self, path: Path, device: torch.device):
        data = path.read_bytes()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch prefers other formats by now
                self.network = torch.jit.load(io.BytesIO(data), map_location=device).eval()
        except (RuntimeError, ValueError, EOFError) as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"--features '{path}': is not a TorchScript file ({reason}); torch.jit.save writes one"
            ) from None
        self.name, self.device = f"torchscript:{hashlib.sha256(data).hexdigest()}", device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Outputs:
        output = self.network(images)
        features, logits = output if isinstance(output, tuple) else (output, None)
        return Outputs(features.flatten(1).float(), None if logits is None else logits.float(), None)


def read_timm_weights(folder: Path) -> dict[str, Tensor]:
    """The file that timm itself would take, which some of its versions would unpickle."""
    file = next((file for name in TIMM_WEIGHTS if (file := folder / name).exists()), None)
    if file is None:
        raise FileNotFoundError(f"none of {', '.join(TIMM_WEIGHTS)}")
    return (
        load_file(file)
        if file.suffix == ".safetensors"
        else torch.load(file, map_location="cpu", weights_only=True)
    )


class Timm:
    """A local folder with config.json and weights as timm saves it, with the preprocessing that its configuration names."""

    is_inception = False

    def __init__(self, path: Path, device: torch.device):
        import timm  # here, because it takes seconds and few commands need it

        try:
            self.network = timm.create_model(f"local-dir:{path}").to(device).eval()
            self.network.load_state_dict(read_timm_weights(path))
        except Exception as error:  # timm, safetensors and json raise a dozen kinds
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            raise UserError(f"--features '{path}': is not the folder of a timm model ({reason})") from None
        settings = timm.data.resolve_model_data_config(self.network)
        self.size, self.interpolation = settings["input_size"][1:], settings["interpolation"]
        self.mean, self.std = (
            torch.tensor(settings[key], device=device).view(3, 1, 1) for key in ("mean", "std")
        )
        digest = hashlib.sha256((path / "config.json").read_bytes())
        for name, value in self.network.state_dict().items():
            digest.update(name.encode() + value.cpu().numpy().tobytes())
        self.name, self.device = f"timm:{digest.hexdigest()}", device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Outputs:
        mode = self.interpolation if self.interpolation in ("bilinear", "bicubic") else "bicubic"
        images = F.interpolate(
            images.float() / 255, self.size, mode=mode, antialias=True, align_corners=False
        )
        maps = self.network.forward_features((images - self.mean) / self.std)
        features = self.network.forward_head(maps, pre_logits=True).flatten(1)
        return Outputs(features, self.network.forward_head(maps) if self.network.num_classes else None, None)
