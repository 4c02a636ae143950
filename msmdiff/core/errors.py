"""The two errors a user may meet. Each carries one finished sentence; the command line prints it
and exits.
"""

import difflib
import unicodedata


class MsmdiffError(Exception):
    """Something failed: a file, a number, a machine. Exit code 1.

    The sentence is one line whatever names stand in it: controls are written as escapes.
    """

    exit_code = 1

    def __init__(self, sentence: str = "") -> None:
        super().__init__("".join(map(_shown, sentence)))


def _shown(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Zl", "Zp"):
        return character.encode("unicode_escape").decode()
    return character


class UsageError(MsmdiffError):
    """What was asked for cannot be: an option, a value, a combination. Exit code 2."""

    exit_code = 2


def nearest(name: str, candidates: list[str]) -> str:
    """A clause `; did you mean 'x'?`, or nothing where no candidate is close."""
    lowered = {candidate.lower(): candidate for candidate in reversed(candidates)}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    return f"; did you mean '{lowered[close[0]]}'?" if close else ""
