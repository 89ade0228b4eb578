"""An independent reference implementation of the loss and of sampling, as docs/format.md describes them.

It is simple and slow: it computes everything step by step, and shares, caches or skips nothing, except that
AR levels keep the keys and values of earlier tokens, without which they would be too slow to use. It reads a
model's weights by their names. Of the library it calls only the generators' `order` and `plan`, `Noise` and the
conversions of util.pixels. Tests compare the library's loss and sampler with it, and tests/bench.py compares
their speed.

Letters: N images, L patches, C = 3 * p * p values of a patch, D width, K conditions, T tokens, d width of a
head. A batch that is doubled for guidance holds the class conditions first, and then `fake_latent`.
"""

import torch
import torch.nn.functional as F

from models.fractalgen import FractalGen
from models.mar import MAR
from models.noise import VALUES, Noise
from util.pixels import normalize, to_values


def patchify(x, p):
    """(N, 3, H, H) -> (N, L, 3 * p * p)."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(n, -1, c * p * p)


def unpatchify(x, p):
    """(N, L, 3 * p * p) -> (N, 3, H, H)."""
    n, length, _ = x.shape
    g = int(length**0.5)
    return x.reshape(n, g, g, 3, p, p).permute(0, 3, 1, 4, 2, 5).reshape(n, 3, g * p, g * p)


def attention(q, k, v, heads, causal=False, dropout=0.0):
    """Attention of queries, keys and values, each (N, T, D) -> (N, T, D)."""
    q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)
    return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)


def linear(layer, x):
    return F.linear(x, layer.weight, layer.bias)


def block(b, x, heads, causal=False, attn_dropout=0.0):
    """A block with LayerNorm, (N, T, D) -> (N, T, D). There is dropout if the module is in training mode."""
    p_attn, p = (attn_dropout, b.mlp.drop.p) if b.training else (0.0, 0.0)
    q, k, v = linear(b.attn.qkv, b.norm1(x)).chunk(3, dim=-1)
    x = x + F.dropout(linear(b.attn.proj, attention(q, k, v, heads, causal, p_attn)), p)
    return x + F.dropout(linear(b.mlp.fc2, F.dropout(F.gelu(linear(b.mlp.fc1, b.norm2(x))), p)), p)


def rms_norm(norm, x):
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + norm.eps)
    return (x.float() * scale).type_as(x) * norm.weight


def turn(x, heads, cos, sin):
    """Applies the rotary embedding to (N, T, D); cos and sin have shape (T, d / 2)."""
    even, odd = x.float().reshape(*x.shape[:2], heads, -1, 2).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).reshape(x.shape).type_as(x)


def rotary_block(b, x, heads, cos, sin, past=None):
    """A block with RMSNorm and rotary embedding, (N, T, D) -> (N, T, D).

    past  keys and values of earlier tokens, to which those of this token are added; None: x holds all tokens
    """
    a, f, p = b.attention, b.feed_forward, b.attention.wo.drop.p if b.training else 0.0
    q, k, v = linear(a.wqkv, rms_norm(b.attention_norm, x)).chunk(3, dim=-1)
    q, k = turn(q, heads, cos, sin), turn(k, heads, cos, sin)
    if past is not None:
        past.append((k, v))
        k, v = (torch.cat(t, dim=1) for t in zip(*past, strict=True))
    x = x + F.dropout(linear(a.wo, attention(q, k, v, heads, causal=past is None)), p)
    y = rms_norm(b.ffn_norm, x)
    return x + F.dropout(linear(f.w2, F.silu(linear(f.w1, y)) * linear(f.w3, y)), p)


def mar_outputs(g, conds, patches, known, pixel):
    """A MAR generator's outputs: patches (N, L, C), known (N, L) bool -> five conditions, each (N, L, D)."""
    prefix = [g.cond_emb(cond) for cond in reversed(conds[: g.spec.num_conds])]
    if pixel is not None:
        prefix.insert(0, g.pix_proj(pixel))
    tokens = torch.where(known[..., None], g.patch_emb(patches), g.mask_token)
    x = torch.cat([torch.stack(prefix, dim=1), tokens], dim=1)
    x = g.patch_emb_ln(x + g.pos_embed_learned)
    for b in g.blocks:
        x = block(b, x, g.spec.num_heads, attn_dropout=g.spec.attn_dropout)
    middle = g.norm(x)[:, len(prefix) :]
    side = g.spec.grid
    padded = F.pad(middle.reshape(len(x), side, side, -1), (0, 0, 1, 1, 1, 1))
    shifted = [
        padded[:, 1 + y : 1 + y + side, 1 + x : 1 + x + side]
        for y, x in ((0, 0), (-1, 0), (0, 1), (1, 0), (0, -1))
    ]
    return [s.reshape(middle.shape) for s in shifted]


