"""A pytest plugin for RQ's own tests: `-p own_suite_plugin`, with this folder on the path, runs them with otelexec's adapter active."""

from __future__ import annotations

from typing import Any

from otelexec_rq import RQInstrumentor

instrumentor: Any = RQInstrumentor
instrumentor().instrument()
