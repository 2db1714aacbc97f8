"""The error for what a user can put right."""


class InputError(ValueError):
    """Something that was given cannot work.

    The message says what was expected, what was given and what to do; the command line turns it into exit status 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for one-line messages."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
