"""The flags of main_fractalgen.py, and the record of a run that allows to repeat it."""

import argparse
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from util.errors import UserError
from util.pixels import VALUE_KINDS, parse_shape

T = TypeVar("T")
# defaults that a small model or its data may change (util/run/settings.py)
PUBLISHED = {
    "class_num": 1000, "batch_size": 64, "epochs": 400, "warmup_epochs": 40.0, "eval_freq": 40,
    "save_last_freq": 5, "r_weight": 5.0, "attn_dropout": 0.1, "proj_dropout": 0.1, "ema_decay": 0.9999,
    "blr": 5e-5, "num_workers": 10,
}  # fmt: skip
TEMPERATURE = "multiplies the logits: above 1 is sharper, the reverse of other libraries, which divide by it"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")

    @contextmanager
    def one_line_errors(self, *kinds: type[Exception]) -> Iterator[None]:
        """Ends the command with one line and status 2 on UserError or `kinds`, with status 130 on Ctrl-C."""
        try:
            yield
        except (UserError, *kinds) as error:
            # An error of a data worker contains the worker's traceback; its last line is the message.
            self.error(str(error).strip().splitlines()[-1].removeprefix("util.errors.UserError: "))
        except KeyboardInterrupt:
            self.exit(130, "interrupted\n")


