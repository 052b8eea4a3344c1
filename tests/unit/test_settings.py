"""A wrong setting is one line that names it, when `configure()` reads it and not later in a thread."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

import otelexec
from otelexec import runtime, settings
from otelexec.choices import Choices
from otelexec.errors import SettingsError
from otelexec.settings import MoreSettings, Settings
from tests.servers import missing


@pytest.mark.parametrize("endpoint", ["gopher://collector", "collector", "http://", "https:///", "://x"])
def test_an_endpoint_that_is_no_url_is_refused_at_configure(endpoint: str) -> None:
    with pytest.raises(SettingsError, match=r"^otlp_endpoint: must be a URL"):
        otelexec.configure(otlp_endpoint=endpoint)


@pytest.mark.parametrize("endpoint", ["http://localhost:4318", "https://collector/base", "collector:4317", " http://localhost:4318 "])
def test_an_endpoint_that_http_or_grpc_takes_is_taken(endpoint: str) -> None:
    assert settings.load(otlp_endpoint=endpoint).otlp_endpoint == endpoint.strip()


def test_an_endpoint_that_is_empty_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTELEXEC_OTLP_ENDPOINT", " ")
    assert settings.load().otlp_endpoint is None


@pytest.mark.parametrize("keys", [",", " , ", " "])
def test_signing_keys_that_are_separators_only_are_refused(monkeypatch: pytest.MonkeyPatch, keys: str) -> None:
    """They would leave every carrier unsigned and every forged one trusted."""
    monkeypatch.setenv("OTELEXEC_SIGNING_KEY", keys)
    with pytest.raises(SettingsError, match=r"^OTELEXEC_SIGNING_KEY: holds no key"):
        settings.load()


def test_signing_keys_are_split_and_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.load(signing_key="new, old").signing_keys == (b"new", b"old")
    monkeypatch.setenv("OTELEXEC_SIGNING_KEY", "")
    assert settings.load().signing_keys == ()


def test_a_provider_that_is_none_is_refused_at_configure() -> None:
    wrong: Any = "a provider"
    with pytest.raises(SettingsError, match=r"^tracer_provider: must be a TracerProvider of OpenTelemetry, not str"):
        otelexec.configure(tracer_provider=wrong)


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be a user without a home folder, as in a container with a uid that nobody knows."""

    def unknown(_: int) -> Any:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.delenv("OTELEXEC_STORE", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_folder_the_message_names_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"^OTELEXEC_STORE: this user has no home folder: set OTELEXEC_STORE"):
        settings.load()
    assert settings.load(store="none").store == "none"
    monkeypatch.setenv("XDG_STATE_HOME", "/var/lib")
    assert settings.load().store == "sqlite:////var/lib/otelexec/otelexec.db"


@pytest.mark.parametrize(("name", "value"), [("store", "sqlite:///~no_such_user/x.db"), ("spool", "~no_such_user/spool")])
def test_the_home_of_a_user_that_is_none_is_refused(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name}: .*no such user"):
        settings.load(**{name: value})


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://tmp/x.db", "needs three slashes"),
        ("sqlite://", "with a file"),
        ("sqlite:///", "with a file"),
        ("sqlite://:memory:", "would not survive"),
        ("sqlite:///:memory:", "would not survive"),
    ],
)
def test_a_sqlite_url_without_a_file_is_told_what_is_wrong_with_it(url: str, message: str) -> None:
    with pytest.raises(SettingsError, match=f"^store: .*{message}"):
        settings.load(store=url)


