"""PostgreSQL, its network and its hosts fail under the work: nothing is missing, nothing doubled, nothing disagrees."""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import otelexec
from otelexec import cli, runtime
from tests import stores
from tests.acceptance.hosts import Host, running_hosts, running_network
from tests.acceptance.repairing import COMMANDS
from tests.acceptance.scenarios import SCENARIOS
from tests.acceptance.sweeping import report, reports, together
from tests.postgres_proxy import running_proxy
from tests.postgres_servers import Server, database_of, running_server
from tests.records import Records, until

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


SURE = 1_000
"""From so many jobs on, some of the kills fall into the middle of one."""


def random_kills(folder: Path, server: Server, jobs: int, *, kills: int, seconds: float) -> None:
    answer = run_jobs(folder / "run", jobs, f"--least-kills={kills}", "--workers=4", f"--store={server.new_database()}", seconds=seconds)
    assert answer["kills"] >= kills
    assert answer["redelivered"] > 0
    assert answer["states"].get("lost", 0) > 0 or jobs < SURE
    assert answer["repeated"] <= answer["claimed"]


@pytest.mark.timeout(200)
def test_120_jobs_under_random_kills_are_recorded_and_delivered_once_each(tmp_path: Path, postgres: Server) -> None:
    random_kills(tmp_path, postgres, 120, kills=3, seconds=180)


@pytest.mark.longest
@pytest.mark.timeout(1500)
def test_10000_jobs_under_random_kills_are_recorded_and_delivered_once_each(tmp_path: Path, postgres: Server) -> None:
    random_kills(tmp_path, postgres, 10_000, kills=100, seconds=1480)


def many_hosts(folder: Path, postgres_folder: Path, jobs: int, *, kills: int, seconds: float) -> None:
    with running_network() as network, running_server(postgres_folder, host=network.address) as server:
        hosts = f"--hosts={CLOCKS}", f"--network={network.bridge}@{network.address}"
        answer = run_jobs(
            folder / "run", jobs, f"--least-kills={kills}", "--workers=6", f"--store={server.new_database()}", *hosts, seconds=seconds
        )
    assert answer["machines"] == 3
    assert answer["kills"] >= kills
    assert answer["states"].get("lost", 0) > 0 or jobs < SURE


@pytest.mark.timeout(200)
def test_workers_on_hosts_whose_clocks_disagree_are_killed_at_random(tmp_path: Path, postgres_folder: Path) -> None:
    """A living worker whose clock is seven minutes behind is not lost, and a dead one whose clock is ahead is."""
    many_hosts(tmp_path, postgres_folder, 60, kills=3, seconds=180)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_10000_jobs_on_hosts_whose_clocks_disagree(tmp_path: Path, postgres_folder: Path) -> None:
    many_hosts(tmp_path, postgres_folder, 10_000, kills=100, seconds=1480)


def server_kills(folder: Path, postgres_folder: Path, jobs: int, *, each: int, kills: int, seconds: float) -> None:
    """Kill the server whenever about `each` more attempts have ended; the first end puts on disk what was published before."""
    with running_server(postgres_folder) as server:
        url = server.new_database()
        killed = 0
        started = folder / "started"

        def kill(done: threading.Event) -> None:
            nonlocal killed
            chooser = random.Random(3)
            wanted = 0.0
            until(lambda: started.exists() or done.is_set(), 300)
            while True:
                wanted = max(wanted, ended_attempts(server, url)) + each * chooser.uniform(0.2, 1.8)
                until(lambda: done.is_set() or not started.exists() or ended_attempts(server, url) >= wanted, seconds)  # noqa: B023 (called at once)
                if done.is_set() or not started.exists():
                    return
                server.kill9()
                killed += 1
                time.sleep(chooser.uniform(0, 0.5))
                server.start()

        with meanwhile(kill):
            arguments = "--workers=4", "--kill-seconds=0", "--crashes", f"--started={started}"
            run_jobs(folder / "run", jobs, f"--store={url}", *arguments, seconds=seconds)
        assert killed >= kills


def ended_attempts(server: Server, url: str) -> int:
    with server.administrator(database_of(url)) as connection:
        row = connection.execute("SELECT count(*) FROM otelexec.attempt WHERE ended_unix_ns IS NOT NULL").fetchone()
    return 0 if row is None else int(row[0])


