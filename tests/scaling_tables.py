"""Prints the tables of predictions in docs/scaling.md. Nothing here is measured: see bench_scaling.py."""

import argparse
import sys
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from evaluation import scaling
from evaluation.cost import forward_cost
from models.fractalgen import FractalGen

SIZES = {64: (64, 4, 1), 256: (256, 16, 4, 1), 512: (512, 32, 8, 2, 1), 1024: (1024, 64, 16, 4, 1)}
MODELS = {  # width, blocks and heads of level 0; the first three as published
    "base": (768, 24, 12), "large": (1024, 32, 16), "huge": (1280, 40, 16), "3 B": (2304, 42, 18), "10 B": (4096, 46, 32),
}  # fmt: skip
GPU, IMAGES, FULL = "h100", 2048, 0.9  # images of a step of all GPUs; how much of their memory may be used


def arguments(name: str, size: int) -> dict:
    """FractalGen's arguments: with each level widths halve; blocks are a quarter, an eighth, a sixteenth."""
    width, blocks, heads = MODELS[name]
    deeper = range(1, len(SIZES[size]) - 1)
    head = (128, 3) if size == 64 else (64, 1)
    return {
        "img_size_list": SIZES[size],
        "embed_dim_list": [width, *(width >> level for level in deeper), head[0]],
        "num_blocks_list": [blocks, *(max(1, blocks >> (level + 1)) for level in deeper), head[1]],
        "num_heads_list": [heads, *(max(1, heads >> level) for level in deeper), 4],
        "generator_type_list": ["mar"] * (len(SIZES[size]) - 1) + ["ar"],
        "num_conds": 5, "guiding_pixel": size > 64, "grad_checkpointing": True,
    }  # fmt: skip


@cache
def traced(name: str, size: int, batch: int, sharded: bool) -> scaling.Trace:
    return scaling.trace(arguments(name, size), batch, half=True, sharded=sharded)


def fitting(name: str, size: int, gpus: int, sharded: bool) -> tuple[int, dict] | None:
    """The largest batch of a GPU that divides its images and fits, and the prediction for it."""
    images = max(1, IMAGES // gpus)
    machine, batch = scaling.GPUS[GPU], min(32, images)
    while batch and not (sharded and gpus == 1):
        step = traced(name, size, batch, sharded)
        found = scaling.predict(step, machine, gpus, accum=images // batch, averaged=True)
        if found["gib"] <= FULL * machine.gib:
            return batch, found
        weights = 24 * sum(map(sum, step.units)) / (gpus if sharded else 1)
        batch = batch // 2 if weights < FULL * machine.gib * 2**30 else 0
    return None


def row(title: str, name: str, size: int, gpus: int) -> str:
    cells = []
    for sharded in (False, True):
        if (found := fitting(name, size, gpus, sharded)) is None:
            cells += ["" if sharded and gpus == 1 else "too large", "", "", "", ""]
            continue
        batch, said = found
        cells += [
            f"{batch} × {max(1, IMAGES // gpus) // batch}",
            f"{said['gib']:.0f}",
            f"{said['sent_gb']:,.3g}" if said["sent_gb"] < 100 else f"{said['sent_gb']:,.0f}",
            f"{said['seconds']:.3g} ({said['waiting'] / said['seconds']:.0%})",
            f"{said['dollars_per_million_images']:,.0f}",
        ]
    return f"| {title} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args, rows, many = parser.parse_args(), [], []
    for name in args.models:
        for size in SIZES:
            with torch.device("meta"):
                model = FractalGen(**arguments(name, size))
            gflops = [count / 1e9 for count in forward_cost(model)[0]]
            weights = sum(p.numel() for p in model.parameters())
            print(f"| {name} | {size} | {weights / 1e6:,.0f} M | {sum(gflops):,.0f} | "
                  f"{', '.join(f'{x:,.0f}' for x in gflops)} |", flush=True)  # fmt: skip
            rows.append(row(f"{name}, {size:,} px", name, size, 64))
            if size == 256 and name in ("large", "10 B"):
                many += [row(f"{name}, {gpus:,}", name, size, gpus) for gpus in (1, 8, 64, 256, 1024)]
    print("\n".join(["", *rows, "", *many]))


if __name__ == "__main__":
    main()
