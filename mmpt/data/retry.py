"""Which failures of disks, networks and servers pass, and trying again where they do.

action -> its result | error -> _cause -> lasts: UserError at once | passes: wait, action again -> UserError after TRIES
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import TypeVar

from mmpt.types import UserError

TRIES = 6
FIRST_DELAY = 0.1  # seconds before the second try, twice as long before each further one

LASTING = {
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENXIO, errno.ENODEV, errno.ENOSYS),
}
"""Errors of the system that another try does not mend."""

# Errors of drivers that are no OSError; by name, because a driver is imported only where it is used.
DRIVER_ERRORS = {
    "aiohttp.client_exceptions.ClientError",
    "azure.core.exceptions.AzureError",
    "botocore.exceptions.BotoCoreError",
    "botocore.parsers.ResponseParserError",
    "google.auth.exceptions.GoogleAuthError",
}
PASSING_ERRORS = {
    "aiohttp.client_exceptions.ClientConnectionError",
    "aiohttp.client_exceptions.ClientPayloadError",
    "azure.core.exceptions.IncompleteReadError",
    "azure.core.exceptions.ServiceRequestError",
    "azure.core.exceptions.ServiceResponseError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.IncompleteReadError",
    "botocore.parsers.ResponseParserError",
    "google.auth.exceptions.TransportError",
}
CHANGED_ERRORS = {"s3fs.utils.FileExpired"}
PASSING_STATUS = {408, 425, 429}  # of HTTP, beside all from 500 on

T = TypeVar("T")


def retrying(what: str, action: Callable[[], T], sleep: Callable[[float], None] = time.sleep) -> T:
    """The result of `action`, which is tried up to TRIES times where a disk, a network or a server fails for a moment.

    `what` is the file or address that messages name; they never hold the text of an error, which may hold credentials.
    Raises UserError after the last try, and at once for what no further try mends. Errors of other kinds pass through.
    """
    for attempt in range(TRIES):
        if attempt:
            sleep(FIRST_DELAY * 2 ** (attempt - 1))
        try:
            return action()
        except Exception as error:
            cause = true_cause(error)
            if not (isinstance(cause, OSError) or http_status(cause) or _is_any(cause, DRIVER_ERRORS)):
                raise
            last = _describe(cause)
            # `from None`: a worker's traceback is printed whole, and would show the text of the error.
            if fault := _lasting(cause):
                raise UserError(f"{what}: {fault}") from None
    raise UserError(
        f"{what}: {last}, after {TRIES} tries; check the disk, the network or the server, and resume from the last checkpoint"
    )


def true_cause(error: Exception) -> BaseException:
    """fsspec's file system of the web calls every failure 'not found'; what it was is the cause."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None:
        return error
    return cause if http_status(cause) or isinstance(cause, OSError) or _is_any(cause, PASSING_ERRORS) else error


def is_missing(error: Exception) -> bool:
    """Whether the error says that there is no such file."""
    cause = true_cause(error)
    return isinstance(cause, FileNotFoundError | NotADirectoryError) or http_status(cause) in (404, 410)


def http_status(error: BaseException) -> int | None:
    """The status of a server's answer, where a driver's error carries one."""
    found = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    return next((value for value in found if isinstance(value, int) and 100 <= value < 600), None)


def _lasting(error: BaseException) -> str | None:
    """What is wrong for good, and the mend; None where another try may do."""
    status = http_status(error)
    if isinstance(error, FileNotFoundError | NotADirectoryError) or status in (404, 410):
        return "no such file; check shards.root and shards.pattern"
    if isinstance(error, PermissionError) or status in (401, 403, 407):
        return "access refused; check its permissions, and for an address the credentials in the environment"
    if _is_any(error, CHANGED_ERRORS):
        return "it was changed while it was copied; index it again"
    if status:
        passes = status >= 500 or status in PASSING_STATUS
    elif isinstance(error, OSError):
        passes = error.errno not in LASTING
    else:
        passes = _is_any(error, PASSING_ERRORS)
    return None if passes else f"{_describe(error)}; check shards.root, and for an address its driver's settings"


def _is_any(error: BaseException, names: set[str]) -> bool:
    return any(f"{cls.__module__}.{cls.__qualname__}" in names for cls in type(error).__mro__)


def _describe(error: BaseException) -> str:
    if status := http_status(error):
        return f"its server answers {status}"
    known = isinstance(error, OSError) and error.errno in errno.errorcode
    return os.strerror(error.errno) if known else type(error).__name__
