"""Networks that turn images into features: Inception, a TorchScript file, the folder of a timm model."""

import hashlib
import io
import json
import pickle
import warnings
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.error import URLError

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from config import UserError, one_line
from data.store_files import sha256_of
from evaluation.adm_npz import parse_class_names
from processes import group
from weights.untrusted import unpickling_problem

SPATIAL_CHANNELS = 7  # sFID takes the first channels of mixed_6/conv: 17 x 17 x 7 = 2023 values
CLASS_NAMES_FILE = "class_names.json"  # in a TorchScript archive
TIMM_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")  # in timm's order


class ExtractorOutput(NamedTuple):
    """What an extractor computes from a batch of images, in float32."""

    features: Tensor  # (B, D)
    logits: Tensor | None  # (B, K), where the extractor is a classifier
    spatial: Tensor | None  # (B, 2023), of Inception only


class Extractor(Protocol):
    """What every extractor has.

    Attributes:
        name: kind and content hash of the weights. Features may be compared only if these names are equal.
        is_inception: whether distances of these features may be called FID and sFID.
        tf32: whether its products in float32 may run as TF32.
        class_names: of the logits, where the file has them.
    """

    name: str
    class_names: list[str] | None
    device: torch.device
    is_inception: bool
    tf32: bool

    def __call__(self, images: Tensor) -> ExtractorOutput:
        """images: (B, 3, H, W) uint8 on the extractor's device."""


def load_extractor(
    features: str, inception_weights: str | None, device: torch.device, tf32: bool = False
) -> Extractor:
    """The extractor that --features names: "inception", a TorchScript file or the folder of a timm model.

    Args:
        tf32: its products in float32 may run as TF32.

    Raises:
        UserError: a package or file is missing, or the file's content is something else.
    """
    extractor = find_extractor(features, inception_weights, device)
    extractor.tf32 = tf32
    return extractor


def precise_name(extractor: Extractor) -> str:
    """Name of the extractor, and whether its products ran as TF32: equal names mean equal features."""
    return f"{extractor.name}+tf32" if extractor.tf32 else extractor.name


def find_extractor(features: str, inception_weights: str | None, device: torch.device) -> Extractor:
    """`load_extractor` without its switches."""
    path = Path(features)
    if features == "inception":
        return Inception(inception_weights, device)
    if inception_weights:
        raise UserError(
            f"--inception-weights '{inception_weights}': has no meaning with --features '{features}'; "
            "leave it out"
        )
    if (path / "config.json").is_file():
        return TimmModel(path, device)
    if path.is_file():
        return TorchScriptModel(path, device)
    raise UserError(
        f"--features '{features}': is neither 'inception', a TorchScript file nor the folder of a timm model"
    )


