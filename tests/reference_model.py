"""An independent reference implementation of the loss and of sampling, as docs/format.md describes them.

It is simple and slow: it computes everything step by step, and shares, caches or skips nothing, except that
AR levels keep the keys and values of earlier tokens, without which they would be too slow to use. It reads a
model's weights by their names. Of the library it calls only the generators' `order` and `plan`, `Noise` and the
conversions of util.pixels. Tests compare the library's loss and sampler with it, and tests/bench.py compares
their speed.

Letters: N images, C channels, V values, S an image's sides, p a patch's sides, P cells of a patch, L patches,
D width, K conditions, T tokens, d width of a head. A batch that is doubled for guidance holds the class
conditions first, and then `fake_latent`.
"""

import torch
import torch.nn.functional as F

from models.fractalgen import FractalGen
from models.mar import MAR
from models.noise import VALUES, Noise
from models.patches import as_shapes


def patchify(x, sides):
    """(N, C, *S) -> (N, L, C * P), for patches with these sides."""
    for axis, side in enumerate(sides):
        x = x.unfold(2 + axis, side, side)  # in the end (N, C, *grid, *sides)
    return x.flatten(2, 1 + len(sides)).transpose(1, 2).flatten(2)


def unpatchify(x, grid, sides):
    """(N, L, C * P) -> (N, C, *S)."""
    axes = len(grid)
    x = x.reshape(len(x), *grid, -1, *sides).movedim(1 + axes, 1)  # (N, C, *grid, *sides)
    for axis in range(axes):
        x = x.movedim(2 + axes, 3 + axis).flatten(2 + axis, 3 + axis)
    return x


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


def embed(g, patches):
    """Patches (..., C * P) -> tokens (..., D); of categorical values, by the vector of each of them."""
    alphabet = g.spec.alphabet
    if not alphabet.is_ordinal:
        values = patches.round().long().unflatten(-1, (alphabet.channels, -1)).unbind(-2)
        tables = g.patch_emb.table.weight.chunk(alphabet.channels)
        patches = torch.cat([F.embedding(*pair).flatten(-2) for pair in zip(values, tables, strict=True)], -1)
    return linear(g.patch_emb, patches)


def neighbours(x, grid):
    """(N, L, D) -> the vectors of each patch, and of those around it: above, right, below, left on two axes."""
    x = x.unflatten(1, grid)

    def shifted(axis, step):
        rest, zeros = x.shape[axis] - 1, torch.zeros_like(x.narrow(axis, 0, 1))
        parts = [zeros, x.narrow(axis, 0, rest)] if step < 0 else [x.narrow(axis, 1, rest), zeros]
        return torch.cat(parts, dim=axis)

    signs = [(axis, -1 if axis == 1 else 1) for axis in range(1, 1 + len(grid))]
    found = [
        x,
        *(shifted(axis, step) for axis, step in signs),
        *(shifted(axis, -step) for axis, step in signs),
    ]
    return [f.flatten(1, len(grid)) for f in found]


def mar_outputs(g, conds, patches, known, pixel):
    """A MAR generator's outputs: patches (N, L, C * P), known (N, L) bool -> conditions, each (N, L, D)."""
    prefix = [g.cond_emb(cond) for cond in reversed(conds[: g.spec.num_conds])]
    if pixel is not None:
        prefix.insert(0, g.pix_proj(pixel))
    tokens = torch.where(known[..., None], embed(g, patches), g.mask_token)
    x = torch.cat([torch.stack(prefix, dim=1), tokens], dim=1)
    x = g.patch_emb_ln(x + g.pos_embed_learned)
    for b in g.blocks:
        x = block(b, x, g.spec.num_heads, attn_dropout=g.spec.attn_dropout)
    return neighbours(g.norm(x)[:, len(prefix) :], g.spec.grid)


def losses(fractal, images, conds, masks, r_weight):
    """Returns the terms of the loss, level by level.

    images  normalised, (N, C, *S)
    masks   for each level bool (N, L), True for masked patches, or None for an AR level
    """
    if not isinstance(fractal, FractalGen):
        return [pixel_loss(fractal, images.flatten(1), conds, r_weight)]
    g, spec, terms, pixel = fractal.generator, fractal.generator.spec, [], None
    patches = patchify(images, spec.patch_size)
    if isinstance(g, MAR):
        if spec.guiding_pixel:
            pixel = mean_cell(images)
            terms.append(pixel_loss(g.guiding_pixel_loss, pixel, conds, 5.0 if g.training else 1.0))
        masked = masks[spec.index]
        outputs = [cond[masked] for cond in mar_outputs(g, conds, patches, ~masked, pixel)]
        patches = patches[masked]
    else:
        x = torch.cat([g.cond_emb(conds[0])[:, None], embed(g, patches)], dim=1)
        x = g.patch_emb_ln(x + g.pos_embed_learned)
        for b in g.blocks:
            x = rotary_block(b, x, spec.num_heads, g.rope_cos, g.rope_sin)
        outputs, patches = [g.norm(x)[:, :-1].flatten(0, 1)], patches.flatten(0, 1)
    return terms + losses(
        fractal.next_fractal, patches.unflatten(1, spec.patch_shape), outputs, masks, r_weight
    )


def mean_cell(images):
    """(N, C, *S) -> (N, C): the mean over the last axis, then over the one before it, and so on."""
    while images.dim() > 2:
        images = images.mean(-1)
    return images


def pixel_loss(head, pixels, conds, r_weight):
    """Pixels (N, C) -> the loss of docs/format.md, "The RGB head", without the added noise."""
    values = head.alphabet.to_values(pixels)
    logits = pixel_logits(head, conds[0], values).float()
    nll = F.cross_entropy(logits.flatten(0, 1), values.flatten(), reduction="none").view(values.shape)
    weights = torch.ones(values.shape[1])
    weights[0] = r_weight if head.training else 1.0
    return (nll.mean(0) * weights).sum() / weights.sum()


