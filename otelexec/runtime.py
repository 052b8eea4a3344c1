"""
What one process has: its settings, store, journal, provider, background threads, and the hooks for fork and exit.

There is one runtime per process. The first use makes it from the environment; `configure()` makes it on purpose; a
forked child gets a new one with new locks and a new process row.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from otelexec import identity, logs, otlp, semconv, spans
from otelexec import settings as _settings
from otelexec.clock import monotonic
from otelexec.context import current_execution
from otelexec.endings import raised_by_signal_handler
from otelexec.errors import SettingsError, StoreError
from otelexec.exits import call_within
from otelexec.heartbeat import HeartbeatThread
from otelexec.ids import mint_nonce
from otelexec.journal import Journal
from otelexec.running import RunningExecution
from otelexec.settings import MoreSettings, Settings
from otelexec.spans import CollectingProvider, Collector, SecureIdGenerator
from otelexec.store.base import Store
from otelexec.store.rows import ProcessRow
from otelexec.store.writes import AddSpans, Heartbeat, RecordProgress

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Link, Span, Tracer

    from otelexec.relay import Relay

logger = logging.getLogger("otelexec")


def open_store(settings: Settings, *, create: bool = True) -> Store | None:
    """
    Make the store that the settings name; it connects when it is first used.

    Args:
        settings: The settings.
        create: Whether to make one where none is; reading commands don't.

    Returns:
        None for `none`.

    Raises:
        SettingsError: The store's extra is not installed.
    """
    if settings.store == "none":
        return None
    if settings.store.startswith("sqlite:///"):
        from otelexec.store.sqlite import SqliteStore

        return SqliteStore(Path(settings.store.removeprefix("sqlite:///")), create=create)
    try:
        from otelexec.store.postgres import PostgresStore
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("psycopg", "psycopg_pool"):
            raise
        raise SettingsError("OTELEXEC_STORE: the PostgreSQL store needs psycopg: pip install 'otelexec[postgres]'") from error
    return PostgresStore(settings.store, create=create, patience_seconds=settings.open_timeout_seconds)


def _stock_exporter(settings: Settings) -> SpanExporter:
    from otelexec import endpoint

    where = endpoint.read(settings.otlp_endpoint)
    if where.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter(endpoint=where.url, insecure=not where.secure)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter(endpoint=where.url)


class Runtime:
    """
    The runtime of one process.

    Args:
        settings: Its settings.
        provider: The user's tracer provider; None means the global one if it is not ours.
        parent: The runtime of the process that this one was forked from; None if there was none.
    """

    def __init__(self, settings: Settings, provider: TracerProvider | None = None, *, parent: Runtime | None = None) -> None:
        self.settings = settings
        self._forked = parent is not None
        self.process_id = identity.mint_process_id()
        self.id_generator = SecureIdGenerator()
        self.theirs = provider or spans.foreign_provider()
        self.heartbeat = HeartbeatThread(self)
        self.store = open_store(settings)
        _watch_forks()
        self.records = self.store is not None
        self.provider = self._recording_provider(parent) if self.records else self._plain_provider()
        self.resource = self.provider.resource
        self.tracer: Tracer
        if parent is not None and parent.provider is self.provider:
            self.tracer = parent.tracer
        else:
            from otelexec import __version__  # not there yet when this module is imported

            self.tracer = self.provider.get_tracer(semconv.SCOPE_NAME, __version__, schema_url=semconv.SCHEMA_URL)
        self.collector = Collector(self.resource, settings.max_collected_spans, self.heartbeat.nudge, forked=self._forked)
        self._process: ProcessRow | None = None
        self._parent = (0, 0)
        self.executions: dict[str, RunningExecution] = {}
        self.relay: Relay | None = None
        if self.store is not None:  # else there is no journal, which is what `records` tells
            same = parent is not None and parent.records and parent.settings.store == settings.store
            self.journal: Journal = Journal(self, self.store, parent.journal if parent is not None and same else None)

    def _recording_provider(self, parent: Runtime | None) -> TracerProvider:
        """Give the provider whose spans are committed with their records."""
        resource = spans.make_resource(self.settings.service_name, self.theirs)
        if parent is not None and parent.theirs is self.theirs and isinstance(parent.provider, CollectingProvider):
            parent.provider.inherited_by(resource, parent.tracer)
            return parent.provider
        return spans.make_provider(resource, current_collector, self.theirs)

    def _plain_provider(self) -> TracerProvider:
        """Without a store, spans go the usual way: through the user's provider, or to the SDK's own exporter."""
        if isinstance(self.theirs, TracerProvider):
            return self.theirs
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = spans.make_resource(self.settings.service_name, self.theirs)
        provider = spans.make_provider(resource, current_collector, self.theirs, collects=False)
        if os.environ.get("OTEL_TRACES_EXPORTER", "").strip() == "none":  # as the SDK's own set-up reads it
            return provider
        try:
            provider.add_span_processor(BatchSpanProcessor(_stock_exporter(self.settings)))
        except SettingsError as error:  # as with a store, where the relay says it
            logger.error("otelexec.export.unusable: %s. No span leaves this process; the work goes on.", error)  # noqa: TRY400 (the message says it all)
        return provider

    def _send_plain_spans(self, deadline: float) -> None:
        """Send the spans that are not the relay's to send, as long as an exit may take; the SDK alone would retry for much longer."""
        if not isinstance(self.theirs, TracerProvider):
            if self.records:
                return
            send: Callable[[], object] = self.provider.shutdown
        elif self._parent[0]:
            send = self.theirs.force_flush
        else:  # its own exit handler does it; the children of pools leave without any
            return
        call_within(max(0.0, deadline - monotonic()), send, "otelexec-exit")

    @property
    def process(self) -> ProcessRow:
        """This process, as the store knows it."""
        if self._process is None:
            self._process = identity.this_process(
                self.process_id,
                lease_seconds=self.settings.lease_seconds,
                resource=otlp.encode_resource(self.resource),
                scope=otlp.encode_scope(getattr(self.tracer, "_instrumentation_scope", None)),
                parent=self._parent,
            )
        return self._process

    def start_span(  # noqa: PLR0917 # as the SDK's own, which it stands for
        self, name: str, base: Context, kind: trace.SpanKind, attributes: Mapping[str, Any], links: Sequence[Link], started_unix_ns: int
    ) -> Span:
        """Start a span of our own; where the user's sampler or processor fails, there is a record without one."""
        try:
            span = self.tracer.start_span(
                name, base, kind, attributes, links, started_unix_ns, record_exception=False, set_status_on_exception=False
            )
        except Exception as error:
            if raised_by_signal_handler(error):
                raise
            logger.exception("otelexec.span.failed: %s runs without a span", name)
            return trace.INVALID_SPAN
        if self.theirs is not None:
            spans.keep_attributes(span, attributes)
        return span

    def be_supervised(self) -> None:
        """
        Learn that the parent process looks after this one: it reports its death, and relays and reconciles for it.

        A reconciler then leaves this process's attempts to the parent while that lives, for as long as a lease. To be
        called before the first write.
        """
        self._parent = identity.parent_of_this_process()
        self.settings = self.settings.model_copy(update={"relay": False, "reconcile": False})

    def attend(self) -> None:
        """Open the store, and relay and reconcile from now on, also while nothing runs here: for children that don't."""
        if self.records:
            self.journal.write(Heartbeat(self.process))
            self.heartbeat.ensure()

    # Executions

    def entered(self, execution: RunningExecution) -> None:
        """Learn that an execution runs here."""
        self.executions[execution.token if execution.outer is None else f"{execution.token}:core"] = execution
        if self.records:
            self.heartbeat.ensure()

    def left(self, execution: RunningExecution) -> None:
        """Learn that it has ended."""
        self.executions.pop(execution.token if execution.outer is None else f"{execution.token}:core", None)
        if execution.outer is not None and execution.ending is not None:
            execution.outer.cores.leave(execution.ending.state)

    def execution_of(self, token: str) -> RunningExecution | None:
        """Give the execution that runs here under a fencing token: of a core and the executor around it, the core."""
        return self.executions.get(f"{token}:core") or self.executions.get(token)

    def progressed(self, execution: RunningExecution) -> None:
        """Write a progress marker now, or soon if the one before was written just now."""
        now = monotonic()
        if now - execution.progress_written < self.settings.progress_seconds:
            execution.progress_due = True  # the background thread looks every `cancel_poll_seconds`
            return
        execution.progress_written = now
        self.write_progress(execution)

    def write_progress(self, execution: RunningExecution) -> None:
        """Write the marker without waiting for anybody."""
        execution.progress_due = False
        marker = execution.progress_marker
        if self.records and marker is not None and not self.journal.spooling:
            self.journal.offer(RecordProgress(execution.id, execution.token, marker))

    def open_ancestors(self, context: Context) -> tuple[Any, ...]:
        """Give the rows of spans still open between a context and its execution, not yet written."""
        return self.collector.open_ancestors(context) if self.records else ()

    # Exit

    def flush(self) -> None:
        """Write what is only in memory; gives up at once where the store does not answer, and in time where the spool holds much."""
        if not self.records:
            return
        deadline = monotonic() + self.settings.exit_timeout_seconds

        def meanwhile() -> None:
            if monotonic() >= deadline:
                raise TimeoutError("the process ends")

        self.journal.group.flush()
        loose = self.collector.take_loose(self.process_id)
        while loose:
            self.journal.write(loose)
            loose = self.collector.take_loose(self.process_id)
        if self.journal.homeless:
            self.journal.recover(meanwhile)

    def shutdown(self, *, leaves: bool = False) -> None:
        """
        Write what is left, say goodbye, and give the relay a bounded time to send it.

        Args:
            leaves: Whether the process ends right after this; see `shutdown()`.
        """
        deadline = monotonic() + self.settings.exit_timeout_seconds
        self.heartbeat.stop(self.settings.exit_timeout_seconds)
        if self.store is None:
            self._send_plain_spans(deadline)
            return
        # A goodbye is for what is still open or was left to write. Else a process that ends is missed by nobody.
        silent = leaves and not (self.executions or self.journal.group.waits or self.collector.has_loose)
        self.flush()
        if not silent and not self.journal.spooling and self._process is not None:
            with contextlib.suppress(StoreError):
                self.journal.group.commit(Heartbeat(self.process, ended=not self.executions), durable=False, timeout_seconds=0.5)
        if self.relay is None and self.settings.relay and self._process is not None and not self._forked:
            # A short script; a forked worker of one job leaves its spans to its parent's relay, and is sooner gone.
            relay = self.heartbeat.make_relay()
            if relay is not None:
                relay.send_rest(deadline)
        if self.relay is not None:
            self.relay.stop(max(0.0, deadline - monotonic()))
        self._send_plain_spans(deadline)
        self.journal.group.close()
        if leaves:
            _left.append(self)
        else:
            self.store.close()


