"""Files from the internet: a server that cannot be reached is noticed at once, and a hub's cache is
enough without one.
"""

import re
import ssl
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msmdiff.core.errors import MsmdiffError

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""A name, or an owner's name and one; anything else is a path."""
PATIENCE = 5.0
"""Seconds that an answer is waited for."""


class OutOfReach(MsmdiffError):
    """What would have to come from the internet, and cannot."""


def require(url: str) -> None:
    """Raise OSError unless the server of `url` answers, whatever it answers, within PATIENCE.

    Proxies of the environment are used.
    """
    failures: list[Exception] = [OSError(f"no answer within {PATIENCE:g} s")]

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=PATIENCE).close()
        except urllib.error.HTTPError:
            pass  # an answer
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ssl.SSLError):  # else too, by other certificates
                failures[:] = [error]
                return
        except (OSError, ValueError) as error:
            failures[:] = [error]
            return
        failures.clear()

    # In a thread, since looking up a name has a patience of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if failures:
        reason = getattr(failures[0], "reason", failures[0])
        raise OSError(f"{url.split('/')[2]} cannot be reached: {reason}")


@contextmanager
def loading(source: str, what: str, remedy: str) -> Iterator[None]:
    """Let a library load `source` from the hub, from its cache alone where the hub is out of reach.

    Args:
        source: a path that is there, with which this does nothing, or a hub id.
        what: which option it is, for the sentence.
        remedy: what to give instead.

    Raises OutOfReach where neither the hub nor its cache can give it; whatever else the library
    raises passes.
    """
    if Path(source).exists():
        yield
        return
    if not HUB_ID.fullmatch(source):
        raise MsmdiffError(f"{what} {source}: there is no such folder or file: {remedy}")
    from huggingface_hub import constants

    offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    if not offline:
        try:
            require(constants.ENDPOINT)
        except OSError as error:
            offline = str(error)
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = bool(offline)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries to one another
            yield
    except Exception:  # the libraries' own words differ, and do not say what can be done
        if not offline:
            raise
        raise OutOfReach(
            f"{what} {source} is no folder or file here, nor whole in the hub's cache, and the hub "
            f"is out of reach ({offline}): {remedy}"
        ) from None
    finally:
        constants.HF_HUB_OFFLINE = before
