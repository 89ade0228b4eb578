"""The command line of main_fractalgen.py: the files it writes, and its messages for bad input."""

import hashlib
import json
import pickle
import shlex
import shutil
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_fractalgen
from conftest import random_values
from models import fractalgen
from models.fractalgen import FractalGen
from util import checkpoint

ROOT = Path(__file__).parent.parent
TINY = "--model fractalar_tiny_in8 --class_num 3 --device cpu --num_workers 0 --amp off --batch_size 4 --nll_bsz 5"
TRAIN = f"{TINY} --epochs 2 --warmup_epochs 1 --lr 1e-3 --num_iter_list 4,16 --save_last_freq 1 --eval_freq 2"


def run(flags: str, **paths) -> None:
    main_fractalgen.main(
        shlex.split(flags) + [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    )


def write_images(folder, per_class: int) -> None:
    for i, values in enumerate(random_values(3 * per_class, 8)):
        path = folder / f"class{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.permute(1, 2, 0).numpy()).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_images(folder / "train", 4)
    write_images(folder / "val", 2)
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(f"{TRAIN} --ema", data_path=data, output_dir=folder)
    return folder


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_training_writes_checkpoint_settings_log_and_samples(trained):
    content = checkpoint.load(trained / "checkpoint-last.pth")
    assert content["epoch"] == 1
    assert content["args"].model == "fractalar_tiny_in8"
    assert content["optimizer"]["param_groups"][0]["weight_decay"] == 0.0
    fractalgen.fractalar_tiny_in8(class_num=3).load_state_dict(content["model"], strict=True)
    settings = json.loads((trained / "settings.json").read_text())
    assert settings["settings"]["lr"] == 1e-3
    assert settings["versions"]["torch"] == torch.__version__
    assert settings["commit"]
    assert any("val/bits_per_dim" in record for record in records(trained))
    assert Image.open(trained / "samples" / "step-0000006.png").width > 4 * 96


@pytest.mark.parametrize(("kind", "optimizer"), [("fractalar", "muon"), ("fractalmar", "adamw")])
def test_a_resumed_run_ends_as_the_run_that_was_not_stopped(kind, optimizer, data, tmp_path):
    """The run is also evaluated in between, which must not use random numbers of the training."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    flags = (
        TRAIN.replace("fractalar", kind)
        + f" --ema --eval_freq 1 --lr_schedule constant --optimizer {optimizer}"
    )
    run(flags, data_path=data, output_dir=whole)
    # The folder holds no checkpoint yet, so that this run starts from the beginning.
    run(flags.replace("--epochs 2", "--epochs 1"), data_path=data, output_dir=halves, resume=halves)
    run(flags, data_path=data, output_dir=halves, resume=halves)
    a, b = (checkpoint.load(folder / "checkpoint-last.pth") for folder in (whole, halves))
    for key in ("model", "model_ema"):
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])


def test_resuming_with_other_precision_or_from_a_published_optimizer_state(data, trained, tmp_path):
    """In a published file, parameter groups have no "fused"; a run without float16 saves an empty scaler."""
    content = checkpoint.load(trained / "checkpoint-last.pth")
    for group in content["optimizer"]["param_groups"]:
        del group["fused"], group["foreach"]
    published = {key: content[key] for key in ("model", "optimizer", "epoch", "scaler", "args")}
    torch.save(published, tmp_path / "checkpoint-last.pth")
    run(
        TRAIN.replace("--amp off", "--amp fp16").replace("--epochs 2", "--epochs 3"),
        data_path=data,
        output_dir=tmp_path,
        resume=tmp_path,
    )
    resumed = checkpoint.load(tmp_path / "checkpoint-last.pth")
    assert (resumed["epoch"], resumed["step"]) == (2, 9)
    assert all(group["fused"] for group in resumed["optimizer"]["param_groups"])
    assert resumed["scaler"]["scale"] > 0


def test_ema_weights_are_kept_and_used(data, trained, tmp_path, capsys):
    content = checkpoint.load(trained / "checkpoint-last.pth")
    assert not torch.equal(content["model"]["fake_latent"], content["model_ema"]["fake_latent"])
    scores = []
    for ema in (" --no_ema", ""):
        run(f"{TINY} --evaluate_nll{ema}", data_path=data, output_dir=tmp_path, resume=trained)
        scores.append(json.loads(capsys.readouterr().out)["bits_per_dim"])
    assert scores[0] != scores[1]


def test_a_run_is_evaluated_without_repeating_its_model(data, trained, tmp_path, capsys):
    short = "--device cpu --num_workers 0 --amp off --evaluate_nll --nll_bsz 5"
    run(short, data_path=data, output_dir=tmp_path, resume=trained)
    run(f"{TINY} --evaluate_nll --ema", data_path=data, output_dir=tmp_path, resume=trained)
    scores = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert scores[0] == scores[1]
    settings = json.loads((tmp_path / "nll.json").read_text())["settings"]
    assert (settings["model"], settings["class_num"]) == ("fractalar_tiny_in8", 3)


def test_data_with_other_classes_than_the_run_are_refused(trained, tmp_path, capsys):
    write_images(tmp_path / "val", 1)
    shutil.rmtree(tmp_path / "val" / "class2")
    evaluate = lambda: run("--device cpu --amp off --evaluate_nll", data_path=tmp_path, resume=trained)  # noqa: E731
    assert_refused(evaluate, "val (class folders) has 2 classes but --class_num is 3", capsys)


def test_a_trained_run_loads_as_a_model_with_the_names_of_its_folders(trained):
    model = FractalGen.from_pretrained(trained)
    assert model.class_names == ("class0", "class1", "class2")
    average = checkpoint.load(trained / "checkpoint-last.pth")["model_ema"]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in average.items())


def test_classes_are_counted_where_there_is_no_val_and_few_flags_are_given(tmp_path):
    write_images(tmp_path / "images", 4)
    flags = "--model fractalar_tiny_in8 --device cpu --num_workers 0 --amp off --epochs 1 --nll_bsz 5"
    run(flags, data_path=tmp_path / "images", output_dir=tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())["settings"]
    assert (settings["class_num"], settings["class_names"]) == (3, ["class0", "class1", "class2"])
    assert (settings["batch_size"], settings["lr"], settings["ema"]) == (9, 4e-3, True)
    notes = [record["note"] for record in records(tmp_path / "out") if "note" in record]
    assert notes[0].endswith("class folders, every 10th for validation, 3 classes, 9 + 3 images")
    assert notes[1].startswith(
        "1 epochs of 1 steps, 1 steps of 9 images; learning rate 0.004, weights averaged"
    )
    assert notes[2].startswith("warning: 1 steps are few")


def test_fine_tuning_takes_weights_and_writes_its_own_classes(data, trained, tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    for name in ("class2", "other"):
        shutil.copytree(data / "train" / ("class0" if name == "other" else name), images / name)
    flags = "--device cpu --num_workers 0 --amp off --epochs 1 --nll_bsz 5 --lr 0 --no_ema"
    run(flags, finetune=trained, data_path=images, output_dir=out, resume=out)
    notes = [record["note"] for record in records(out) if "note" in record]
    assert "classes: 1 of 3 taken by name, 1 begun anew" in notes
    before, after = (FractalGen.from_pretrained(folder) for folder in (trained, out))
    assert after.class_names == ("class2", "other")
    assert torch.equal(after.class_emb.weight[0], before.class_emb.weight[2])
    assert torch.equal(after.generator.patch_emb.weight, before.generator.patch_emb.weight)
    # A second call goes on with its own weights.
    run(
        flags.replace("--epochs 1", "--epochs 2"),
        finetune=trained,
        data_path=images,
        output_dir=out,
        resume=out,
    )
    assert checkpoint.load(out / "checkpoint-last.pth")["epoch"] == 1
    assert [record.get("note") for record in records(out)].count(
        "classes: 1 of 3 taken by name, 1 begun anew"
    ) == 1


def test_a_dry_run_says_how_long_a_run_takes(data, capsys):
    run(f"{TRAIN} --dry_run", data_path=data)
    out, err = capsys.readouterr()
    plan = json.loads(out)["run"]
    assert (plan["images"], plan["held_out"], plan["epochs"], plan["steps"], plan["batch"]) == (
        12,
        6,
        2,
        3,
        4,
    )
    assert plan["seconds"] > 0
    assert f"6 steps of 4 images: about {plan['seconds'] * 6:.0f} s, " in err
    assert " GiB a step in float32" in err
    assert "warning: 6 steps are few" in err


def test_a_dry_run_without_the_memory_for_a_step_does_not_try_one(data, capsys, monkeypatch):
    monkeypatch.setattr(main_fractalgen, "free_gib", lambda device: 1e-6)
    run(f"{TRAIN} --dry_run", data_path=data)
    out, err = capsys.readouterr()
    assert json.loads(out)["run"]["seconds"] is None
    assert "no step is measured: it needs " in err


def test_evaluate_nll_needs_only_val(data, trained, tmp_path, capsys):
    write_images(tmp_path / "val", 2)
    run(
        f"{TINY} --evaluate_nll",
        data_path=tmp_path,
        output_dir=tmp_path / "out",
        resume=trained / "checkpoint-last.pth",
    )
    scores = json.loads(capsys.readouterr().out)
    assert scores["num_images"] == 6
    assert 4 < scores["bits_per_dim"] < 12


def test_likelihoods_are_written_with_everything_that_is_needed_to_repeat_them(
    data, trained, tmp_path, capsys
):
    flags = "--evaluate_nll --nll_labels --nll_schedule --num_iter_list 3,2 --nll_forward_number 2 --seed 5"
    checkpoint_file = trained / "checkpoint-last.pth"
    run(f"{TINY} {flags}", data_path=data, output_dir=tmp_path, resume=trained)
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "nll.json").read_text())
    assert printed.items() <= written.items()
    assert written["checkpoint"]["path"] == str(checkpoint_file)
    assert written["checkpoint"]["sha256"] == hashlib.sha256(checkpoint_file.read_bytes()).hexdigest()
    assert written["data"] == {"path": str(data), "kind": "class folders", "num_images": 6}
    settings = {
        "seed": 5,
        "nll_forward_number": 2,
        "nll_labels": True,
        "nll_schedule": True,
        "num_iter_list": [3, 2],
    }
    assert settings.items() <= written["settings"].items()
    assert written["versions"]["torch"] == torch.__version__
    assert written["commit"]
    write_images(tmp_path / "one" / "val", 1)
    for name in ("01.png", "02.png"):
        next((tmp_path / "one").rglob(name)).write_bytes(b"broken")
    run(f"{TINY} --evaluate_nll", data_path=tmp_path / "one", output_dir=tmp_path / "out")
    only = json.loads((tmp_path / "out" / "nll.json").read_text())
    assert (only["num_images"], only["num_bad_images"]) == (1, 2)
    assert only["standard_error"] is only["checkpoint"] is None


def test_evaluate_gen_needs_no_data(trained, tmp_path, capsys):
    flags = f"{TINY} --evaluate_gen --num_images 6 --gen_bsz 4 --cfg 2 --data_path /nowhere"
    run(flags, output_dir=tmp_path, resume=trained)
    scores = json.loads(capsys.readouterr().out)
    files = sorted((tmp_path / "generated").iterdir())
    assert [path.name for path in files] == [*(f"{i:05d}.png" for i in range(6)), "manifest.json"]
    begun_by = json.loads(files[-1].read_text())["begun_by"]
    assert begun_by["settings"]["resume"] == str(trained)
    assert begun_by["versions"]["torch"] == torch.__version__
    run(f"{flags} --class_labels 2,0", output_dir=tmp_path / "some", resume=trained)
    assert json.loads((tmp_path / "some" / "generated" / "manifest.json").read_text())["settings"][
        "classes"
    ] == [2, 0]
    assert np.asarray(Image.open(files[0])).shape == (8, 8, 3)
    assert scores["num_images"] == 6


@pytest.mark.parametrize("what", ["weight", "temperature"])
def test_images_that_are_not_finite_end_in_one_line_and_are_not_written(what, tmp_path, capsys):
    model = fractalgen.fractalar_tiny_in8(class_num=3)
    torch.nn.init.constant_(model.next_fractal.next_fractal.r_mlm.bias, 9.0)
    message, flags = "temperature 1e+38, guidance scale 2.0", "--cfg 2 --temperature 1e38"
    if what == "weight":
        torch.nn.init.constant_(model.next_fractal.generator.norm.bias, torch.nan)
        message, flags = "weight next_fractal.generator.norm.bias of the model is not finite (nan)", ""
    checkpoint.save_safetensors(tmp_path / "model.safetensors", model.state_dict())
    with pytest.raises(SystemExit, match="2"):
        run(f"{TINY} --evaluate_gen --num_images 3 {flags}", output_dir=tmp_path, resume=tmp_path)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("main_fractalgen.py: error: ")
    assert message in error
    assert not list(tmp_path.rglob("*.png"))


def test_generating_in_chunks_writes_the_same_images(trained, tmp_path, monkeypatch):
    from models.fractalgen import FractalGen

    chunks, generate = [], FractalGen.generate
    monkeypatch.setattr(
        FractalGen,
        "generate",
        lambda self, *args, **how: chunks.append(how["chunk"]) or generate(self, *args, **how),
    )
    written = []
    for chunk in ("", "--chunk 3"):
        run(
            f"{TINY} --evaluate_gen --num_images 6 --cfg 2 --amp off {chunk}",
            output_dir=tmp_path / f"out{chunk}",
            resume=trained,
        )
        written.append(
            [
                np.asarray(Image.open(path))
                for path in sorted((tmp_path / f"out{chunk}" / "generated").glob("*.png"))
            ]
        )
    assert chunks == [None, 3]
    # Matrix products of other shapes round differently.
    assert (np.array(written[0]) == np.array(written[1])).mean() > 0.99


def test_online_eval_writes_images_while_training(data, tmp_path):
    flags = TRAIN.replace("--epochs 2", "--epochs 1") + " --online_eval --num_images 3"
    run(flags, data_path=data, output_dir=tmp_path)
    assert len(list((tmp_path / "generated-0000003").glob("*.png"))) == 3


PUBLISHED = {
    "train 256": "--model fractalmar_large_in256 --img_size 256 --num_conds 5 --guiding_pixel --batch_size 32 --eval_freq 40 "
    "--save_last_freq 10 --epochs 800 --warmup_epochs 40 --blr 5.0e-5 --weight_decay 0.05 --attn_dropout 0.1 --proj_dropout 0.1 "
    "--lr_schedule cosine --gen_bsz 256 --num_images 8000 --num_iter_list 64,16,16 --cfg 21.0 --cfg_schedule linear "
    "--temperature 1.1 --output_dir OUT --resume OUT --data_path IMAGENET --grad_checkpointing --online_eval",
    "train 64 ar": "--model fractalar_in64 --img_size 64 --num_conds 1 --batch_size 64 --eval_freq 40 --save_last_freq 10 "
    "--epochs 800 --warmup_epochs 40 --blr 5.0e-5 --weight_decay 0.05 --attn_dropout 0.1 --proj_dropout 0.1 "
    "--lr_schedule cosine --gen_bsz 256 --num_images 8000 --num_iter_list 64,16 --cfg 11.0 --cfg_schedule linear "
    "--temperature 1.03 --output_dir OUT --resume OUT --data_path IMAGENET --grad_checkpointing --online_eval",
    "evaluate 64 mar": "--model fractalmar_in64 --img_size 64 --num_conds 5 --gen_bsz 1024 --num_images 50000 "
    "--num_iter_list 64,16 --cfg 6.5 --cfg_schedule linear --temperature 1.02 --output_dir OUT --resume OUT "
    "--data_path IMAGENET --seed 0 --evaluate_gen",
    "likelihood": "--model fractalmar_in64 --num_conds 5 --nll_bsz 128 --nll_forward_number 10 --output_dir OUT --resume OUT "
    "--data_path IMAGENET --seed 0 --evaluate_nll --no_pin_mem --world_size 1 --local_rank -1 --dist_url env://",
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_command_lines(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # The cost of sampling is measured step by step, which takes seconds. One case and test_cost.py do so.
    if name != "train 256":
        monkeypatch.setattr("evaluation.cost._level_flops", lambda *args: (0, 1))
    run(PUBLISHED[name] + " --dry_run")
    report = json.loads(capsys.readouterr().out)
    flags = shlex.split(PUBLISHED[name])
    settings = report["settings"]
    assert settings["model"] == flags[1]
    for flag, value in pairwise(flags):
        if flag in ("--cfg", "--temperature", "--blr"):
            assert settings[flag[2:]] == float(value)
    assert settings["num_iter_list"] == list(fractalgen.PRESETS[flags[1]].steps)
    assert settings["img_size"] == fractalgen.PRESETS[flags[1]].sizes[0]
    assert report["parameters"] > 4e8
    memory = report["training_gib_in_float32"]
    assert memory["largest peak"] >= memory["average peak"] >= memory["weights, gradients, moments"] > 6
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


def test_generation_that_was_killed_is_completed_by_the_next_call(trained, tmp_path):
    """The images equal those of a run that was not killed, and there is never a partly written image."""
    flags = f"{TINY} --evaluate_gen --num_images 60 --gen_bsz 3 --num_iter_list 4,16 --resume {trained}"
    run(flags, output_dir=tmp_path / "whole")
    folder, command = (
        tmp_path / "killed" / "generated",
        [sys.executable, "main_fractalgen.py", *shlex.split(flags)],
    )
    for goal in (5, 20):
        process = subprocess.Popen(
            [*command, "--output_dir", str(folder.parent)], cwd=ROOT, stderr=subprocess.DEVNULL
        )
        while len(list(folder.glob("*.png"))) < goal:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        process.wait()
        for path in folder.glob("*.png"):
            Image.open(path).load()
    found = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert 20 <= len(found) < 60
    times = {name: (folder / name).stat().st_mtime_ns for name in found}
    run(flags, output_dir=folder.parent)
    assert {name: (folder / name).stat().st_mtime_ns for name in found} == times, "not drawn again"
    contents = [
        {p.name: p.read_bytes() for p in at.glob("*.png")}
        for at in (folder, tmp_path / "whole" / "generated")
    ]
    assert contents[0] == contents[1]
    assert len(contents[0]) == 60
    assert not list(folder.glob("*.tmp"))


def test_learning_rate_scales_with_the_total_batch(capsys):
    run(f"{TINY} --batch_size 32 --accum_iter 4 --dry_run --blr 1e-4")
    assert json.loads(capsys.readouterr().out)["settings"]["lr"] == pytest.approx(1e-4 * 128 / 256)


BAD = {
    "unknown model": ("--model fractalmar_in65", "fractalmar_in65"),
    "unknown guidance schedule": ("--cfg_schedule cosine", "'cosine'"),
    "unknown learning-rate schedule": ("--lr_schedule step", "'step'"),
    "size against preset": ("--model fractalmar_in64 --img_size 32", "--img_size 32 contradicts --model fractalmar_in64, which has 64"),
    "conditions against preset": ("--model fractalmar_in64 --num_conds 1", "num_conds 1 contradicts model fractalmar_in64"),
    "guiding pixel against preset": ("--model fractalmar_in64 --guiding_pixel", "guiding_pixel True contradicts"),
    "labels without classes": ("--class_num 0 --nll_labels", "--nll_labels needs classes; with --class_num 0 leave it out"),
    "number of images": ("--evaluate_gen --num_images 1500", "--num_images 1500 must be a multiple of --class_num 1000"),
    "number of images of some": ("--evaluate_gen --num_images 5 --class_labels 1,2", "--num_images 5 must be a multiple of the number of --class_labels 2"),
    "class that is none": ("--evaluate_gen --class_labels 1,1000", "--class_labels '1000' is no class of the model; give one of its names or a number from 0 to 999"),
    "guidance below one": ("--cfg 0.5", "--cfg 0.5 must be a finite number from 1"),
    "temperature": ("--temperature 0", "--temperature 0.0 must be a finite number above 0"),
    "steps": ("--num_iter_list 64", "--num_iter_list 64 must be 2 numbers"),
    "steps that are no numbers": ("--num_iter_list 64,a", "64,a"),
    "batch": ("--batch_size 0", "--batch_size 0 must be at least 1"),
    "seed": ("--seed -1", "--seed -1 must be from 0 to"),
    "dropout": ("--attn_dropout 2", "--attn_dropout 2.0 must be from 0 to 1"),
    "rate": ("--lr nan", "--lr nan must be at least 0 and finite"),
    "weight of the red channel": ("--r_weight inf", "--r_weight inf must be at least 0 and finite"),
    "number of classes": ("--class_num 1000000000000", "--class_num 1000000000000 must be from 0 to 1000000"),
    "images without a folder": ("--evaluate_gen --output_dir ''", "--output_dir '' saves nothing"),
    "chunk": ("--chunk 0", "--chunk 0 must be at least 1"),
    "patience of processes": ("--dist_timeout nan", "--dist_timeout nan must be from 1 to 100000000"),
    "GPUs": ("--dry_run --gpus -4", "--gpus -4 must be at least 0"),
    "GPUs of nothing": ("--dry_run --gpu h200", "--gpu h200 says which GPUs to predict for"),
    "GPUs of a run": ("--gpus 4", "--gpus 4 only predicts: give --dry_run too"),
    "shards of one process": ("--shard", "--shard divides a model among processes: start several"),
    "shards of an evaluation": ("--evaluate_nll --shard", "--shard is for training: leave it out"),
    "feature cache of an AR level": ("--model fractalar_in64 --feature_cache_interval 2", "--feature_cache_interval 2 must be 1, or above 1 for a model whose level 0"),
    "workers": ("--num_workers -1", "--num_workers -1 must be at least 0"),
    "rendezvous": (f"{TINY} --world_size 2 --local_rank 0", "--dist_url env://"),
    "device": ("--device tpu9", "--device tpu9: torch finds no such device here"),
    "place among processes": ("--world_size 4", "needs torchrun"),
    "no data": (f"{TRAIN} --data_path /nowhere", "/nowhere: no such folder; --data_path must hold images"),
    "missing checkpoint": (f"{TINY} --evaluate_gen --num_images 3 --resume /nowhere/x.pth", "/nowhere/x.pth: no such checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_line_and_status_2(bad, tmp_path, capsys):
    flags, message = BAD[bad]
    assert_refused(lambda: run(f"--output_dir {tmp_path / 'out'} {flags}"), message, capsys)


def assert_refused(call, message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        call()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert error.startswith("main_fractalgen.py: error: ")
    assert error.count("\n") == 1


def test_bad_data_folders(data, tmp_path, capsys):
    (tmp_path / "val").mkdir()
    train = lambda: run(TRAIN, data_path=tmp_path, output_dir=tmp_path / "out")  # noqa: E731
    assert_refused(train, f"{tmp_path}/train: no such folder; --data_path must hold images", capsys)
    (tmp_path / "train").symlink_to(data / "train")
    assert_refused(train, "there is no image in it", capsys)
    write_images(tmp_path / "val", 1)
    (tmp_path / "val" / "class0").rename(tmp_path / "val" / "other")
    assert_refused(train, "train/ and val/ have different classes", capsys)
    assert_refused(lambda: run(TRAIN + " --class_num 5", data_path=data, output_dir=tmp_path / "out"),
                   "has 3 classes but --class_num is 5", capsys)  # fmt: skip


def test_without_an_output_folder_nothing_is_written(data, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(f"{TRAIN} --output_dir '' --save_every_steps 1", data_path=data)
    run(f"{TRAIN} --output_dir '' --epochs 3", data_path=data, resume=trained)
    run(f"{TINY} --output_dir '' --evaluate_nll", data_path=data, resume=trained)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out.count("steps an epoch, log: none") == 2


def test_a_run_whose_steps_were_all_skipped_fails(data, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(f"{TRAIN} --r_weight 1e300", data_path=data, output_dir=tmp_path)
    assert "error: in 6 of the last 6 steps the loss was not finite; no checkpoint" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.pth"))


def test_an_unreadable_image_in_a_worker_is_one_line(data, tmp_path, capsys):
    write_images(tmp_path / "train", 4)
    write_images(tmp_path / "val", 1)
    for path in (tmp_path / "train").glob("*/*.png"):
        path.write_bytes(b"broken")
    flags = TRAIN.replace("--num_workers 0", "--num_workers 1")
    with pytest.raises(SystemExit) as stop:
        run(flags, data_path=tmp_path, output_dir=tmp_path / "out")
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"main_fractalgen.py: error: {tmp_path}/train/class")
    assert "cannot be read as an image" in last


class Hostile:
    def __reduce__(self):
        return print, ("it ran",)


def test_checkpoints_that_cannot_be_used(trained, tmp_path, capsys):
    path = tmp_path / "checkpoint-last.pth"
    load = lambda: run(f"{TINY} --evaluate_gen --num_images 3", resume=tmp_path, output_dir=tmp_path / "out")  # noqa: E731
    torch.save({"model": Hostile()}, path)
    assert_refused(load, f"{path}: refused", capsys)
    torch.save({"model": fractalgen.fractalar_tiny_in8(class_num=3).state_dict()}, path)
    ema = partial(
        run, f"{TINY} --evaluate_gen --num_images 3 --ema", resume=tmp_path, output_dir=tmp_path / "out"
    )
    assert_refused(ema, f"{path}: holds no averaged weights 'model_ema'; leave out --ema", capsys)
    path.write_bytes(pickle.dumps({"model": Hostile()}))
    assert_refused(load, f"{path}: refused", capsys)
    path.write_bytes((trained / "checkpoint-last.pth").read_bytes()[:5000])
    assert_refused(load, f"{path}: cannot be read, it is damaged", capsys)
    torch.save({"model": fractalgen.fractalmar_tiny_in8(class_num=3).state_dict()}, path)
    assert_refused(load, "weights of another model", capsys)


def test_an_output_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert_refused(
        lambda: run(TRAIN, output_dir=tmp_path / "file" / "out"), "/file/out: cannot be written", capsys
    )


def test_bad_images_are_skipped_named_and_counted(data, tmp_path, capsys):
    write_images(tmp_path / "train", 4)
    write_images(tmp_path / "val", 2)
    (tmp_path / "train" / "class1" / "熊猫.png").write_bytes(b"broken")
    (tmp_path / "val" / "class0" / "00.png").write_bytes(b"")
    run(TRAIN, data_path=tmp_path, output_dir=tmp_path / "out")
    said = capsys.readouterr().out
    assert (
        said.count(f"bad image 1, skipped: {tmp_path}/train/class1/熊猫.png: cannot be read as an image") == 1
    )
    assert said.count(f"bad image 1, skipped: {tmp_path}/val/class0/00.png") == 1
    assert [r["val/num_images"] for r in records(tmp_path / "out") if "val/num_images" in r] == [5]
    assert [r["train/bad_images"] for r in records(tmp_path / "out") if "train/bad_images" in r] == [1, 1]
    run(f"{TINY} --evaluate_nll", data_path=tmp_path, output_dir=tmp_path / "out", resume=tmp_path / "out")
    out, err = capsys.readouterr()
    assert json.loads(out)["num_bad_images"] == 1
    assert f"bad image 1, skipped: {tmp_path}/val/class0/00.png" in err


def test_a_validation_set_that_is_all_bad_is_one_line(tmp_path, capsys):
    write_images(tmp_path / "val", 1)
    for path in (tmp_path / "val").glob("*/*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(SystemExit, match="2"):
        run(f"{TINY} --evaluate_nll", data_path=tmp_path, output_dir=tmp_path / "out")
    assert "error: none of the 3 validation images can be read" in capsys.readouterr().err.splitlines()[-1]


def test_strict_data_stops_at_the_start(data, tmp_path, capsys):
    write_images(tmp_path / "train", 4)
    (tmp_path / "val").symlink_to(data / "val")
    run(TRAIN + " --strict_data --epochs 1", data_path=tmp_path, output_dir=tmp_path / "out")
    capsys.readouterr()
    (tmp_path / "train" / "class1" / "04.png").write_bytes(b"broken")
    strict = lambda: run(TRAIN + " --strict_data", data_path=tmp_path, output_dir=tmp_path / "again")  # noqa: E731
    assert_refused(
        strict, f"--strict_data: 1 bad image(s) in train, the first: {tmp_path}/train/class1/04.png", capsys
    )
    assert not (tmp_path / "again" / "log.txt").exists()


def test_an_unconditional_model_goes_all_the_way(tmp_path, capsys):
    for i, values in enumerate(random_values(12, 8)):
        path = tmp_path / ("train" if i < 8 else "val") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(values.permute(1, 2, 0).numpy()).save(path)
    flags = TRAIN.replace("--class_num 3", "--class_num 0")
    assert_refused(lambda: run(TRAIN, data_path=tmp_path, output_dir=tmp_path / "out"),
                   "train (images without classes) has 0 classes but --class_num is 3; give --class_num 0", capsys)  # fmt: skip
    assert_refused(
        lambda: run(flags + " --cfg 2"), "--cfg 2.0 needs classes; with --class_num 0 leave it out", capsys
    )
    run(flags + " --ema --online_eval --num_images 3", data_path=tmp_path, output_dir=tmp_path / "out")
    evaluate = flags + " --evaluate_nll --evaluate_gen --num_images 5"
    capsys.readouterr()
    run(evaluate, data_path=tmp_path, output_dir=tmp_path / "out", resume=tmp_path / "out")
    nll, generated = map(json.loads, capsys.readouterr().out.splitlines())
    assert (nll["num_images"], generated["num_images"]) == (4, 5)
    assert len(list((tmp_path / "out" / "generated").glob("*.png"))) == 5
    run(
        flags.replace("--epochs 2", "--epochs 3"),
        data_path=tmp_path,
        output_dir=tmp_path / "out",
        resume=tmp_path / "out",
    )


OTHER_DATA = {
    "sequence": (
        (16,),
        "--img_size_list 16x,4,1 --channels 2 --num_values 5 --value_kind categorical",
        "npy",
    ),
    "rectangle": ((4, 6), "--img_size_list 4x6,2x3,1 --channels 1 --num_values 17", "png"),
    "volume": ((2, 4, 4), "--img_size_list 2x4x4,1x2x2,1 --channels 1 --num_values 300", "npy"),
}


@pytest.mark.parametrize("name", OTHER_DATA)
def test_other_grids_and_alphabets_go_from_an_array_to_generated_files(name, tmp_path, capsys):
    shape, flags, kind = OTHER_DATA[name]
    channels, num_values = (
        int(flags.split(f"--{word} ")[1].split()[0]) for word in ("channels", "num_values")
    )
    values = np.random.default_rng(0).integers(0, num_values, (12, *shape, channels)).astype(np.uint16)
    np.save(tmp_path / "data.npy", values)
    data, folder = tmp_path / "data.npy", tmp_path / "run"
    flags = f"{TRAIN} {flags}".replace("--class_num 3", "--class_num 0").replace("fractalar", "fractalmar")
    run(flags.replace("--epochs 2", "--epochs 1"), data_path=data, output_dir=folder, resume=folder)
    run(flags, data_path=data, output_dir=folder, resume=folder)
    assert checkpoint.load(folder / "checkpoint-last.pth")["epoch"] == 1
    assert Image.open(next((folder / "samples").glob("*.png"))).width > 96
    capsys.readouterr()
    own = "--device cpu --num_workers 0 --amp off"  # the rest is that of the run
    run(f"{own} --evaluate_nll", data_path=data, output_dir=folder, resume=folder)
    assert 0 < json.loads(capsys.readouterr().out)["bits_per_dim"] < 2 * np.log2(num_values)
    drawn = []
    for _ in range(2):
        run(f"{own} --evaluate_gen --num_images 3 --gen_bsz 2", output_dir=folder, resume=folder)
        said = capsys.readouterr()
        drawn.append(json.loads(said.out)["num_drawn"])
        assert ("the images are not scored" in said.err) == (kind == "png")
    assert drawn == [3, 0]
    model = FractalGen.from_pretrained(folder)
    options = dict(seed=0, temperature=1.0, output_type="np", progress_bar=False)
    own_images = model.generate(num_images=3, **options)
    for number, image in enumerate(own_images):
        path = folder / "generated" / f"{number:05d}.{kind}"
        found = np.load(path) if kind == "npy" else model.alphabet.from_bytes(np.asarray(Image.open(path)))
        assert np.array_equal(found.reshape(image.shape), image)


def test_images_are_scored_where_a_reference_is_given_or_lies_where_the_published_code_looks(
    data, trained, tmp_path, monkeypatch, capsys, colour_network
):
    generate = f"{TINY} --evaluate_gen --num_images 6 --num_iter_list 4,16"
    run(generate + f" --fid_stats {data}/train", resume=trained, output_dir=tmp_path / "out")
    line, *table = capsys.readouterr().out.splitlines()[::-1]
    figures, result = (
        json.loads(line),
        json.loads((tmp_path / "out" / "generated" / "metrics.json").read_text()),
    )
    assert figures["fid"] == result["scores"]["fid"] > 0
    assert f"{figures['fid']:.2f}" in table[-2].split()
    assert result["generated"]["crop"] == "ADM, 8 px"
    assert list((tmp_path / "out" / "scores").glob("events.*"))

    run(generate, resume=trained, output_dir=tmp_path / "unscored")
    assert (
        "no --fid_stats: the images are not scored; make one of your images: python -m"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "unscored" / "generated" / "metrics.json").exists()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fid_stats").mkdir()
    np.savez(
        tmp_path / "fid_stats" / "adm_in8_stats.npz", arr_0=random_values(12, 8).permute(0, 2, 3, 1).numpy()
    )
    run(generate, resume=trained, output_dir=tmp_path / "unscored")
    assert json.loads((tmp_path / "unscored" / "generated" / "metrics.json").read_text())["scores"]["fid"] > 0
    capsys.readouterr()
    missing = lambda: run(generate + " --fid_stats /nowhere.npz", resume=trained, output_dir=tmp_path / "new")  # noqa: E731
    assert_refused(missing, "/nowhere.npz: no such reference; make one of your images", capsys)
    assert not (tmp_path / "new" / "generated").exists(), "said before anything is drawn"


def test_a_file_that_is_no_reference_is_refused_before_the_network_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("evaluation.score.Inception", None)
    flags = f"{TINY} --evaluate_gen --num_images 3 --fid_stats /etc/passwd"
    assert_refused(lambda: run(flags, output_dir=tmp_path), "/etc/passwd: cannot be read as npz", capsys)


def test_online_evaluation_scores_its_images_at_their_step(data, tmp_path, colour_network):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    online = f"{TRAIN} --online_eval --num_images 6 --eval_freq 1 --fid_stats {data}/val"
    run(online, data_path=data, output_dir=tmp_path)
    events = EventAccumulator(str(tmp_path / "scores"))
    events.Reload()
    # in any order: each evaluation writes a file of its own, and names tell the second only
    assert {event.step for event in events.Scalars("score/fid")} == {3, 6}
    assert [
        r["note"].count("secs_per_image")
        for r in records(tmp_path)
        if r.get("note", "").startswith("images:")
    ] == [1, 1]
    assert (
        json.loads((tmp_path / "generated-0000006" / "metrics.json").read_text())["reference"]["pictures"]
        == 6
    )
