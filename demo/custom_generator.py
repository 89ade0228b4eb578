"""An example of a generator type and its sampler. It predicts all patches in one step, from the condition."""

from torch import nn

from models.generator import Generator, LevelOutput, register_generator
from models.patches import patchify
from models.sampling.canvas import LevelSampler, register_sampler


@register_generator("independent", num_conds_out=1, num_conds_in=1)  # its name in generator_type_list
class Independent(Generator):
    def __init__(self, spec):
        super().__init__(spec)
        self.cond_emb = nn.Linear(spec.cond_dim, spec.num_patches * spec.embed_dim)

    def forward(self, images, conds, options):
        patches = patchify(images, self.spec.patch_size).unflatten(2, self.spec.patch_shape)
        return LevelOutput(patches.flatten(0, 1), [self.cond_emb(conds[0]).view(-1, self.spec.embed_dim)])

    def plan(self, num_iter, hidden=None):
        yield 0, self.spec.num_patches, 1.0  # (begin, end, progress) of the only step


@register_sampler(Independent)
class IndependentSampler(LevelSampler):
    start = staticmethod(lambda batch, order: batch.conds[0])

    def predict(self, cond, new, begin, end):
        return [self.generator.cond_emb(cond).view(-1, self.generator.spec.embed_dim)]
