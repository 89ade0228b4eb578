"""The one exception that means: the user can mend this, and one line says how."""


class UserError(ValueError):
    """Bad input. Its message is one line that names the file, flag or value and what would be right.

    The command line prints it and exits with status 2; everything else keeps its traceback.
    """
