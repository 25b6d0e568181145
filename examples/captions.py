"""Captions as a condition: CLIP embeds each once, for a column of the features and for --condition.

    python -m examples.captions features/own data/captions

A kind of condition of one's own, which reads text. Needs `pip install transformers`.
"""

from pathlib import Path

import numpy as np
import torch

import cli
import plugins
from config import UserError
from data.columns import add_column
from data.features import FeatureStore
from data.store_files import read_manifest
from grid import Grid
from models.embeddings import VectorCondition

MODEL = "openai/clip-vit-large-patch14"
WIDTH = 768
BATCH = 256


@torch.inference_mode()
def encode(captions: list[str]) -> np.ndarray:
    """Embeddings (n, 768) of captions, with a mean square of 1."""
    import transformers

    tokenizer = transformers.CLIPTokenizer.from_pretrained(MODEL)
    encoder = transformers.CLIPTextModelWithProjection.from_pretrained(MODEL).eval()
    rows = []
    for start in range(0, len(captions), BATCH):
        batch = captions[start : start + BATCH]
        tokens = tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
        rows.append(encoder(**tokens).text_embeds)
    unit = torch.nn.functional.normalize(torch.cat(rows))
    return unit.numpy() * np.float32(WIDTH**0.5)


class CaptionCondition(VectorCondition):
    """A caption, or a .txt file with a caption per sample."""

    @classmethod
    def read(cls, text: str, shape: tuple[int, ...]) -> np.ndarray:
        is_file = text.endswith(".txt")
        return encode(Path(text).read_text(encoding="utf-8").splitlines() if is_file else [text])


plugins.add_condition("caption-N", CaptionCondition)


def read_captions(folder: Path, names: list[str]) -> list[str]:
    """The text beside each image: folder/cat/1.txt for cat/1.png; UserError for an image without one."""
    captions = []
    for name in names:
        file = (folder / name).with_suffix(".txt")
        if not file.is_file():
            raise UserError(
                f"captions '{folder}': has no {file.relative_to(folder)}; write one for every image"
            )
        captions.append(file.read_text(encoding="utf-8").strip())
    return captions


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("features", type=Path, help="a complete feature store")
    parser.add_argument("captions", type=Path, help="folder with a text file for each image")
    args = parser.parse_args(argv)
    size = read_manifest(args.features / "manifest.json")["image_size"]
    store = FeatureStore(args.features, Grid.of(size))
    file = args.features / "captions.npy"
    np.save(file, encode(read_captions(args.captions, store.file_names)))
    add_column(args.features, "caption", file)
    file.unlink()
    print(f"{args.features}: column caption, {len(store)} captions")


if __name__ == "__main__":
    cli.run(main)
