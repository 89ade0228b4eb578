"""Times a small FractalAR from a fresh process to 3.0 bits/dim of Fashion-MNIST's test images, on two cores.

    python demo/speedrun.py [--data_path FOLDER]        or: make speedrun

Trains for a fixed number of steps with the library's own parts, in two processes of one thread, then measures
all 10,000 test images, exactly and without their classes. The time is that from the start of the first
process to the end of training; measuring comes after it. docs/log.md has the table of what was tried.
"""

import time

BEGAN = time.time()

import environment  # noqa: E402, F401  first: without its packages a demo says how to get them

# isort: split
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from contextlib import nullcontext  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from common import make_parser  # noqa: E402
from fashion_data import find_data  # noqa: E402
from timm.utils import ModelEmaV3  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import engine_fractalgen as engine  # noqa: E402
from models.fractalgen import FractalGen  # noqa: E402
from util import dist  # noqa: E402
from util.data.loader import ImageLoader, make_loader, open_dataset  # noqa: E402
from util.dist import World  # noqa: E402
from util.threads import cpu_name  # noqa: E402

GOAL = 3.0  # bits per dimension
PROCESSES = 2
SIZES, WIDTHS, BLOCKS, HEADS = (28, 2, 1), (128, 64, 32), (4, 1, 1), (4, 4, 4)
STEPS, BATCH, EMA_DECAY = 540, 8, 0.98  # steps of all processes together, and images of each in a step
RATE, WARM_UP, FALL = 6e-3, 0.04, 0.3  # shares of the steps after which the rate is reached, and falls
RECIPE = engine.Recipe(RATE, 0.0, "constant", 0.0, 1, 3.0, optimizer="muon")
CPU = torch.device("cpu")


def open_loader(data: Path, split: str, model: FractalGen, batch: int, world: World) -> ImageLoader:
    dataset = open_dataset(
        data, split, model.image_shape, model.alphabet, class_num=None, seed=0, flip=False, shift=0,
        strict=False, world=world, num_workers=0,
    )  # fmt: skip
    return make_loader(dataset, batch, world, shuffled=split == "train", num_workers=0, pin_memory=False)


def learning_rate(progress: float) -> float:
    """The rate at a share of all steps: it rises, stays, and falls, each on a straight line."""
    return RATE * min(progress / WARM_UP, 1.0, (1 - progress) / (1 - FALL))


def train(data: Path, steps: int, world: World) -> FractalGen:
    """Trains for `steps` steps on the first images of a random order. Returns the averaged weights."""
    torch.manual_seed(0)
    model = FractalGen(
        SIZES, WIDTHS, BLOCKS, HEADS, ("ar",) * 3, class_num=0, channels=1, attn_dropout=0.0, proj_dropout=0.0
    ).train()
    ema = ModelEmaV3(model, EMA_DECAY, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0)
    network = DistributedDataParallel(model) if world.size > 1 else model
    optimizer, scaler = engine.make_optimizer(model, RECIPE), torch.amp.GradScaler("cpu", enabled=False)
    batches, window = iter(open_loader(data, "train", model, BATCH, world)), engine.Window(CPU)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / steps)
        engine.train_step(network, batches, optimizer, scaler, RECIPE, window, CPU, nullcontext())
        ema.update(model, step=step + 1)
        if (step + 1) % 50 == 0 and world.is_main:
            print(f"step {step + 1} of {steps}, {time.time() - began():.0f} s", flush=True)
    return ema.module


def began() -> float:
    """When the first process began: the one that has started this one, if any."""
    return float(os.environ.get("SPEEDRUN_BEGAN", BEGAN))


def measure(data: Path) -> None:
    """Trains and measures in this process, one of several or the only one."""
    world = dist.from_environment()
    dist.connect(world, CPU, "env://")
    model = train(data, STEPS, world)
    minutes = (time.time() - began()) / 60
    scores = engine.compute_nll(
        model, open_loader(data, "val", model, 128, world), passes=1, seed=0, device=CPU,
        autocast=nullcontext(), world=world,
    )  # fmt: skip
    dist.disconnect()
    bits = scores["bits_per_dim"]
    if world.is_main:
        print(f"{minutes:.2f} minutes, {bits:.4f} bits/dim, exact, of {scores['num_images']} test images")
        print(f"on {cpu_name()}, {world.size} processes, torch {torch.__version__}")
        print(f"the goal of {GOAL} bits/dim is {'reached' if bits <= GOAL else 'missed'}")


def main() -> None:
    parser = make_parser("speedrun.py", __doc__)
    parser.add_argument("--data_path", type=Path, help="folder with the IDX files; default: as fashion.py")
    args = parser.parse_args()
    with parser.one_line_errors(OSError):
        data = args.data_path or find_data()
        if "RANK" in os.environ:
            measure(data)
            return
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={PROCESSES}"]
    os.environ |= {"SPEEDRUN_BEGAN": str(BEGAN), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, __file__, "--data_path", str(data)]
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
