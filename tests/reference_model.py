"""The slow twin: loss and sampling as SPEC.md says them, one line after the other, with nothing shared, cached or skipped.

It reads a model's weights by name and calls nothing of ours but the order of the patches and the steps' plan. Tests hold the
fast sampler against it, the benchmark times it. Only AR levels keep keys and values: without, nobody would use them.

Letters: N images, L patches, C = 3 * p * p, D width, K conditions; a doubled batch holds class conditions, then fake_latent.
"""

import torch
import torch.nn.functional as F

from models.fractalgen import FractalGen
from models.mar import MAR
from models.noise import COLOUR, Noise
from util.pixels import normalize, to_values


def patchify(x, p):
    """(N, 3, H, H) -> (N, L, 3 * p * p)."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * p * p)


def unpatchify(x, p):
    n, length, _ = x.shape
    g = int(length**0.5)
    return x.reshape(n, g, g, 3, p, p).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, g * p, g * p)


def attention(q, k, v, heads, causal=False, dropout=0.0):
    q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)
    return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)


def block(b, x, causal=False):
    """A transformer block, with dropout where the module is in training."""
    p_attn, p = (b.attn.attn_drop.p, b.mlp.drop.p) if b.training else (0.0, 0.0)
    q, k, v = b.attn.qkv(b.norm1(x)).chunk(3, dim=-1)
    x = x + F.dropout(b.attn.proj(attention(q, k, v, b.attn.num_heads, causal, p_attn)), p)
    return x + F.dropout(b.mlp.fc2(F.dropout(F.gelu(b.mlp.fc1(b.norm2(x))), p)), p)


def rms_norm(norm, x):
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + norm.eps)).type_as(
        x
    ) * norm.weight


def turn(x, heads, cos, sin):
    """Rotary embedding of (N, T, D) by (T, d / 2)."""
    even, odd = x.float().reshape(*x.shape[:2], heads, -1, 2).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).reshape(x.shape).type_as(x)


def rotary_block(b, x, cos, sin, past=None):
    """`past`: list of earlier tokens' (k, v), to which this token's are added; without it, all tokens at once."""
    a, f, p = b.attention, b.feed_forward, b.attention.drop.p if b.training else 0.0
    q, k, v = a.wqkv(rms_norm(b.attention_norm, x)).chunk(3, dim=-1)
    q, k = turn(q, a.num_heads, cos, sin), turn(k, a.num_heads, cos, sin)
    if past is not None:
        past.append((k, v))
        k, v = (torch.cat(t, dim=1) for t in zip(*past, strict=True))
    x = x + F.dropout(a.wo(attention(q, k, v, a.num_heads, causal=past is None)), p)
    y = rms_norm(b.ffn_norm, x)
    return x + F.dropout(f.w2(F.silu(f.w1(y)) * f.w3(y)), p)


def mar_outputs(g, conds, patches, known, pixel):
    """Patches (N, L, C), known (N, L) bool -> five conditions, each (N, L, D)."""
    prefix = [g.cond_emb(cond) for cond in reversed(conds[: g.spec.num_conds])]
    if pixel is not None:
        prefix.insert(0, g.pix_proj(pixel))
    tokens = torch.where(known[..., None], g.patch_emb(patches), g.mask_token)
    x = torch.cat([torch.stack(prefix, dim=1), tokens], dim=1)
    x = g.patch_emb_ln(x + g.pos_embed_learned)
    for b in g.blocks:
        x = block(b, x)
    middle = g.norm(x)[:, len(prefix) :]
    side = g.spec.grid
    padded = F.pad(middle.reshape(len(x), side, side, -1), (0, 0, 1, 1, 1, 1))
    shifted = [
        padded[:, 1 + y : 1 + y + side, 1 + x : 1 + x + side]
        for y, x in ((0, 0), (-1, 0), (0, 1), (1, 0), (0, -1))
    ]
    return [s.reshape(middle.shape) for s in shifted]


def losses(fractal, images, conds, masks, r_weight):
    """Breadth-first, the loss's terms: normalised images (N, 3, H, H), masks (N, L) bool or None for each level."""
    if not isinstance(fractal, FractalGen):
        return [pixel_loss(fractal, images.flatten(1), conds, r_weight)]
    g, spec, terms, pixel = fractal.generator, fractal.generator.spec, [], None
    patches = patchify(images, spec.patch_size)
    if isinstance(g, MAR):
        if spec.guiding_pixel:
            pixel = images.mean(-1).mean(-1)
            terms.append(pixel_loss(g.guiding_pixel_loss, pixel, conds, 5.0 if g.training else 1.0))
        masked = masks[spec.index]
        handed = [cond[masked] for cond in mar_outputs(g, conds, patches, ~masked, pixel)]
        patches = patches[masked]
    else:
        x = torch.cat([g.cond_emb(conds[0])[:, None], g.patch_emb(patches)], dim=1)
        x = g.patch_emb_ln(x + g.pos_embed_learned)
        for b in g.blocks:
            x = rotary_block(b, x, g.rope_cos, g.rope_sin)
        handed, patches = [g.norm(x)[:, :-1].flatten(0, 1)], patches.flatten(0, 1)
    size = spec.patch_size
    return terms + losses(fractal.next_fractal, patches.reshape(-1, 3, size, size), handed, masks, r_weight)


