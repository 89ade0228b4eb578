"""The one exception that means: the user can mend this, and one line says how."""


class UserError(ValueError):
    """Bad input. Its message is one line that names the file, flag or value and what would be right.

    The command line prints it and exits with status 2; everything else keeps its traceback.
    """


def one_line(said: object) -> str:
    """What another library or a file says, as part of our one line: its first line without control characters, at most
    120 characters. A hostile file may decide what stands there: it must not move the cursor or fill the screen.
    """
    line = next((line.strip() for line in str(said).splitlines() if line.strip()), type(said).__name__)
    return "".join(letter if letter.isprintable() else "?" for letter in line[:120])
