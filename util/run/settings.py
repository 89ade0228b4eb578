"""The settings of a run: what its flags leave open, and what they must be."""

import argparse
import math
import sys

from util.errors import UserError
from util.flags import PUBLISHED

# of the `tiny` models, in place of the published defaults: for thousands of steps on thousands of images
TINY = {"r_weight": 1.0, "attn_dropout": 0.0, "proj_dropout": 0.0, "ema": True, "num_workers": 2}
TINY_STEPS, TINY_BATCH = 4000, 16

FINITE = sys.float_info.max
RANGES = {
    "batch_size accum_iter epochs save_last_freq eval_freq nll_bsz nll_forward_number": (1, math.inf),
    "num_images gen_bsz chunk feature_cache_interval save_every_steps keep_last patience": (1, math.inf),
    "max_bad_steps start_epoch num_workers shift gpus": (0, math.inf),
    "dist_timeout": (1, 10**8),  # seconds
    "class_num": (0, 10**6),  # whose embeddings alone take 4 GB in the largest models
    "warmup_epochs lr blr min_lr weight_decay r_weight": (0, FINITE),
    "grad_clip": (1e-6, math.inf),
    "attn_dropout proj_dropout label_drop_prob ema_decay": (0, 1),
    "seed": (0, 2**31),  # NumPy's and torch's generators both take these, and a few more for the processes
}  # fmt: skip


def check_ranges(args: argparse.Namespace) -> None:
    """Raises UserError that names the first flag whose number is out of range."""
    for names, (low, high) in RANGES.items():
        for name in names.split():
            if (value := getattr(args, name)) is not None and not low <= value <= high:
                named = {math.inf: f"at least {low}", FINITE: f"at least {low} and finite"}
                raise UserError(f"--{name} {value} must be {named.get(high, f'from {low} to {high}')}")


def check_classes(args: argparse.Namespace) -> None:
    """Raises UserError where no images can be written, or not equally many of each class."""
    if args.class_num == 0 and args.nll_labels:
        raise UserError("--nll_labels needs classes; with --class_num 0 leave it out")
    count = len(args.class_labels or ()) or args.class_num or 1
    if (args.evaluate_gen or args.online_eval or args.sweep) and args.num_images % count:
        flag = f"{'the number of --class_labels' if args.class_labels else '--class_num'} {count}"
        raise UserError(
            f"--num_images {args.num_images} must be a multiple of {flag}: the same for each class"
        )
    if not args.output_dir and (args.evaluate_gen or args.online_eval or args.sweep):
        raise UserError(
            "--output_dir '' saves nothing: --evaluate_gen, --online_eval and --sweep need a folder"
        )


def fill_in(args: argparse.Namespace, tiny_lr: float | None, num_images: int | None, processes: int) -> None:
    """Gives each flag that is None its default, for training on `num_images`; None: there is no training.

    tiny_lr  AdamW's learning rate of a tiny model; None for other models, whose defaults are PUBLISHED

    A tiny model is trained for about TINY_STEPS steps on batches of TINY_BATCH, with a warm-up of a tenth of
    them and an average over a twentieth, and is evaluated ten times.
    """

    def default(**values) -> None:
        vars(args).update({name: value for name, value in values.items() if getattr(args, name) is None})

    if tiny_lr is not None and num_images is not None:
        default(**TINY, batch_size=min(TINY_BATCH, max(1, num_images // processes)))
        steps = max(1, num_images // (args.batch_size * args.accum_iter * processes))
        default(epochs=math.ceil(TINY_STEPS / steps))
        default(
            warmup_epochs=args.epochs / 10,
            ema_decay=round(1 - 1 / max(2, steps * args.epochs / 20), 5),
            eval_freq=math.ceil(args.epochs / 10),
            save_last_freq=math.ceil(args.epochs / 40),
        )
        if args.blr is None:
            default(lr=tiny_lr)
    if num_images is not None:
        default(ema=False)
    default(**PUBLISHED)
    default(lr=args.blr * args.batch_size * args.accum_iter * processes / 256)
