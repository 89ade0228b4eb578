import torch

from conftest import random_values, tiny_model
from models.generator import ForwardOptions
from models.patches import patchify
from models.sampling.canvas import Batch
from models.sampling.generate import build_sampler
from models.sampling.guidance import Guidance
from models.sampling.prepare import Setup
from util.pixels import RGB


def test_cached_sampling_steps_equal_the_teacher_forced_pass():
    model = tiny_model("ar")
    generator, conds = model.generator, [torch.randn(2, 32)]
    images = RGB.normalize(random_values(2, 8))
    canvas = patchify(images, (2, 2))
    noise = model.noise(0, range(2))
    order = generator.order(noise.order_uniforms)
    sampler = build_sampler(model, Setup(torch.float32))
    state = sampler.start(Batch(conds, Guidance(), noise), order)
    known = [None, *canvas.split(1, dim=1)]
    steps = [sampler.predict(state, known[begin], begin, end)[0] for begin, end, _ in generator.plan(1)]
    forced = generator(images, conds, ForwardOptions()).conds[0].view(2, 16, -1)
    torch.testing.assert_close(torch.stack(steps, 1), forced, rtol=1e-4, atol=1e-5)


def test_a_patch_sees_only_the_past():
    generator, conds = tiny_model("ar").generator, [torch.randn(1, 32)]
    images = RGB.normalize(random_values(1, 8))
    changed = images.clone()
    changed[:, :, 4:] = 0  # patches 8 to 15
    before, after = (generator(x, conds, ForwardOptions()).conds[0] for x in (images, changed))
    assert torch.equal(before[:9], after[:9])
    assert not torch.equal(before[9], after[9])


def test_progress_is_the_share_of_patches_known():
    assert [p for *_, p in tiny_model("ar").generator.plan(3)] == [(s + 1) / 16 for s in range(16)]
