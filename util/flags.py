"""The command line's flags, and what is written down of a run so that it can be repeated."""

import argparse
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from util.errors import UserError


class Parser(argparse.ArgumentParser):
    """Its errors are one line, without the usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")

    @contextmanager
    def one_line_errors(self, *kinds: type[Exception]) -> Iterator[None]:
        """Inside, bad input and errors of `kinds` end the command with one line and status 2, Ctrl-C with status 130."""
        try:
            yield
        except (
            UserError,
            *kinds,
        ) as error:  # from a data worker it arrives wrapped in that process's traceback
            self.error(str(error).strip().splitlines()[-1].removeprefix("util.errors.UserError: "))
        except KeyboardInterrupt:
            self.exit(130, "interrupted\n")


def get_args_parser(
    description: str, models: Sequence[str], guidance_schedules: Sequence[str], lr_schedules: Sequence[str]
) -> argparse.ArgumentParser:
    """Names and defaults of SPEC section 7; None where a preset, the device or other flags decide."""
    parser = Parser(
        "main_fractalgen.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    number_list = lambda text: tuple(int(part) for part in text.split(","))  # noqa: E731  argparse shows its name
    number_list.__name__ = "comma-separated list of numbers"

    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", default="./output_dir", help="checkpoints, logs, images")
    run.add_argument(
        "--resume", default="", help="checkpoint or safetensors file, or folder of one, to go on from"
    )
    run.add_argument(
        "--start_epoch", type=int, default=0, help="epoch to count from, where nothing is resumed"
    )
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--device", help="default: the accelerator that torch finds, else cpu")
    run.add_argument(
        "--amp",
        choices=("bf16", "fp16", "off"),
        help="mixed precision; default: bf16 where the device has it",
    )
    run.add_argument(
        "--compile", action="store_true", help="torch.compile the transformer blocks and the sampler"
    )
    run.add_argument("--dry_run", action="store_true", help="print settings, cost and memory, and end")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", default="fractalmar_in64", choices=models, metavar="NAME", help=", ".join(models)
    )
    model.add_argument("--img_size", type=int, help="fixed by --model; may be left out")
    model.add_argument("--num_conds", type=int, help="fixed by --model; may be left out")
    model.add_argument(
        "--guiding_pixel", action="store_true", default=None, help="fixed by --model; may be left out"
    )
    model.add_argument("--class_num", type=int, default=1000, help="0: an unconditional model")
    model.add_argument(
        "--r_weight", type=float, default=5.0, help="weight of R in the training loss; G and B have 1"
    )
    model.add_argument("--label_drop_prob", type=float, default=0.1)
    model.add_argument("--attn_dropout", type=float, default=0.1)
    model.add_argument("--proj_dropout", type=float, default=0.1)
    model.add_argument(
        "--grad_checkpointing", action="store_true", help="less memory, about a third more time"
    )

    train = parser.add_argument_group("training")
    train.add_argument("--batch_size", type=int, default=64, help="images a process and accumulation step")
    train.add_argument(
        "--accum_iter",
        type=int,
        default=1,
        help="accumulation steps for each optimiser step: the effective batch is batch_size * accum_iter * processes",
    )
    train.add_argument("--epochs", type=int, default=400)
    train.add_argument("--warmup_epochs", type=float, default=40)
    train.add_argument("--lr", type=float, help="default: blr * total batch / 256")
    train.add_argument("--blr", type=float, default=5e-5)
    train.add_argument("--min_lr", type=float, default=0.0)
    train.add_argument("--lr_schedule", choices=lr_schedules, default="cosine")
    train.add_argument("--weight_decay", type=float, default=0.05)
    train.add_argument("--grad_clip", type=float, default=3.0)
    train.add_argument(
        "--ema", action="store_true", help="keep an exponential moving average and evaluate with it"
    )
    train.add_argument("--ema_decay", type=float, default=0.9999)
    train.add_argument("--save_last_freq", type=int, default=5, help="epochs between checkpoints")
    train.add_argument("--save_every_steps", type=int, help="steps between checkpoints, besides")
    train.add_argument("--keep_last", type=int, default=2, help="checkpoints kept")
    train.add_argument(
        "--on_save_error",
        choices=("continue", "stop"),
        default="continue",
        help="where a checkpoint cannot be written",
    )
    train.add_argument(
        "--max_bad_steps",
        type=int,
        default=20,
        help="steps in a row that may be skipped because loss or gradient is not finite",
    )
    train.add_argument("--eval_freq", type=int, default=40, help="epochs between bits/dim and sample grids")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data_path",
        default="./data/imagenet",
        help="train/ and val/, a folder for each class (or see README)",
    )
    data.add_argument(
        "--strict_data", action="store_true", help="read every image first and stop if one is bad"
    )
    data.add_argument(
        "--fast_decode",
        action="store_true",
        help="training images at twice the speed, not quite the ADM crop",
    )
    data.add_argument(
        "--no_flip", action="store_false", dest="flip", help="no mirrored images (digits, text)"
    )
    data.add_argument("--num_workers", type=int, default=10)
    data.add_argument("--pin_mem", action="store_true", default=True)
    data.add_argument("--no_pin_mem", action="store_false", dest="pin_mem")

    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument(
        "--evaluate_nll", action="store_true", help="print bits/dim of val/, write nll.json, and end"
    )
    evaluation.add_argument("--nll_bsz", type=int, default=128)
    evaluation.add_argument(
        "--nll_forward_number", type=int, default=1, help="masks, or orders, for each image"
    )
    evaluation.add_argument(
        "--nll_labels", action="store_true", help="given the images' classes; default: unconditional"
    )
    evaluation.add_argument(
        "--nll_schedule",
        action="store_true",
        help="follow the sampler's parallel steps (--num_iter_list) for drawn orders",
    )
    evaluation.add_argument(
        "--evaluate_gen", action="store_true", help="write --num_images numbered PNGs and end"
    )
    evaluation.add_argument(
        "--online_eval", action="store_true", help="write them in training too, every --eval_freq"
    )
    evaluation.add_argument("--num_images", type=int, default=50000)
    evaluation.add_argument(
        "--class_labels", type=number_list, help="classes to draw, the same number of each; default all"
    )
    evaluation.add_argument("--gen_bsz", type=int, default=1024)

    scores = parser.add_argument_group(
        "scores of the images written (see also python -m evaluation.score --help)"
    )
    scores.add_argument(
        "--fid_stats",
        metavar="REFERENCE",
        help="ADM's or another npz; default: fid_stats/adm_in<img_size>_stats.npz if it is there",
    )
    scores.add_argument(
        "--inception_weights", metavar="FILE", help="default: fetched once by torch-fidelity's address"
    )
    scores.add_argument(
        "--sweep",
        nargs="+",
        metavar="NAME=VALUE,…",
        help="write and score --num_images for every combination, such as cfg=1,2,4 temperature=1,1.05, and end",
    )

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--num_iter_list", type=number_list, help="steps of each level; default: the model's best"
    )
    sampling.add_argument(
        "--chunk", type=int, help="patches of each deeper level drawn together: bounds memory; default all"
    )
    sampling.add_argument(
        "--refresh",
        type=int,
        default=1,
        help="above 1, approximate: a MAR level 0 computes all features every N steps only",
    )
    sampling.add_argument("--cfg", type=float, default=1.0, help="guidance scale, 1 = off")
    sampling.add_argument("--cfg_schedule", default="linear", choices=guidance_schedules)
    sampling.add_argument(
        "--temperature", type=float, default=1.0, help="multiplies logits: above 1 is sharper"
    )
    sampling.add_argument("--filter_threshold", type=float, default=1e-4)

    processes = parser.add_argument_group("processes (torchrun sets these)")
    processes.add_argument("--world_size", type=int, default=1)
    processes.add_argument("--local_rank", type=int, default=-1)
    processes.add_argument(
        "--dist_on_itp", action="store_true", help="take the place among processes from Open MPI"
    )
    processes.add_argument("--dist_url", default="env://")
    return parser


def provenance(args: argparse.Namespace) -> dict:
    """The settings as resolved, versions, and the commit of this code."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"settings": vars(args), "versions": versions, "commit": commit}


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself, not by emulation."""
    module = torch.get_device_module(device)
    if hasattr(module, "is_bf16_supported"):
        return module.is_bf16_supported(including_emulation=False)
    capabilities = module.get_capabilities() if hasattr(module, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def make_writable(output_dir: str) -> Path:
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be written ({error.strerror})") from error
    return folder
