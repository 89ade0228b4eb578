import json

import pytest
import torch

from models import fractalgen
from util import flags
from util.run import settings

DEFAULTS = {  # docs/format.md, "Published names and flags"
    "batch_size": 64,
    "epochs": 400,
    "seed": 0,
    "start_epoch": 0,
    "num_workers": 10,
    "model": "fractalmar_in64",
    "num_images": 50000,
    "cfg": 1.0,
    "cfg_schedule": "linear",
    "temperature": 1.0,
    "filter_threshold": 0.0001,
    "label_drop_prob": 0.1,
    "eval_freq": 40,
    "save_last_freq": 5,
    "gen_bsz": 1024,
    "nll_bsz": 128,
    "nll_forward_number": 1,
    "weight_decay": 0.05,
    "blr": 5e-05,
    "min_lr": 0,
    "lr_schedule": "cosine",
    "warmup_epochs": 40,
    "r_weight": 5.0,
    "grad_clip": 3.0,
    "attn_dropout": 0.1,
    "proj_dropout": 0.1,
    "data_path": "./data/imagenet",
    "class_num": 1000,
    "output_dir": "./output_dir",
    "world_size": 1,
    "local_rank": -1,
    "dist_url": "env://",
}


def parse(*argv: str):
    return flags.get_args_parser(
        "", tuple(fractalgen.PRESETS), ("linear", "constant"), ("cosine", "constant")
    ).parse_args(argv)


@pytest.mark.parametrize("name", DEFAULTS)
def test_published_defaults(name):
    args = parse()
    settings.fill_in(args, tiny_lr=None, num_images=1000, processes=1)
    args.model = args.model or "fractalmar_in64"  # models/hub/from_flags.py
    assert getattr(args, name) == DEFAULTS[name]


def test_published_switches():
    args = parse()
    assert args.pin_mem
    assert not parse("--no_pin_mem").pin_mem
    for name in (
        "online_eval",
        "evaluate_gen",
        "evaluate_nll",
        "grad_checkpointing",
        "guiding_pixel",
        "dist_on_itp",
    ):
        assert not getattr(args, name)
        assert getattr(parse(f"--{name}"), name)
    assert parse("--num_iter_list", "64,16,16").num_iter_list == (64, 16, 16)


def test_provenance_is_json():
    report = json.loads(json.dumps(flags.provenance(parse())))
    assert report["versions"]["torch"] == torch.__version__
    assert report["settings"]["min_lr"] == 0
    assert report["commit"]
