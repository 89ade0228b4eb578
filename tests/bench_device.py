"""Measures how fast the published presets sample on one device, for several batch sizes.

    make bench DEVICE=cuda      or python tests/bench_device.py --device cuda

Sampling is guided, with each preset's steps, random weights and, unless --precision says otherwise, bfloat16 on
an accelerator and float32 on a CPU. Prints a line for each model and batch, then all of it as one line of JSON,
and appends the rows to --csv. Figures of a row:

seconds_per_image, images_per_s  of the steps; preparing the weights, once a call, is left out
arithmetic   the share of the rate of a large matrix product that was measured in the same run
bandwidth    the share of the rate of a large copy, if each call of a network reads its weights once: the least
             that has to be read
peak_gib     the largest memory of all tensors
timed_steps  how many steps of level 0 were timed, each with everything beneath. Where they are fewer than all,
             the time of the others is interpolated, and the row is marked as extrapolated
chunk        "all", or the largest --chunk, by halving, that memory sufficed for

--seconds bounds the whole run: each row gets an equal part of what is left.
"""

import argparse
import csv
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from evaluation.cost import sampling_cost
from evaluation.report import softmax_heads
from models.attention import full_precision
from models.fractalgen import PRESETS, FractalGen, build
from models.sampling.canvas import Batch
from models.sampling.generate import build_sampler, eval_mode, is_out_of_memory
from models.sampling.options import SamplingOptions
from models.sampling.prepare import Setup
from util.flags import provenance
from util.run.meters import PeakMemory

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = [name for name in PRESETS if "tiny" not in name]
COLUMNS = (
    "card", "torch", "commit", "model", "precision", "batch", "chunk", "seconds_per_image", "images_per_s",
    "arithmetic", "bandwidth", "peak_gib", "timed_steps", "extrapolated", "note",
)  # fmt: skip
# by whether the device is a CPU: the side of a matrix product, and the bytes of a copy, that saturate it
PRODUCT_SIDE, COPY_BYTES = {False: 8192, True: 1024}, {False: 2**30, True: 2**28}
MAX_TIMED = 16  # steps of level 0, where there is no time for all of them


class Enough(Exception):
    """Ends the sampling of an image of which all steps that were asked for are timed."""


def wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """The median of five calls, after one to warm up."""
    times = []
    for _ in range(6):
        wait_for(device)
        began = time.perf_counter()
        call()
        wait_for(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def peak_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Operations and bytes a second, of a large matrix product and of a large copy (read and written)."""
    side, size = (table[device.type == "cpu"] for table in (PRODUCT_SIDE, COPY_BYTES))
    x = torch.randn(side, side, device=device).to(dtype)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return {
        "flops": 2 * side**3 / seconds_of(lambda: x @ x, device),
        "bytes": 2 * size / seconds_of(lambda: target.copy_(source), device),
    }


def least_bytes(model: FractalGen, calls: dict[str, int], dtype: torch.dtype) -> int:
    """The bytes of weights that are read if each of the `calls` of a network reads all of its weights once."""
    size = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    *guides, rgb = softmax_heads(model)
    total = calls["rgb"] * size(rgb) * 4  # the heads compute in the weights' dtype, float32
    for level, (generator, guide) in enumerate(zip(model.generators, [None, *guides], strict=True)):
        of_guide = size(guide) if guide is not None else 0
        total += calls.get(f"guiding{level}", 0) * of_guide * 4
        total += calls[f"level{level}"] * (size(generator) - of_guide) * dtype.itemsize
    return total


class Steps:
    """Samples a batch with guidance, and times steps of its level 0 with everything beneath."""

    def __init__(self, model: FractalGen, batch: int, options: SamplingOptions, dtype: torch.dtype):
        self.model, self.device, self.options = model, model.fake_latent.device, options
        self.sampler = build_sampler(model, Setup(dtype, options))
        self.plan = self.sampler.plan(options.num_inference_steps)
        guidance = options.guidance(len(model.generators))
        classes = torch.arange(batch).to(self.device) % model.class_num
        cond = torch.cat([model.class_emb(classes), model.fake_latent.repeat(batch, 1)])
        noise = model.noise(0, range(batch), self.device)
        conds = [cond.detach()] * model.num_conds
        self.batch = Batch(conds, guidance, noise, options.num_inference_steps, on_step=self.on_step)

    @property
    def sizes(self) -> np.ndarray:
        """What the time of a step depends on: its number of patches, or its place where all have as many."""
        patches = np.array([end - begin for begin, end, _ in self.plan])
        return patches if len(set(patches)) > 1 else np.arange(len(patches))

    def on_step(self, step: int, num_steps: int, canvas: torch.Tensor) -> None:
        wait_for(self.device)
        self.ends.append(time.perf_counter())
        if step + 1 == num_steps:
            raise Enough

    def time(self, numbers: Iterable[int]) -> dict[int, float]:
        """The seconds of the steps with these numbers and of step 0, with which sampling has to begin."""
        numbers = sorted({0, *numbers})
        wait_for(self.device)
        self.ends = [time.perf_counter()]
        with suppress(Enough):
            self.sampler.draw(self.batch, tuple(self.plan[number] for number in numbers))
        return dict(zip(numbers, np.diff(self.ends).tolist(), strict=True))


def in_steps(steps: Steps, seconds: float) -> tuple[float, int]:
    """The seconds of a whole batch, and how many steps they were measured from, in about so many `seconds`."""
    began, by_size = time.perf_counter(), np.argsort(steps.sizes, kind="stable")
    some = {int(by_size[place]) for place in (0, len(by_size) // 2, -1)}
    steps.time([by_size[-1]])  # warms up, and takes the most memory
    found = steps.time(some)
    left = seconds - (time.perf_counter() - began)
    whole = interpolated(steps.sizes, found)
    number = len(steps.plan) if whole <= left else min(MAX_TIMED, int(left / whole * len(steps.plan)))
    spread = by_size[np.linspace(0, len(by_size) - 1, max(number, 0)).round().astype(int)]
    if others := {int(n) for n in spread} - found.keys():
        found = {**steps.time(others), **found}
    return interpolated(steps.sizes, found), len(found)


def interpolated(sizes: np.ndarray, found: dict[int, float]) -> float:
    """The sum of the seconds of all steps: those that were `found`, by number, and the others by their size."""
    xs = sorted({sizes[number] for number in found})
    means = [statistics.mean(secs for n, secs in found.items() if sizes[n] == x) for x in xs]
    return sum(found.get(n, float(np.interp(size, xs, means))) for n, size in enumerate(sizes))


def measure(
    model: FractalGen, batch: int, options: SamplingOptions, dtype: torch.dtype, seconds: float
) -> dict:
    """The figures of a row that need the model to run, with the largest chunk that memory suffices for."""
    while True:
        peak = PeakMemory(model.fake_latent.device)
        try:
            with eval_mode(model), full_precision(model.fake_latent), torch.inference_mode():
                steps = Steps(model, batch, options, dtype)
                whole, timed = in_steps(steps, seconds)
            found = {
                "seconds_per_image": whole / batch,
                "images_per_s": batch / whole,
                "peak_gib": peak.gib(),
            }
            found |= {"timed_steps": f"{timed} of {len(steps.plan)}", "chunk": options.chunk or "all"}
            found |= {"extrapolated": "yes" if timed < len(steps.plan) else "no"}
            return found | ({"note": "out of memory without chunk"} if options.chunk else {})
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        chunk = (options.chunk or 2 * batch) // 2
        if options.chunk == 1:
            return {"note": "out of memory, even with chunk 1"}
        steps, options = None, replace(options, chunk=chunk)
        if model.fake_latent.device.type != "cpu":
            torch.accelerator.empty_cache()


def name_of(device: torch.device) -> str:
    if device.type != "cpu":
        return torch.get_device_module(device).get_device_name(device)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return f"{capabilities.get('cpu_name') or platform.machine()}, {torch.get_num_threads()} threads"


def sweep(models, batches, device, dtype, seconds: float, path: Path) -> dict:
    """All rows, each appended to the file `path` as soon as it is measured, and the rates of the device."""
    end, rates = time.perf_counter() + seconds, peak_rates(device, dtype)
    card, precision = name_of(device), str(dtype).removeprefix("torch.")
    about = {
        "card": card,
        "torch": torch.__version__,
        "commit": provenance(argparse.Namespace())["commit"],
        "precision": precision,
    }
    in_words = f"{rates['flops'] / 1e12:.4g} TFLOP/s, {rates['bytes'] / 1e9:.4g} GB/s"
    print(f"{card}: {in_words}, {precision}", flush=True)
    rows = []
    for name in models:
        with torch.device("meta"):
            shapes = build(name)
        options = shapes.sampling_defaults
        flops, calls = sampling_cost(shapes, options)
        with device:
            model = build(name)
        least = least_bytes(model, calls, dtype)
        for batch in batches:
            left = end - time.perf_counter()
            row = {**about, "model": name, "batch": batch}
            if left > 0:
                row |= measure(model, batch, options, dtype, left / (len(models) * len(batches) - len(rows)))
            else:
                row["note"] = "no time was left"
            if "images_per_s" in row:
                per_s = row["images_per_s"]
                row["arithmetic"] = sum(flops) * per_s / rates["flops"]
                row["bandwidth"] = least * per_s / batch / rates["bytes"]
            rows.append({key: rounded(row.get(key, "")) for key in COLUMNS})
            append(path, rows[-1:])
            print("  ".join(str(rows[-1][key]) for key in COLUMNS[3:]), flush=True)
    return {"peak": rates, "rows": rows}


def rounded(value):
    return float(f"{value:.4g}") if isinstance(value, float) else value


def append(path: Path, rows: Sequence[dict]) -> None:
    """Appends the rows to a CSV file, which gets the names of the columns first where it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="such as cuda or cpu")
    parser.add_argument("--models", nargs="+", default=PUBLISHED, choices=PRESETS, metavar="NAME")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64, 256], metavar="N")
    parser.add_argument("--precision", choices=["bfloat16", "float32"])
    parser.add_argument("--seconds", type=float, default=300, help="what the whole run may take, about")
    parser.add_argument("--csv", type=Path, default=ROOT / "docs" / "results" / "speed.csv")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    if device.type != "cpu" and not torch.accelerator.is_available():
        parser.error(f"--device {device}: torch finds no such device here")
    dtype = getattr(torch, args.precision or ("float32" if device.type == "cpu" else "bfloat16"))
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as main_fractalgen.py does
    torch.manual_seed(0)
    print(json.dumps(sweep(args.models, args.batches, device, dtype, args.seconds, args.csv)))


if __name__ == "__main__":
    main()
