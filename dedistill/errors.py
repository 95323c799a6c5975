"""The one exception that carries a message for the user rather than for the programmer."""

RUN_AGAIN = 75
"""Exit code of a run that is not finished: the same command goes on with it (EX_TEMPFAIL of sysexits.h)."""


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, where, and the way out.

    The command line prints the message alone (the traceback only with ``--debug``) and exits with ``exit_code``:
    2 for a recipe or an argument, RUN_AGAIN where the same command may well succeed, 1 for everything else.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code
