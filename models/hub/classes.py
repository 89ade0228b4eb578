"""Classes as people say them: names or numbers."""

from collections.abc import Sequence
from difflib import get_close_matches

from util.errors import UserError, one_line


def imagenet_names() -> list[str]:
    """The 1,000 classes of ImageNet in the order of its folders, from torchvision (BSD-3-Clause)."""
    from torchvision.models import ResNet50_Weights

    return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def find_class(said: str, names: Sequence[str] | None, class_num: int) -> int:
    """The label of a class named or numbered. A name counts before a number, its exact spelling before
    another case.

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
    spellings = {name.casefold(): name for name in names or ()}
    close = get_close_matches(said.casefold(), spellings, n=3, cutoff=0.5)
    perhaps = f"; perhaps {', '.join(spellings[name] for name in close)}" if close else ""
    wanted = f"{'one of its names or ' * bool(names)}a number from 0 to {class_num - 1}"
    raise UserError(f"the model has no class {one_line(said)!r}; give {wanted}{perhaps}")


def class_title(label: int, names: Sequence[str] | None) -> str:
    """The name of a class, or "class 3" where the classes have no names."""
    return names[label] if names else f"class {label}"
