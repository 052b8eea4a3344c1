"""
Who asked for this work: execution id, request id, source, and the source's own fields.

A `Correlation` is an immutable value; `correlate()` opens a `Scope` that holds one; `with_ambient()` puts the
part of it that every outgoing call may carry into the OpenTelemetry baggage. How it travels is in
`propagation.py` and `envelope.py`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from hashlib import sha256
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal
from uuid import UUID

from opentelemetry import context as otel_context
from opentelemetry.baggage import _BAGGAGE_KEY  # private: see with_ambient, and guarded by a test
from opentelemetry.context.context import Context
from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, TypeAdapter, ValidationError, model_validator

from otelexec import runtime, semconv
from otelexec.context import SCOPE_KEY, current_execution, current_scope
from otelexec.errors import CorrelationError

if TYPE_CHECKING:
    from opentelemetry.trace import Link

    from otelexec.context import CurrentExecution

DIRECT: Final = "direct"
"""The source of work that nobody correlated."""

MAX_ID_CHARS: Final = 128
MAX_SOURCE_CHARS: Final = 128
"""Bounds the one free text among the three ids: percent-encoded it is at most 1,536 bytes of the header's 8,192."""
MAX_ORIGINAL_CHARS: Final = 256
"""How much of an id that had to be hashed is kept beside the hash."""

RESERVED: Final = frozenset(
    {value.removeprefix(semconv.PREFIX) for value in vars(semconv).values() if isinstance(value, str) and value.startswith(semconv.PREFIX)}
    | {"", "trigger_type", "signature"}
)
"""What a free attribute can't be called, because `otelexec.<name>` already says something else on the span."""

_DIRECT_GIVEN: Final = {"execution_id", "request_id", "source"}
_IDS: Final = ("execution_id", "request_id", "parent_execution_id")
_SURROGATES: Final = re.compile("[\ud800-\udfff]")
_put = object.__setattr__


def mint_id() -> str:
    """
    Make a new id: a UUIDv7 in lowercase text, so that ids sort by time.

    The 12 bits after the version hold the fraction of the millisecond in units of about 244 ns (RFC 9562,
    section 6.2, method 3), the 62 random bits come from the operating system: a user's `random.seed()` and a fork
    change nothing.
    """
    milliseconds, rest = divmod(time.time_ns(), 1_000_000)
    tail = int.from_bytes(os.urandom(8), "big") & 0x3FFF_FFFF_FFFF_FFFF | 0x8000_0000_0000_0000
    text = f"{milliseconds:012x}{tail:016x}"
    return f"{text[:8]}-{text[8:12]}-7{(rest << 12) // 1_000_000:03x}-{text[12:16]}-{text[16:]}"


def normalize_id(value: str) -> tuple[str, str | None]:
    """
    Make an id of any text.

    Args:
        value: 1 to 128 printable ASCII characters are an id already. Other text is hashed (SHA-256, lowercase hex).
            Empty text names nothing: hashing it would give one id to everything unnamed, so a new id is minted.

    Returns:
        The id, and the start of the original text where it was hashed (at most 256 characters), else None.
    """
    if not value:
        return mint_id(), None
    if len(value) <= MAX_ID_CHARS and value.isascii() and value.isprintable():
        return value, None
    return sha256(value.encode("utf-8", "surrogatepass")).hexdigest(), clean(value[:MAX_ORIGINAL_CHARS])


def clean(value: str) -> str:
    """Replace lone surrogates by U+FFFD: they can't be written as UTF-8, so no header, store or span can hold them."""
    return value if value.isascii() else _SURROGATES.sub("\ufffd", value)


def as_text(value: object) -> str:
    """
    Give the text of a field: numbers as Python writes them, dates and times in ISO 8601, UUIDs, enums by their value.

    Raises:
        ValueError: The value is none of those.
    """
    if isinstance(value, str):
        return clean(str.__str__(value))
    if isinstance(value, Enum):
        return as_text(value.value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, int | float | Decimal | UUID):
        return str(value)
    msg = f"must be text, a number, a date or a UUID, not {type(value).__name__}"
    raise ValueError(msg)


