"""The one exception that a user is meant to see."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. Its message is one sentence that names the field, the value and
    a fix.

    The command line prints the message alone and exits with code 2.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause that names the entries of `known` nearest to `name`, or all of them when none is
    near.
    """
    known = sorted(set(known))
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if nearest:
        return "did you mean " + " or ".join(repr(candidate) for candidate in nearest) + "?"
    return "it must be one of " + ", ".join(known)


class Interrupted(Exception):
    """A request to stop reached work that has nothing of its own to save; what is complete on disk
    stays.

    Work that takes long calls a `proceed` between bounded pieces, of at most a second or so, and
    cleans up as this passes through it. The training loop turns it into an orderly end of the call.
    """
