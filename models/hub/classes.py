"""The names of classes."""

from collections.abc import Sequence


def imagenet_names() -> list[str]:
    """The 1,000 classes of ImageNet in the order of its folders, from torchvision (BSD-3-Clause)."""
    from torchvision.models import ResNet50_Weights

    return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def class_title(label: int, names: Sequence[str] | None) -> str:
    """The name of a class, or "class 3" where the classes have no names."""
    return names[label] if names else f"class {label}"
