"""Mechanisms behind the scripts. Nothing here imports a script; importing this package loads no heavy library."""


class UserError(Exception):
    """Bad input from the user: the message is one line that names the cause and the cure.

    The scripts print it as ``error: …`` and exit with code 1 (common/cli.py); a library caller can catch it.
    """


class RankError(UserError):
    """An error that may have hit this process alone: any rank prints it, not only the first."""
