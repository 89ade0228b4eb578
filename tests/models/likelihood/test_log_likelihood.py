"""log2-likelihoods and classes, against brute force and the measurements that `--evaluate_nll` makes."""

import itertools
import math

import numpy as np
import pytest
import torch
from reference_model import Forced

from conftest import opinionated, random_values, swayed, tiny_model
from models.fractalgen import FractalGen
from models.likelihood.bits import LN2
from models.likelihood.log_likelihood import pixels_together
from models.mar import cosine_plan
from models.pixelloss import PixelLoss
from util.pixels import RGB, Alphabet

QUIET = dict(progress_bar=False)
PIXELS = dict(
    img_size_list=[2, 1], embed_dim_list=[16, 16], num_blocks_list=[1, 1], num_heads_list=[2, 2], class_num=2
)


def two_by_two(kind: str) -> FractalGen:
    """One level of 2 x 2 pixels."""
    torch.manual_seed(0)
    return opinionated(FractalGen(**PIXELS, generator_type_list=[kind, "ar"])).eval()


def test_reductions_sum_to_the_image(kind):
    model, levels = swayed(tiny_model(kind)), random_values(3, 8)
    image, pixel, channel, level = (
        model.log_likelihood(levels, [0, 1, 2], reduce, num_orders=3, **QUIET)
        for reduce in ("image", "pixel", "channel", "level")
    )
    assert (image.bits < 0).all()
    assert pixel.bits.shape == (3, 8, 8)
    assert channel.bits.shape == (3, 3)
    assert level.bits.shape == (3, 2)
    for part in (pixel, channel, level):
        torch.testing.assert_close(part.bits.flatten(1).sum(1), image.bits)
        assert part.standard_error.shape == part.bits.shape
    assert (level.bits[:, 0] == 0).all() == (kind != "guided")
    assert (image.standard_error == 0).all() == (kind == "ar")


@pytest.mark.parametrize("label", [None, 2])
def test_bits_are_what_the_sampler_pays(kind, label):
    """The unguided sampler, made to draw the image in the same orders, with the same numbers of steps."""
    model, levels, steps = opinionated(tiny_model(kind)), random_values(1, 8) // 4 * 4, (3, 2)
    forced = Forced(model, levels, seed=5)
    cond = model.fake_latent if label is None else model.class_emb(torch.tensor([label]))
    model.sample([cond] * model.num_conds, steps, noise=forced.noise, pick=forced)
    read = model.log_likelihood(levels, label, num_orders=1, num_inference_steps=steps, seed=5, **QUIET)
    assert -read.bits.item() == pytest.approx(forced.bits, rel=1e-5)
    assert math.isnan(read.standard_error.item()) == (kind != "ar")


def test_a_map_says_which_pixel_pays():
    """AR: a changed pixel changes no bits before it, in raster order of patches and in it of pixels, and its own."""
    model, levels = opinionated(tiny_model("ar")), random_values(1, 8)
    changed = levels.clone()
    changed[:, :, 5, 2] = 255 - changed[:, :, 5, 2]  # the patch of rows 4 and 5, columns 2 and 3
    before, after = (model.log_likelihood(x, 0, "pixel", **QUIET).bits[0] for x in (levels, changed))
    same = before == after
    assert same[:4].all()
    assert same[4:6, :2].all()
    assert same[4, 2:4].all()
    assert not same[5, 2:4].any()


