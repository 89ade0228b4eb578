import json
import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import engine_fractalgen as engine
from conftest import opinionated, random_values, tiny_model
from models.sampling.options import SamplingOptions
from util.data.folders import class_folders
from util.data.loader import ImageDataset, make_loader
from util.dist import World
from util.errors import UserError
from util.pixels import RGB
from util.run.meters import RunLog

CPU = torch.device("cpu")
RECIPE = engine.Recipe(lr=1e-3, min_lr=0.0, lr_schedule="constant", warmup_epochs=0, epochs=1, grad_clip=3.0)


@pytest.fixture
def images(tmp_path):
    """Four classes of six images, with random values, 8 x 8 pixels."""
    for i, values in enumerate(random_values(24, 8)):
        path = tmp_path / "data" / str(i // 6) / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.permute(1, 2, 0).numpy()).save(path)
    return ImageDataset(class_folders(tmp_path / "data"), (8, 8), RGB, seed=0)


def loader(images, batch_size, shuffled=True):
    return make_loader(images, batch_size, World(), shuffled=shuffled, num_workers=0, pin_memory=False)


def train(model, images, tmp_path, batch_size=6, recipe=RECIPE, epoch=0, **more):
    optimizer = torch.optim.AdamW(engine.add_weight_decay(model, 0.05), lr=1.0, betas=(0.9, 0.95), fused=True)
    log = RunLog(tmp_path, enabled=True)
    try:
        return engine.train_one_epoch(
            model, loader(images, batch_size), optimizer, torch.amp.GradScaler("cpu", enabled=False), recipe,
            epoch=epoch, device=CPU, autocast=more.pop("autocast", nullcontext()), world=World(), log=log, **more,
        )  # fmt: skip
    finally:
        log.close()


def test_weight_decay_groups():
    model = tiny_model("guided")
    undecayed, decayed = engine.add_weight_decay(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (undecayed["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    first = [names[id(p)] for p in undecayed["params"]]
    second = [names[id(p)] for p in decayed["params"]]
    assert sorted(first + second) == sorted(names.values())
    assert all(n.endswith(".bias") or "norm" in n or n.endswith(("_ln.weight", ".ln.weight")) for n in first)
    assert "next_fractal.next_fractal.r_mlm.bias" in first
    for name in ("fake_latent", "class_emb.weight", "generator.mask_token", "generator.pos_embed_learned"):
        assert name in second
    assert [n for n in names.values() if n in set(second)] == second


def test_training_lowers_the_loss_and_logs_all_numbers(images, tmp_path):
    model = tiny_model("guided")
    results = [train(model, images, tmp_path, epoch=epoch) for epoch in range(4)]
    assert results[-1]["loss"] < results[0]["loss"]
    records = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [record["step"] for record in records] == [4, 8, 12, 16]
    assert records[0].keys() == {
        "step", "train/loss", "train/loss_guiding1", "train/loss_rgb", "train/lr", "train/grad_norm", "train/images_per_s",
        "train/skipped_steps", "train/memory_gib",
    }  # fmt: skip
    for record in records:
        parts = record["train/loss_guiding1"] + record["train/loss_rgb"]
        assert record["train/loss"] == pytest.approx(parts, rel=1e-5)
    assert any(path.name.startswith("events.out.tfevents") for path in tmp_path.iterdir())


def test_accumulation_gives_the_step_of_the_whole_batch(images, tmp_path):
    weights = []
    for batch_size, accum in ((12, 1), (4, 3)):
        model = tiny_model("ar", attn_dropout=0.0, proj_dropout=0.0, label_drop_prob=0.0)
        recipe = replace(RECIPE, **{"accum_iter": accum})
        train(model, images, tmp_path, batch_size, recipe)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-3, atol=2e-5)


def test_bfloat16_training_follows_float32(images, tmp_path):
    losses = []
    for autocast in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        model = tiny_model("ar", attn_dropout=0.0, proj_dropout=0.0, label_drop_prob=0.0)
        losses.append(train(model, images, tmp_path, autocast=autocast)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_an_epoch_can_begin_in_the_middle(images, tmp_path):
    data = loader(images, 6)
    data.batch_sampler.start = 12  # images
    model, done = tiny_model("ar"), []
    log = RunLog(tmp_path, enabled=True)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    engine.train_one_epoch(model, data, optimizer, torch.amp.GradScaler("cpu", enabled=False), RECIPE, epoch=0, device=CPU,
                           autocast=nullcontext(), world=World(), log=log, after_step=done.append)  # fmt: skip
    assert next(iter(optimizer.state.values()))["step"] == 2  # of four
    assert done == [18, 24]
    assert data.batch_sampler.start == 0


def test_float16_with_its_scaler(images, tmp_path):
    model, log = tiny_model("mar"), RunLog(tmp_path, enabled=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # overflows at first, so steps are skipped
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(8):
        result = engine.train_one_epoch(model, loader(images, 6), optimizer, scaler, replace(RECIPE, max_bad_steps=40), epoch=0,
                                        device=CPU, autocast=torch.autocast("cpu", torch.float16), world=World(), log=log)  # fmt: skip
    assert math.isfinite(result["loss"])
    assert scaler.get_scale() < 2.0**40
    assert json.loads((tmp_path / "log.txt").read_text().splitlines()[0])["train/skipped_steps"] == 4
    assert all(p.isfinite().all() for p in model.parameters())


def test_compiled_blocks_train_as_plain_ones(images, tmp_path):
    losses = []
    for compiled in (False, True):
        model = tiny_model("mar", attn_dropout=0.0, proj_dropout=0.0, label_drop_prob=0.0)
        for block in model.generator.blocks if compiled else ():
            block.compile(dynamic=True, backend="eager")  # traces, but does not compile C++ for half a minute
        np.random.seed(0)
        torch.manual_seed(0)
        losses.append(train(model, images, tmp_path)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class _Spoil(torch.autograd.Function):
    """Returns zero, and nan as its gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return torch.zeros(())

    @staticmethod
    def backward(ctx, grad):
        return torch.full(ctx.shape, math.nan)


def spoiled(model, where, steps):
    """Makes the loss or a gradient infinite or nan in the steps with these numbers. Returns the model."""
    calls = []

    def spoil(module, args, loss):
        calls.append(0)
        total, terms = loss
        if len(calls) - 1 in steps:
            if where == "loss":
                return total + math.inf, terms  # its gradient is finite
            return total + _Spoil.apply(module.fake_latent), terms
        return None

    model.register_forward_hook(spoil)
    return model


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_steps_that_are_not_finite_change_nothing_and_are_counted(images, tmp_path, where):
    model, weights = spoiled(tiny_model("ar"), where, {1, 2}), []
    keep = lambda _: weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))  # noqa: E731
    result = train(model, images, tmp_path, recipe=replace(RECIPE, max_bad_steps=2), after_step=keep)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[2], weights[3])
    assert weights[3].isfinite().all()
    record = json.loads((tmp_path / "log.txt").read_text())
    assert record["train/skipped_steps"] == 2
    assert math.isfinite(result["loss"])
    assert math.isfinite(record["train/loss"])


def test_too_many_bad_steps_in_a_row_end_the_run(images, tmp_path):
    recipe = replace(RECIPE, warmup_epochs=1)
    expected = r"not finite in 2 steps in a row \(--max_bad_steps 1\), from epoch 0, step 2 of 4, learning rate 0.0005, on"
    with pytest.raises(UserError, match=expected):
        train(
            spoiled(tiny_model("ar"), "loss", {0, 2, 3}),
            images,
            tmp_path,
            recipe=replace(recipe, max_bad_steps=1),
        )
    train(
        spoiled(tiny_model("ar"), "loss", {0, 2}), images, tmp_path, recipe=replace(RECIPE, max_bad_steps=1)
    )


def test_bad_steps_are_counted_over_epochs(images, tmp_path):
    model, watch = spoiled(tiny_model("ar"), "loss", range(2, 9)), engine.LossWatch()
    train(model, images, tmp_path, recipe=replace(RECIPE, max_bad_steps=5), watch=watch)
    with pytest.raises(UserError, match=r"in 6 steps in a row .*, from epoch 0, step 2 of 4"):
        train(model, images, tmp_path, recipe=replace(RECIPE, max_bad_steps=5), watch=watch, epoch=1)
    assert watch.skipped == 6


SETTINGS = SamplingOptions((4, 2), 2.0, "linear", 1.0, 1e-4)


def evaluate(model, folder, settings=SETTINGS, **more):
    how = dict(num_images=8, batch_size=3, seed=0, world=World(), progress_bar=False)
    return engine.evaluate(model, folder, settings, **{**how, **more})


def read(folder) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def test_evaluate_writes_numbered_images_the_same_number_of_each_class(tmp_path, monkeypatch):
    model = opinionated(tiny_model("mar"))
    asked, plain = [], model.generate
    monkeypatch.setattr(model, "generate", lambda labels, **how: asked.extend(labels) or plain(labels, **how))
    result = evaluate(model, tmp_path / "a")
    assert asked == [0, 0, 1, 1, 2, 2, 3, 3]
    assert (result["num_images"], result["num_drawn"]) == (8, 8)
    assert result["secs_per_image"] > 0
    assert result["peak_gib"] > 0.01
    assert evaluate(model, tmp_path / "a")["num_drawn"] == 0
    for path in sorted((tmp_path / "a").glob("*.png"))[3:6]:
        path.unlink()
    before = read(tmp_path / "a")
    assert evaluate(model, tmp_path / "a", batch_size=8)["num_drawn"] == 3
    evaluate(model, tmp_path / "b", batch_size=8, world=World(1, 2))  # begins in the middle
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert len(a) == len(b) == 8
    assert (a[[0, 1, 2, 6, 7]] == before).all()
    assert (a == b).mean() >= 0.999


def test_evaluate_refuses_a_folder_of_other_weights_or_settings(tmp_path):
    model = opinionated(tiny_model("mar"))
    evaluate(model, tmp_path, classes=[2, 1])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["settings"]["classes"] == [2, 1]
    refused = dict(
        seed=dict(seed=1), classes=dict(classes=[1, 2]), num_images=dict(num_images=4), guidance_scale=dict(settings=replace(SETTINGS, guidance_scale=3.0)),
        precision=dict(settings=replace(SETTINGS, amp="bf16")),
    )  # fmt: skip
    for name, change in refused.items():
        with pytest.raises(UserError, match=f"was begun with {name} "):
            evaluate(model, tmp_path, **{"classes": [2, 1], **change})
    with torch.no_grad():
        model.fake_latent[0, 0] += 1e-6
    with pytest.raises(UserError, match="was begun with weights_sha256 "):
        evaluate(model, tmp_path, classes=[2, 1])


def test_evaluate_refuses_a_folder_of_another_architecture_with_the_same_weights(tmp_path):
    model, other = tiny_model("mar"), tiny_model("mar", num_heads_list=[4, 2, 2])
    other.load_state_dict(model.state_dict())
    evaluate(model, tmp_path)
    with pytest.raises(UserError, match=r"was begun with num_heads_list \[2, 2, 2\], not \[4, 2, 2\]"):
        evaluate(other, tmp_path)
    assert evaluate(tiny_model("mar", attn_dropout=0.0, grad_checkpointing=True), tmp_path)["num_drawn"] == 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError("Unable to allocate 8 GiB"),  # NumPy, and C++ libraries
    ],
)
def test_a_lack_of_memory_lowers_the_chunk(tmp_path, monkeypatch, error):
    model, said, chunks = opinionated(tiny_model("mar")), [], []
    plain, fits = model.generate, 2

    def generate(labels, **how):
        chunks.append(how["chunk"])
        if how["chunk"] is None or how["chunk"] > fits:
            raise error
        return plain(labels, **how)

    monkeypatch.setattr(model, "generate", generate)
    evaluate(model, tmp_path / "a", batch_size=4, say=said.append)
    assert chunks == [None, 4, 2, 2]
    assert said == ["out of memory: from now on with --chunk 4", "out of memory: from now on with --chunk 2"]
    assert len(read(tmp_path / "a")) == 8
    fits = 0
    with pytest.raises(
        UserError, match="out of memory drawing 4 images, even with --chunk 1; give a smaller --gen_bsz"
    ):
        evaluate(model, tmp_path / "b", batch_size=4, say=said.append)


def test_other_errors_while_drawing_are_not_taken_for_a_lack_of_memory(tmp_path, monkeypatch):
    model = tiny_model("mar")
    monkeypatch.setattr(
        model, "generate", lambda *args, **how: (_ for _ in ()).throw(RuntimeError("something else"))
    )
    with pytest.raises(RuntimeError, match="something else"):
        evaluate(model, tmp_path)
