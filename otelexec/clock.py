"""The clock that waits, leases and pauses here go by."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Final

monotonic: Final[Callable[[], float]] = partial(time.clock_gettime, time.CLOCK_MONOTONIC)
"""`time.monotonic`, also in a test that freezes that one (freezegun does): a wait would have no end, and nothing would be sent."""
