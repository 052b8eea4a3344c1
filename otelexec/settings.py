"""Every setting: its environment name, unit, default, and the reason for each limit."""

from __future__ import annotations

import errno
import functools
import logging
import os
import pickle
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypedDict

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from otelexec.errors import SettingsError

logger = logging.getLogger("otelexec")

MAX_SECONDS = 1e9
"""Thirty years: several are added to one another, and no thread can wait for more than 292 (threading.TIMEOUT_MAX)."""

Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False)]

_SHARED = stat.S_ISVTX | stat.S_IWOTH
"""The mode of folders like /tmp."""

STORE_SCHEMES = ("sqlite", "postgresql", "postgres")


def state_home() -> Path:
    """
    Give the folder for the default store and for spools.

    It is the same for every process of a user, whatever folder it starts in (XDG Base Directory
    Specification: `$XDG_STATE_HOME`, default `~/.local/state`).

    Raises:
        SettingsError: The user has no home folder, as in a container with a uid that nobody knows.
    """
    base = os.environ.get("XDG_STATE_HOME", "")
    try:
        root = Path(base) if base.startswith("/") else Path.home() / ".local" / "state"
    except RuntimeError:
        raise SettingsError("this user has no home folder: set OTELEXEC_STORE and OTELEXEC_SPOOL, or XDG_STATE_HOME") from None
    return root / "otelexec"


