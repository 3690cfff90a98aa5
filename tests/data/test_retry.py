import errno
from functools import partial

import pytest

from mmpt.data.retry import TRIES, retrying
from mmpt.types import UserError

DELAYS = [0.1, 0.2, 0.4, 0.8, 1.6]  # seconds between six tries


@pytest.mark.parametrize(
    "error", [TimeoutError(), ConnectionResetError(), OSError("no number"), OSError(errno.EBUSY, "slow down")]
)
def test_what_passes_is_tried_six_times_with_growing_delays(error: Exception) -> None:
    delays: list[float] = []
    calls: list[int] = []

    def action() -> None:
        calls.append(1)
        raise error

    with pytest.raises(UserError, match=r"shard x: .* after 6 tries"):
        retrying("shard x", action, delays.append)
    assert len(calls) == TRIES
    assert delays == pytest.approx(DELAYS)


@pytest.mark.parametrize(
    "error, told",
    [
        (PermissionError("denied for key testing"), "access refused; check its permissions"),
        (FileNotFoundError("key testing"), r"no such file; check shards\.root"),
        (OSError(errno.ENOSPC, "key testing"), "No space left on device"),
    ],
)
def test_what_lasts_is_told_at_once(error: Exception, told: str) -> None:
    with pytest.raises(UserError, match=f"shard x: {told}"):
        retrying("shard x", partial(_raise, error), lambda _: pytest.fail("waited"))


def test_what_is_no_fault_of_a_disk_or_network_passes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        retrying("shard x", lambda: 1 // 0, lambda _: pytest.fail("waited"))


def _raise(error: Exception) -> None:
    raise error
