"""What a command tells in one line, without a traceback."""


class UserError(ValueError):
    """A mistake that the user can mend: one line that names the key, the value and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


class Fault(UserError):
    """What befell a process from outside, told as a mistake is; but starting again may help: exit code 1."""