class Settings(BaseSettings):
    """
    The settings of one process: arguments first, then `OTELEXEC_*` variables, then these defaults.

    All times are in seconds unless the name says otherwise. The OTLP endpoint, its headers, certificates,
    compression and timeout come from the standard `OTEL_EXPORTER_OTLP_*` variables, the resource from
    `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES`, the sampler from `OTEL_TRACES_SAMPLER`.
    """

    model_config = SettingsConfigDict(env_prefix="OTELEXEC_", env_ignore_empty=True, extra="forbid", frozen=True, validate_default=True)

    store: str = Field(
        default="",
        repr=False,  # it may hold a password
        description="`sqlite:///PATH`, `postgresql://...`, or `none` for spans without a record, which `request_cancel()` can't reach. "
        "Default: `otelexec.db` in the user's state folder, so that web process, worker and command line meet.",
    )
    spool: Path | None = Field(
        default=None,
        description="Folder of the spool. Default: `<file>.spool/` beside a SQLite store, else one for each database in the state folder.",
    )
    service_name: str | None = Field(default=None, description="`service.name` of the resource. Default: OTEL_SERVICE_NAME.")
    otlp_endpoint: str | None = Field(
        default=None,
        repr=False,  # likewise
        description="Where the relay sends spans. Default: OTEL_EXPORTER_OTLP_(TRACES_)ENDPOINT, "
        "else localhost:4318, over gRPC localhost:4317.",
    )
    jaeger_url: str = Field(default="http://localhost:16686", description="Base URL of the Jaeger UI that `show` links to.")

    open_timeout_seconds: Seconds = Field(
        default=1.0, description="How long opening an attempt may wait for the store before it goes to the spool and the function runs."
    )
    finalize_timeout_seconds: Seconds = Field(
        default=5.0, description="How long closing an attempt retries the store before the record goes to the spool."
    )
    lease_seconds: Seconds = Field(
        default=30.0, description="After this long without a heartbeat a process that can't be looked at counts as dead."
    )
    heartbeat_seconds: Seconds | None = Field(
        default=None, description="Interval between two signs of life of a process. Default: a sixth of the lease."
    )
    cancel_poll_seconds: Seconds = Field(
        default=0.5, description="How soon at the latest a running attempt sees a cancellation asked for in another process."
    )
    progress_seconds: Seconds = Field(default=0.5, description="Least time between two progress markers written for one attempt.")
    exit_timeout_seconds: Seconds = Field(
        default=2.0,
        description="How long a normal exit may wait for the relay to send what is left. "
        "A request that is already under way is waited for longer, for OTEL_EXPORTER_OTLP_TIMEOUT at most.",
    )
    relay: bool = Field(default=True, description="Whether this process sends spans itself, beside any `otelexec relay`.")
    relay_interval_seconds: Seconds = Field(default=1.0, description="How often the relay looks for spans of other processes.")
    reconcile: bool = Field(default=True, description="Whether this process also closes the attempts of dead workers.")
    reconcile_interval_seconds: Seconds = Field(default=15.0, description="How often it looks for them.")

    signing_key: SecretStr | None = Field(
        default=None, description="Comma-separated HMAC keys: the first signs, all verify. Set: unsigned carriers are untrusted."
    )
    ambient: Annotated[frozenset[str], NoDecode] = Field(
        default=frozenset(),
        description="Comma-separated correlation fields that are baggage for every outgoing call, besides request id and source.",
    )
    link_carried: bool = Field(
        default=False, description="Link to the carried context instead of taking it as the parent of the execution span."
    )
    max_collected_spans: int = Field(
        default=512, ge=1, description="Ended child spans kept in memory for one execution; above it they are written at once."
    )
    max_output_bytes: int = Field(default=65_536, ge=0, description="Largest output or snapshot in bytes of JSON.")
    max_error_chars: int = Field(
        default=4_096, ge=64, description="Characters of an error message, or of a progress marker, that the record keeps."
    )

    @field_validator("store", mode="after")
    @classmethod
    def _store_is_known(cls, value: str) -> str:
        if not value:
            return _absolute_sqlite(f"sqlite:///{state_home() / 'otelexec.db'}")
        if value == "none":
            return value
        scheme, separator, _ = value.partition("://")
        if not separator or scheme not in STORE_SCHEMES:
            # The value itself is left out: a connection string may hold a password.
            msg = "must be sqlite:///PATH, postgresql://... or none"
            raise ValueError(msg)
        return _absolute_sqlite(value) if scheme == "sqlite" else value

    @field_validator("spool", mode="after")
    @classmethod
    def _spool_is_absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else _expanded(value).absolute()

    @field_validator("otlp_endpoint", mode="after")
    @classmethod
    def _endpoint_is_a_url(cls, value: str | None) -> str | None:
        # Whether it is for HTTP or gRPC, which takes a bare host:port too, stands in OTEL_EXPORTER_OTLP_PROTOCOL.
        text = (value or "").strip()
        scheme, separator, rest = text.partition("://")
        if text and not (scheme in ("http", "https") and rest.strip("/") if separator else ":" in text):
            msg = "must be a URL like http://localhost:4318"
            raise ValueError(msg)
        return text or None

    @field_validator("signing_key", mode="after")
    @classmethod
    def _keys_are_there(cls, value: SecretStr | None) -> SecretStr | None:
        # Set to separators only, it would turn the demand for signatures off without a word.
        text = "" if value is None else value.get_secret_value()
        if text and not text.replace(",", "").strip():
            msg = "holds no key: give the keys, comma-separated, or leave it out"
            raise ValueError(msg)
        return value

    @field_validator("ambient", mode="before")
    @classmethod
    def _split_ambient(cls, value: Any) -> Any:
        return frozenset(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("jaeger_url", mode="after")
    @classmethod
    def _no_slash(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            msg = "must start with http:// or https://"
            raise ValueError(msg)
        return value.rstrip("/")

    @field_validator("heartbeat_seconds", mode="after")
    @classmethod
    def _lease_outlasts_heartbeat(cls, value: float | None, info: ValidationInfo) -> float | None:
        lease = info.data.get("lease_seconds")
        if value is not None and lease is not None and lease < 2 * value:
            msg = f"must be at most half of lease_seconds ({lease:g}), or one late heartbeat looks like a death"
            raise ValueError(msg)
        return value

    @property
    def heartbeat(self) -> float:
        """Give the interval between two heartbeats in seconds."""
        return self.heartbeat_seconds or self.lease_seconds / 6

    def environment(self) -> dict[str, str]:
        """Give the variables that make the same settings in a process that starts afresh; they may hold a password."""
        return {
            f"OTELEXEC_{name.upper()}": _as_variable(getattr(self, name))
            for name in self.model_fields_set
            if getattr(self, name) is not None
        }

    @property
    def signing_keys(self) -> tuple[bytes, ...]:
        """Give the HMAC keys, the signing one first; empty when carriers are not signed."""
        if self.signing_key is None:
            return ()
        return tuple(part.strip().encode() for part in self.signing_key.get_secret_value().split(",") if part.strip())


class MoreSettings(TypedDict, total=False):
    """The fields of `Settings` that `configure()` takes beside the arguments that it names; None means not given."""

    spool: str | os.PathLike[str] | None
    jaeger_url: str | None
    open_timeout_seconds: float | None
    finalize_timeout_seconds: float | None
    lease_seconds: float | None
    heartbeat_seconds: float | None
    cancel_poll_seconds: float | None
    progress_seconds: float | None
    exit_timeout_seconds: float | None
    relay: bool | None
    relay_interval_seconds: float | None
    reconcile: bool | None
    reconcile_interval_seconds: float | None
    signing_key: str | SecretStr | None
    ambient: str | Iterable[str] | None
    link_carried: bool | None
    max_collected_spans: int | None
    max_output_bytes: int | None
    max_error_chars: int | None


def _as_variable(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return ",".join(sorted(value)) if isinstance(value, frozenset) else str(value)


def _absolute_sqlite(url: str) -> str:
    """Make `sqlite:///relative.db` absolute, as SQLAlchemy spells it: four slashes start an absolute path."""
    path = url.removeprefix("sqlite://")
    if path in ("", "/") or path.removeprefix("/").startswith(":memory:"):
        msg = "must be sqlite:///PATH with a file: a store in memory would not survive the process"
        raise ValueError(msg)
    if not path.startswith("/"):
        msg = "needs three slashes before the path, as in sqlite:///relative.db, and four before an absolute one, sqlite:////var/lib/app.db"
        raise ValueError(msg)
    try:
        given = _expanded(Path(path[1:])).absolute()
        if any(map(_is_planted, (given, *given.parents))):
            msg = "its path leads over another user's link in a folder that everybody may write in"
            raise ValueError(msg)
        # Two names of one file share one spool, and a link may name a file that is to be made.
        resolved = given.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        msg = f"its path can't be used: {error}"
        raise ValueError(msg) from error
    if any(map(_is_link, (resolved, *resolved.parents))):  # since Python 3.13 such links are left as they stand
        msg = f"its path can't be used: {os.strerror(errno.ELOOP)}"
        raise ValueError(msg)
    return f"sqlite:///{resolved}"


def _is_planted(path: Path) -> bool:
    """Tell whether a path is a link that the kernel would not follow (`fs.protected_symlinks`), whose rule resolving it here evades."""
    if not _is_link(path):
        return False
    folder = path.parent.stat()
    return folder.st_mode & _SHARED == _SHARED and path.lstat().st_uid not in (os.geteuid(), folder.st_uid)


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except PermissionError:  # who may not look there can't open it either, which is no wrong setting
        return False


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        msg = f"{path}: there is no such user, or the user has no home folder"
        raise ValueError(msg) from None


def _nearest(name: str, known: Iterable[str]) -> str | None:
    """Give the name that this one was meant to be; None when it is like none."""
    import difflib

    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.85)), None)


