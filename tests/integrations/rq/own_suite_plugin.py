"""A pytest plugin for RQ's own tests: `-p tests.integrations.rq.own_suite_plugin` runs them with otelexec's adapter active."""

from __future__ import annotations

from typing import Any

from otelexec_rq import RQInstrumentor

instrumentor: Any = RQInstrumentor
instrumentor().instrument()
