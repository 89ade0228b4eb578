"""Classes as people say them, by name or number, as labels (docs/format.md, "Class conditions and levels").

`model` is a FractalGen: `class_num` is the number of its classes, `class_names` are their names or None.
"""

from collections.abc import Iterable, Sequence
from numbers import Integral

from util.errors import ArgumentError, one_line, perhaps

Label = int | str  # a class by its number or by its name


def find_class(said: str, names: Sequence[str] | None, class_num: int, argument: str = "class") -> int:
    """The label of a class named or numbered. A name counts before a number, its exact spelling before
    another case.

    Raises ArgumentError, with the names that come close, for what is no class or may be two.
    """
    said = said.strip()
    for spelling in (str, str.casefold):
        found = [label for label, name in enumerate(names or ()) if spelling(name) == spelling(said)]
        if len(found) == 1:
            return found[0]
        if found:
            numbers = " or ".join(map(str, found))
            raise ArgumentError(argument, f"{one_line(said)!r} may be {numbers}; give the number")
    if said.isdecimal() and said.isascii() and len(said) < 10 and int(said) < class_num:
        return int(said)
    raise _no_class(argument, one_line(said), names, class_num, perhaps(said, names or ()))


def _no_class(argument: str, said, names, class_num: int, near: str = "") -> ArgumentError:
    if not class_num:
        return ArgumentError(argument, f"{said!r} is given, but the model has no classes")
    wanted = f"{'one of its names or ' * bool(names)}a number from 0 to {class_num - 1}"
    return ArgumentError(argument, f"{said!r} is no class of the model; give {wanted}{near}")


def check_labels(model, labels, argument: str = "class_labels") -> list[int] | None:
    """Returns one or several classes, each a name or a number, as a list of labels, and None as None.

    Raises ArgumentError for what is no class of the model.
    """
    if labels is None:
        return None
    labels = labels.tolist() if hasattr(labels, "tolist") else labels
    labels = list(labels) if isinstance(labels, Iterable) and not isinstance(labels, str) else [labels]
    if not labels:
        raise ArgumentError(argument, "must hold at least one class")
    found = []
    for label in labels:
        if isinstance(label, str):
            label = find_class(label, model.class_names, model.class_num, argument)
        elif isinstance(label, bool) or not (isinstance(label, Integral) and 0 <= label < model.class_num):
            raise _no_class(argument, label, model.class_names, model.class_num)
        found.append(int(label))
    return found


def labels_of_each(model, labels, num_images: int, argument: str = "class_labels") -> list[int] | None:
    """Returns one label for each image, or None.

    `labels` are as in `check_labels`: one for all images, or one for each. Raises ArgumentError for another
    number.
    """
    labels = check_labels(model, labels, argument)
    if labels is None:
        return None
    if len(labels) not in (1, num_images):
        raise ArgumentError(argument, f"must be one class, or one for each of the {num_images} images")
    return labels if len(labels) == num_images else labels * num_images
