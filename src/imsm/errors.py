"""The error for what a user can put right."""


class InputError(ValueError):
    """Something that was given cannot work.

    The message says what was expected, what was given and what to do; the command line turns it into exit status 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for one-line messages; with the next where it ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
