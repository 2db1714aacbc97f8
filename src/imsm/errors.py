"""The error for what a user can put right."""


class InputError(ValueError):
    """Something that was given cannot work.

    The message says what was expected, what was given and what to do; the command line turns it into exit status 2.
    """