def test_two_names_of_one_file_are_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two spools beside it, a process would not see what another one left there."""
    target = tmp_path / "data" / "store.db"
    (tmp_path / "link.db").symlink_to(target)
    monkeypatch.chdir(tmp_path)
    assert settings.load(store="sqlite:///link.db").store == settings.load(store=f"sqlite:///{target}").store == f"sqlite:///{target}"


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.db").symlink_to(tmp_path / "b.db")
    (tmp_path / "b.db").symlink_to(tmp_path / "a.db")
    with pytest.raises(SettingsError, match=r"^store: its path can't be used"):
        settings.load(store=f"sqlite:///{tmp_path / 'a.db'}")


@pytest.mark.parametrize("name", ["link", "link/store.db"])
def test_another_users_link_in_a_shared_folder_is_not_followed(tmp_path: Path, name: str) -> None:
    """What it leads to would be set aside as damaged, and written anew."""
    if os.geteuid():
        missing("only root can make another user's link")
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (tmp_path / "precious").write_text("precious", encoding="utf-8")
    (shared / "link").symlink_to(tmp_path / "precious")
    assert settings.load(store=f"sqlite:///{shared / name}").store == f"sqlite:///{tmp_path / 'precious'}{name[4:]}"
    os.lchown(shared / "link", 65_534, 65_534)
    with pytest.raises(SettingsError, match=r"^store: its path leads over another user's link"):
        settings.load(store=f"sqlite:///{shared / name}")
    shared.chmod(0o755)
    settings.load(store=f"sqlite:///{shared / name}")


def test_a_link_to_a_file_that_is_to_be_made_is_a_store(tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "store.db")
    otelexec.configure(store=f"sqlite:///{tmp_path / 'link.db'}", relay=False)
    otelexec.execution("x")(lambda: None)()
    assert (tmp_path / "store.db").stat().st_size > 0
    assert not list(tmp_path.glob("*.spool/*.jsonl"))


def test_no_secret_stands_in_the_representation() -> None:
    given: dict[str, Any] = {
        "store": "postgresql://me:hunter@host/x",
        "otlp_endpoint": "https://me:hunter@host",
        "signing_key": "hunter",
    }
    loaded = settings.load(**given)
    assert "hunter" not in f"{loaded!r} {loaded}"


def test_a_time_that_no_thread_can_wait_for_is_refused() -> None:
    """Else it ends the thread that is to wait for it, or the exit."""
    with pytest.raises(SettingsError, match=r"^exit_timeout_seconds: .*less than or equal to 1000000000"):
        otelexec.configure(exit_timeout_seconds=1e10)
    otelexec.configure(exit_timeout_seconds=1e9, relay_interval_seconds=1e9)
    otelexec.execution("x")(lambda: None)()
    otelexec.shutdown()


@pytest.mark.parametrize(
    ("name", "said"), [("lease_secnds", "; did you mean lease_seconds[?]"), ("Store", "; did you mean store[?]"), ("port", "$")]
)
def test_a_setting_that_does_not_exist_is_told_so_with_the_one_that_was_meant(name: str, said: str) -> None:
    given: dict[str, Any] = {name: "7"}
    with pytest.raises(SettingsError, match=f"^{name}: there is no such setting{said}"):
        otelexec.configure(**given)


def test_type_checkers_know_every_setting() -> None:
    named = inspect.signature(otelexec.configure).parameters.keys() - {"tracer_provider", "settings"}
    assert named | MoreSettings.__annotations__.keys() == Settings.model_fields.keys()


def test_a_misspelt_variable_is_warned_of_once_and_one_of_somebody_else_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTELEXEC_LEASE_SECOND", "10")
    monkeypatch.setenv("OTELEXEC_SIGNATURE", "of a carrier")
    settings.load()
    settings.load()
    warned = [record.getMessage() for record in caplog.records if "settings.unknown" in record.getMessage()]
    assert warned == ["otelexec.settings.unknown: there is no setting OTELEXEC_LEASE_SECOND; did you mean OTELEXEC_LEASE_SECONDS?"]


def test_a_folder_that_this_user_may_not_look_into_is_no_wrong_setting(tmp_path: Path) -> None:
    """As after a change of user that leaves HOME as it was: supervisord, `celery --uid`. Its records go to the log, its work goes on."""
    closed = tmp_path / "home"
    closed.mkdir()
    closed.chmod(0)
    mine = os.geteuid()
    os.seteuid(65534 if mine == 0 else mine)
    try:
        with pytest.raises(PermissionError):
            (closed / "x.db").lstat()
        assert settings.load(store=f"sqlite:///{closed}/x.db").store == f"sqlite:///{closed}/x.db"
    finally:
        os.seteuid(mine)
        closed.chmod(0o700)


def test_a_provider_that_an_adapter_is_given_leaves_the_settings_as_they_are(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'mine.db'}"
    otelexec.configure(store=store, service_name="billing")
    theirs = TracerProvider(shutdown_on_exit=False)
    Choices().activate({"tracer_provider": theirs}).undo()
    assert (runtime.get().settings.store, runtime.get().settings.service_name, runtime.get().theirs) == (store, "billing", theirs)
    with pytest.raises(SettingsError, match=r"^tracer_provider: must be a TracerProvider"):
        Choices().activate({"tracer_provider": "mine"})
