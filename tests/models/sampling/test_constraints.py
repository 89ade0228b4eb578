"""Every drawn pixel fulfils the constraint of its edit."""

import numpy as np
import pytest
import torch

from conftest import opinionated, random_values, tiny_model
from models.sampling.constraints import Grey, Palette, Within
from models.sampling.known import KnownPixels
from util.pixels import RGB

QUIET = dict(progress_bar=False, output_type="np", seed=3)
COLOURS = [[0, 0, 0], [255, 255, 255], [250, 10, 20], [250, 200, 30]]


def edited(kind, constraint, **settings):
    """Edits the five left columns of two images. Returns their pixels (2, 40, 3) before and after."""
    model, values, mask = opinionated(tiny_model(kind)), random_values(2, 8), np.zeros((8, 8), bool)
    mask[:, :5] = True
    out = model.edit(values, mask, [1, 2], guidance_scale=2.0, constraint=constraint, **settings, **QUIET)
    image = values.permute(0, 2, 3, 1).numpy()
    assert (out == image)[:, ~mask].all()
    return image[:, mask].astype(int), out[:, mask].astype(int)


def test_grey(kind):
    _, drawn = edited(kind, Grey())
    assert (drawn == drawn[..., :1]).all()
    assert len(np.unique(drawn)) > 20


def test_a_guiding_pixel_over_known_colours_can_be_drawn():
    """Half of the patch is known and red: its mean is not grey, but some value must remain possible."""
    values, hidden = (
        torch.tensor([255, 0, 0], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 2, 2),
        torch.zeros(1, 2, 2),
    )
    hidden[:, 0] = 1
    for known in (
        KnownPixels(RGB.normalize(values), hidden.bool(), RGB, Grey()),
        KnownPixels(RGB.normalize(values), torch.ones(1, 2, 2).bool(), RGB, Grey()),
    ):
        drawn = torch.zeros(1, 0, dtype=torch.long)
        for channel in range(3):
            weights = known.guiding_weights(channel, drawn)
            drawn = torch.cat([drawn, weights.argmax(1, keepdim=True)], dim=1)
            assert weights.isfinite().any()
        assert (len(drawn.unique()) == 1) == known.hidden.all()


@pytest.mark.parametrize("distance", [0, 7])
def test_within(kind, distance):
    image, drawn = edited(kind, Within(distance))
    assert np.abs(image - drawn).max() == distance


def test_palette(kind):
    _, drawn = edited(kind, Palette(COLOURS))
    drawn = set(map(tuple, drawn.reshape(-1, 3).tolist()))
    assert drawn <= set(map(tuple, COLOURS))
    assert len(drawn) > 2


def test_allowed_values_keep_the_ratios_of_their_probabilities():
    """A constraint only excludes values, and keeps the ratios of the probabilities of the others."""
    model, values = opinionated(tiny_model()), random_values(1, 8)
    met = []

    def pick(probs, uniforms):
        met.append(probs)
        return probs.argmax(-1)

    conds, hidden = [model.fake_latent] * model.num_conds, torch.zeros(1, 8, 8, dtype=torch.bool)
    hidden[0, 0, 0] = True
    for constraint in (
        None,
        lambda channel, drawn, reference: torch.arange(256).expand(len(reference), -1) % 2 == 0,
    ):
        model.sample(
            conds, (1, 1), pick=pick, known=KnownPixels(RGB.normalize(values), hidden, RGB, constraint)
        )
    free, even = met[0][0], met[3][0]
    torch.testing.assert_close(even[::2], free[::2] / free[::2].sum())
    assert (even[1::2] == 0).all()


def guides(known: KnownPixels, drawn: tuple[int, ...] = ()) -> list[int]:
    """Returns the possible values of the channel of one guiding pixel that follows the channels `drawn`."""
    weights = known.guiding_weights(len(drawn), torch.tensor([drawn], dtype=torch.long))
    return weights[0].isfinite().nonzero().flatten().tolist()


def test_a_guiding_pixel_is_the_mean_of_known_colours_and_hidden_pixels_that_fulfil_the_constraint():
    """Three pixels are known and red, one is hidden and grey, so that R of their mean decides G and B."""
    values, hidden = torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1, 2, 2, dtype=torch.bool)
    values[:, 0], values[:, :, 0, 0], hidden[:, 0, 0] = 200, 80, True
    red = KnownPixels(RGB.normalize(values), hidden, RGB, Grey())
    assert guides(red) == [*range(150, 215)]
    assert guides(red, (170,)) == [20]
    assert guides(red, (170, 20)) == [20]
    near = KnownPixels(RGB.normalize(values), hidden, RGB, Within(4))
    assert guides(near) == [169, 170, 171]
    assert guides(near, (170,)) == [19, 20, 21]
    nothing_known = torch.ones_like(hidden)
    assert guides(KnownPixels(RGB.normalize(values), nothing_known, RGB, Grey()), (170,)) == [170]
    assert guides(KnownPixels(RGB.normalize(values), nothing_known, RGB, Within(4))) == [*range(166, 175)]


def test_a_plain_function_can_be_a_constraint(kind):
    _, drawn = edited(
        kind, lambda channel, drawn, reference: torch.arange(256).expand(len(reference), -1) < 10
    )
    assert drawn.max() < 10


def test_a_constraint_that_allows_nothing_is_named():
    with pytest.raises(ValueError, match="allows no value of channel G"):
        edited("mar", lambda channel, drawn, reference: torch.full((len(reference), 256), channel != 1))