def losses(fractal, images, conds, masks, r_weight):
    """Returns the terms of the loss, level by level.

    images  normalised, (N, 3, H, H)
    masks   for each level bool (N, L), True for masked patches, or None for an AR level
    """
    if not isinstance(fractal, FractalGen):
        return [pixel_loss(fractal, images.flatten(1), conds, r_weight)]
    g, spec, terms, pixel = fractal.generator, fractal.generator.spec, [], None
    patches = patchify(images, spec.patch_size)
    if isinstance(g, MAR):
        if spec.guiding_pixel:
            pixel = images.mean(-1).mean(-1)
            terms.append(pixel_loss(g.guiding_pixel_loss, pixel, conds, 5.0 if g.training else 1.0))
        masked = masks[spec.index]
        outputs = [cond[masked] for cond in mar_outputs(g, conds, patches, ~masked, pixel)]
        patches = patches[masked]
    else:
        x = torch.cat([g.cond_emb(conds[0])[:, None], g.patch_emb(patches)], dim=1)
        x = g.patch_emb_ln(x + g.pos_embed_learned)
        for b in g.blocks:
            x = rotary_block(b, x, spec.num_heads, g.rope_cos, g.rope_sin)
        outputs, patches = [g.norm(x)[:, :-1].flatten(0, 1)], patches.flatten(0, 1)
    size = spec.patch_size
    return terms + losses(fractal.next_fractal, patches.reshape(-1, 3, size, size), outputs, masks, r_weight)