def get_args_parser(
    description: str, models: Sequence[str], guidance_schedules: Sequence[str], lr_schedules: Sequence[str]
) -> argparse.ArgumentParser:
    """Makes the parser, with names and defaults of docs/format.md, "Published names and flags".

    A default of None means that the model, the data, the device or other flags decide.
    """
    parser = Parser(
        "main_fractalgen.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def number_list(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    def sizes(text: str) -> tuple[int | tuple[int, ...], ...]:
        return tuple(parse_shape(part) if "x" in part else parse_shape(part)[0] for part in text.split(","))

    # argparse shows its name
    number_list.__name__ = "comma-separated list of numbers"

    def number(name: str, default: float, help: str | None = None) -> None:
        """Adds a flag to the group of `add`, for a number of the default's type."""
        add(name, type=type(default), default=default, help=help)

    def published(flag: str, help: str = "") -> None:
        """Adds a flag for a number of PUBLISHED. It is None by default."""
        value = PUBLISHED[flag.removeprefix("--")]
        default = f"default: {value:g}, for tiny models others"
        add(flag, type=type(value), help=f"{help}; {default}" if help else default)

    def switch(name: str, help: str | None = None) -> None:
        """Adds a flag that takes no value. It is False by default."""
        add(name, action="store_true", help=help)

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default="./output_dir", help="folder for checkpoints, logs and images; '' for none")
    add(
        "--resume",
        default="",
        help="checkpoint or safetensors file, or folder that holds one, to continue from",
    )
    add(
        "--finetune",
        default="",
        metavar="WEIGHTS",
        help="begin with the weights of a published name, a folder, a run, a checkpoint or an id on the hub",
    )
    number("--start_epoch", 0, "used if no checkpoint sets it")
    number("--seed", 0)
    add("--device", help="default: the accelerator that torch finds, otherwise cpu")
    add("--amp", choices=("bf16", "fp16", "off"), help="mixed precision; default: bf16 where that is faster")
    switch("--compile", "torch.compile the transformer blocks and the sampler")
    switch("--dry_run", "print settings, cost and memory, and exit")
    number("--gpus", 0, "with --dry_run: predict a step on so many GPUs, and its price")
    add("--gpu", help="with --gpus: which, as a100, h100 (the default), h200 or b200")

    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        choices=models,
        metavar="NAME",
        help=f"{', '.join(models)}; default: that of --resume or --finetune, else fractalmar_in64",
    )
    fixed = "fixed by --model; may be left out"
    add("--img_size", type=int, help=fixed)
    add("--num_conds", type=int, help=fixed)
    add(
        "--img_size_list",
        type=sizes,
        metavar="SIZE,…",
        help="all sizes in place of the model's: 28,7,1; by axes 28x20,4x4,1; with one axis 64x,16,1",
    )
    add("--channels", type=int, help="channels of a pixel; default: the model's, as a rule 3")
    add("--num_values", type=int, help="values of a channel, 2 to 65536; default: the model's, as a rule 256")
    add("--value_kind", choices=VALUE_KINDS, help="whether values are amounts or names; default: the model's")
    parser.set_defaults(mean=None, std=None)  # those of the model that is resumed
    add("--guiding_pixel", action="store_true", default=None, help=fixed)
    add(
        "--class_num",
        type=int,
        help="default: that of --resume, else as many as the data has, else 1000; 0: an unconditional model",
    )
    published("--r_weight", "weight of the first channel (R) in the training loss; the others have weight 1")
    number("--label_drop_prob", 0.1, "share of labels dropped, for guidance")
    published("--attn_dropout")
    published("--proj_dropout")
    switch("--grad_checkpointing", "use less memory and about a third more time")

    add = parser.add_argument_group("training").add_argument
    published("--batch_size", "images per process and accumulation step")
    number("--accum_iter", 1, "accumulation steps per optimiser step")
    published("--epochs")
    published("--warmup_epochs")
    add("--lr", type=float, help="default: blr * batch_size * accum_iter * processes / 256")
    published("--blr", "learning rate for 256 images per step")
    number("--min_lr", 0.0)
    add("--lr_schedule", choices=lr_schedules, default="cosine")
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="default: adamw, the published one")
    number("--weight_decay", 0.05)
    number("--grad_clip", 3.0)
    add(
        "--ema",
        action="store_true",
        default=None,
        help="keep an exponential moving average, with warm-up, and evaluate it; default: tiny models in "
        "training, and evaluation of a checkpoint that has one",
    )
    add("--no_ema", action="store_false", dest="ema")
    published("--ema_decay", "reached by a warm-up: of an average over the last tenth of the steps")
    published("--save_last_freq", "epochs between checkpoints")
    add("--save_every_steps", type=int, help="steps between additional checkpoints")
    number("--keep_last", 2, "checkpoints to keep")
    add(
        "--on_save_error",
        choices=("continue", "stop"),
        default="continue",
        help="what to do if a checkpoint cannot be written",
    )
    switch("--shard", "divide weights, gradients and optimiser among the processes, by FSDP; default: DDP")
    number("--max_bad_steps", 20, "steps in a row that may be skipped because loss or gradient is not finite")
    published("--eval_freq", "epochs between evaluations (bits/dim, a grid of samples)")
    add("--patience", type=int, help="end after so many evaluations without a better bits/dim")

    add = parser.add_argument_group("data").add_argument
    add(
        "--data_path",
        default="./data/imagenet",
        help="folder of images, of class folders, or with train/ and val/ of these (others: docs/data.md)",
    )
    switch("--strict_data", "read every image first, and stop if one is bad")
    add("--no_flip", action="store_false", dest="flip", help="do not mirror images (for digits or text)")
    number("--shift", 0, "shift training images at random by up to so many pixels")
    published("--num_workers", "processes that read images")
    add("--pin_mem", action="store_true", default=True)
    add("--no_pin_mem", action="store_false", dest="pin_mem")

    add = parser.add_argument_group("evaluation").add_argument
    switch("--evaluate_nll", "print bits/dim of val/, write nll.json, and exit")
    number("--nll_bsz", 128, "images per process and batch")
    number("--nll_forward_number", 1, "random masks or orders per image")
    switch("--nll_labels", "condition on the classes; default: unconditional")
    switch("--nll_schedule", "follow the sampler's parallel steps (--num_iter_list), in random orders")
    switch("--evaluate_gen", "write --num_images numbered PNGs (or .npy of what is no image), and exit")
    switch("--online_eval", "write them during training too, every --eval_freq epochs")
    number("--num_images", 50000)
    add(
        "--class_labels",
        metavar="CLASS,…",
        help="classes to draw equally often, by number or name; default: all",
    )
    number("--gen_bsz", 1024, "images per process and batch")

    add = parser.add_argument_group(
        "scores of generated images (see also python -m evaluation.score --help)"
    ).add_argument
    add(
        "--fid_stats",
        metavar="REFERENCE",
        help="npz of ADM or another one; default: fid_stats/adm_in<img_size>_stats.npz if it exists",
    )
    add("--features", choices=("inception", "efficientnet_lite0"), default="inception", help="their network")
    add("--inception_weights", metavar="FILE", help="default: downloaded once from torch-fidelity's address")
    add(
        "--sweep",
        nargs="+",
        metavar="NAME=VALUE,…",
        help="write and score --num_images for each combination, as in cfg=1,2 temperature=1,1.05, and exit",
    )

    add = parser.add_argument_group("sampling").add_argument
    add("--num_iter_list", type=number_list, help="steps of each level; default: the model's best")
    add("--chunk", type=int, help="patches of each deeper level drawn together, to save memory; default: all")
    number("--feature_cache_interval", 1, "steps from one full pass of MAR's level 0 to the next; exact: 1")
    number("--cfg", 1.0, "guidance scale; 1 is without guidance")
    add("--cfg_schedule", default="linear", choices=guidance_schedules)
    number("--temperature", 1.0, TEMPERATURE)
    number("--filter_threshold", 1e-4)

    add = parser.add_argument_group("processes (torchrun sets these)").add_argument
    number("--world_size", 1)
    number("--local_rank", -1)
    switch("--dist_on_itp", "read rank and size from Open MPI's variables")
    add("--dist_url", default="env://")
    number("--dist_timeout", 1800.0, "seconds that a process waits for another")
    return parser


def from_flags(cls: type[T], args: argparse.Namespace, **others) -> T:
    """A dataclass whose fields are the flags of the same names, and `others`."""
    named = {field.name: getattr(args, field.name) for field in fields(cls) if hasattr(args, field.name)}
    return cls(**{**named, **others})


def provenance(args: argparse.Namespace) -> dict:
    """Records the settings after all defaults are filled in, versions, and the commit of this code."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"settings": vars(args), "versions": versions, "commit": commit}