Text = Annotated[str, BeforeValidator(as_text)]


def _source(value: object) -> str:
    text = as_text(value)
    if not 0 < len(text) <= MAX_SOURCE_CHARS:
        msg = f"must be 1 to {MAX_SOURCE_CHARS} characters"
        raise ValueError(msg)
    return text


def _id_text(name: str, value: object) -> str:
    """Give the text of an id, or name the id in the error: a validator of the whole model has no field to name."""
    try:
        text = as_text(value)
    except ValueError as error:
        msg = f"{name} {error}"
        raise ValueError(msg) from None
    if not text:
        msg = f"{name} is empty: leave it out to have one minted"
        raise ValueError(msg)
    return text


class Correlation(BaseModel, frozen=True, extra="allow"):
    """
    Who asked for an execution. This class serves every source that has no fields of its own.

    Free attributes are extra fields, flat and all text. A field that is None is not given. Ids that are not 1 to
    128 printable ASCII characters are hashed, and the original is kept as `original_execution_id` or
    `original_request_id`.

    Attributes:
        execution_id: The one logical run; minted when not given.
        request_id: What all executions for one request have in common; minted when not given.
        source: What kind of thing asked: `workflow`, `schedule`, `webhook`, `direct`, or any name of the user's.
        parent_execution_id: The execution that asked for this one; None when none did.
        trigger_type: How the source was triggered; None when it doesn't matter.
    """

    # Slots, so that neither comparison nor model_copy() ever sees what is only cached.
    __slots__ = ("_members", "_parts")

    if TYPE_CHECKING:
        _members: dict[str, str] | None
        _parts: tuple[dict[str, str], dict[str, str]] | None

    OWN: ClassVar[tuple[str, ...]] = ()
    """The fields that belong to the source."""

    __pydantic_extra__: dict[str, Text]  # pyright: ignore[reportIncompatibleVariableOverride] # how pydantic spells it

    execution_id: Text = Field(default_factory=mint_id)
    request_id: Text = Field(default_factory=mint_id)
    source: Annotated[str, BeforeValidator(_source)] = DIRECT
    parent_execution_id: Text | None = None
    trigger_type: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _normalize(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        values = {name: value for name, value in data.items() if value is not None}
        for name in _IDS:
            if name in values:
                values[name], original = normalize_id(_id_text(name, values[name]))
                if original is not None and name != "parent_execution_id":
                    values[f"original_{name}"] = original
        return values

    @classmethod
    def direct(cls) -> Correlation:
        """Make the correlation of work that nobody correlated: source `direct`, both ids minted."""
        return Correlation._assemble(
            {
                "execution_id": mint_id(),
                "request_id": mint_id(),
                "source": DIRECT,
                "parent_execution_id": None,
                "trigger_type": None,
            },
            {},
            _DIRECT_GIVEN,
        )

    @classmethod
    def from_members(cls, members: Mapping[str, str]) -> Correlation:
        """
        Read what a trusted carrier holds; the inverse of `members()`. Never raises.

        Args:
            members: Decoded members called `otelexec.*`. What can't be an id is hashed, missing ids are minted, a
                missing source is `direct`, unknown names become attributes, and names that only spans use are ignored.
        """
        values = {name.removeprefix(semconv.PREFIX): clean(value) for name, value in members.items()}
        execution_id, original_execution = normalize_id(values.pop("execution_id", ""))
        request_id, original_request = normalize_id(values.pop("request_id", ""))
        source = values.pop("source", "")[:MAX_SOURCE_CHARS] or DIRECT
        parent = values.pop("parent_execution_id", "")
        model = _MODELS.get(source, Correlation)
        known: dict[str, Any] = {
            "execution_id": execution_id,
            "request_id": request_id,
            "source": source,
            "parent_execution_id": normalize_id(parent)[0] if parent else None,
            "trigger_type": values.pop("trigger_type", None),
        }
        for name in model.OWN:
            known[name] = values.pop(name, None)
        if original_execution is not None:
            values["original_execution_id"] = original_execution
        if original_request is not None:
            values["original_request_id"] = original_request
        if values:
            values = {name: value for name, value in values.items() if name not in RESERVED}
        return model._assemble(known, values, set(known))  # noqa: SLF001 # a subclass of this class

    @classmethod
    def _assemble(cls, known: dict[str, Any], extra: dict[str, str], given: set[str]) -> Correlation:
        """Build from values that are valid already: validation would cost several times what the whole path may."""
        new = cls.__new__(cls)
        _put(new, "__dict__", known)
        _put(new, "__pydantic_extra__", extra)
        _put(new, "__pydantic_fields_set__", given)
        _put(new, "__pydantic_private__", None)
        _put(new, "_members", None)  # an unset slot would cost pydantic's search through everything else
        _put(new, "_parts", None)
        return new

    def child(self, parent_execution_id: str | None) -> Correlation:
        """
        Give the correlation of a further execution for the same request: a new execution id, the rest unchanged.

        Args:
            parent_execution_id: The execution that asks for it; None when none does.
        """
        known = self.__dict__.copy()
        known["execution_id"] = mint_id()
        known["parent_execution_id"] = parent_execution_id
        extra = self.__pydantic_extra__
        if "original_execution_id" in extra:
            extra = {name: value for name, value in extra.items() if name != "original_execution_id"}
            return self._assemble(known, extra, self.__pydantic_fields_set__)
        new = self._assemble(known, extra, self.__pydantic_fields_set__)
        _put(new, "_parts", self._split())
        return new

    def _split(self) -> tuple[dict[str, str], dict[str, str]]:
        """Give the fields under their own names and as members; both cached and shared with every child."""
        try:
            cached = self._parts
        except AttributeError:  # validated, copied or unpickled
            cached = None
        if cached is not None:
            return cached
        values = self.__dict__
        fields = {name: values[name] for name in (*self.OWN, "trigger_type") if values[name] is not None}
        fields.update(self.__pydantic_extra__)
        parts = fields, {semconv.PREFIX + name: value for name, value in fields.items()}
        _put(self, "_parts", parts)
        return parts

    @property
    def fields(self) -> Mapping[str, str]:
        """The source's own fields, the trigger type and the attributes, under the names given to `correlate()`; read-only."""
        return self._split()[0]

    def members(self) -> Mapping[str, str]:
        """
        Give the baggage members of one message, which are also the span's attributes: `otelexec.<name>` to value.

        The ids come first, so that whoever has to cut at a limit cuts elsewhere. Cached: read-only.
        """
        try:
            cached = self._members
        except AttributeError:  # validated, copied or unpickled
            cached = None
        if cached is not None:
            return cached
        values = self.__dict__
        members = {
            semconv.EXECUTION_ID: values["execution_id"],
            semconv.REQUEST_ID: values["request_id"],
            semconv.SOURCE: values["source"],
        }
        if values["parent_execution_id"] is not None:
            members[semconv.PARENT_EXECUTION_ID] = values["parent_execution_id"]
        members.update(self._split()[1])
        _put(self, "_members", members)
        return members


class WorkflowCorrelation(Correlation, frozen=True, extra="allow"):
    """Work that a workflow asked for."""

    OWN: ClassVar[tuple[str, ...]] = ("workflow_id",)

    source: Literal["workflow"] = "workflow"
    workflow_id: Text | None = None


class ScheduleCorrelation(Correlation, frozen=True, extra="allow"):
    """Work that a schedule asked for; `scheduled_for` is the time that was meant, in ISO 8601."""

    OWN: ClassVar[tuple[str, ...]] = ("schedule_id", "scheduled_for")

    source: Literal["schedule"] = "schedule"
    schedule_id: Text | None = None
    scheduled_for: Text | None = None


class WebhookCorrelation(Correlation, frozen=True, extra="allow"):
    """Work that a call from outside asked for; `path` is the one it came in on, `provider` who sent it."""

    OWN: ClassVar[tuple[str, ...]] = ("webhook_id", "path", "provider")

    source: Literal["webhook"] = "webhook"
    webhook_id: Text | None = None
    path: Text | None = None
    provider: Text | None = None


_MODELS: Final[dict[str, type[Correlation]]] = {
    "workflow": WorkflowCorrelation,
    "schedule": ScheduleCorrelation,
    "webhook": WebhookCorrelation,
}
_OWNERS: Final = {name: source for source, model in _MODELS.items() for name in model.OWN}


def _tag(value: Any) -> str:
    source = value.get("source") if isinstance(value, Mapping) else getattr(value, "source", None)
    return source if isinstance(source, str) and source in _MODELS else "other"


AnyCorrelation = Annotated[
    Annotated[WorkflowCorrelation, Tag("workflow")]
    | Annotated[ScheduleCorrelation, Tag("schedule")]
    | Annotated[WebhookCorrelation, Tag("webhook")]
    | Annotated[Correlation, Tag("other")],
    Discriminator(_tag),
]
"""The union on `source`, for models of the user's that hold a correlation."""

_UNION: Final[TypeAdapter[Correlation]] = TypeAdapter(AnyCorrelation)


class Scope:
    """
    What `correlate()` and `extract()` open: a correlation whose execution id is there to be used once.

    A forked child gets derived ids only: its siblings and its parent hold the same scope, and one id must not
    become several executions. To run a message in a forked child under the message's id, extract it there.

    Attributes:
        correlation: The scope's own.
        links: Span contexts that the execution span should be linked to, such as an untrusted caller's.
        trusted: Whether the carrier was believed; True for `correlate()`.
        message_id: The message's own id, as the backend knows it; None when there is none.
        enqueued_unix_ns: When the message was made, in nanoseconds since 1970; None when it doesn't say.
        execution: The execution that the scope was opened in; None when there was none.
    """

    __slots__ = ("_pid", "_unused", "correlation", "enqueued_unix_ns", "execution", "links", "message_id", "trusted")

    def __init__(
        self,
        correlation: Correlation,
        *,
        links: tuple[Link, ...] = (),
        trusted: bool = True,
        message_id: str | None = None,
        enqueued_unix_ns: int | None = None,
        execution: CurrentExecution | None = None,
    ) -> None:
        self.correlation = correlation
        self.links = links
        self.trusted = trusted
        self.message_id = message_id
        self.enqueued_unix_ns = enqueued_unix_ns
        self.execution = execution
        self._unused = [correlation]
        self._pid = os.getpid()

    def take(self) -> Correlation:
        """
        Give the correlation for one more execution or message: the scope's own once, after that derived ones.

        Running and sending use up the same id. Any number of threads may ask: exactly one gets the scope's own.
        """
        if self._pid == os.getpid():
            try:
                return self._unused.pop()  # atomic, and unlike a lock it can't be inherited in the locked state by a fork
            except IndexError:
                pass
        return self.correlation.child(self.correlation.parent_execution_id)


def enclosing(context: Context | None = None) -> Correlation | None:
    """
    Give the correlation that holds at this point: that of the innermost scope or execution, whichever is inside.

    Args:
        context: Where to look; None means the current context.

    Returns:
        None outside any scope and execution.
    """
    scope = current_scope(context)
    execution = running(context)
    if execution is None or (scope is not None and scope.execution is execution):
        return None if scope is None else scope.correlation
    return execution.correlation


def running(context: Context | None = None) -> CurrentExecution | None:
    """
    Give the execution that work at this point belongs to.

    Args:
        context: Where to look; None means the current context.

    Returns:
        None outside any execution.
    """
    execution = current_execution(context)
    return None if execution is None or execution.id is None else execution


def with_ambient(context: Context, correlation: Correlation, parent_execution_id: str | None = None) -> Context:
    """
    Put into the baggage of a context what every call made in it may carry: never the execution id.

    One pass over the members and one new context: `baggage.set_baggage` copies both for each key.

    Args:
        context: Where to start. Members that are not ours are kept, older `otelexec.*` ones are replaced.
        correlation: Whose request id and source to set, and those of its fields that the setting `ambient` names.
        parent_execution_id: What a callee's executions have as their parent; None for no such member.
    """
    # Ours first: the SDK's propagator cuts at the end when the header gets too long.
    members: dict[str, object] = {semconv.REQUEST_ID: correlation.request_id, semconv.SOURCE: correlation.source}
    if parent_execution_id is not None:
        members[semconv.PARENT_EXECUTION_ID] = parent_execution_id
    allowed = runtime.settings().ambient
    if allowed:
        members.update((semconv.PREFIX + name, value) for name, value in correlation.fields.items() if name in allowed)
    present = context.get(_BAGGAGE_KEY)
    if isinstance(present, dict):
        members.update((name, value) for name, value in present.items() if not str(name).startswith(semconv.PREFIX))
    values = dict(context)
    values[_BAGGAGE_KEY] = members
    return Context(values)


@contextmanager
def correlate(
    *,
    source: str,
    execution_id: str | None = None,
    request_id: str | None = None,
    attributes: Mapping[str, Any] | None = None,
    trigger_type: str | None = None,
    **fields: Any,
) -> Iterator[Correlation]:
    """
    Say who asks for the work that is run or sent inside the `with` block, which may hold asynchronous code.

    The first execution run or message sent in the block has the execution id, each further one a new id and the
    same request id. Inside an execution each is a child of it.

    Args:
        source: `workflow`, `schedule`, `webhook`, or any other name of 1 to 128 characters.
        execution_id: The id of the first execution; None mints one. The id of an earlier execution makes a new
            attempt at it.
        request_id: None takes that of the enclosing scope or execution, else mints one.
        attributes: More fields under free names; their values become text, None is left out.
        trigger_type: How the source was triggered; None when it doesn't matter.
        **fields: The source's own: workflow_id; schedule_id, scheduled_for; webhook_id, path, provider.

    Yields:
        The correlation of the first execution.

    Raises:
        CorrelationError: A field is not one of the source's, a name is reserved, or a value is no text.
    """
    outer = enclosing()
    execution = running()
    parent = execution.id if execution is not None else outer.parent_execution_id if outer is not None else None
    correlation = _validated(
        source,
        {
            "execution_id": execution_id,
            "request_id": request_id if request_id is not None or outer is None else outer.request_id,
            "parent_execution_id": parent,
            "trigger_type": trigger_type,
        },
        fields,
        {} if attributes is None else attributes,
    )
    context = with_ambient(otel_context.get_current(), correlation, parent)
    token = otel_context.attach(otel_context.set_value(SCOPE_KEY, Scope(correlation, execution=execution), context))
    try:
        yield correlation
    finally:
        otel_context.detach(token)


def _validated(source: object, known: dict[str, Any], fields: Mapping[str, Any], attributes: Mapping[str, Any]) -> Correlation:
    """Build what `correlate()` was asked for, or say in one line why that can't be."""
    own = _MODELS.get(source, Correlation).OWN if isinstance(source, str) else ()
    for name in fields:
        if name not in own:
            owner = f", which is a field of source={_OWNERS[name]!r}" if name in _OWNERS else ""
            raise CorrelationError(f"source={source!r} has no field {name!r}{owner}: use attributes={{{name!r}: ...}}")
    if not isinstance(attributes, Mapping):
        raise CorrelationError(f"attributes must be a mapping of names to text, not {type(attributes).__name__}")
    for name in attributes:
        if not isinstance(name, str):
            raise CorrelationError(f"attribute names must be text, not {type(name).__name__}")
        if name in RESERVED:
            raise CorrelationError(f"attribute name {name!r} is reserved: choose another one")
        if name in own:
            raise CorrelationError(f"attribute name {name!r} is a field of source={source!r}: give it as {name}=...")
    try:
        values = {clean(name): value for name, value in attributes.items()}
        return _UNION.validate_python({**values, **fields, **known, "source": source})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # The first part of the place is the union's tag; an error of the whole model names its field itself.
        where = "".join(f"{part} " for part in first["loc"][1:])
        raise CorrelationError(where + str(first["msg"]).removeprefix("Value error, ")) from None
