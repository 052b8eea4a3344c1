"""What the instrumentor was asked for, the name that RQ goes by, and what keeps our errors away from its jobs."""

from __future__ import annotations

import logging
from typing import Final

from otelexec.choices import Choices
from otelexec.patches import Guard
from otelexec_rq import endings

SYSTEM: Final = "rq"
"""`messaging.system`."""

CHOICES: Final = Choices()

GUARD: Final = Guard(lambda: CHOICES.active, logging.getLogger("otelexec.rq"), endings.passes)
