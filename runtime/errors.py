"""The one exception that a user, and not a programmer, is meant to read."""


class UserError(Exception):
    """Bad input, data or configuration. The message is one line: what is wrong, and what to do about it."""