def pixel_loss(head, pixels, conds, r_weight):
    """Pixels (N, 3) -> the loss of SPEC section 4, without dither."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    levels = (255 * (pixels * std + mean)).round().clamp(0, 255).long()
    logits = pixel_logits(head, conds[0], levels).float()
    red, green, blue = (
        F.cross_entropy(logits.flatten(0, 1), levels.flatten(), reduction="none").view(-1, 3).mean(0)
    )
    r_weight = r_weight if head.training else 1.0
    return (r_weight * red + green + blue) / (r_weight + 2)


def loss(model, images, labels, masks):
    """The training or evaluation loss of `model`, whichever mode it is in, with no label dropped."""
    conds = [model.class_emb(labels)] * model.num_conds
    return sum(losses(model, images, conds, masks, model.r_weight))


def pixel_logits(head, cond, levels):
    """Conditions (N, D), levels so far (N, 3) -> logits (N, 3, 256): four tokens, as published."""
    tokens = [
        head.cond_proj(cond),
        head.r_codebook(levels[:, 0]),
        head.g_codebook(levels[:, 1]),
        head.b_codebook(levels[:, 2]),
    ]
    x = head.ln(torch.stack(tokens, dim=1))
    for b in head.blocks:
        x = block(b, x, causal=True)
    x = head.norm(x)
    tied = ((head.r_codebook, head.r_mlm), (head.g_codebook, head.g_mlm), (head.b_codebook, head.b_mlm))
    return torch.stack([x[:, i] @ book.weight.T + mlm.bias for i, (book, mlm) in enumerate(tied)], dim=1)


def guided_probabilities(logits, doubled, scale, temperature, threshold):
    """SPEC section 5, on (2N or N, 256)."""
    logits = logits * temperature
    if not doubled:
        return torch.softmax(logits, dim=-1)
    cond, uncond = logits.chunk(2)
    lifted = torch.maximum(uncond, cond - cond.max(-1, keepdim=True)[0] + uncond.max(-1, keepdim=True)[0])
    uncond = torch.where(torch.softmax(cond, dim=-1) < threshold, lifted, uncond)
    return torch.softmax(uncond + scale * (cond - uncond), dim=-1)


def inverse_cdf(probs, uniforms):
    """The first value whose cumulative probability exceeds the uniform share of the total."""
    cdf = probs.cumsum(-1)
    return (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(-1).clamp(max=255)


class ReferenceSampler:
    """Samples `model`'s images. scale …: as in FractalGen.sample; pick: (probs, uniforms (N,)) -> values (N,)."""

    def __init__(
        self,
        model: FractalGen,
        steps,
        scale,
        schedule="linear",
        temperature=1.0,
        threshold=1e-4,
        pick=inverse_cdf,
    ):
        self.model, self.steps, self.scale, self.doubled = model, steps, scale, scale != 1
        self.schedule, self.temperature, self.threshold, self.pick = schedule, temperature, threshold, pick

    @torch.no_grad()
    def sample(self, labels, noise: Noise):
        """Class labels (N,), or None -> normalised images (N, 3, H, H)."""
        unconditional = self.model.fake_latent.repeat(len(noise), 1)
        cond = unconditional if labels is None else self.model.class_emb(labels)
        cond = torch.cat([cond, unconditional]) if self.doubled else cond
        return self.level(self.model, [cond] * self.model.num_conds, noise, self.scale)

    def pixel(self, head, conds, noise, scale):
        n = len(noise)
        levels = torch.zeros(n, 3, dtype=torch.long)
        for channel in range(3):
            twice = torch.cat([levels, levels]) if self.doubled else levels
            logits = pixel_logits(head, conds[0], twice)[:, channel]
            probs = guided_probabilities(logits, self.doubled, scale, self.temperature, self.threshold)
            levels[:, channel] = self.pick(probs, noise.colour[:, channel])
        return normalize(levels)

    def level(self, fractal, conds, noise, scale):
        """Conditions, each (N or 2N, D) -> images (N, 3, H, H)."""
        if not isinstance(fractal, FractalGen):
            return self.pixel(fractal, conds, noise, scale)[:, :, None, None]
        g, spec, n = fractal.generator, fractal.generator.spec, len(noise)
        order = g.order(noise)  # (N, L)
        canvas = torch.zeros(n, spec.num_patches, spec.patch_dim)
        known = torch.zeros(n, spec.num_patches, dtype=torch.bool)
        pixel = None
        if isinstance(g, MAR) and spec.guiding_pixel:
            pixel = self.pixel(g.guiding_pixel_loss, conds, noise, scale)
        rows = torch.arange(n)[:, None]
        caches = [[] for _ in range(spec.num_blocks)]
        patch_noise = patch_maps(noise, spec)
        for begin, end, progress in g.plan(self.steps[spec.index]):
            if spec.index == 0 and self.schedule == "linear":
                scale = 1 + (self.scale - 1) * progress
            where = order[:, begin:end]
            twice = (lambda x: torch.cat([x, x])) if self.doubled else (lambda x: x)
            if isinstance(g, MAR):
                handed = mar_outputs(
                    g, conds, twice(canvas), twice(known), None if pixel is None else twice(pixel)
                )
                handed = [h[torch.arange(len(h))[:, None], twice(where)].flatten(0, 1) for h in handed]
            else:
                handed = [self.ar(g, conds, twice(canvas), begin, caches)]
            picked = [m[rows, where].flatten(0, 1) for m in patch_noise]
            patches = self.level(fractal.next_fractal, handed, Noise(picked), scale)
            canvas[rows, where] = patches.reshape(n, end - begin, -1)
            known[rows, where] = True
        return unpatchify(canvas, spec.patch_size)

    def ar(self, g, conds, canvas, place, caches):
        """-> the condition of patch number `place` (N, D)."""
        token = g.cond_emb(conds[0]) if place == 0 else g.patch_emb(canvas[:, place - 1])
        x = g.patch_emb_ln(token[:, None] + g.pos_embed_learned[:, place : place + 1])
        for b, past in zip(g.blocks, caches, strict=True):
            x = rotary_block(b, x, g.rope_cos[place : place + 1], g.rope_sin[place : place + 1], past)
        return g.norm(x)[:, 0]


