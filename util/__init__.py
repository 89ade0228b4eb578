"""What the models, the evaluation and the engine share. Nothing in here imports any of those."""

import argparse

from util.threads import bound_spinning

bound_spinning()

import torch  # noqa: E402  not before

# Published checkpoints carry their `args`. This lets torch.load accept them in its safe mode, as in
# torch.load(path)["model"], which clients call.
torch.serialization.add_safe_globals([argparse.Namespace])
