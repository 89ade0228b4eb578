"""Predicts what training costs on machines that are not there, from counted operations, bytes and messages.

A step is traced on fake tensors, which compute nothing. `predict` turns the trace into seconds, memory and
price; docs/scaling.md says how, holds it against measurements, and names what is assumed. Rates are those of
the vendors' data sheets, times the shares below.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from evaluation.cost import Operations, masked_forward, patches_in_training
from evaluation.report import LiveBytes
from models.fractalgen import FractalGen
from models.likelihood.inside import softmax_heads
from util.errors import UserError

UTILISATION = {"flops": 0.6, "bandwidth": 0.75, "network": 0.8}  # of the data sheets' rates
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends together
UPDATE, AVERAGE = 28, 12  # bytes that AdamW, and averaging, read and write for a weight
GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """Processors of one kind, a process each, and what joins them.

    flops      operations a second of matrix products, in float32 and in bfloat16
    bandwidth  bytes a second of its memory
    launch     seconds that the shortest operation takes
    gib        of memory; price: dollars an hour
    per_host   processors of a host; link: bytes a second to others of the host, one way
    network    bytes a second of a processor to other hosts, one way; latency: seconds of a message
    overlaps   whether a sharded step computes while messages are on their way
    passes     how often bytes pass to be gathered, to be summed and scattered, and to be summed for all
    """

    flops: tuple[float, float]
    bandwidth: float
    launch: float
    gib: float
    price: float
    per_host: int
    link: float
    network: float
    latency: float
    overlaps: bool = True
    passes: tuple[float, float, float] = (1.0, 1.0, 2.0)

    def message(self, size: float, processes: int, passes: float = 1.0) -> float:
        """Seconds in which `size` bytes pass so often through a ring of processes that keep a part each."""
        if processes == 1:
            return 0.0
        # the rings of a host's processes leave it by all of its connections at once
        speed = self.link if processes <= self.per_host else min(self.link, self.per_host * self.network)
        hops = min(processes, self.per_host) + math.ceil(processes / self.per_host) - 2
        return passes * (processes - 1) / processes * size / speed + hops * self.latency


def data_sheet(
    tflops: tuple[float, float], terabytes: float, gib: float, price: float, link: float, network: float
) -> Machine:
    """A GPU of eight a host: float32 and dense bfloat16, TB/s, GiB, $/h, GB/s to its host and to others."""
    share = UTILISATION
    flops = tuple(share["flops"] * rate * 1e12 for rate in tflops)
    return Machine(
        flops, share["bandwidth"] * terabytes * 1e12, 5e-6, gib, price, 8,
        share["network"] * link * 1e9, share["network"] * network * 1e9, 10e-6,
    )  # fmt: skip


GPUS = {
    "a100": data_sheet((19.5, 312), 2.0, 80, 1.5, 300, 25),
    "h100": data_sheet((67, 989), 3.35, 80, 2.5, 450, 50),
    "h200": data_sheet((67, 989), 4.8, 141, 3.0, 450, 50),
    "b200": data_sheet((80, 2250), 8.0, 180, 5.0, 900, 50),
}


@dataclass(frozen=True)
class Trace:
    """What a training step of a `batch` does in a process, with an average number of masked patches.

    work   (operations, 2): of each, what its matrix products compute and its bytes
    parts  (operations,) the level, or -1 for the backward pass
    kept   bytes at most that the passes allocate, gradients left out
    units  for each level the weights of its rest and of each of its blocks
    half   whether autocast is bfloat16; sharded: whether the weights are divided and gathered in that type
    """

    work: np.ndarray
    parts: np.ndarray
    kept: int
    units: tuple[tuple[int, ...], ...]
    batch: int
    half: bool
    sharded: bool


def _forget(weight: torch.Tensor) -> None:
    weight.grad = None


def trace(arguments: dict, batch: int, *, half: bool = False, sharded: bool = False) -> Trace:
    """Traces a training step of FractalGen(**arguments), with autocast to bfloat16 if `half`."""
    with torch.device("meta"):
        model = FractalGen(**arguments)
    patches = list(map(patches_in_training, model.generators))
    operations, memory = Operations(), LiveBytes()
    with FakeTensorMode():
        model = FractalGen(**arguments).train()
        for weight in model.parameters() if half and sharded else ():
            weight.data = weight.data.bfloat16()  # as they are gathered: autocast makes no copies
        *_, head = softmax_heads(model)
        levels = [*model.generators, head]
        for number, level in enumerate(levels):
            level.register_forward_pre_hook(partial(operations.begin, number))
        for weight in model.parameters():
            weight.register_post_accumulate_grad_hook(_forget)
        forward = masked_forward(model, patches, batch)
        with memory, operations:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = forward()
            operations.begin(-1)
            loss.backward()
    units = []
    for level in levels:
        blocks = [sum(p.numel() for p in block.parameters()) for block in level.blocks]
        units.append((sum(p.numel() for p in level.parameters()) - sum(blocks), *blocks))
    rest = sum(p.numel() for p in model.parameters()) - sum(map(sum, units))
    units[0] = (units[0][0] + rest, *units[0][1:])
    parts, *work = np.array(operations.found, float).T
    return Trace(np.stack(work, -1), parts.astype(int), memory.peak, tuple(units), batch, half, sharded)


def predict(
    step: Trace, machine: Machine, processes: int, *, accum: int = 1, averaged: bool = False
) -> dict[str, float]:
    """Predicts a training step of `accum` batches in each process.

    Returns seconds of a step, how many of them are for computing and how many wait for messages; the GB that
    a process sends; its GiB of memory; images a second of all; and dollars for a million images.
    """
    rates = np.array([machine.flops[step.half], machine.bandwidth])
    times = np.maximum((step.work / rates).max(-1), machine.launch)
    forward = [times[step.parts == level].sum() for level in range(len(step.units))]
    backward = times[step.parts == -1].sum() / sum(forward)  # of a level, to its forward pass
    units = [  # weights, seconds of the forward pass
        (weights, seconds * weights / sum(of_level))
        for of_level, seconds in zip(step.units, forward, strict=True)
        for weights in of_level
    ]
    all_weights, kept = sum(map(sum, step.units)), processes if step.sharded else 1
    computing = accum * times.sum() + (UPDATE + AVERAGE * averaged) * all_weights / kept / machine.bandwidth
    element, (gather, scatter, reduce) = 2 if step.half else 4, machine.passes
    of_weight, of_unit = (16 + 4 * averaged) / kept, 0  # bytes
    if step.sharded:
        gathers = [machine.message(element * weights, processes, gather) for weights, _ in units]
        scatters = [machine.message(4 * weights, processes, scatter) for weights, _ in units]
        seconds = [seconds for _, seconds in units]
        there = _pipeline(seconds, gathers, [0.0] * len(units), machine.overlaps)
        back = [backward * seconds for seconds in seconds[::-1]]
        waiting = accum * (there + _pipeline(back, gathers[::-1], scatters[::-1], machine.overlaps))
        sent = accum * (2 * element * gather + 4 * scatter)
        of_unit = 2 * element + element + 4  # two that are gathered, and gradients before and in a message
    else:
        waiting = _buckets(units, backward, lambda size: machine.message(size, processes, reduce))
        sent = 4 * reduce
        of_weight += 4 * (processes > 1)  # buckets
    memory = of_weight * all_weights + of_unit * max(weights for weights, _ in units) + step.kept
    seconds, images = computing + waiting, processes * step.batch * accum
    found = {
        "seconds": seconds, "computing": computing, "waiting": waiting,
        "sent_gb": sent * all_weights * (processes - 1) / processes / 1e9, "gib": memory / GIB,
        "images_per_s": images / seconds,
        "dollars_per_million_images": machine.price / 3600 * processes * seconds / images * 1e6,
    }  # fmt: skip
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def predict_step(args: argparse.Namespace, arguments: dict, lines: list[str]) -> dict:
    """The prediction for `--gpus`, if there are any, each with `--batch_size` images; adds a line of it.

    Raises UserError for flags that cannot be predicted.
    """
    if not args.gpus:
        return {}
    name = args.gpu or "h100"
    if name not in GPUS:
        raise UserError(f"--gpu {name}: not known; one of {', '.join(GPUS)}")
    if args.optimizer != "adamw":
        raise UserError(f"--gpus predicts steps of AdamW, not of --optimizer {args.optimizer}")
    if args.shard and args.gpus == 1:
        raise UserError("--shard divides a model among GPUs: give more than --gpus 1")
    machine, half = GPUS[name], args.amp != "off"
    arguments = {**arguments, "grad_checkpointing": args.grad_checkpointing}
    step = trace(arguments, args.batch_size, half=half, sharded=args.shard)
    found = predict(step, machine, args.gpus, accum=args.accum_iter, averaged=bool(args.ema))
    kind = f"{'sharded' if args.shard else 'DDP'}, {'16 bits' if half else 'float32'}"
    lines.append(
        f"predicted, not measured: {args.gpus} {name}, {kind}: {found['seconds']:.3g} s a step, "
        f"{found['waiting'] / found['seconds']:.0%} of it waiting for messages ({found['sent_gb']:.3g} GB); "
        f"{found['gib']:.3g} of {machine.gib} GiB{'' if found['gib'] <= machine.gib else ', too much'}; "
        f"{found['images_per_s']:,.0f} images/s, {found['dollars_per_million_images']:.3g} $ a million"
    )
    return {"prediction": found}


def _pipeline(seconds: list[float], gathers: list[float], scatters: list[float], overlaps: bool) -> float:
    """Seconds that units wait which are gathered one ahead, and whose gradients are scattered behind."""
    if not overlaps:
        return sum(gathers) + sum(scatters)
    computed = network = ready = gathers[0]
    for here, ahead, scatter in zip(seconds, [*gathers[1:], 0.0], scatters, strict=True):
        computed = max(computed, ready)
        ready = max(network, computed) + ahead
        computed += here
        network = max(ready, computed) + scatter if scatter else ready
    return max(computed, network) - sum(seconds)


def _buckets(units, backward: float, all_reduce: Callable[[float], float]) -> float:
    """Seconds that DDP's messages of gradients take after the end of the backward pass."""
    clock = sent = full = 0.0
    for number, (weights, seconds) in enumerate(reversed(units)):
        clock += backward * seconds
        full += 4 * weights
        if full >= BUCKET or number == len(units) - 1:
            sent, full = max(sent, clock) + all_reduce(full), 0.0
    return max(0.0, sent - clock)
