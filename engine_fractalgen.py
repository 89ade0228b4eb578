"""What a run does: train an epoch, measure the likelihood of images, generate images. Arguments in, dicts out."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from evaluation.gallery import Gallery, balanced
from evaluation.nll import compute_nll  # noqa: F401  a published name of this module
from models.fractalgen import FractalGen
from models.sampling.generate import is_out_of_memory
from util import dist
from util.checkpoint import fingerprint
from util.dist import World
from util.errors import UserError
from util.meters import BadSteps, PeakMemory, RunLog, Window
from util.pixels import normalize, to_pil

OF_TRAINING = (
    "label_drop_prob",
    "attn_dropout",
    "proj_dropout",
    "r_weight",
    "grad_checkpointing",
)  # no image sees them
LOG_EVERY = 20  # steps; the only places in an epoch where the host waits for the device


LR_SCHEDULES = ("cosine", "constant")


def learning_rate(
    epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float, schedule: str
) -> float:
    """The rate at `epoch` (fractional, from 0 to `epochs`)."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    if schedule == "constant":
        return lr
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Recipe:
    """The training settings that an epoch needs (SPEC section 6). lr in units of AdamW; epochs may be fractions."""

    lr: float
    min_lr: float
    lr_schedule: str
    warmup_epochs: float
    epochs: int
    grad_clip: float
    accum_iter: int = 1

    def learning_rate(self, epoch: float) -> float:
        settings = {name: getattr(self, name) for name in ("lr", "min_lr", "warmup_epochs", "epochs")}
        return learning_rate(epoch, schedule=self.lr_schedule, **settings)


@dataclass(frozen=True)
class SamplerSettings:
    """How images are drawn; see `FractalGen.sample`."""

    num_iter_list: tuple[int, ...]
    cfg: float
    cfg_schedule: str
    temperature: float
    filter_threshold: float
    chunk: int | None = None
    compiled: bool = False
    refresh: int = 1