_current: Runtime | None = None
_template: tuple[Settings, TracerProvider | None] | None = None
_lock = threading.RLock()
# From here on an ended span makes no new runtime: the interpreter starts no more threads.
_exiting = False
# Runtimes of the process that this one was forked from: their connections must be neither used nor closed here.
_inherited: list[Runtime] = []
# Runtimes that left their connections to the end of the process: nobody may close them before that.
_left: list[Runtime] = []


def get() -> Runtime:
    """Give the runtime of this process; made from the environment if nobody configured it."""
    return _current or _make(None, None)


def _make(settings: Settings | None, provider: TracerProvider | None) -> Runtime:
    global _current, _template
    with _lock:
        if settings is None:
            if _current is not None:
                return _current
            settings, provider = _template or (_settings.handed_down() or _settings.load(), None)
        before, _current = _current, None
        if before is not None:
            before.shutdown()
        runtime = Runtime(settings, provider, parent=_inherited[-1] if _inherited else None)
        _current, _template = runtime, (settings, provider)
        if "multiprocessing.process" in sys.modules:
            _end_with_multiprocessing(os.getpid())
        spans.offer_as_global(runtime.provider)
        logs.install()
        logger.info("otelexec.configured: store %s", "none" if runtime.store is None else runtime.store.url)
        return runtime


