"""The two ways in which fedstill refuses to go on."""

from __future__ import annotations


class FedstillError(Exception):
    """Base of the errors that speak to the user; the command line prints them as one line."""

    exit_code = 1


class InputError(FedstillError):
    """Something the user gave cannot work: a key, a value, a file, a combination (exit code 2).

    The message says what is wrong, where (file, key, client), and what to do. Nothing has been
    written when it is raised.
    """

    exit_code = 2


class RunError(FedstillError):
    """A run that had started cannot go on: training turned non-finite, a disk is full (exit code 1).

    The last good checkpoint is intact.
    """

    exit_code = 1