class Inception:
    """The Inception graph of 2015 behind FID, in torch-fidelity's conversion, with TensorFlow's resize."""

    is_inception = True
    tf32 = False
    class_names: list[str] | None = None

    def __init__(self, weights: str | None, device: torch.device):
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as inception
        except ImportError:
            raise UserError(
                "--features inception: needs the package torch-fidelity; run `pip install torch-fidelity`"
            ) from None
        url = inception.URL_INCEPTION_V3
        path = Path(weights) if weights else download(url)
        try:
            data = path.read_bytes()
            # A safe load first, because torch-fidelity's own load would execute a malicious pickle
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # about files that turn out to be something else
                torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            network = inception.FeatureExtractorInceptionV3("inception", ["2048"], io.BytesIO(data))
        except OSError as error:
            raise UserError(
                f"--inception-weights '{path}': cannot be read ({error.strerror}); download it from {url}"
            ) from None
        except (
            RuntimeError,
            pickle.UnpicklingError,
            EOFError,
            TypeError,
            AttributeError,
            ValueError,
        ) as error:
            raise UserError(
                f"--inception-weights '{path}': does not hold the Inception weights ({unpickling_problem(error)}); "
                f"download them from {url}"
            ) from None
        self.name = f"inception:{hashlib.sha256(data).hexdigest()}"
        self.device = device
        self.network = network.to(device)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> ExtractorOutput:
        maps = []

        def keep_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            maps.append(output)

        # TensorFlow calls the output of this layer mixed_6/conv
        with self.network.Mixed_6d.branch1x1.register_forward_hook(keep_output):
            (features,) = self.network(images)
        # In TensorFlow's order: row, column, channel
        spatial = maps[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        # The ADM suite leaves out the bias of the last layer
        logits = features @ self.network.fc.weight.T
        return ExtractorOutput(features, logits, spatial)


def download(url: str) -> Path:
    """The file behind a URL in torch's hub folder, downloaded if it is missing.

    The file name must end with the start of the file's SHA-256, as those of torch-fidelity do.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    # What follows the last hyphen is the start of the hash
    expected_hash = path.stem.rsplit("-", 1)[-1]
    if path.is_file():
        if sha256_of(path).startswith(expected_hash):
            return path
        group.print_once(f"'{path}' is damaged; it is downloaded again")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=expected_hash)
    except (URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"--inception-weights is not given and {url} cannot be downloaded ({one_line(error)}); "
            "download that file on a machine with internet access and give it as --inception-weights, "
            f"or put it at {path}"
        ) from None
    return path


class TorchScriptModel:
    """A TorchScript file: images (B, 3, H, W) uint8 -> features (B, D), or (features, logits (B, K)).

    Its extra file CLASS_NAMES_FILE may hold the names of the K classes, as a list in JSON.
    """

    is_inception = False
    tf32 = False

    def __init__(self, path: Path, device: torch.device):
        data = path.read_bytes()
        extra = {CLASS_NAMES_FILE: ""}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # PyTorch recommends other formats by now
                network = torch.jit.load(io.BytesIO(data), map_location=device, _extra_files=extra)
        except (RuntimeError, ValueError, EOFError) as error:
            reason = one_line(error, 120)
            raise UserError(
                f"--features '{path}': is not a TorchScript file ({reason}); torch.jit.save writes one"
            ) from None
        self.path = path
        self.network = network.eval()
        self.class_names = parse_class_names(extra[CLASS_NAMES_FILE])
        self.name = f"torchscript:{hashlib.sha256(data).hexdigest()}"
        self.device = device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> ExtractorOutput:
        try:
            output = self.network(images)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            size = f"{images.shape[2]} x {images.shape[3]}"
            raise UserError(
                f"--features '{self.path}': fails on uint8 images of {size} pixels ({last_line(error)}); "
                "give a network for this size"
            ) from None
        parts = output if isinstance(output, tuple) else (output,)
        if len(parts) == 2 and parts[1] is None:
            parts = parts[:1]
        if len(parts) > 2 or not all(is_batch_of(part, len(images)) for part in parts):
            raise UserError(
                f"--features '{self.path}': returns neither features (B, D) nor (features, logits (B, K)); "
                "give a network that does"
            )
        logits = parts[1].float() if len(parts) == 2 else None
        return ExtractorOutput(parts[0].flatten(1).float(), logits, None)


def is_batch_of(value: Any, count: int) -> bool:
    """Whether a value is a tensor with this many rows."""
    return isinstance(value, Tensor) and value.ndim > 1 and len(value) == count


def last_line(error: Exception) -> str:
    """The last line of a message that begins with a trace."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1][:120]


class TimmModel:
    """A local folder with config.json and weights as timm saves it, with the preprocessing named there."""

    is_inception = False
    tf32 = False

    def __init__(self, path: Path, device: torch.device):
        import timm  # here, because the import takes seconds and few commands need it

        try:
            self.network = timm.create_model(f"local-dir:{path}").to(device).eval()
            self.network.load_state_dict(read_timm_weights(path))
        except Exception as error:  # timm, safetensors and json raise a dozen kinds
            raise UserError(
                f"--features '{path}': is not the folder of a timm model ({unpickling_problem(error)})"
            ) from None

        # Preprocessing
        settings = timm.data.resolve_model_data_config(self.network)
        self.size = settings["input_size"][1:]
        mode = settings["interpolation"]
        self.interpolation = mode if mode in ("bilinear", "bicubic") else "bicubic"
        self.mean = torch.tensor(settings["mean"], device=device).view(3, 1, 1)
        self.std = torch.tensor(settings["std"], device=device).view(3, 1, 1)

        # Names of the classes; the data sets of timm's own models have none here
        config = (path / "config.json").read_bytes()
        self.class_names = parse_class_names(json.dumps(json.loads(config).get("label_names")))

        # The name covers the configuration and the weights as loaded
        digest = hashlib.sha256(config)
        for name, value in self.network.state_dict().items():
            digest.update(name.encode())
            digest.update(value.cpu().numpy().tobytes())
        self.name = f"timm:{digest.hexdigest()}"
        self.device = device

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> ExtractorOutput:
        # Preprocess
        pixels = images.float() / 255
        pixels = F.interpolate(
            pixels, self.size, mode=self.interpolation, antialias=True, align_corners=False
        )

        # Features before the classifier, and what it makes of them
        maps = self.network.forward_features((pixels - self.mean) / self.std)
        features = self.network.forward_head(maps, pre_logits=True).flatten(1)
        logits = self.network.forward_head(maps) if self.network.num_classes else None
        return ExtractorOutput(features, logits, None)


def read_timm_weights(folder: Path) -> dict[str, Tensor]:
    """The weights file that timm itself would choose. Some versions of timm would unpickle it."""
    for name in TIMM_WEIGHTS:
        file = folder / name
        if not file.exists():
            continue
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    raise FileNotFoundError(f"none of {', '.join(TIMM_WEIGHTS)}")
