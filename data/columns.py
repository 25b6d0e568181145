"""Add a named column to a feature store: an array with an entry per image, beside the latents.

    python -m data.columns features/own aesthetic scores.npy
    python -m data.columns features/own dino tokens.npy --mirrored tokens-mirrored.npy

A file holds (n, ...) numbers: n scalars, vectors (n, width), or the tokens of an encoder (n, tokens, width). Row k
belongs to image k of the store, `open_features(folder, image_size).file_names[k]`. A store of moments also has the
mirror images: --mirrored gives their rows; without it, both views have the same row, which is right for a score.
Text is not a column: embed it first.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

import cli
from config import UserError, one_line
from config_keys import COLUMN_NAME
from data.files import write_file, write_json
from data.store_files import column_file, read_manifest, sha256_of

CHUNK = 256  # images that are copied at once


def add_column(folder: Path, name: str, file: Path, mirrored: Path | None = None) -> None:
    """Copy a .npy file into a complete store, and name it in the manifest. A column of this name is replaced.

    Args:
        folder: of the store.
        name: lower-case letters, digits and underscores.
        file: (n, ...) of any number format, which is stored as float16 if it has that, otherwise as float32.
        mirrored: the same of the mirror images.

    Raises:
        UserError: no complete store, or a name or files that do not fit.
    """
    if not re.fullmatch(COLUMN_NAME, name):
        raise UserError(f"{name}: is no name of a column; use lower-case letters, digits and underscores")
    if not (folder / "manifest.json").is_file():
        raise UserError(
            f"{folder}: is no complete feature store; make one with extract_features.py --features-path {folder}"
        )
    manifest = read_manifest(folder / "manifest.json")
    views = [open_rows(file, manifest["count"])]
    if mirrored is not None:
        if manifest["kind"] != "moments" or manifest["views"] != 2:
            raise UserError(
                f"--mirrored {mirrored}: the store does not hold mirror images beside the images; leave it out"
            )
        views.append(open_rows(mirrored, manifest["count"]))
        if views[0].shape != views[1].shape:
            raise UserError(f"--mirrored {mirrored}: is {views[1].shape}, but {file} is {views[0].shape}")

    # The manifest first forgets the column, so that it never describes another file
    dtype = "float16" if all(rows.dtype == np.float16 for rows in views) else "float32"
    target = folder / column_file(name)
    columns = manifest.setdefault("columns", {})
    if columns.pop(name, None) is not None:
        write_json(folder / "manifest.json", manifest)
    write_file(target, lambda stream: write_rows(stream, views, dtype, file))
    columns[name] = {
        "dtype": dtype,
        "views": len(views),
        "shape": list(views[0].shape[1:]),
        "bytes": target.stat().st_size,
        "sha256": sha256_of(target),
    }
    write_json(folder / "manifest.json", manifest)


def open_rows(file: Path, count: int) -> np.ndarray:
    """The memory map of a .npy file of numbers with a row per image; UserError for anything else."""
    try:
        rows = np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # NumPy and mmap raise many kinds on strange headers
        raise UserError(f"{file}: is not a readable .npy file ({one_line(error)})") from None
    if rows.dtype.kind not in "fiub":
        raise UserError(f"{file}: holds {rows.dtype}, not numbers; embed texts first")
    if rows.ndim == 0 or len(rows) != count:
        raise UserError(f"{file}: is {rows.shape}, but the store has {count} images; give a row per image")
    return rows


def write_rows(stream: BinaryIO, views: list[np.ndarray], dtype: str, file: Path) -> None:
    """Write (n, views, ...) as a .npy file. Raises UserError for a number that is not finite in this format."""
    shape = (len(views[0]), len(views), *views[0].shape[1:])
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    for start, rows in stacked_chunks(views, dtype):
        finite = np.isfinite(rows).reshape(len(rows), -1).all(1)
        if not finite.all():
            raise UserError(f"{file}: row {start + int(finite.argmin())} is not finite in {dtype}")
        stream.write(rows.tobytes())


def stacked_chunks(views: list[np.ndarray], dtype: str) -> Iterator[tuple[int, np.ndarray]]:
    """The first image of each chunk and its rows, (chunk, views, ...)."""
    for start in range(0, len(views[0]), CHUNK):
        chunk = [rows[start : start + CHUNK] for rows in views]
        # Numbers beyond the format become infinities, which the caller refuses
        with np.errstate(over="ignore"):
            yield start, np.stack(chunk, axis=1).astype(dtype)


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", type=Path, help="a complete feature store")
    parser.add_argument("name", help="of the column, as data.conditions or training.terms call it")
    parser.add_argument("file", type=Path, help=".npy file with a row per image")
    parser.add_argument("--mirrored", type=Path, metavar="FILE", help="the rows of the mirror images")
    args = parser.parse_args(argv)
    add_column(args.folder, args.name, args.file, args.mirrored)
    entry = read_manifest(args.folder / "manifest.json")["columns"][args.name]
    print(f"{args.folder}: column {args.name}, {entry['dtype']} {tuple(entry['shape'])} per image")


if __name__ == "__main__":
    cli.run(main)
