import pytest
import torch

from conftest import opinionated
from models.noise import Noise
from models.pixelloss import PixelLoss
from models.sampling.canvas import Batch
from models.sampling.generate import build_sampler
from models.sampling.guidance import Guidance
from models.sampling.prepare import Setup
from util.pixels import RGB, VALUE_KINDS, Alphabet


def head(alphabet: Alphabet = RGB) -> PixelLoss:
    return PixelLoss(cond_dim=8, embed_dim=16, num_blocks=2, num_heads=2, alphabet=alphabet).eval()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("num_values", [2, 5, 256])
@pytest.mark.parametrize("value_kind", VALUE_KINDS)
def test_the_probabilities_of_each_channel_sum_to_one(channels, num_values, value_kind):
    alphabet = Alphabet(channels, num_values, value_kind)
    model, cond = opinionated(head(alphabet)), torch.randn(1, 8)
    for channel in range(channels):
        values = torch.randint(num_values, (num_values, channels))  # later channels must not matter
        values[:, :channel] = values[0, :channel]
        values[:, channel] = torch.arange(num_values)
        probs = model(alphabet.normalize(values), [cond.expand(num_values, -1)])[:, channel].neg().exp()
        assert probs.sum().item() == pytest.approx(1, abs=1e-5)
        assert probs.std() > 0.01 / num_values  # equal probabilities would sum to 1 too


def test_sampling_draws_from_what_the_loss_measures():
    """The sampler's probabilities are the softmax of the teacher-forced logits of the drawn values."""
    model, conds = head(), [torch.randn(5, 8)]
    met = []

    def pick(probs, uniforms):
        met.append(probs)
        return (uniforms * 256).long()

    noise = Noise([torch.rand(5, 5, 1, 1)])
    pixels = build_sampler(model, Setup(torch.float32)).sample(
        Batch(conds, Guidance.create(1.0, "linear", 1.0, 0.0, pick), noise)
    )
    assert pixels.shape == (5, 3, 1, 1)
    values = (noise.value_uniforms * 256).long()
    torch.testing.assert_close(pixels[:, :, 0, 0], RGB.normalize(values))
    torch.testing.assert_close(
        torch.stack(met, 1), model.logits(values, conds).softmax(-1), rtol=1e-4, atol=1e-6
    )


def test_logits_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert head().logits(torch.zeros(2, 3, dtype=torch.long), [torch.randn(2, 8)]).dtype == torch.float32


def test_dither_changes_only_values_that_are_not_whole_numbers(monkeypatch):
    seen = []
    model = head()
    plain = model.logits
    monkeypatch.setattr(model, "logits", lambda values, conds: seen.append(values) or plain(values, conds))
    half = RGB.normalize(torch.full((400, 3), 99.5))
    model(half, [torch.randn(400, 8)], dither=0.01)
    model(RGB.normalize(torch.full((400, 3), 99.0)), [torch.randn(400, 8)], dither=0.01)
    assert set(seen[0].unique().tolist()) == {99, 100}
    assert seen[1].unique().tolist() == [99]