@pytest.mark.timeout(200)
def test_the_server_is_killed_in_the_middle_of_300_jobs(tmp_path: Path, postgres_folder: Path) -> None:
    server_kills(tmp_path, postgres_folder, 300, each=60, kills=2, seconds=180)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_the_server_is_killed_again_and_again_in_the_middle_of_10000_jobs(tmp_path: Path, postgres_folder: Path) -> None:
    server_kills(tmp_path, postgres_folder, 10_000, each=700, kills=10, seconds=1480)


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
    random_cuts(tmp_path, postgres, 100, share=0.03, cuts=15, seconds=180)


@pytest.mark.longest
@pytest.mark.timeout(1500)
def test_connections_are_cut_at_random_under_10000_jobs(tmp_path: Path, postgres: Server) -> None:
    random_cuts(tmp_path, postgres, 10_000, share=0.01, cuts=200, seconds=1480)


def crews(folder: Path, server: Server, jobs: int, *, kills: int, seconds: float) -> None:
    arguments = "--workers=16", "--crew=2", "--kill-seconds=0.5", f"--least-kills={kills}", f"--store={server.new_database()}"
    answer = run_jobs(folder / "run", jobs, *arguments, seconds=seconds)
    assert answer["kills"] >= kills
    assert answer["states"].get("lost", 0) > 0 or jobs < SURE
    assert answer["repeated"] == 0  # no relay was killed


@pytest.mark.timeout(200)
def test_two_relays_and_two_reconcilers_share_the_work_of_16_workers(tmp_path: Path, postgres: Server) -> None:
    crews(tmp_path, postgres, 100, kills=2, seconds=180)


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_two_relays_and_two_reconcilers_share_10000_jobs_of_16_workers(tmp_path: Path, postgres: Server) -> None:
    crews(tmp_path, postgres, 10_000, kills=50, seconds=1480)


LEASE = 2.0


