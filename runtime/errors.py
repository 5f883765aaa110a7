"""The one exception that a user, and not a programmer, is meant to read; and one line out of any other."""


class UserError(Exception):
    """Bad input, data or configuration. The message is one line: what is wrong, and what to do about it."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that is not blank; its class's name where there is none."""
    return _message_lines(error)[0]


def last_line(error: BaseException) -> str:
    """The last line of an exception's message that is not blank; its class's name where there is none."""
    return _message_lines(error)[-1]


def _message_lines(error: BaseException) -> list[str]:
    """The message's lines, stripped, without blank ones; at least one."""
    try:
        message = str(error)
    except Exception:  # other people's exceptions can fail to be printed, and that must not hide what they stand for
        message = ""
    return [line.strip() for line in message.splitlines() if line.strip()] or [type(error).__name__]
