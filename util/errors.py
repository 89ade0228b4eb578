"""The exceptions for mistakes that the user can correct, and helpers for messages of one line."""

import logging
import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from numbers import Real

from torch import distributed

log = logging.getLogger(__name__)


class UserError(ValueError):
    """Bad input. Its message is one line that names the file, flag or value and says what would be right.

    The command line prints the message and exits with status 2. All other exceptions keep their traceback.
    """


class ArgumentError(UserError):
    """A UserError about one argument: its message is the argument's name and then the problem."""

    def __init__(self, name: str, problem: str):
        super().__init__(name, problem)
        self.name, self.problem = name, problem

    def __str__(self) -> str:
        return f"{self.name} {self.problem}"


@contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Within this block, an ArgumentError names the argument as the caller does, by `names`.

    Whoever passes an argument or a flag on under another name uses it: {"guidance_scale": "cfg"}.
    """
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(names.get(error.name, error.name), error.problem) from None


def whole_number(name: str, value, low: int = 0, high: int | None = None) -> int:
    """An integer of Python, NumPy or torch, from `low` to `high` (None: of any size), as an int.

    Raises ArgumentError for others, and also for floats, texts and bools: 1.5 would be taken for 1 elsewhere,
    and True is more likely a mistake than the number 1.
    """
    bounds = f"at least {low}" if high is None else f"from {low} to {high}"
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise ArgumentError(name, f"{one_line(repr(value))} must be an integer, {bounds}")
    if number < low or (high is not None and number > high):
        raise ArgumentError(name, f"{number} must be {bounds}")
    return number


def real_number(name: str, value, low: float, high: float, wanted: str) -> float:
    """A finite number of Python, NumPy or torch, from `low` to `high`, as a float.

    Raises ArgumentError for others; `wanted` ends its message, as in "a number from 0 to 1".
    """
    number = value.item() if getattr(value, "shape", None) == () else value
    if isinstance(number, bool) or not isinstance(number, Real) or not (low <= number <= high):
        raise ArgumentError(name, f"{one_line(repr(number))} must be {wanted}")
    return float(number)


def perhaps(said: str, names: Iterable[str]) -> str:
    """ "; perhaps A, B" with those of `names` that are spelled most like `said`, in any case; else ""."""
    spellings = {name.casefold(): name for name in names}
    close = get_close_matches(said.casefold(), spellings, n=3, cutoff=0.5)
    return f"; perhaps {', '.join(one_line(spellings[name]) for name in close)}" if close else ""


@lru_cache(256)
def warn_once(line: str) -> None:
    """Logs a warning, on the first process of a run only, and not again if it is the same line."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank()):
        log.warning(line)


def one_line(message: object) -> str:
    """Makes the message of another library, or text from a file, safe to quote in a message of one line.

    Returns its first line that is not empty, cut at 120 characters, with "?" for control characters: a
    hostile file may choose the text, and it must not move the cursor or fill the screen.
    """
    lines = (line.strip() for line in str(message).splitlines())
    line = next(filter(None, lines), type(message).__name__)
    return "".join(letter if letter.isprintable() else "?" for letter in line[:120])


@contextmanager
def reading(file: object, problem: str, advice: str = "") -> Iterator[None]:
    """Within this block, turns all errors into a UserError that names `file`.

    A damaged or hostile file makes its reader raise errors of any type. These become
    "<file>: <problem> (<what the error says>)<advice>". A UserError only gets the file's name in front.
    """
    try:
        yield
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{file}: {problem} ({one_line(reason)}){advice}") from error
