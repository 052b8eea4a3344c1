"""otelexec: the durable record and the span of an execution, in one commit. See README.md."""

from otelexec.correlation import Correlation, correlate
from otelexec.decorators import execution, wrap_executor
from otelexec.endings import Ending, was_finalized
from otelexec.envelope import extract, inject
from otelexec.errors import ExecutionCancelled, OtelexecError, SettingsError, StoreError
from otelexec.execution import Execution, current_execution
from otelexec.logs import structlog_processor
from otelexec.propagation import extract_env, extract_headers, inject_env, inject_headers
from otelexec.publishing import publish, reject, request_cancel
from otelexec.runtime import configure, shutdown

__all__ = [
    "Correlation",
    "Ending",
    "Execution",
    "ExecutionCancelled",
    "OtelexecError",
    "SettingsError",
    "StoreError",
    "configure",
    "correlate",
    "current_execution",
    "execution",
    "extract",
    "extract_env",
    "extract_headers",
    "inject",
    "inject_env",
    "inject_headers",
    "publish",
    "reject",
    "request_cancel",
    "shutdown",
    "structlog_processor",
    "was_finalized",
    "wrap_executor",
]
__version__ = "0.1.0"
