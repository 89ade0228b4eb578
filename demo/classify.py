"""Classes by Bayes' rule, from a model's likelihoods, beside a logistic regression of the pixels, on held-out images.

    python demo/classify.py MODEL DATA [--num_orders 4]

MODEL: a folder of save_pretrained, or id on the hub; DATA: train/CLASS/*.png and val/CLASS/*.png, of the model's size.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from common import read_split, share_read_as_asked  # noqa: E402  need the paths above

from models.hub.zoo import load  # noqa: E402
from util.flags import Parser  # noqa: E402


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("classify.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument(
        "--num_orders", type=int, default=4, help="drawn orders to average, where the model has MAR levels"
    )
    parser.add_argument("--device", help="default: the accelerator that torch finds, else cpu")
    args = parser.parse_args(arguments)
    with parser.one_line_errors():
        model = load(args.model, args.device)
        images, labels = read_split(args.data / "val")
        began = time.perf_counter()
        posterior = model.classify(images, num_orders=args.num_orders)
    labels = torch.from_numpy(labels)
    right = (posterior.argmax(1) == labels).double().mean().item()
    log_score = -posterior.gather(1, labels[:, None]).log().mean().item()
    seconds = (time.perf_counter() - began) / len(labels)
    one_each = [
        Image.fromarray(images[(labels == label).nonzero()[0].item()]) for label in range(model.class_num)
    ]
    _, regression = share_read_as_asked(args.data, one_each)
    print(f"of {len(labels)} held-out images, the right class first")
    print(
        f"  {args.model}: {right:.2%} (mean -log p of the true class {log_score:.3f} nats; {seconds:.2f} s an image)"
    )
    print(f"  logistic regression of the training images' pixels: {regression:.2%}")


if __name__ == "__main__":
    main()
