"""otelexec: the durable record and the span of an execution, in one commit. See README.md."""

from otelexec.correlation import Correlation, Scope, correlate
from otelexec.decorators import execution, wrap_executor
from otelexec.endings import Ending, was_finalized
from otelexec.envelope import Extraction, extract, inject
from otelexec.errors import CarrierError, CorrelationError, ExecutionCancelled, OtelexecError, SettingsError, StoreError
from otelexec.handle import Execution, NoExecution, current_execution
from otelexec.logs import structlog_processor
from otelexec.lookup import find_execution
from otelexec.propagation import extract_env, extract_headers, inject_env, inject_headers
from otelexec.publishing import Message, publish, reject, request_cancel
from otelexec.runtime import configure, shutdown

__all__ = [
    "CarrierError",
    "Correlation",
    "CorrelationError",
    "Ending",
    "Execution",
    "ExecutionCancelled",
    "Extraction",
    "Message",
    "NoExecution",
    "OtelexecError",
    "Scope",
    "SettingsError",
    "StoreError",
    "configure",
    "correlate",
    "current_execution",
    "execution",
    "extract",
    "extract_env",
    "extract_headers",
    "find_execution",
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
