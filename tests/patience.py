"""How long tests wait for what must happen."""

from __future__ import annotations

import os
from typing import Final

PATIENCE: Final = 4 if os.environ.get("CI") else 1
"""Every wait for a condition is so many times as long: a shared machine of CI may stand still for seconds, and a wait costs nothing
when the condition holds."""
