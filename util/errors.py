"""The exception for mistakes that the user can correct, and a helpers for its one-line messages."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input. Its message is one line that names the file, flag or value and says what would be right.

    The command line prints the message and exits with status 2. All other exceptions keep their traceback.
    """


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
