"""How long tests wait for what must happen, and how much of a sweep they do."""

from __future__ import annotations

import os
from typing import Final

PATIENCE: Final = 4 if os.environ.get("CI") else 1
"""Every wait for a condition is so many times as long: a shared machine of CI may stand still for seconds, and a wait costs nothing
when the condition holds."""

LENGTH: Final = int(os.environ.get("OTELEXEC_TEST_LONG", "0"))
"""0: the short forms; 1: the long sweeps as well, as in CI; 2: also those that CI has no time for."""
