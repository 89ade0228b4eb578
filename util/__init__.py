import argparse

import torch

# Published checkpoints carry their `args`. With this, torch.load in its safe mode takes them, as clients call it:
# torch.load(path)["model"].
torch.serialization.add_safe_globals([argparse.Namespace])
