"""Measures packs in shards beside a pack in one file, of synthetic images of 16 px.

    python tests/bench_shards.py --folder NEW --images 20000000 --read 12800    writes 768 bytes an image twice
    python tests/bench_shards.py --folder NEW --images 400000 --shard_gb 0.005 --read 1280 --cache 1 0.75 0.5

Each line is a process of its own that opens the pack, as training does, and loads shuffled batches of 256. Rates
are images in a second of processor time, of this process and its workers, so that other work on the machine
does not matter; wall_s says how long that took. Memory is PSS: what several processes share counts by its share.
Images are read twice: "cold" without them in the page cache, then "warm". With --cache the pack is read from a
file:// address, by way of a cache of that part of its size. The packs are removed at the end. The last line is
JSON.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from util.data import shards
from util.data.loader import BatchOrder, ImageDataset, make_loader, open_split
from util.data.packed import HASHES, IMAGES, LABELS, MANIFEST, part, parts
from util.data.source import cells_of
from util.dist import World
from util.files import sha256
from util.pixels import RGB

ROW = 3 * 16 * 16


def write(folder: Path, count: int, shard_gb: float | None) -> None:
    """Writes a pack of random images without names, as the tool would. Shards differ in their first image."""
    folder.mkdir(parents=True)
    length = shard_gb and int(shard_gb * 1e9 / ROW)
    np.save(folder / LABELS, np.arange(count) % 1000)
    lines = [f"{sha256(folder / LABELS)}  {LABELS}\n"]
    block = np.random.default_rng(0).bytes(10_000 * ROW)
    for number, images in parts(count, length):
        path = folder / part(IMAGES, number)
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(images), 3, 16, 16)}
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            start = file.tell()
            for first in range(0, len(images), 10_000):
                file.write(block[: (len(images) - first) * ROW])
            file.seek(start)
            file.write(f"{number}".encode())
        if length:
            lines.append(f"{sha256(path)}  {path.name}\n")
    if length:
        (folder / HASHES).write_text("".join(lines))
    settings = {"shape": [16, 16], "alphabet": list(cells_of(RGB)), "can_mirror": True, "kind": "synthetic"}
    settings |= {
        "classes": [str(i) for i in range(1000)],
        "pictures": count,
        "bad": {},
        "shard_images": length,
    }
    (folder / MANIFEST).write_text(json.dumps(settings))


def forget(folder: Path) -> None:
    """Drops the files of a folder from the page cache."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_mb(pid: int | str = "self") -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def processor_s(pids: list[str]) -> float:
    """Seconds of processor time that this process and others have used."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    ticks = sum(int(one[11]) + int(one[12]) for one in fields)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def measure(address: str, workers: int, images: int, cold: bool) -> dict[str, float]:
    fetched, make_room = [], shards.make_room
    shards.make_room = lambda *words, **more: (fetched.append(1), make_room(*words, **more))
    empty, began, used = memory_mb(), time.perf_counter(), time.process_time()
    dataset = ImageDataset(open_split(address, "train"), (16, 16), RGB, seed=0, flip=True, training=True)
    result = {"open_s": time.perf_counter() - began, "open_cpu_s": time.process_time() - used}
    result["open_mb"], used = memory_mb() - empty, time.process_time()
    order = iter(BatchOrder(len(dataset), 256, World(), 0, True))
    chosen, result["order_cpu_s"] = list(islice(order, images // 256)), time.process_time() - used
    result["order_mb"] = memory_mb() - empty - result["open_mb"]
    loader = make_loader(dataset, 256, World(), shuffled=True, num_workers=workers, pin_memory=False)
    vars(loader)["batch_sampler"] = chosen
    if cold:
        forget(Path(address) / "train")
    for state in ("cold", "warm")[not cold :]:
        began, pids = time.perf_counter(), []
        batches = iter(loader)
        pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        used = processor_s(pids)
        count = sum(len(numbers) for _, _, numbers in batches)
        result[f"{state}_images_per_cpu_s"] = count / (processor_s(pids) - used)
        result[f"{state}_wall_s"] = time.perf_counter() - began
        result["worker_mb"] = memory_mb(pids[0]) if pids else 0.0
    return result | {"files_fetched": len(fetched)}


def in_process(*words: object, cache: Path, cache_gb: float = 1000) -> dict:
    env = {**os.environ, "FRACTALGEN_CACHE": str(cache), "FRACTALGEN_CACHE_GB": f"{cache_gb:.6f}"}
    command = [sys.executable, __file__, "--measure", *map(str, words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="a new folder on the disk to measure")
    parser.add_argument("--images", type=int, default=20_000_000)
    parser.add_argument("--shard_gb", type=float, default=1.0)
    parser.add_argument("--read", type=int, default=51_200, help="images to read")
    parser.add_argument("--cache", type=float, nargs="+", default=[], help="parts of the pack's size")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        address, workers, images, cold = args.measure
        print(json.dumps(measure(address, int(workers), int(images), cold == "True")))
        return
    args.folder.mkdir(parents=True)
    rows, cache = {}, args.folder / "cache"

    def row(name: str, *words: object, **more) -> None:
        rows[name] = in_process(*words, **more)
        print(f"{name:24}", "  ".join(f"{k} {v:,.2f}" for k, v in rows[name].items()), flush=True)

    try:
        write(args.folder / "shards/train", args.images, args.shard_gb)
        for some in args.cache:
            address, gb = f"file://{args.folder.resolve()}/shards", args.images * (ROW + 8) * some / 1e9
            shutil.rmtree(cache, ignore_errors=True)
            row(f"cache of {some:.0%}", address, 0, args.read, False, cache=cache, cache_gb=gb * 1.01)
        if not args.cache:
            write(args.folder / "one file/train", args.images, None)
            for name, workers in (
                ("one file", 0),
                ("shards, first time", 0),
                ("shards", 0),
                ("one file", 2),
                ("shards", 2),
            ):
                pack = args.folder / name.split(",")[0]
                row(f"{name}, {workers} workers", pack, workers, args.read, True, cache=cache)
    finally:
        shutil.rmtree(args.folder)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