@pytest.fixture
def elsewhere(tmp_path: Path, postgres_folder: Path, isolated: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """Give another host, whose clock is seven minutes ahead, on a store that this process uses too."""
    with running_network() as network, running_server(postgres_folder, host=network.address) as server:
        monkeypatch.setenv("OTELEXEC_STORE", server.new_database())
        monkeypatch.setenv("OTELEXEC_LEASE_SECONDS", str(LEASE))
        with running_hosts(network, tmp_path, {"elsewhere": 420.0}, {}) as (host,):
            yield host
        runtime.shutdown()


@contextmanager
def long_job(host: Host, path: Path) -> Iterator[str]:
    """Let a host run a job until a file is there; gives its execution id, and waits at the end until the worker has ended well."""
    with otelexec.correlate(source="workflow", workflow_id="w"), otelexec.publish("job", destination="q") as message:
        job = otelexec.inject({"n": 1, "until": str(path)})
    runtime.get().flush()
    jobs_out, jobs_in = os.pipe()
    answers_out, answers_in = os.pipe()
    pid = host.start(jobs_out, answers_in, path.with_suffix(".ledger"))
    for end in (jobs_out, answers_in):
        os.close(end)
    try:
        os.write(jobs_in, json.dumps(job).encode() + b"\n")
        until(path.with_suffix(".running").exists, 30)
        yield message.id
        assert os.read(answers_out, 100) == b"1\n"
    finally:
        os.close(jobs_in)
        os.close(answers_out)
    assert host.wait(pid) == 0


def test_a_host_that_was_cut_off_until_its_attempts_were_lost_records_what_it_observed_beside(elsewhere: Host, tmp_path: Path) -> None:
    end = tmp_path / "end"
    with long_job(elsewhere, end) as execution_id:
        records = Records(os.environ["OTELEXEC_STORE"])
        assert records.attempt().state == "running"
        elsewhere.cut_off()

        def lost() -> bool:
            assert cli.main(["reconcile", "--once"]) == 0
            return records.attempt().state == "lost"

        until(lost, 30)
        end.touch()
        time.sleep(1)  # it ends while it is cut off
        elsewhere.join_again()
    until(lambda: records.attempt().observed, 30)
    attempt = records.attempt()
    assert (attempt.state, attempt.classification) == ("lost", "worker_lost")
    observed = json.loads(attempt.observed or "")
    assert observed["state"] == "succeeded"
    assert records.one().execution_id == execution_id
    assert records.one().state == "lost"
    records.check_agreement()
    beside = records.span(observed["span_id"])
    assert beside.attributes["otelexec.outcome"] == "succeeded"
    assert beside.attributes["otelexec.observed_of"] == attempt.span_id
    records.close()


def test_a_cancellation_reaches_another_host_within_two_seconds(elsewhere: Host, tmp_path: Path) -> None:
    end = tmp_path / "end"
    with long_job(elsewhere, end) as execution_id:
        assert otelexec.request_cancel(execution_id)
        until(end.with_suffix(".cancelled").exists, 2.0)
    records = Records(os.environ["OTELEXEC_STORE"])
    until(lambda: records.one().state == "cancelled")
    assert records.attempt().classification is None
    records.check_agreement()
    records.close()


def test_two_machines_with_one_name_don_t_take_each_other_for_dead(elsewhere: Host, tmp_path: Path) -> None:
    """Images of virtual machines carry a name; only the lease tells whether the other one lives."""
    end = tmp_path / "end"
    with long_job(elsewhere, end):
        records = Records(os.environ["OTELEXEC_STORE"])
        stores.execute(
            os.environ["OTELEXEC_STORE"],
            f"UPDATE process SET host = '{socket.gethostname()}', pid_namespace = '{Path('/proc/self/ns/pid').readlink()}'",
        )
        for _ in range(3):
            assert cli.main(["reconcile", "--once"]) == 0
        assert records.attempt().state == "running"
        end.touch()
    until(lambda: records.one().state == "succeeded")
    records.close()


def killed_anywhere(folder: Path, server: Server, *arguments: str, seconds: float) -> dict[str, int]:
    runs = [(folder / str(share), (*arguments, f"--share={share}/2", f"--server={server.url()}")) for share in range(2)]
    answers = reports("killing", runs, seconds=seconds)
    counts = together(answers, "killed", "missed", "attempts", "spans")
    assert counts["missed"] <= MISSED * counts["killed"]
    assert counts["attempts"] > counts["killed"]
    return counts | {"lines": answers[0]["lines"], "statements": answers[0]["statements"]}


MISSED = 0.1
"""Share of the points that a run may pass less often than the dry run did: the pool's threads take turns as they like."""


@pytest.mark.timeout(300)
def test_a_kill_before_and_behind_any_statement_leaves_every_attempt_one_state_and_one_span(tmp_path: Path, postgres: Server) -> None:
    counts = killed_anywhere(tmp_path, postgres, "nested", "spooled", "--within=store/postgres_tail", seconds=280)
    assert counts["statements"] >= 20
    assert counts["killed"] >= 0.8 * counts["statements"]


@pytest.mark.longest
@pytest.mark.timeout(900)
def test_a_kill_at_any_line_of_the_store_leaves_every_attempt_one_state_and_one_span(tmp_path: Path, postgres: Server) -> None:
    counts = killed_anywhere(tmp_path, postgres, *SCENARIOS, "--within=store/postgres", seconds=880)
    assert counts["killed"] >= 0.8 * (counts["lines"] + counts["statements"])


@pytest.mark.longest
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_kill_at_any_line_or_statement_of_each_scenario(tmp_path: Path, postgres: Server, scenario: str) -> None:
    killed_anywhere(tmp_path, postgres, scenario, "--extra=50", seconds=1480)


@pytest.mark.longest
@pytest.mark.timeout(600)
def test_a_kill_while_the_schema_is_made_leaves_a_store_that_works(tmp_path: Path, postgres: Server) -> None:
    counts = killed_anywhere(tmp_path, postgres, "block", "--fresh", "--within=store/postgres", seconds=580)
    assert counts["statements"] >= 25  # those of the schema among them


@pytest.mark.longest
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("command", COMMANDS)
def test_reconcile_and_relay_killed_anywhere_are_finished_by_the_next_ones(tmp_path: Path, postgres: Server, command: str) -> None:
    within = "--within=reconcile,relay,delivery,store/postgres,cli/relaying,cli/reconciling"
    answer = report("repairing", tmp_path / "run", command, within, f"--server={postgres.url()}", seconds=1480)
    counts = together([answer], "killed", "missed", "repeated")
    assert counts["killed"] > 80
    assert bool(counts["repeated"]) is (command == "relay")