def add_weight_decay(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's groups in published order: undecayed (1-D weights and names ending in .bias), then decayed."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    undecayed = [p for name, p in named if p.dim() <= 1 or name.endswith(".bias")]
    decayed = [p for name, p in named if not (p.dim() <= 1 or name.endswith(".bias"))]
    return [{"params": undecayed, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    recipe: Recipe,
    *,
    epoch: int,
    device: torch.device,
    autocast: AbstractContextManager,
    world: World,
    log: RunLog,
    ema: nn.Module | None = None,
    bad: BadSteps | None = None,
    max_bad_steps: int = 20,
    after_step: Callable[[int], None] = lambda images: None,
) -> dict[str, float]:
    """Trains on the rest of epoch number `epoch` (from 0), beginning at the loader's BatchOrder.start.

    model: a FractalGen, bare or in DDP; optimizer: a fused one. Returns the mean loss and images a second.
    A step whose loss or gradient is not finite changes no weight and is counted. Raises UserError after more than
    `max_bad_steps` of them in a row, counted in `bad` over epochs. `after_step` is told how many images of the epoch all
    processes have done.
    """
    model.train()
    order = loader.batch_sampler
    order.epoch = epoch
    images = order.together * recipe.accum_iter  # a step
    steps, done = len(order) // recipe.accum_iter, order.start
    first_step = -(-done // images)
    batches = iter(loader) if first_step < steps else None
    order.start = 0
    log.start_epoch(epoch, recipe.epochs, steps, first_step)
    bad = BadSteps(device) if bad is None else bad
    window, windows, began = Window(device), [], time.perf_counter()
    for step in range(first_step, steps):
        lr = recipe.learning_rate(epoch + step / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        grad_norm = train_step(model, batches, optimizer, scaler, recipe, window, device, autocast)
        bad.note(grad_norm, epoch * steps + step)
        if ema is not None:
            ema.update(bare(model))
        log.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            means, now = window.read(), time.perf_counter()  # sync
            if (row := bad.most_in_a_row()) > max_bad_steps:
                first_epoch, first = divmod(bad.first(), steps)
                rate = recipe.learning_rate(first_epoch + first / steps)
                raise UserError(
                    f"the loss or its gradient was not finite in {row} steps in a row (--max_bad_steps {max_bad_steps}), from "
                    f"epoch {first_epoch}, step {first} of {steps}, learning rate {rate:.3g}, "
                    "on; they changed no weight; resume from the last checkpoint with a lower --blr, or with --amp off"
                )
            seen = window.images * world.size
            windows.append((means["loss"] * seen, seen, now - began))
            means |= {"lr": lr, "grad_norm": grad_norm.item(), "images_per_s": seen / (now - began)}
            means["skipped_steps"] = bad.skipped()
            log.record(epoch * steps + step + 1, {f"train/{name}": value for name, value in means.items()})
            window, began = Window(device), now
        done += images
        after_step(done)
    loss, seen, secs = (
        (sum(column) for column in zip(*windows, strict=True)) if windows else (math.nan, 1, math.nan)
    )
    return {"loss": loss / seen, "images_per_s": seen / secs}


def train_step(model, batches, optimizer, scaler, recipe, window: Window, device, autocast) -> Tensor:
    """One optimiser step over `accum_iter` batches, noted in `window`. Returns the gradient's norm before clipping.

    Where that is not finite, on whichever process, nothing is changed: decided on the device.
    """
    for micro in range(recipe.accum_iter):
        levels, labels, _ = next(batches)
        images = normalize(levels.to(device, non_blocking=True))
        labels = labels.to(device, non_blocking=True)
        accumulate = isinstance(model, DistributedDataParallel) and micro + 1 < recipe.accum_iter
        with model.no_sync() if accumulate else nullcontext():
            with autocast:
                loss, terms = model(images, labels, return_terms=True)
            finite = torch.where(
                loss.detach().isfinite(), 1.0, math.nan
            )  # else every process's gradient shall be nan
            scaler.scale(loss * finite / recipe.accum_iter).backward()
        window.add(loss, terms, len(images))
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
    if scaler.is_enabled():  # it skips such a step by itself
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.found_inf = (~grad_norm.isfinite()).float()  # as the scaler tells a fused optimiser
        optimizer.step()
        del optimizer.found_inf
    optimizer.zero_grad()
    return grad_norm


def bare(model: nn.Module) -> FractalGen:
    return model.module if isinstance(model, DistributedDataParallel) else model


@torch.no_grad()
def evaluate(
    model: FractalGen,
    folder: Path,
    settings: SamplerSettings,
    *,
    num_images: int,
    batch_size: int,
    seed: int,
    autocast: AbstractContextManager,
    world: World,
    classes: Sequence[int] | None = None,
    notes: dict | None = None,
    progress_bar: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, float | None]:
    """Draws `folder`/00000.png, 00001.png, …, as many as `num_images` and none more; what is there is not drawn again.

    Image i depends on (weights, settings, seed, i) alone, whichever process or job draws it (evaluation/gallery.py).

    classes  the same number of images of each, in this order; default all
    notes    goes into manifest.json beside what decides the images
    say      is told where memory ran out, and what was done about it

    Returns the numbers of images and of those that this job drew, its seconds an image and the most memory a process used.
    Raises UserError where the folder was begun with other weights or settings.
    """
    classes = list(range(model.class_num)) if classes is None else classes
    labels = balanced(classes or [0], num_images)
    decisive = {key: value for key, value in model.arguments.items() if key not in OF_TRAINING}
    decisive |= {key: value for key, value in asdict(settings).items() if key not in ("chunk", "compiled")}
    device = model.fake_latent.device
    with autocast:
        autocasts = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        precision = torch.get_autocast_dtype(device.type) if autocasts else model.generator.dtype
    decisive |= {"precision": str(precision), "seed": seed, "classes": classes}
    decisive |= {"weights_sha256": fingerprint(model.state_dict())}
    unit = min(batch_size, -(-num_images // world.size))
    gallery = Gallery(
        folder,
        num_images,
        decisive,
        {"chunk": settings.chunk, "compiled": settings.compiled, **(notes or {})},
        unit,
    )
    drawer, began, peak = (
        Drawer(model, labels, settings, seed, autocast, say),
        time.perf_counter(),
        PeakMemory(device),
    )
    shown = None if progress_bar and world.is_main else True  # None: a bar on a terminal only
    there = num_images - len(gallery.missing(range(num_images)))
    with tqdm(total=num_images, initial=there, desc="images", unit="image", disable=shown) as bar:
        drawn = gallery.fill(
            drawer, batch_size, world.rank / world.size, lambda there: bar.update(there - bar.n)
        )
    dist.barrier()
    gallery.close()
    drawn, elapsed = sum(dist.gather(drawn)), time.perf_counter() - began
    return {
        "num_images": num_images,
        "num_drawn": drawn,
        "secs_per_image": elapsed / drawn if drawn else None,
        "peak_gib": max(dist.gather(peak.gib())),
    }


class Drawer:
    """Numbers of images -> images. Where memory runs out, it draws half as much at a time, from then on."""

    def __init__(
        self, model: FractalGen, labels: Sequence[int], settings: SamplerSettings, seed: int, autocast, say
    ):
        self.model, self.labels, self.settings, self.seed = model, labels, settings, seed
        self.autocast, self.say = autocast, say

    def __call__(self, indices: Sequence[int]) -> list[Image.Image]:
        while True:
            try:
                return draw(
                    self.model,
                    [self.labels[i] for i in indices],
                    indices,
                    self.settings,
                    self.seed,
                    self.autocast,
                )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            chunk = self.settings.chunk or 2 * len(indices)
            if chunk == 1:
                raise UserError(
                    f"out of memory drawing {len(indices)} images, even with --chunk 1; give a smaller --gen_bsz"
                )
            self.settings = replace(self.settings, chunk=chunk // 2)
            self.say(f"out of memory: from now on with --chunk {chunk // 2}")
            if self.model.fake_latent.device.type != "cpu":
                torch.accelerator.empty_cache()


def draw(
    model: FractalGen,
    labels: Sequence[int],
    indices: Sequence[int],
    settings: SamplerSettings,
    seed: int,
    autocast: AbstractContextManager,
) -> list[Image.Image]:
    """RGB images number `indices` of `seed` for class `labels`, or unconditional ones where the model has no classes."""
    with autocast:
        images = model.generate(
            labels if model.class_num else None,
            num_images=len(indices),
            guidance_scale=settings.cfg,
            guidance_schedule=settings.cfg_schedule,
            num_inference_steps=settings.num_iter_list,
            temperature=settings.temperature,
            filter_threshold=settings.filter_threshold,
            chunk=settings.chunk,
            compiled=settings.compiled,
            refresh=settings.refresh,
            seed=seed,
            indices=indices,
            output_type="pt",
            progress_bar=False,
        )
    return to_pil(images)
