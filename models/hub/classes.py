"""Classes as people say them: names or numbers."""

from collections.abc import Sequence
from difflib import get_close_matches

from util.errors import UserError, one_line


def imagenet_names() -> list[str]:
    """The 1,000 classes of ImageNet in the order of its folders: torchvision's (BSD-3-Clause), which needs no network."""
    from torchvision.models import ResNet50_Weights

    return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def find_class(said: str, names: Sequence[str] | None, class_num: int) -> int:
    """The label of a class named or numbered. A name counts before a number, its exact spelling before another case.

    Raises UserError, with the names that come close, for what is no class or may be two.
    """
    said = said.strip()
    for spelling in (str, str.casefold):
        found = [label for label, name in enumerate(names or ()) if spelling(name) == spelling(said)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f"class {one_line(said)!r} may be {' or '.join(map(str, found))}; give the number"
            )
    if said.isdecimal() and said.isascii() and int(said) < class_num:
        return int(said)
    if not class_num:
        raise UserError("the model has no classes")
    close = get_close_matches(
        said.casefold(), {name.casefold(): None for name in names or ()}, n=3, cutoff=0.5
    )
    close = [name for name in names or () if name.casefold() in close]
    wanted = (
        f"one of its names or a number from 0 to {class_num - 1}"
        if names
        else f"a number from 0 to {class_num - 1}"
    )
    raise UserError(
        f"the model has no class {one_line(said)!r}; give {wanted}"
        + (f"; perhaps {', '.join(close)}" if close else "")
    )


def class_title(label: int, names: Sequence[str] | None) -> str:
    return names[label] if names else f"class {label}"