def configure(
    *,
    service_name: str | None = None,
    store: str | None = None,
    otlp_endpoint: str | None = None,
    tracer_provider: TracerProvider | None = None,
    **settings: Unpack[MoreSettings],
) -> None:
    """
    Configure otelexec in this process. Optional, and so is every argument. A further call starts anew, with its own arguments alone.

    Args:
        service_name: `service.name` of the resource; None: OTELEXEC_SERVICE_NAME, else OTEL_SERVICE_NAME.
        store: `sqlite:///PATH`, `postgresql://...`, or `none`; None: OTELEXEC_STORE, else a file in the user's state folder.
        otlp_endpoint: Where the relay sends spans; None: OTELEXEC_OTLP_ENDPOINT, else OTEL_EXPORTER_OTLP_(TRACES_)ENDPOINT, else
            localhost.
        tracer_provider: Your own provider, whose resource, sampler, limits, trace ids and `on_start` processors are taken over;
            without a store it is used as it is. None: the global one, if there is one, else otelexec sets it.
        **settings: Any other field of `Settings` (README, Configuration).

    Raises:
        SettingsError: A setting is wrong. A store that can't be reached is no such error: the work goes on.
    """
    if tracer_provider is not None:
        _check(tracer_provider)
    chosen = _settings.load(service_name=service_name, store=store, otlp_endpoint=otlp_endpoint, **settings)
    _make(chosen, tracer_provider)
    _settings.hand_down(chosen)