def pixel_loss(head, pixels, conds, r_weight):
    """Pixels (N, 3) -> the loss of docs/format.md, "The RGB head", without the added noise."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    values = (255 * (pixels * std + mean)).round().clamp(0, 255).long()
    logits = pixel_logits(head, conds[0], values).float()
    red, green, blue = (
        F.cross_entropy(logits.flatten(0, 1), values.flatten(), reduction="none").view(-1, 3).mean(0)
    )
    r_weight = r_weight if head.training else 1.0
    return (r_weight * red + green + blue) / (r_weight + 2)


def loss(model, images, labels, masks):
    """The loss of `model` for its mode, training or evaluation. No label is dropped."""
    conds = [model.class_emb(labels)] * model.num_conds
    return sum(losses(model, images, conds, masks, model.arguments["r_weight"]))


def pixel_logits(head, cond, values):
    """Conditions (N, D), values (N, 3) -> logits (N, 3, 256). Has the four tokens of the published code."""
    tokens = [
        head.cond_proj(cond),
        head.r_codebook(values[:, 0]),
        head.g_codebook(values[:, 1]),
        head.b_codebook(values[:, 2]),
    ]
    x = head.ln(torch.stack(tokens, dim=1))
    for b in head.blocks:
        x = block(b, x, head.num_heads, causal=True)
    x = head.norm(x)
    tied = ((head.r_codebook, head.r_mlm), (head.g_codebook, head.g_mlm), (head.b_codebook, head.b_mlm))
    return torch.stack([x[:, i] @ book.weight.T + mlm.bias for i, (book, mlm) in enumerate(tied)], dim=1)


def guided_probabilities(logits, doubled, scale, temperature, threshold):
    """Logits (2N or N, 256) -> probabilities (N, 256), by equation (F7) of docs/format.md, "Sampling"."""
    logits = logits * temperature
    if not doubled:
        return torch.softmax(logits, dim=-1)
    cond, uncond = logits.chunk(2)
    lifted = torch.maximum(uncond, cond - cond.max(-1, keepdim=True)[0] + uncond.max(-1, keepdim=True)[0])
    uncond = torch.where(torch.softmax(cond, dim=-1) < threshold, lifted, uncond)
    return torch.softmax(uncond + scale * (cond - uncond), dim=-1)


def inverse_cdf(probs, uniforms):
    """Returns the first value whose cumulative probability exceeds the uniform number times the total."""
    cdf = probs.cumsum(-1)
    return (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(-1).clamp(max=255)


class ReferenceSampler:
    """Draws images from a model, as docs/format.md, "Sampling" describes it.

    steps, scale, schedule, temperature, threshold  the settings of FractalGen.sample
    pick                                            (probs (N, 256), uniforms (N,)) -> drawn values (N,)
    """

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
        """Draws R, G and B. Conditions, each (N or 2N, D) -> normalised pixels (N, 3)."""
        n = len(noise)
        values = torch.zeros(n, 3, dtype=torch.long)
        for channel in range(3):
            twice = torch.cat([values, values]) if self.doubled else values
            logits = pixel_logits(head, conds[0], twice)[:, channel]
            probs = guided_probabilities(logits, self.doubled, scale, self.temperature, self.threshold)
            values[:, channel] = self.pick(probs, noise.value_uniforms[:, channel])
        return normalize(values)

    def level(self, fractal, conds, noise, scale):
        """Draws all patches of one level. Conditions, each (N or 2N, D) -> images (N, 3, H, H)."""
        if not isinstance(fractal, FractalGen):
            return self.pixel(fractal, conds, noise, scale)[:, :, None, None]
        g, spec, n = fractal.generator, fractal.generator.spec, len(noise)
        order = g.order(noise.order_uniforms)  # (N, L)
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
                outputs = mar_outputs(
                    g, conds, twice(canvas), twice(known), None if pixel is None else twice(pixel)
                )
                outputs = [h[torch.arange(len(h))[:, None], twice(where)].flatten(0, 1) for h in outputs]
            else:
                outputs = [self.ar(g, conds, twice(canvas), begin, caches)]
            picked = [m[rows, where].flatten(0, 1) for m in patch_noise]
            patches = self.level(fractal.next_fractal, outputs, Noise(picked), scale)
            canvas[rows, where] = patches.reshape(n, end - begin, -1)
            known[rows, where] = True
        return unpatchify(canvas, spec.patch_size)

    def ar(self, g, conds, canvas, place, caches):
        """Returns the condition of patch number `place`, (N, D), and adds its keys and values to `caches`."""
        token = g.cond_emb(conds[0]) if place == 0 else g.patch_emb(canvas[:, place - 1])
        x = g.patch_emb_ln(token[:, None] + g.pos_embed_learned[:, place : place + 1])
        for b, past in zip(g.blocks, caches, strict=True):
            cos, sin = g.rope_cos[place : place + 1], g.rope_sin[place : place + 1]
            x = rotary_block(b, x, g.spec.num_heads, cos, sin, past)
        return g.norm(x)[:, 0]


def patch_maps(noise, spec):
    """Cuts the maps of random numbers of the levels below into patches (N, L, 5, s, s)."""
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
    """A `pick` that makes a sampler draw known images, and adds up the bits of all draws."""

    def __init__(self, model: FractalGen, values: torch.Tensor, seed: int = 0):
        """`values` (B, 3, H, H) are the images to draw; the orders of patches are those of `seed`."""
        self.noise, self.bits = Noise.of_images(seed, range(len(values)), model.noise_sizes), 0.0
        for side, size in zip(self.noise.maps, model.noise_sizes, strict=True):
            patches = patchify(normalize(values), size).unflatten(2, (3, size, size))  # (B, L, 3, p, p)
            # The values of guiding pixels, or of pixels at the last level, (B, 3, L).
            drawn = to_values(patches.mean(-1).mean(-1), dim=2).transpose(1, 2)
            side[:, VALUES] = ((drawn + 0.5) / 256).view_as(side[:, VALUES])

    def __call__(self, probs, uniforms):
        picked = (uniforms * 256).long()
        self.bits -= probs.double().gather(1, picked[:, None]).log2().sum().item()
        return picked
