"""Holds the predictions of evaluation/scaling.py against training steps on hosts that are network namespaces.

    python tests/bench_scaling.py [--processes 2 4] [--mbit 50 150 500] [--model fractalar_tiny_in32]

Each host has one process, and sends at most so many Mbit/s. How fast a machine computes is measured first, by
as many processes that send nothing, and how long messages take, by messages alone. Then each line is a run of
STEPS steps, its median second, what was predicted, and the error. Needs root and a machine with nothing else
to do. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from hosts import Hosts
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import engine_fractalgen as engine
from evaluation import scaling
from models.fractalgen import FractalGen
from models.hub.presets import PRESETS
from util import dist
from util.run.meters import Window
from util.run.sharding import Sharded

STEPS, WARM = 5, 1  # all steps of a run, and how many of them are not counted
LATENCY = 2e-4  # seconds of a message between two such hosts
BYTES = 3_200_000, 3_200_000, scaling.BUCKET  # of messages: about those of a transformer block, and DDP's
MESSAGES = 10, 10, 3  # how many of them are timed


def messages(size: int) -> list[float]:
    """The mean seconds that it takes to gather, to sum and scatter, and to sum for all, each of BYTES."""
    calls = (
        lambda whole, part: distributed.all_gather_single(whole, part),
        lambda whole, part: distributed.reduce_scatter_single(part, whole),
        lambda whole, part: distributed.all_reduce(whole),
    )
    found = []
    for call, length, count in zip(calls, BYTES, MESSAGES, strict=True):
        part, seconds = torch.zeros(length // 4 // size), []
        whole = part.repeat(size)
        for _ in range(WARM + count):
            dist.barrier()
            began = time.perf_counter()
            call(whole, part)
            seconds.append(time.perf_counter() - began)
        found.append(float(np.mean(seconds[WARM:])))
    return found


def work(args: argparse.Namespace) -> None:
    """A process of a run: prints the median seconds of a step, or those of messages."""
    torch.set_num_threads(1)
    world, device = dist.from_environment(), torch.device("cpu")
    dist.connect(world, device)
    if args.kind == "messages":
        found = messages(world.size)
        if world.is_main:
            print(json.dumps(found))
        return dist.disconnect()
    torch.manual_seed(0)
    model = FractalGen(**PRESETS[args.model].arguments).train()
    if args.kind == "sharded":
        Sharded(model, None, device)
    elif world.size > 1:
        model = DistributedDataParallel(model)
    recipe = engine.Recipe(1e-4, 0.0, "constant", 0.0, 1, 3.0)
    optimizer = engine.make_optimizer(model, recipe)
    scaler, alphabet = torch.amp.GradScaler("cpu", enabled=False), getattr(model, "module", model).alphabet
    shape = args.batch, alphabet.channels, *getattr(model, "module", model).image_shape
    seconds = []
    for _ in range(STEPS):
        batch = torch.randint(256, shape, dtype=torch.uint8), torch.zeros(args.batch, dtype=torch.long), None
        dist.barrier()
        began = time.perf_counter()
        inputs = iter([batch]), optimizer, scaler, recipe, Window(device), device
        engine.train_step(model, *inputs, torch.autocast("cpu", enabled=False))
        seconds.append(time.perf_counter() - began)
    if world.is_main:
        print(json.dumps(float(np.median(seconds[WARM:]))))
    dist.disconnect()


def measure(hosts: Hosts, args: argparse.Namespace, kind: str, together: bool = True) -> np.ndarray:
    """The seconds of a step, or of messages, on all hosts, `together` or each for itself."""
    processes = []
    for rank, name in enumerate(hosts.names):
        place = {"RANK": rank, "WORLD_SIZE": len(hosts.names) if together else 1, "LOCAL_RANK": 0}
        place |= {
            "MASTER_ADDR": "10.77.0.1",
            "MASTER_PORT": 29500,
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": 1,
        }
        flags = ["--worker", "--kind", kind, "--model", args.model, "--batch", str(args.batch)]
        processes.append(subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, __file__, *flags],
            env={**os.environ, **{key: str(value) for key, value in place.items()}},
            stdout=subprocess.PIPE, text=True,
        ))  # fmt: skip
    said = [process.communicate()[0] for process in processes]
    return np.median([json.loads(one) for one in said if one], axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--mbit", type=float, nargs="+", default=[50, 150, 500])
    parser.add_argument("--model", default="fractalar_tiny_in32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", default=["ddp", "sharded"])
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    arguments, found = PRESETS[args.model].arguments, []
    steps = {x: scaling.trace(arguments, args.batch, sharded=x == "sharded") for x in ("ddp", "sharded")}
    for processes in [1, *args.processes]:
        with Hosts(processes) as hosts:
            alone = measure(hosts, args, "alone", together=False)
            guess = scaling.Machine((1e11, 1e11), 1e10, 1e-5, 0, 0, 1, 0, 0, LATENCY, overlaps=False)
            ratio = scaling.predict(steps["ddp"], guess, 1)["seconds"] / alone
            own = replace(guess, flops=(1e11 * ratio,) * 2, bandwidth=1e10 * ratio, launch=1e-5 / ratio)
            print(f"{processes} processes that send nothing: {alone:.3f} s a step", flush=True)
            for mbit in args.mbit if processes > 1 else ():
                for number in range(processes):
                    hosts.limit(number, mbit)
                machine = replace(own, link=mbit * 1e6 / 8, network=mbit * 1e6 / 8)
                passes = measure(hosts, args, "messages") / [
                    machine.message(length, processes) for length in BYTES
                ]
                machine = replace(machine, passes=tuple(passes))
                print(
                    f"{processes} processes, {mbit:g} Mbit/s: messages take {passes.round(2)} of their bytes"
                )
                for kind in args.kinds:
                    seconds = float(measure(hosts, args, kind))
                    said = scaling.predict(steps[kind], machine, processes)["seconds"]
                    found.append([processes, mbit, kind, seconds, said])
                    print(
                        f"{processes} processes, {mbit:g} Mbit/s, {kind}: {seconds:.3f} s, predicted {said:.3f} s, "
                        f"{said / seconds - 1:+.0%}", flush=True,
                    )  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
