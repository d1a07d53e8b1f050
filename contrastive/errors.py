"""The one exception type for a user's mistake."""


class UserError(ValueError):
    """A mistake that the user can mend: one line that names the key, the value and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """
