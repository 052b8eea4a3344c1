"""
Trigger-style backends for otelexec: trigger over HTTP or over the store itself, run anywhere, one contract.

See integrations/README.md.
"""

try:
    import httpx as _httpx  # noqa: F401 (asked for here, where the error can say how it is installed)
except ModuleNotFoundError as error:
    if error.name == "httpx":
        raise ModuleNotFoundError(
            "No module named 'httpx'. Install it with the adapter: pip install 'otelexec[trigger]'", name="httpx", path=error.path
        ) from None
    raise

from otelexec_trigger.backend import AsyncTriggerBackend, TriggerBackend
from otelexec_trigger.local import AsyncLocalBackend, LocalBackend
from otelexec_trigger.receiver import PermanentFailure, Receiver, Reply
from otelexec_trigger.runs import BackendError, EnqueueError, InvalidRequest, Run, RunNotFound, TriggerError
from otelexec_trigger.scripts import run
from otelexec_trigger.tasks import task
from otelexec_trigger.trigger_dev import AsyncTriggerDevBackend, TriggerDevBackend
from otelexec_trigger.verifiers import QStash, StandardWebhooks, TimestampedHmac, TriggerDevAlert, VerificationError

__all__ = [
    "AsyncLocalBackend",
    "AsyncTriggerBackend",
    "AsyncTriggerDevBackend",
    "BackendError",
    "EnqueueError",
    "InvalidRequest",
    "LocalBackend",
    "PermanentFailure",
    "QStash",
    "Receiver",
    "Reply",
    "Run",
    "RunNotFound",
    "StandardWebhooks",
    "TimestampedHmac",
    "TriggerBackend",
    "TriggerDevAlert",
    "TriggerDevBackend",
    "TriggerError",
    "VerificationError",
    "run",
    "task",
]
