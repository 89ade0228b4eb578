"""What must hold on a GPU: `pytest -m gpu` runs it there, and the ordinary tests on what stands in for one.

tests/test_golden.py has the golden numbers on every device. Here `device` is CUDA, or else the stand-in, which
computes on the CPU but takes an accelerator's ways through the code and does not let the host wait for it.
Where the test is of torch's own machinery (graphs, process groups, memory), the CPU itself stands in.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from opcount import OpCount
from reference_model import ReferenceSampler
from stand_in import STAND_IN, no_waiting
from torch.nn.parallel import DistributedDataParallel

import engine_fractalgen as engine
from conftest import CPU_AND_CUDA, opinionated, random_values, tiny_model
from evaluation.cost import patches_in_training
from evaluation.images import Drawer
from evaluation.report import LiveBytes, training_bytes
from models.fractalgen import FractalGen, build
from models.generator import Mask
from models.mar import MAR
from models.sampling.constraints import Grey, Palette
from models.sampling.options import SamplingOptions
from util import dist

RECIPE = engine.Recipe(lr=1e-3, min_lr=0.0, lr_schedule="constant", warmup_epochs=0, epochs=1, grad_clip=3.0)
QUIET = dict(guidance_scale=2.0, seed=0, output_type="pt", progress_bar=False)
BOX = np.pad(np.ones((3, 2), bool), ((1, 0), (1, 1)))


def small_model(kind: str, **changes) -> FractalGen:
    """A tiny model of 4 px images, because the stand-in is slow."""
    return tiny_model(kind, img_size_list=[4, 2, 1], **changes)


@pytest.mark.parametrize("how", [{}, {"chunk": 3}, {"feature_cache_interval": 2}], ids=str)
def test_sampling_never_waits(kind, device, how):
    model = opinionated(small_model(kind))
    if "feature_cache_interval" in how and not model.generator.has_feature_cache:
        pytest.skip("this model has no feature cache")
    expected = model.generate([0, 1, 2], **QUIET, **how)
    model.to(device)
    with no_waiting(device):
        drawn = model.generate([0, 1, 2], **QUIET, **how)
    assert drawn.device.type == device.type
    assert drawn.isfinite().all()
    if device == STAND_IN:
        assert torch.equal(drawn.cpu(), expected)


@pytest.mark.parametrize("constraint", [None, Grey(), Palette([[0, 0, 0], [250, 120, 10]])], ids=repr)
def test_edits_wait_only_where_it_is_marked(kind, device, constraint):
    model, images = opinionated(small_model(kind)).to(device), random_values(2, 4)
    with no_waiting(device):
        out = model.edit(images, BOX, [1, 2], constraint=constraint, num_results=2, **QUIET)
    known = torch.from_numpy(~BOX)
    expected = model.edit(images, np.zeros_like(BOX), [1, 2], num_results=2, **QUIET)
    assert torch.equal(out.cpu()[:, :, known], expected.cpu()[:, :, known])


def test_likelihoods_wait_only_for_their_result(kind, device):
    model, images = opinionated(small_model(kind)), random_values(3, 4)
    expected = model.log_likelihood(images, [0, 1, 2], "pixel", num_orders=2, progress_bar=False).bits
    model.to(device)
    with no_waiting(device):
        bits = model.log_likelihood(images, [0, 1, 2], "pixel", num_orders=2, progress_bar=False).bits
        model.classify(images, num_orders=1, progress_bar=False)
    torch.testing.assert_close(bits, expected, rtol=1e-4, atol=1e-3)


class Trained:
    """A model with all that a training step takes."""

    def __init__(self, model: FractalGen, device: torch.device, precision: str = "float32"):
        self.model = model.to(device).train()
        groups = engine.add_weight_decay(self.model, 0.05)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
        self.window, self.watch, self.device = engine.Window(device), engine.LossWatch(), device
        self.autocast = nullcontext()
        if precision != "float32" and torch.amp.is_autocast_available(device.type):
            self.autocast = torch.autocast(device.type, getattr(torch, precision))

    def step(self, number: int, model: torch.nn.Module | None = None, batch: tuple | None = None) -> None:
        batch = (random_values(6, 4, seed=number), torch.arange(6) % 4, None) if batch is None else batch
        loss, norm = engine.train_step(
            self.model if model is None else model, iter([batch]), self.optimizer, self.scaler, RECIPE,
            self.window, self.device, self.autocast,
        )  # fmt: skip
        self.watch.note(loss, norm, number)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["guided", "mar over ar"])
def test_a_training_step_never_waits(kind, device, precision, checkpointing):
    if device == STAND_IN and precision == "bfloat16":
        pytest.skip("the stand-in has no autocast; of float16 it has the scaler")
    trained = Trained(small_model(kind, grad_checkpointing=checkpointing), device, precision)
    before = trained.model.fake_latent.detach().cpu().clone()
    for number in range(3):
        with no_waiting(device), OpCount() as ops:
            trained.step(number)
        assert ops.launched["_fused_adamw_"] == 2
    with pytest.raises(RuntimeError), no_waiting(device):
        trained.window.sum.tolist()  # reading waits, which happens only when a line is logged
    with no_waiting(device):
        assert np.isfinite(trained.window.read()["loss"])
    with pytest.raises(RuntimeError), no_waiting(device):
        trained.watch.pending[0][
            1
        ].item()  # a loss is read only when a line is logged or a checkpoint written
    trained.watch.read()
    assert trained.watch.skipped == 0
    assert trained.model.generator.pos_embed_learned.isfinite().all()
    assert not torch.equal(trained.model.fake_latent.detach().cpu(), before)


def test_what_waits_is_an_error_unless_its_line_is_marked(device):
    x = torch.arange(4.0).to(device)
    waiting = {
        "item": lambda: x.sum().item(),
        "bool": lambda: bool(x.sum() > 1),
        "size": lambda: x[x > 1],
        "nonzero": lambda: x.nonzero(),
        "to host": lambda: x.cpu(),
        "to host by to": lambda: x.to("cpu"),
        "from host": lambda: torch.ones(3).to(device),
    }
    for name, wait in waiting.items():
        wait()
        with (
            pytest.raises(RuntimeError, match=r"synchroni|_local_scalar|index|nonzero|copy"),
            no_waiting(device),
        ):
            pytest.fail(f"{name}: {wait()}")
    with no_waiting(device):
        assert x.sum().item() == 6  # sync
        torch.ones(3).to(device, non_blocking=True)
        x[torch.tensor([1, 2]).to(device, non_blocking=True)].add_(1)
    with pytest.raises(RuntimeError, match=r"host and of the device|same device"):
        x + torch.ones(4)


@CPU_AND_CUDA
@pytest.mark.filterwarnings("ignore:barrier")
def test_one_process_in_a_group_trains_as_without_it(device):
    """By NCCL on CUDA, by gloo on a CPU, with the collective calls that a run makes."""
    alone = Trained(small_model("guided"), device)
    for number in range(2):
        np.random.seed(number), torch.manual_seed(number)
        alone.step(number)
    backend = torch.distributed.get_default_backend_for_device(device)
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert torch.distributed.get_backend() == ("nccl" if device.type == "cuda" else "gloo")
        grouped = Trained(small_model("guided"), device)
        model = DistributedDataParallel(grouped.model, [device.index] if device.type == "cuda" else None)
        for number in range(2):
            np.random.seed(number), torch.manual_seed(number)
            grouped.step(number, model)
        assert grouped.window.read()["loss"] == pytest.approx(alone.window.read()["loss"], rel=1e-5)
        agreement = dist.Agreement()
        assert (agreement.largest(3), agreement.close(), dist.gather("a")) == (0, 3, ["a"])
        dist.barrier()
    finally:
        dist.disconnect()
    for ours, theirs in zip(alone.model.parameters(), grouped.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class LimitedBytes(LiveBytes):
    """A context in which tensors that would take more than `limit` bytes in all cannot be made."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit

    def follow(self, storage):
        super().follow(storage)
        if self.live > self.limit:
            raise torch.OutOfMemoryError(f"{self.live} of {self.limit} bytes")


@contextmanager
def limited(device: torch.device, limit: int):
    """Lets tensors made inside take at most so many bytes together."""
    if device.type == "cpu":
        with LimitedBytes(limit):
            yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + limit) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


class Peak:
    """A context in which `bytes` becomes the largest memory of the tensors made inside."""

    def __init__(self, device: torch.device):
        self.device, self.bytes, self.followed = device, 0, LiveBytes()

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.followed.__enter__()
        return self

    def __exit__(self, *error):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self.before
        else:
            self.followed.__exit__(*error)
            self.bytes = self.followed.peak


@CPU_AND_CUDA
def test_out_of_memory_halves_the_chunk_until_it_fits(device, monkeypatch):
    """What is left of the memory lies between what all patches of a step take and what few of them take."""
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # in which LiveBytes sees all operations
    if device.type == "cpu":
        model, count = small_model("mar", embed_dim_list=[16, 64, 64], class_num=4), 64
    else:
        model, count = build("fractalmar_tiny_in64", class_num=4).to(device).eval(), 64
    options, said = SamplingOptions((1,) * len(model.generators), 2.0), []
    labels, indices = [0, 1, 2, 3] * (count // 4), range(count)

    def drawer(**changes) -> Drawer:
        return Drawer(model, labels, replace(options, **changes), 0, said.append)

    with Peak(device) as whole:
        drawer()(indices)
    with Peak(device) as small:
        drawer(chunk=count // 8)(indices)
    assert small.bytes < 0.6 * whole.bytes
    limited_drawer = drawer()
    with limited(device, (small.bytes + whole.bytes) // 2):
        assert len(limited_drawer(indices)) == count
    chunks = [count >> number for number in range(len(said))]
    assert chunks
    assert said == [f"out of memory: from now on with --chunk {chunk}" for chunk in chunks]
    assert limited_drawer.options.chunk == chunks[-1]


@pytest.mark.parametrize(
    ("device", "name", "batch"),
    [
        *(("cpu", name, 16) for name in ("fractalar_tiny_in8", "fractalmar_tiny_in8")),
        ("cpu", "fractalmar_tiny_guided_in32", 1),
        *(
            pytest.param("cuda", name, batch, marks=pytest.mark.gpu)
            for name in ("fractalar_tiny_in64", "fractalmar_tiny_in64", "fractalar_in64", "fractalmar_in64")
            for batch in (4, 16)
        ),
    ],
    indirect=["device"],
)  # fmt: skip
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
def test_training_needs_the_memory_that_a_dry_run_estimates(device, name, batch, checkpointing):
    """In float32: within 20% of the real peak of a step with the same masks, of all patches and of the average."""
    with torch.device("meta"):
        model = build(name, grad_checkpointing=checkpointing).train()
    estimate = training_bytes(model, batch)
    if device.type == "cuda" and estimate["largest peak"] > 0.8 * torch.cuda.mem_get_info(device)[1]:
        pytest.skip("the card is too small")
    masks = {"largest peak": lambda g: g.spec.num_patches, "average peak": patches_in_training}
    for peak, patches in masks.items():
        counts = [patches(generator) for generator in model.generators]
        with Peak(device) as real, fixed_masks(counts):
            with device:
                trained = Trained(build(name, grad_checkpointing=checkpointing), device)
            batch_of = (random_values(batch, model.img_size_list[0]), torch.arange(batch), None)
            for number in range(2):  # AdamW's moments are made in the first step
                trained.step(number, batch=batch_of)
            del trained
        assert 0.8 < estimate[peak] / real.bytes < 1.2, peak


@contextmanager
def fixed_masks(counts):
    """Lets every image of level i have `counts[i]` masked patches in training."""

    def random_mask(mar, n, train, device):
        of_each = np.full(n, counts[mar.spec.index])
        return Mask.of_counts(of_each, torch.rand(n, mar.spec.num_patches, device=device))

    with patch.object(MAR, "random_mask", random_mask):
        yield


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # the compiler advises them
@pytest.mark.parametrize(
    ("device", "kind"),
    [("cpu", "mar over ar"), *(pytest.param("cuda", k, marks=pytest.mark.gpu) for k in ("mar over ar", "guided"))],
    indirect=["device"],
)  # fmt: skip
def test_compiled_sampling_gives_the_same(device, kind):
    """On CUDA as graphs. Picks the most probable values, as a `pick` with state is recompiled at each call."""
    model = opinionated(tiny_model(kind, num_blocks_list=[1, 1, 1])).to(device)
    likeliest = lambda probs, uniforms: probs.argmax(-1)  # noqa: E731
    labels, settings = torch.tensor([0, 1], device=device), ((1, 4), 3.0, "linear", 1.1, 1e-2)
    noise = model.noise(3, range(2), device)
    conds = [torch.cat([model.class_emb(labels), model.fake_latent.repeat(2, 1)])] * model.num_conds
    if device.type == "cpu":
        expected = ReferenceSampler(model, *settings, pick=likeliest).sample(labels, noise)
    else:
        expected = model.sample(conds, *settings, noise=noise, pick=likeliest)
    for _ in range(1 if device.type == "cpu" else 3):  # graphs: warm up, record, replay
        images = model.sample(conds, *settings, noise=noise, pick=likeliest, compiled=True)
        torch.testing.assert_close(images, expected)
    assert images.unique().numel() > 20
