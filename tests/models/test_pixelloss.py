import torch

from models.noise import Noise
from models.pixelloss import PixelLoss
from models.sampling.canvas import Batch
from models.sampling.generate import build_sampler
from models.sampling.guidance import Guidance
from models.sampling.prepare import Setup
from util.pixels import normalize


def head() -> PixelLoss:
    return PixelLoss(cond_dim=8, embed_dim=16, num_blocks=2, num_heads=2).eval()


def test_the_256_probabilities_of_each_channel_sum_to_one():
    model, cond = head(), torch.randn(1, 8)
    all_values = torch.arange(256)
    for channel in range(3):
        values = torch.tensor([[10, 200, 77]]).repeat(256, 1)
        values[:, channel] = all_values
        values[:, channel + 1 :] = 0  # later channels must not matter
        nll = model(normalize(values), [cond.expand(256, -1)])
        torch.testing.assert_close(nll[:, channel].neg().exp().sum(), torch.tensor(1.0), rtol=1e-5, atol=1e-5)


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
    torch.testing.assert_close(pixels[:, :, 0, 0], normalize(values))
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
    half = normalize(torch.full((400, 3), 99.5))
    model(half, [torch.randn(400, 8)], dither=0.01)
    model(normalize(torch.full((400, 3), 99.0)), [torch.randn(400, 8)], dither=0.01)
    assert set(seen[0].unique().tolist()) == {99, 100}
    assert seen[1].unique().tolist() == [99]
