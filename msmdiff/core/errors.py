"""The two errors a user may meet. Each carries one finished sentence; the command line prints it and exits."""


class MsmdiffError(Exception):
    """Something failed: a file, a number, a machine. Exit code 1."""

    exit_code = 1


class UsageError(MsmdiffError):
    """What was asked for cannot be: an option, a value, a combination. Exit code 2."""

    exit_code = 2