def test_the_mean_over_all_orders_is_brute_force(monkeypatch):
    """Every order of four pixels in two steps once: the mean, and the posterior by the mean of the probabilities."""
    model, levels = two_by_two("mar"), random_values(1, 2)
    orders = list(itertools.permutations(range(4)))
    plan = [(begin, end) for begin, end, _ in cosine_plan(4, 2)]
    from models.generator import Mask

    def brute(order, label) -> float:
        paid = 0.0
        for begin, end in plan:
            masked = torch.tensor([[patch in order[begin:] for patch in range(4)]])
            mask = Mask.of(masked)
            _, (term,) = model(
                RGB.normalize(levels), torch.tensor([label]), masks=[mask], train=False, label_drop=torch.zeros(1, dtype=torch.bool),
                return_terms=True,
            )  # fmt: skip
            nats = dict(zip(mask.rows.tolist(), term.nll.double().sum(1).tolist(), strict=True))
            paid += sum(nats[patch] for patch in order[begin:end]) / LN2
        return -paid

    upcoming = iter(orders * 4)
    from models.generator import Steps

    monkeypatch.setattr(
        type(model.generator),
        "draw_steps",
        lambda self, noise, num_iter: Steps(torch.tensor([next(upcoming)]), tuple(plan)),
    )
    monkeypatch.setattr("models.likelihood.log_likelihood.is_exact", lambda model: False)
    found = model.log_likelihood(levels, 1, num_orders=24, num_inference_steps=(2,), **QUIET)
    expected = np.array([[brute(order, label) for order in orders] for label in (0, 1)])
    assert found.bits.item() == pytest.approx(expected[1].mean(), rel=1e-5)
    assert found.standard_error.item() == pytest.approx(expected[1].std(ddof=1) / math.sqrt(24), rel=1e-4)
    posterior = model.classify(levels, num_orders=24, num_inference_steps=(2,), **QUIET)[0]
    likelihood = (2**expected).mean(1)
    assert posterior.tolist() == pytest.approx((likelihood / likelihood.sum()).tolist(), rel=1e-4)


def test_prior_and_choice_of_classes():
    model, levels = opinionated(tiny_model("ar")), random_values(2, 8)
    every = model.classify(levels, **QUIET)
    assert every.shape == (2, 4)
    torch.testing.assert_close(every.sum(1), torch.ones(2, dtype=torch.float64))
    bits = torch.stack([model.log_likelihood(levels, label, **QUIET).bits for label in range(4)], dim=1)
    torch.testing.assert_close(every, (bits * LN2).softmax(1))
    some = model.classify(levels, [3, 1], prior=[0.0, 2.0], **QUIET)
    assert some.tolist() == [[0, 1], [0, 1]]


def test_fewer_pixels_are_evaluated_together_where_each_has_more_logits():
    most = [pixels_together(alphabet, 4096) for alphabet in (RGB, Alphabet(1, 2), Alphabet(1, 65536))]
    assert most == [4096, 4096, 48]
    assert pixels_together(Alphabet(4096, 65536), 4096) == 1


def test_batches_change_nothing(monkeypatch):
    model, levels = opinionated(tiny_model("mar")), random_values(5, 8)
    together = model.log_likelihood(levels, 1, **QUIET)
    monkeypatch.setattr("models.likelihood.log_likelihood.MAX_PIXELS", 128)  # two images
    torch.testing.assert_close(model.log_likelihood(levels, 1, **QUIET).bits, together.bits)
    monkeypatch.setattr("models.likelihood.log_likelihood.MAX_PIXELS", 64)  # one image
    sizes, run = [], PixelLoss.logits
    monkeypatch.setattr(
        PixelLoss, "logits", lambda self, values, conds: sizes.append(len(values)) or run(self, values, conds)
    )
    torch.testing.assert_close(model.log_likelihood(levels, 1, **QUIET).bits, together.bits)
    assert set(sizes) == {64}
    torch.testing.assert_close(model.log_likelihood(levels[:1], 1, **QUIET).bits, together.bits[:1])


def test_a_model_without_classes_is_read():
    model, levels = tiny_model(class_num=0), random_values(2, 8)
    assert (model.log_likelihood(levels, **QUIET).bits < 0).all()
    with pytest.raises(ValueError, match="class_labels 0 is given, but the model has no classes"):
        model.log_likelihood(levels, 0, **QUIET)
