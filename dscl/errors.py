"""The two ways a run ends early on somebody's account: a wrong input, or a failure outside the program."""


class UserError(ValueError):
    """The input is wrong. The message names what was given, what is allowed and what to change; exit status 2."""


class Failure(RuntimeError):
    """Something outside the program failed (a disk is full, say). One clear line, exit status 1."""
