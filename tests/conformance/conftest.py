"""PostgreSQL databases, servers and a proxy of a test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from otelexec import runtime
from tests.postgres_proxy import Proxy, running_proxy
from tests.postgres_servers import Server, at, running_pgbouncer, running_server
from tests.trouble import Work, configured


@pytest.fixture
def url(postgres: Server, isolated: None) -> Iterator[str]:
    """Give a database of the test's own on the server that all share."""
    url = postgres.new_database()
    yield url
    runtime.shutdown()
    postgres.drop_database(url)


@pytest.fixture
def work(url: str) -> Work:
    return configured(url)


@pytest.fixture(scope="module")
def mortal(postgres_folder: Path) -> Iterator[Server]:
    with running_server(postgres_folder) as server:
        yield server


@pytest.fixture
def own(mortal: Server, isolated: None) -> Iterator[Server]:
    """Give a server that the test may kill; the next one finds it alive again."""
    mortal.ensure()
    yield mortal
    runtime.shutdown()


@pytest.fixture
def proxy(postgres: Server, isolated: None) -> Iterator[Proxy]:
    with running_proxy(postgres.url()) as proxy:
        yield proxy
        proxy.release()
        runtime.shutdown()


@pytest.fixture
def bounced(own: Server, postgres_folder: Path) -> Iterator[str]:
    """Give a database of the server that may be killed, through a PgBouncer, whose clients don't notice when its server dies."""
    with running_pgbouncer(own, postgres_folder) as port:
        yield at(own.new_database(), port=port)
        runtime.shutdown()
