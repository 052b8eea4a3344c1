"""PostgreSQL, its network and its hosts fail under the work: nothing is missing, nothing doubled, nothing disagrees."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.hosts import running_network
from tests.acceptance.sweeping import report, together
from tests.postgres_proxy import running_proxy
from tests.postgres_servers import Server, running_server
from tests.records import until

CLOCKS = "east=420,west=-420,north=0"
"""Host names, and how many seconds the clock of each is ahead."""


@contextmanager
def meanwhile(trouble: Callable[[threading.Event], None]) -> Iterator[None]:
    """Make trouble in a thread until the block ends; what it raises is raised there."""
    done = threading.Event()
    raised: list[BaseException] = []

    def run() -> None:
        try:
            trouble(done)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(120)
    if raised:
        raise raised[0]


def run_jobs(folder: Path, jobs: int, *arguments: str, seconds: float) -> dict[str, Any]:
    """Run jobs through workers; every record, span and ledger must agree, and every job have run."""
    answer = report("redelivery", folder, f"--jobs={jobs}", *arguments, seconds=seconds)
    counts = together([answer], "executions", "attempts", "spans", "repeated", "kills", "redelivered", "claimed")
    assert counts["executions"] >= jobs
    return answer


def random_kills(folder: Path, server: Server, jobs: int, *, kills: int, seconds: float) -> None:
    answer = run_jobs(folder / "run", jobs, "--workers=4", f"--store={server.new_database()}", seconds=seconds)
    assert answer["kills"] >= kills
    assert answer["redelivered"] > 0
    assert answer["states"]["lost"] > 0
    assert answer["repeated"] <= answer["claimed"]


@pytest.mark.timeout(200)
def test_200_jobs_under_random_kills_are_recorded_and_delivered_once_each(tmp_path: Path, postgres: Server) -> None:
    random_kills(tmp_path, postgres, 200, kills=3, seconds=180)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_10000_jobs_under_random_kills_are_recorded_and_delivered_once_each(tmp_path: Path, postgres: Server) -> None:
    random_kills(tmp_path, postgres, 10_000, kills=100, seconds=1480)


def many_hosts(folder: Path, postgres_folder: Path, jobs: int, *, kills: int, seconds: float) -> None:
    with running_network() as network, running_server(postgres_folder, host=network.address) as server:
        hosts = f"--hosts={CLOCKS}", f"--network={network.bridge}@{network.address}"
        answer = run_jobs(folder / "run", jobs, "--workers=6", f"--store={server.new_database()}", *hosts, seconds=seconds)
    assert answer["machines"] == 3
    assert answer["kills"] >= kills
    assert answer["states"]["lost"] > 0


@pytest.mark.timeout(200)
def test_workers_on_hosts_whose_clocks_disagree_are_killed_at_random(tmp_path: Path, postgres_folder: Path) -> None:
    """A living worker whose clock is seven minutes behind is not lost, and a dead one whose clock is ahead is."""
    many_hosts(tmp_path, postgres_folder, 120, kills=3, seconds=180)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_10000_jobs_on_hosts_whose_clocks_disagree(tmp_path: Path, postgres_folder: Path) -> None:
    many_hosts(tmp_path, postgres_folder, 10_000, kills=100, seconds=1480)


def server_kills(folder: Path, postgres_folder: Path, jobs: int, *, pause: float, kills: int, seconds: float) -> None:
    with running_server(postgres_folder) as server:
        killed = 0
        started = folder / "started"

        def kill(done: threading.Event) -> None:
            nonlocal killed
            chooser = random.Random(3)
            until(lambda: started.exists() or done.is_set(), 60)
            time.sleep(1)  # what was published before is not what is tested, and is on disk by then
            while not done.wait(chooser.uniform(0.2, 1.8) * pause):
                server.kill9()
                killed += 1
                time.sleep(chooser.uniform(0, 0.5))
                server.start()

        with meanwhile(kill):
            arguments = "--workers=4", "--kill-seconds=0", "--crashes", f"--started={started}"
            run_jobs(folder / "run", jobs, f"--store={server.new_database()}", *arguments, seconds=seconds)
        assert killed >= kills


@pytest.mark.timeout(200)
def test_the_server_is_killed_in_the_middle_of_300_jobs(tmp_path: Path, postgres_folder: Path) -> None:
    server_kills(tmp_path, postgres_folder, 300, pause=1.5, kills=2, seconds=180)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_the_server_is_killed_again_and_again_in_the_middle_of_10000_jobs(tmp_path: Path, postgres_folder: Path) -> None:
    server_kills(tmp_path, postgres_folder, 10_000, pause=5, kills=10, seconds=1480)


def random_cuts(folder: Path, server: Server, jobs: int, *, share: float, cuts: int, seconds: float) -> None:
    url = server.new_database()
    with running_proxy(url) as proxy:
        proxy.cut_randomly(share)
        arguments = "--workers=4", "--kill-seconds=0", f"--store={proxy.url(url)}", f"--direct={url}"
        answer = run_jobs(folder / "run", jobs, *arguments, seconds=seconds)
        assert proxy.counts()["cut"] >= cuts
    assert answer["repeated"] == 0
    assert set(answer["states"]) == {"succeeded", "failed"}


@pytest.mark.timeout(200)
def test_connections_are_cut_at_random_and_inside_commit(tmp_path: Path, postgres: Server) -> None:
    random_cuts(tmp_path, postgres, 200, share=0.02, cuts=20, seconds=180)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_connections_are_cut_at_random_under_10000_jobs(tmp_path: Path, postgres: Server) -> None:
    random_cuts(tmp_path, postgres, 10_000, share=0.01, cuts=200, seconds=1480)
