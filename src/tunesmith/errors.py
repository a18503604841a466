"""The two errors that a user can meet: each is one line that says what was asked, what was found, where, and the way out."""


class UserError(ValueError):
    """Something the user asked for cannot be done; the command line prints it in one line and exits with 1."""


class UsageError(UserError):
    """The command line or a configuration file is wrong; exit code 2."""
