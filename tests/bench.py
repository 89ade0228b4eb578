"""Compares the library's speed and memory with those of tests/reference_model.py.

    make bench BENCH="sampling --batch 2"      or python tests/bench.py sampling --batch 2

sampling  draws whole images with guidance
pixel     runs the RGB head alone, with guidance
training  computes the loss and its gradients, and runs the optimiser's step
data      reads JPEG files; compared with torchvision's ImageFolder

Prints a line for each of them, and at last all numbers as one line of JSON. A ratio above 1 means that the
library is faster. Times are medians of --repeats rounds. Each round runs every variant once, so that a slow
phase of the machine affects all variants.
"""

import argparse
import ctypes
import json
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import reference_model
import torch
from opcount import OpCount
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from engine_fractalgen import add_weight_decay
from models.fractalgen import PRESETS, FractalGen
from models.generator import Mask
from models.noise import Noise
from models.sampling.canvas import Batch
from models.sampling.generate import build_sampler
from models.sampling.guidance import Guidance
from models.sampling.prepare import Setup
from util.crop import center_crop_arr
from util.data.folders import class_folders
from util.data.loader import ImageDataset
from util.data.packed import Packed
from util.data.tool import pack
from util.pixels import RGB

BF16 = torch.autocast("cpu", torch.bfloat16)
FP32 = torch.autocast("cpu", enabled=False)


def interleaved(variants: dict[str, Callable], repeats: int, memory: dict | None = None) -> dict[str, float]:
    """Returns each variant's median wall time in seconds. `memory` gets each variant's peak memory in GiB."""
    took = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            with PeakMemory() as peak:
                began = time.perf_counter()
                run()
                took[name].append(time.perf_counter() - began)
            if memory is not None:
                memory[name] = max(peak.gib, memory.get(name, 0.0))
    return {name: statistics.median(times) for name, times in took.items()}