def loss(model, images, labels, masks):
    """The loss of `model` for its mode, training or evaluation. No label is dropped."""
    conds = [model.class_emb(labels)] * model.num_conds
    return sum(losses(model, images, conds, masks, model.arguments["r_weight"]))


def pixel_logits(head, cond, values):
    """Conditions (N, D), values (N, C) -> logits (N, C, V). Has the C + 1 tokens of the published code."""
    names = head.alphabet.channel_names
    books = [getattr(head, f"{name}_codebook") for name in names]
    x = [head.cond_proj(cond), *(book(values[:, i]) for i, book in enumerate(books))]
    x = head.ln(torch.stack(x, dim=1))
    for b in head.blocks:
        x = block(b, x, head.num_heads, causal=True)
    x = head.norm(x)
    biases = [getattr(head, f"{name}_mlm").bias for name in names]
    tied = enumerate(zip(books, biases, strict=True))
    return torch.stack([x[:, i] @ book.weight.T + bias for i, (book, bias) in tied], dim=1)


def guided_probabilities(logits, doubled, scale, temperature, threshold):
    """Logits (2N or N, V) -> probabilities (N, V), by equation (F7) of docs/format.md, "Sampling"."""
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
    return (cdf <= uniforms[:, None] * cdf[:, -1:]).sum(-1).clamp(max=probs.shape[-1] - 1)


class ReferenceSampler:
    """Draws images from a model, as docs/format.md, "Sampling" describes it.

    steps, scale, schedule, temperature, threshold  the settings of FractalGen.sample
    pick                                            (probs (N, V), uniforms (N,)) -> drawn values (N,)
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
        """Class labels (N,), or None -> normalised images (N, C, *S)."""
        unconditional = self.model.fake_latent.repeat(len(noise), 1)
        cond = unconditional if labels is None else self.model.class_emb(labels)
        cond = torch.cat([cond, unconditional]) if self.doubled else cond
        return self.level(self.model, [cond] * self.model.num_conds, noise, self.scale)

    def pixel(self, head, conds, noise, scale):
        """Draws the channels. Conditions, each (N or 2N, D) -> normalised pixels (N, C)."""
        channels = head.alphabet.channels
        values = torch.zeros(len(noise), channels, dtype=torch.long)
        for channel in range(channels):
            twice = torch.cat([values, values]) if self.doubled else values
            logits = pixel_logits(head, conds[0], twice)[:, channel]
            probs = guided_probabilities(logits, self.doubled, scale, self.temperature, self.threshold)
            values[:, channel] = self.pick(probs, noise.value_uniforms[:, channel])
        return head.alphabet.normalize(values)

    def level(self, fractal, conds, noise, scale):
        """Draws all patches of one level. Conditions, each (N or 2N, D) -> images (N, C, *S)."""
        if not isinstance(fractal, FractalGen):
            return self.pixel(fractal, conds, noise, scale).view(len(noise), -1, *noise.maps[0].shape[2:])
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
        return unpatchify(canvas, spec.grid, spec.patch_size)

    def ar(self, g, conds, canvas, place, caches):
        """Returns the condition of patch number `place`, (N, D), and adds its keys and values to `caches`."""
        token = g.cond_emb(conds[0]) if place == 0 else embed(g, canvas[:, place - 1])
        x = g.patch_emb_ln(token[:, None] + g.pos_embed_learned[:, place : place + 1])
        for b, past in zip(g.blocks, caches, strict=True):
            cos, sin = g.rope_cos[place : place + 1], g.rope_sin[place : place + 1]
            x = rotary_block(b, x, g.spec.num_heads, cos, sin, past)
        return g.norm(x)[:, 0]


def patch_maps(noise, spec):
    """Cuts the maps of random numbers of the levels below into patches (N, L, 2 + C, *s)."""
    cut = []
    for m in noise.maps[1:]:
        s = [side // places for side, places in zip(m.shape[2:], spec.grid, strict=True)]
        cut.append(patchify(m, s).unflatten(2, (-1, *s)))
    return cut


class Forced:
    """A `pick` that makes a sampler draw known images, and adds up the bits of all draws."""

    def __init__(self, model: FractalGen, values: torch.Tensor, seed: int = 0):
        """`values` (B, C, *S) are the images to draw; the orders of patches are those of `seed`."""
        alphabet, images = model.alphabet, model.alphabet.normalize(values)
        self.noise, self.paid = model.noise(seed, range(len(values))), []
        for numbers, sides in zip(self.noise.maps, as_shapes(model.img_size_list), strict=True):
            patches = patchify(images, sides).unflatten(2, (alphabet.channels, *sides))  # (B, L, C, *p)
            # The values of guiding pixels, or of pixels at the last level, (B, C, L).
            drawn = alphabet.to_values(mean_cell(patches.flatten(0, 1))).unflatten(0, (len(values), -1))
            drawn = drawn.transpose(1, 2).reshape(numbers[:, VALUES].shape)
            numbers[:, VALUES] = (drawn + 0.5) / alphabet.num_values

    def __call__(self, probs, uniforms):
        picked = (uniforms * probs.shape[1]).long()
        self.paid.append(-probs.double().gather(1, picked[:, None]).log2()[:, 0])
        return picked

    @property
    def bits(self) -> float:
        """The bits of all images."""
        return torch.cat(self.paid).sum().item()

    @property
    def bits_of_each(self) -> torch.Tensor:
        """(B,): the bits of each image; only where all images are drawn together, from the first step on."""
        return torch.stack([paid.view(len(self.noise), -1).sum(1) for paid in self.paid]).sum(0)
