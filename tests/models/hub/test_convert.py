import json

import hostile
import pytest
import torch

import main_fractalgen
from models import fractalgen
from models.fractalgen import FractalGen
from models.hub import convert
from util import checkpoint

MODEL = "fractalmar_tiny_in8"


@pytest.fixture
def published(tmp_path):
    """A checkpoint of three classes, and another model's weights as its average."""
    model, average = (fractalgen.build(MODEL, class_num=3).eval() for _ in range(2))
    path = tmp_path / "checkpoint-last.pth"
    torch.save(
        {"model": model.state_dict(), "model_ema": average.state_dict(), "optimizer": {}, "epoch": 3}, path
    )
    return path, model, average


def run(*words) -> None:
    convert.main([str(word) for word in words] + ["--model", MODEL])


def refused(capsys, *words) -> str:
    """What the command says to bad input: one line, and status 2."""
    with pytest.raises(SystemExit, match="2"):
        run(*words)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_a_checkpoint_becomes_a_folder_that_gives_the_same(published, tmp_path, capsys):
    path, model, average = published
    (tmp_path / "names.txt").write_text("cat\ndog\nöchsle\n", encoding="utf-8")
    run(path, tmp_path / "out", "--class_names", tmp_path / "names.txt")
    number = sum(parameter.numel() for parameter in model.parameters())
    said = (
        f"{number:,} weights of {MODEL}, the same bits as in {path}, and so are the outputs for two images\n"
    )
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: {said}"
    loaded = FractalGen.from_pretrained(tmp_path / "out")
    assert loaded.class_names == ("cat", "dog", "öchsle")
    assert loaded.sampling_defaults == model.sampling_defaults
    assert torch.equal(convert.fixed_outputs(loaded), convert.fixed_outputs(model))
    run(tmp_path, tmp_path / "average", "--ema")
    assert torch.equal(
        convert.fixed_outputs(FractalGen.from_pretrained(tmp_path / "average")),
        convert.fixed_outputs(average),
    )
    assert not torch.equal(convert.fixed_outputs(average), convert.fixed_outputs(model))


def test_a_model_without_classes_is_converted_too(tmp_path):
    model = fractalgen.build(MODEL, class_num=0).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "x.pth")
    run(tmp_path / "x.pth", tmp_path / "out")
    assert FractalGen.from_pretrained(tmp_path / "out").class_num == 0


@pytest.mark.parametrize("resume", ["out", "out/model.safetensors"])
def test_the_command_line_takes_the_folder_as_it_takes_the_checkpoint(resume, published, tmp_path, capsys):
    run(published[0], tmp_path / "out")
    flags = f"--model {MODEL} --class_num 3 --device cpu --amp off --evaluate_gen --num_images 3 --gen_bsz 3 --num_iter_list 1,1 --no_ema"
    for source, output in ((published[0], "a"), (tmp_path / resume, "b")):
        main_fractalgen.main(
            [*flags.split(), "--resume", str(source), "--output_dir", str(tmp_path / output)]
        )
    images = [(tmp_path / output / "generated" / "00001.png").read_bytes() for output in "ab"]
    assert images[0] == images[1]


def test_the_command_line_takes_classes_by_the_names_of_the_folder(published, tmp_path, capsys):
    run(published[0], tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "class_names": ["cat", "red heart", "dog"]})
    )
    flags = f"--model {MODEL} --class_num 3 --device cpu --amp off --evaluate_gen --num_images 2 --num_iter_list 1,1"
    arguments = [
        *flags.split(),
        "--resume",
        str(tmp_path / "out"),
        "--output_dir",
        str(tmp_path),
        "--class_labels",
    ]
    main_fractalgen.main([*arguments, "Dog,1"])
    manifest = json.loads((tmp_path / "generated" / "manifest.json").read_text())
    assert manifest["settings"]["classes"] == [2, 1]
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main_fractalgen.main([*arguments, "cats"])
    assert "--class_labels 'cats' is no class of the model" in (error := capsys.readouterr().err)
    assert error.endswith("; perhaps cat\n")


@pytest.mark.parametrize("name", ["class_emb.weight", "next_fractal.next_fractal.r_codebook.weight"])
def test_a_weight_that_is_not_written_as_it_was_is_found(name, published, tmp_path, capsys, monkeypatch):
    """A single wrong number, also that of a class which no output depends on."""

    def spoilt(path, tensors, save=checkpoint.save_safetensors):
        tensors[name] = tensors[name].clone()
        tensors[name][1, 0] += 1
        save(path, tensors)

    monkeypatch.setattr(checkpoint, "save_safetensors", spoilt)
    line = refused(capsys, published[0], tmp_path / "out")
    assert "differs from" in line
    assert "(1 weights differ, the outputs by up to" in line


def test_bad_input_is_one_line(published, tmp_path, capsys):
    path, model, _ = published
    (tmp_path / "names.txt").write_text("cat\n")
    line = refused(capsys, path, tmp_path / "out", "--class_names", tmp_path / "names.txt")
    assert "class_names must be 3 names, one for each class, got 1" in line
    assert "nothing.txt: no text file" in refused(
        capsys, path, tmp_path / "out", "--class_names", tmp_path / "nothing.txt"
    )
    assert f"{path}: no text file in UTF-8" in refused(capsys, path, tmp_path / "out", "--class_names", path)
    assert "no such checkpoint" in refused(capsys, tmp_path / "absent.pth", tmp_path / "out")
    torch.save({"model": model.state_dict()}, path)
    assert "holds no weights 'model_ema'" in refused(capsys, path, tmp_path / "out", "--ema")
    torch.save({"model": {"class_emb.weight": torch.tensor(1.0)}}, path)
    assert "weights of another model" in refused(capsys, path, tmp_path / "out")
    torch.nn.init.constant_(model.fake_latent, torch.nan)
    torch.save({"model": model.state_dict()}, path)
    assert "its outputs are not finite" in refused(capsys, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "/proc/x: cannot be written (No such file or directory)" in refused(capsys, path, "/proc/x")


@pytest.mark.filterwarnings("ignore:.*pickle protocol")
@pytest.mark.parametrize("kind", hostile.RUNS_CODE)
def test_a_hostile_checkpoint_is_refused(kind, tmp_path, capsys):
    path, canary = tmp_path / checkpoint.NAME, tmp_path / "canary"
    hostile.RUNS_CODE[kind](path, canary)
    assert f"{path}: " in refused(capsys, path, tmp_path / "out")
    assert not canary.exists()


def test_a_rewritten_checkpoint_keeps_the_settings_of_its_run(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    for folder in (run, out):
        folder.mkdir()
    checkpoint.save(run, {"model": fractalgen.build(MODEL, class_num=3).state_dict(), "step": 3})
    (run / "settings.json").write_text("{}")
    convert.main([str(run), str(out), "--single"])
    assert (out / "settings.json").read_text() == "{}"
    assert checkpoint.load(out / checkpoint.NAME)["step"] == 3