def use_provider(tracer_provider: TracerProvider) -> None:
    """
    Take a provider over, as `configure` does, with the settings that this process has already.

    Args:
        tracer_provider: The provider.

    Raises:
        SettingsError: It is none; or nobody has configured this process, and a variable is wrong.
    """
    _check(tracer_provider)
    found = _settings.handed_down() or _settings.load() if _template is None else _template[0]
    _make(found, tracer_provider)


def _check(tracer_provider: object) -> None:
    if not isinstance(tracer_provider, trace.TracerProvider):
        raise SettingsError(f"tracer_provider: must be a TracerProvider of OpenTelemetry, not {type(tracer_provider).__name__}")


def settings() -> Settings:
    """Give the settings of this process, read from the environment if nobody configured it."""
    return get().settings


def current_collector() -> Collector | None:
    """Give the collector that spans of our providers go to."""
    runtime = _current
    if runtime is None and _template is not None and not _exiting:
        runtime = get()
    # Without a store nobody would ever take what was collected.
    return None if runtime is None or not runtime.records else runtime.collector


def before_send(context: Context) -> None:
    """Write the spans that are still open between this context and its execution, since their ids leave now."""
    runtime = get()
    rows = runtime.open_ancestors(context)
    if rows:
        execution = current_execution(context)
        execution_id = None if execution is None else execution.id
        runtime.journal.write(AddSpans(opened=rows, process_id=runtime.process_id, execution_id=execution_id, nonce=mint_nonce()))
        runtime.heartbeat.ensure()


def shutdown(*, leaves: bool = False) -> None:
    """
    Write what is left and stop; the next use starts anew, with the same settings. Runs by itself at exit.

    Args:
        leaves: Whether the process ends right after this by `os._exit`. It then leaves its connections to the system: the
            last one to close a SQLite file moves all of its -wal into it with two fsyncs, which would be after every job.
    """
    global _current
    with _lock:
        runtime, _current = _current, None
        if runtime is not None:
            runtime.shutdown(leaves=leaves)


def _before_fork() -> None:
    """Write the spans that are open around a fork: what the child runs has them as parents."""
    if _current is None:
        return
    try:
        before_send(otel_context.get_current())
    except Exception:  # the user's fork must go through; Python would only print it
        logger.exception("otelexec.fork.failed")


def _after_fork() -> None:
    global _current, _lock  # noqa: PLW0603 (one runtime per process is the point)
    _lock = threading.RLock()
    if _current is not None:
        _inherited.append(_current)
        _current = None


@functools.cache
def _end_with_multiprocessing(_pid: int) -> None:
    """See to it that a child of `multiprocessing` writes what it has: a forked one leaves without exit handlers, but calls finalizers."""
    from multiprocessing import process, util

    if process.parent_process() is not None:
        # After its own. What is to be sent is left to the relays of others: nobody waits at its end for an endpoint that doesn't answer.
        util.Finalize(None, _flush, exitpriority=-100)


def _flush() -> None:
    if _current is not None:
        _current.flush()


def _at_exit() -> None:
    global _exiting  # noqa: PLW0603 (one runtime per process is the point)
    _exiting = True
    shutdown()


@functools.cache
def _watch_forks() -> None:
    # Once the store's module has: what is to happen before a fork happens in reverse order, and this writes to the store,
    # which the store's own hook closes.
    os.register_at_fork(before=_before_fork)


# At once: another thread may fork while the first runtime is being made, under the lock.
os.register_at_fork(after_in_child=_after_fork)
atexit.register(_at_exit)