@functools.cache
def _warn_of_misspelt(variable: str) -> None:
    """Say once that a variable is none of ours, if it was meant to be one. Others may share the prefix."""
    known = {f"OTELEXEC_{name.upper()}" for name in Settings.model_fields}
    meant = None if variable in known else _nearest(variable, known)
    if meant is not None:
        logger.warning("otelexec.settings.unknown: there is no setting %s; did you mean %s?", variable, meant)


def load(**arguments: Any) -> Settings:
    """
    Read the settings of this process.

    Args:
        **arguments: Values that go before the environment; None means not given.

    Raises:
        SettingsError: A value can't be used, or an argument is unknown; one line that names it.
    """
    arguments = {name: value for name, value in arguments.items() if value is not None}
    for name in arguments:
        if name not in Settings.model_fields:
            meant = _nearest(name.lower(), Settings.model_fields)
            raise SettingsError(f"{name}: there is no such setting{'' if meant is None else f'; did you mean {meant}?'}")
    for variable in os.environ:
        if variable.startswith("OTELEXEC_"):
            _warn_of_misspelt(variable)
    try:
        return Settings(**arguments)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        where = name if name in arguments else f"OTELEXEC_{name.upper()}"
        message = str(first["msg"]).removeprefix("Value error, ")
        raise SettingsError(f"{where}: {message}") from None


def hand_down(settings: Settings) -> None:
    """Let children of `multiprocessing` that start afresh, as they do by default from Python 3.14 on, have what forked ones inherit."""
    from multiprocessing import process

    # What all descendants get, on every start method; there is no public way. A Python that has it no more is none the worse.
    vars(process.current_process()).setdefault("_config", {})["otelexec"] = pickle.dumps(settings)


def handed_down() -> Settings | None:
    """Give the settings that an ancestor of this child of `multiprocessing` was configured with."""
    process: Any = sys.modules.get("multiprocessing.process")
    if process is None or process.parent_process() is None:
        return None
    data = vars(process.current_process()).get("_config", {}).get("otelexec")
    return None if data is None else pickle.loads(data)  # noqa: S301 (ours, from the parent)
