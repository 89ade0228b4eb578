"""Classifies held-out images by a model's likelihoods (Bayes' rule), and by a logistic regression on pixels.

    python demo/classify.py MODEL DATA [--num_orders 4]

MODEL is a folder that save_pretrained wrote, or an id on the Hugging Face hub. DATA holds images of the
model's size, train/CLASS/*.png and val/CLASS/*.png. Prints both accuracies on val.
"""

import environment  # noqa: F401  first: without its packages a demo says how to get them

# isort: split
import time
from pathlib import Path

import torch
from baselines import classify_by_regression
from common import add_device_flag, make_parser, read_split
from PIL import Image

from models.hub.zoo import load
from util.errors import UserError


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("classify.py", __doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument(
        "--num_orders", type=int, default=4, help="random orders to average over, if the model has MAR levels"
    )
    add_device_flag(parser)
    args = parser.parse_args(arguments)
    with parser.one_line_errors():
        model = load(args.model, args.device)
        (train, train_labels), (images, labels) = (read_split(args.data / name) for name in ("train", "val"))
        for split, number in (("train", train_labels.max() + 1), ("val", labels.max() + 1)):
            if number != model.class_num:
                raise UserError(f"{args.data / split} has {number} classes, {args.model} {model.class_num}")
        if train.shape[1:] != images.shape[1:]:
            raise UserError(f"{args.data}: the images in train and in val are not of one size")
        start, shown = time.perf_counter(), [Image.fromarray(image) for image in images]
        posterior = model.classify(shown, num_orders=args.num_orders)
    labels = torch.from_numpy(labels)
    accuracy = (posterior.argmax(1) == labels).double().mean().item()
    nats = -posterior.gather(1, labels[:, None]).log().mean().item()
    seconds = (time.perf_counter() - start) / len(labels)
    first_of_each_class = [shown[(labels == label).nonzero()[0].item()] for label in range(model.class_num)]
    _, regression = classify_by_regression(args.data, first_of_each_class)
    print(f"accuracy on {len(labels)} held-out images")
    print(f"  {args.model}: {accuracy:.2%} ", end="")
    print(f"(mean -log p of the true class {nats:.3f} nats; {seconds:.2f} s per image)")
    print(f"  logistic regression on the pixels of the training images: {regression:.2%}")


if __name__ == "__main__":
    main()
