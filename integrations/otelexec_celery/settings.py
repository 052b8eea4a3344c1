"""What the instrumentor was asked for, and the name that Celery goes by."""

from __future__ import annotations

from typing import Final

from otelexec.choices import Choices

SYSTEM: Final = "celery"
"""`messaging.system`."""

CHOICES: Final = Choices()