def patch_maps(noise, spec):
    """The noise maps below a level, cut into patches (N, L, 5, s, s)."""
    cut = []
    for m in noise.maps[1:]:
        s = m.shape[-1] // spec.grid
        cut.append(
            m.reshape(len(m), 5, spec.grid, s, spec.grid, s)
            .permute(0, 2, 4, 1, 3, 5)
            .reshape(len(m), -1, 5, s, s)
        )
    return cut


class Forced:
    """Teacher forcing of a sampler: the uniforms say which levels are drawn, and the bits of each draw are added up."""

    def __init__(self, model: FractalGen, levels: torch.Tensor, seed: int = 0):
        """Levels (B, 3, H, H) of the images that are to come out; orders are those of `seed`."""
        self.noise, self.bits = Noise.of_images(seed, range(len(levels)), model.noise_sizes), 0.0
        for side, size in zip(self.noise.maps, model.noise_sizes, strict=True):
            patches = patchify(normalize(levels), size).unflatten(2, (3, size, size))  # (B, L, 3, p, p)
            drawn = to_values(patches.mean(-1).mean(-1), dim=2).transpose(
                1, 2
            )  # (B, 3, L): guiding pixels, then pixels
            side[:, COLOUR] = ((drawn + 0.5) / 256).view_as(side[:, COLOUR])

    def __call__(self, probs, uniforms):
        picked = (uniforms * 256).long()
        self.bits -= probs.double().gather(1, picked[:, None]).log2().sum().item()
        return picked
