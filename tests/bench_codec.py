"""Weighs files: images compressed by a model, beside PNG, WebP, JPEG XL, zstd and xz, and the model's own bits.

    python tests/bench_codec.py MODEL FILE… [--batch 128] [--steps 1 2 4 8]

MODEL and FILE… are as demo/codec.py takes them; the images must have one size. One process encodes all, another
one decodes them, and every image is compared. PNG, WebP and JPEG XL get a file for each image, and then all images
as one sheet; zstd and xz get the values of all images as they are. --steps shows what a MAR level's parallel steps
cost: bits/dim by the file for so many steps of every level. Needs cjxl and zstd (Debian: libjxl-tools, zstd).
"""

import argparse
import lzma
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

from baselines import lossless_bits_per_dim, sheet_of
from codec import read_file
from environment import ROOT

from models.hub.zoo import load
from models.likelihood.codec.archive import Archive, join

CODEC = [sys.executable, str(ROOT / "demo" / "codec.py")]


def run(*words) -> list[str]:
    """Runs a command, and returns the lines that it prints."""
    found = subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True)
    return found.stdout.splitlines()


def jpeg_xl(samples: np.ndarray, folder: Path) -> int:
    """The bytes of an image (H, W, C) as lossless JPEG XL of the highest effort but one."""
    image = Image.fromarray(samples.squeeze(-1) if samples.shape[-1] == 1 else samples)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        image.save(f"{place}/image.png")
        run(
            "cjxl",
            f"{place}/image.png",
            f"{place}/image.jxl",
            "-d",
            "0",
            "-e",
            "9",
            "--quiet",
            "--num_threads",
            "0",
        )
        return Path(place, "image.jxl").stat().st_size


def others(values: np.ndarray, samples: np.ndarray, folder: Path) -> dict[str, float]:
    """The bytes of all images by other means."""
    plain = samples.squeeze(-1) if samples.shape[-1] == 1 else samples
    found = {name: bits * samples.size / 8 for name, bits in lossless_bits_per_dim(plain).items()}
    with ThreadPoolExecutor(2) as pool:
        found["JPEG XL, one file per image"] = sum(pool.map(lambda one: jpeg_xl(one, folder), samples))
    found["JPEG XL, all in one sheet"] = jpeg_xl(sheet_of(samples), folder)
    (folder / "values").write_bytes(values.tobytes())
    run("zstd", "--ultra", "-22", "-q", "-f", folder / "values")
    found["zstd, all in one file"] = (folder / "values.zst").stat().st_size
    found["xz, all in one file"] = len(lzma.compress(values.tobytes(), preset=9 | lzma.PRESET_EXTREME))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, nargs="+", default=[])
    parser.add_argument("--skip_others", action="store_true", help="weigh the model's file only")
    args = parser.parse_args()
    model = load(args.model)
    read = [read_file(path, model.alphabet, len(model.image_shape))[0] for path in args.files]
    values = torch.cat(read).movedim(1, -1).numpy()
    samples = model.alphabet.to_bytes(values)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "values.npy", values)
        common = ["--model", args.model]
        encoded = run(
            *CODEC,
            "encode",
            folder / "values.npy",
            "-o",
            folder / "a.fractal",
            *common,
            "--batch",
            args.batch,
        )
        decoded = run(*CODEC, "decode", folder / "a.fractal", "-o", folder / "back.npy", *common)
        assert (np.load(folder / "back.npy") == values).all()
        data = (folder / "a.fractal").read_bytes()
        streams = Archive.from_bytes(data).streams
        bits = -model.log_likelihood(values, num_orders=1).bits.sum().item()
        coded = sum(one.bits for one in streams)
        print(f"{len(values)} images of {values[0].size} values, every one decoded as it was")
        print(f"encoded {encoded[-1]}; decoded {decoded[-1].split(', ')[-1]}")
        print(
            f"model {bits / values.size:.5f} bits/dim; by the file {coded / values.size:.5f}, {coded / bits - 1:+.4%}"
        )
        sizes = {"this model": len(data), "of these, besides the values": len(data) - coded / 8}
        sizes.update({} if args.skip_others else others(values, samples, folder))
        for name, size in sizes.items():
            print(f"{name:<30}{size:14,.0f} bytes {8 * size / values.size:8.4f} bits/dim")
    for steps in args.steps:
        data = join(
            model.compress(values, num_inference_steps=steps, batch_size=args.batch, progress_bar=False)
        )
        coded = sum(one.bits for one in Archive.from_bytes(data).streams)
        print(f"{steps:4} steps {coded / values.size:8.4f} bits/dim")


if __name__ == "__main__":
    main()