def compared(variants: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Returns seconds and peak memory, and the time of "reference" divided by that of each other variant."""
    memory = {}
    seconds = interleaved(variants, repeats, memory)
    result = {f"seconds_{key}": value for key, value in seconds.items()}
    result |= {f"peak_gib_{key}": value for key, value in memory.items()}
    return result | {
        f"ratio_{key}": seconds["reference"] / value for key, value in seconds.items() if key != "reference"
    }


class PeakMemory(threading.Thread):
    """A context in which `gib` becomes the largest increase of resident memory since the start, in GiB."""

    def __enter__(self):
        # Gives freed memory back to the system, so that using it again counts. Only glibc has this function.
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.start_gib, self.gib, self.stop = self.resident(), 0.0, threading.Event()
        self.start()
        return self

    def __exit__(self, *error):
        self.stop.set()
        self.join()

    def run(self):
        while not self.stop.wait(0.02):
            self.gib = max(self.gib, self.resident() - self.start_gib)

    @staticmethod
    def resident() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096 / 2**30


def thin(name: str, blocks: list[int] | None) -> FractalGen:
    """Builds the preset's model at full width, with `blocks` blocks at each level unless they are None."""
    p = PRESETS[name]
    torch.manual_seed(0)
    settings = dict(guiding_pixel=p.guiding_pixel, num_conds=p.num_conds)
    return FractalGen(p.sizes, p.widths, blocks or p.blocks, p.heads, p.generators, **settings)


def rates() -> dict[str, float]:
    """Measures GFLOP/s of a 522 x 1024 x 4096 matrix product, and GB/s of reading memory."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weights = torch.randn(522, 1024).to(dtype), [torch.randn(4096, 1024).to(dtype) for _ in range(4)]
        run = lambda x=x, weights=weights: [torch.nn.functional.linear(x, w) for w in weights]  # noqa: E731
        run()
        found[f"gemm_{str(dtype)[6:]}_gflops"] = (
            4 * 2 * 522 * 1024 * 4096 / interleaved({"": run}, 9)[""] / 1e9
        )
    x = torch.randn(100_000_000)
    found["read_gb_per_s"] = 0.4 / interleaved({"": x.sum}, 7)[""]
    return found


def least(model: FractalGen, steps, batch: int) -> dict[str, float]:
    """Returns the least work of guided sampling, without that of the RGB head.

    flop   floating-point operations of the MAR levels' matrix products
    bytes  bytes of the float32 weights that the AR levels read, once per step for the whole batch
    """
    need, images, draws = {"flop": 0.0, "bytes": 0.0}, 2 * batch, 1
    for number, generator in enumerate(model.generators):
        spec = generator.spec
        taken = list(generator.plan(steps[number]))
        if hasattr(generator, "mask_token"):
            tokens, dim = spec.num_patches + generator.num_prefix, spec.embed_dim
            reads = (
                getattr(model.generators[number + 1], "num_prefix", 1)
                if number + 1 < len(model.generators)
                else 1
            )
            last = (
                sum(min(tokens, (5 if reads > 1 else 1) * (end - begin)) for begin, end, _ in taken)
                * 20
                * dim**2
            )
            step = (
                tokens * (24 * dim**2 * (spec.num_blocks - 1) + 4 * dim**2)
                + 4 * tokens**2 * dim * spec.num_blocks
            )
            need["flop"] += images * (len(taken) * step + last)
        else:
            need["bytes"] += draws * len(taken) * 4 * sum(p.numel() for p in generator.blocks.parameters())
        images, draws = images * spec.num_patches, draws * len(taken)
    return need


def sampling(model: FractalGen, name: str, args) -> dict[str, float]:
    """Measures how long a batch of whole images takes with guidance."""
    steps, labels, drawn = PRESETS[name].steps, torch.arange(args.batch) % 10, {}
    noise = model.noise(0, range(args.batch))
    conds = [
        torch.cat([model.class_emb(labels), model.fake_latent.repeat(args.batch, 1)]).detach()
    ] * model.num_conds
    model.eval()

    def reference():
        drawn["reference"] = reference_model.ReferenceSampler(model, steps, 4.0, "constant").sample(
            labels, noise
        )

    def ours(key, autocast):
        with autocast:
            drawn[key] = model.sample(conds, steps, 4.0, "constant", noise=noise, compiled=args.compile)

    variants = {
        "reference": reference,
        "float32": lambda: ours("float32", FP32),
        "bfloat16": lambda: ours("bfloat16", BF16),
    }
    if args.compile:
        variants["float32"](), variants["bfloat16"]()
    result = compared(variants, args.repeats)
    result["equal_subpixels"] = (drawn["reference"] == drawn["float32"]).float().mean().item()
    need = least(model, steps, args.batch)
    for key, rate in (
        ("float32", args.rates["gemm_float32_gflops"]),
        ("bfloat16", args.rates["gemm_bfloat16_gflops"]),
    ):
        seconds = (
            need["flop"] / 1e9 / rate
            + need["bytes"] / (1 + (key == "bfloat16")) / 1e9 / args.rates["read_gb_per_s"]
        )
        result |= {
            f"least_seconds_{key}": seconds,
            f"share_of_limit_{key}": seconds / result[f"seconds_{key}"],
        }
    if args.ops:
        for key in ("reference", "float32"):
            with OpCount() as ops:
                variants[key]()
            result |= {f"launched_{key}": ops.total, f"syncs_{key}": sum(ops.syncs.values())}
    return result


def pixel(model: FractalGen, name: str, args) -> dict[str, float]:
    """Measures one call of the RGB head with guidance, for 4 pixels of each image."""
    n, head, sampler = 4 * args.batch, model, build_sampler(model, Setup(torch.float32))
    reference = reference_model.ReferenceSampler(model, PRESETS[name].steps, 4.0)
    while isinstance(head, FractalGen):
        width, head, sampler = head.generator.spec.embed_dim, head.next_fractal, sampler.child
    conds, noise = [torch.randn(2 * n, width)], Noise([torch.rand(n, 5, 1, 1)])
    batch = Batch(conds, Guidance.create(4.0, "constant", 1.0, 1e-4), noise)
    with torch.inference_mode():
        run = {
            "reference": lambda: [reference.pixel(head, conds, noise, 4.0) for _ in range(20)],
            "ours": lambda: [sampler.sample(batch) for _ in range(20)],
        }
        interleaved(run, 1)
        seconds = interleaved(run, max(args.repeats, 5))
    return {
        "seconds_reference": seconds["reference"] / 20,
        "seconds_ours": seconds["ours"] / 20,
        "ratio": seconds["reference"] / seconds["ours"],
    }


def training(model: FractalGen, name: str, args) -> dict[str, float]:
    """Measures forward and backward passes of --train_batch images with dropout, and the optimiser's step."""
    size, n = model.img_size_list[0], args.train_batch
    images, labels, rows, masks = torch.randn(n, 3, size, size).clamp(-2, 2), torch.arange(n), n, []
    for generator in model.generators:
        length = generator.spec.num_patches
        masks.append(torch.rand(rows, length) < 0.8 if hasattr(generator, "mask_token") else None)
        rows = rows * length if masks[-1] is None else int(masks[-1].sum())
    ours_masks = [None if masked is None else Mask.of(masked) for masked in masks]
    model.train()

    def ours(autocast):
        with autocast:
            loss = model(images, labels, masks=ours_masks)
        loss.backward()
        model.zero_grad()

    variants = {
        "reference": lambda: (
            reference_model.loss(model, images, labels, masks).backward(),
            model.zero_grad(),
        ),
        "float32": lambda: ours(FP32),
        "bfloat16": lambda: ours(BF16),
    }
    interleaved(variants, 1)
    result = compared(variants, args.repeats)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    steps = {}
    for kind in ("foreach", "fused"):
        optimizer = torch.optim.AdamW(add_weight_decay(model, 0.05), lr=1e-6, **{kind: True})
        optimizer.step()
        steps[kind] = interleaved({"": optimizer.step}, 3)[""]
        del optimizer
    model.zero_grad()
    return result | {"optimizer_seconds_foreach": steps["foreach"], "optimizer_seconds_fused": steps["fused"]}


def data(args) -> dict[str, float]:
    """Measures images per second on one core, read from JPEG files of 500 x 375 pixels.

    plain  torchvision's ImageFolder and transforms, with the ADM crop
    exact  the library's ImageDataset
    pack   the library's packed file of the same images
    """
    from sklearn.datasets import load_sample_images

    rng, result = np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as packs:
        (Path(folder) / "class").mkdir()
        for i in range(40):
            x, y = rng.integers(0, 100), rng.integers(0, 40)
            photograph = Image.fromarray(load_sample_images().images[i % 2]).crop((x, y, x + 500, y + 375))
            photograph.save(Path(folder) / "class" / f"{i}.jpg", quality=92)
        for size in (64, 256):
            steps = [
                transforms.Lambda(lambda image, size=size: center_crop_arr(image, size)),
                transforms.RandomHorizontalFlip(),
            ]
            steps += [
                transforms.ToTensor(),
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
            plain = ImageFolder(folder, transforms.Compose(steps))
            exact = ImageDataset(class_folders(Path(folder)), (size, size), RGB, flip=True, seed=0)
            pack(exact.source, Path(packs) / str(size), (size, size), RGB, num_workers=0)
            packed = ImageDataset(Packed(Path(packs) / str(size)), (size, size), RGB, flip=True, seed=0)
            variants = {
                "plain": lambda plain=plain: [plain[i] for i in range(40)],
                "exact": lambda exact=exact: [exact[0, i] for i in range(40)],
                "pack": lambda packed=packed: [packed[0, i] for i in range(40)],
            }
            seconds = interleaved(variants, max(args.repeats, 5))
            result |= {f"images_per_s_{size}_{key}": 40 / value for key, value in seconds.items()}
            result |= {f"ratio_{size}_{key}": seconds["plain"] / seconds[key] for key in ("exact", "pack")}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", choices=["sampling", "pixel", "training", "data", []], default=[])
    parser.add_argument("--model", default="fractalmar_tiny_in32", choices=PRESETS, metavar="NAME")
    parser.add_argument(
        "--blocks",
        type=lambda text: [int(n) for n in text.split(",")],
        metavar="N,N,...",
        help="number of blocks of each level, such as 2,2,1; default: the preset's",
    )
    parser.add_argument("--batch", type=int, default=1, help="images of sampling and pixel")
    parser.add_argument("--train_batch", type=int, default=2, help="images of training")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--repeats", type=int, default=3, help="rounds, of which the median counts")
    parser.add_argument("--compile", action="store_true", help="compile the library's sampler")
    parser.add_argument(
        "--ops", action="store_true", help="also count the operations that sampling dispatches"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.rates = rates()
    what = args.what or ["sampling", "pixel", "training", "data"]
    report = {"torch": torch.__version__, "cpu": platform.processor() or platform.machine(), **vars(args)}
    if hasattr(torch.cpu, "get_capabilities"):
        report["cpu"] = torch.cpu.get_capabilities()["cpu_name"]
    if set(what) - {"data"}:
        model = thin(args.model, args.blocks)
    for name in what:
        report[name] = data(args) if name == "data" else globals()[name](model, args.model, args)
        print(
            f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in report[name].items()), flush=True
        )
    print(json.dumps(report, default=str))


if __name__ == "__main__":
    main()
