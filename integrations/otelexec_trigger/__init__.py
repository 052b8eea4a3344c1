"""
Trigger-style backends for otelexec: trigger over HTTP or over the store itself, run anywhere, one contract.

See integrations/README.md.
"""

from otelexec_trigger.backend import AsyncTriggerBackend, TriggerBackend
from otelexec_trigger.local import AsyncLocalBackend, LocalBackend
from otelexec_trigger.runs import BackendError, EnqueueError, InvalidRequest, Run, RunNotFound, TriggerError
from otelexec_trigger.tasks import task

__all__ = [
    "AsyncLocalBackend",
    "AsyncTriggerBackend",
    "BackendError",
    "EnqueueError",
    "InvalidRequest",
    "LocalBackend",
    "Run",
    "RunNotFound",
    "TriggerBackend",
    "TriggerError",
    "task",
]
