"""
The correlation of an execution: a union of pydantic models on `source`.

Made by validation where a user says what it is (`correlate()`), and by assembly where it is known to be valid: from
an incoming message, and from another correlation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, PrivateAttr, Tag, TypeAdapter, model_validator

from otelexec import semconv
from otelexec.ids import as_text, mint_id, normalize_id
from otelexec.w3c import clean

DIRECT: Final = "direct"
"""The source of work that nobody correlated."""

MAX_SOURCE_CHARS: Final = 128
"""Bounds the one free text among the three ids: percent-encoded it is at most 1,536 bytes of the header's 8,192."""

RESERVED: Final = frozenset(
    {value.removeprefix(semconv.PREFIX) for value in vars(semconv).values() if isinstance(value, str) and value.startswith(semconv.PREFIX)}
    | {"", "trigger_type", "signature"}
)
"""What a free attribute can't be called, because `otelexec.<name>` already says something else on the span."""

_DIRECT_GIVEN: Final = {"execution_id", "request_id", "source"}
_IDS: Final = ("execution_id", "request_id", "parent_execution_id")
_put = object.__setattr__

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
        # Said in a way that keeps them out of the constructor's signature.
        __pydantic_extra__: dict[str, Text] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]
        _members: dict[str, str] | None = PrivateAttr()
        _parts: tuple[dict[str, str], dict[str, str]] | None = PrivateAttr()
    else:
        __pydantic_extra__: dict[str, Text]

    OWN: ClassVar[tuple[str, ...]] = ()
    """The fields that belong to the source."""

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
        rest = dict(members)
        execution_id, original_execution = normalize_id(rest.pop(semconv.EXECUTION_ID, ""))
        request_id, original_request = normalize_id(rest.pop(semconv.REQUEST_ID, ""))
        source = clean(rest.pop(semconv.SOURCE, "")[:MAX_SOURCE_CHARS]) or DIRECT
        parent = rest.pop(semconv.PARENT_EXECUTION_ID, "")
        model = MODELS.get(source, Correlation)
        known: dict[str, Any] = {
            "execution_id": execution_id,
            "request_id": request_id,
            "source": source,
            "parent_execution_id": normalize_id(parent)[0] if parent else None,
            **dict.fromkeys(("trigger_type", *model.OWN)),
        }
        extra: dict[str, str] = {}
        for member, value in rest.items():
            name = clean(member.removeprefix(semconv.PREFIX))
            if name in known:
                known[name] = clean(value)
            elif name not in RESERVED:
                extra[name] = clean(value)
        if original_execution is not None:
            extra["original_execution_id"] = original_execution
        if original_request is not None:
            extra["original_request_id"] = original_request
        return model._assemble(known, extra, _GIVEN.get(source, _GIVEN_ELSE))  # noqa: SLF001 # a subclass of this class

    @classmethod
    def _assemble(
        cls,
        known: dict[str, Any],
        extra: dict[str, str],
        given: set[str],
        parts: tuple[dict[str, str], dict[str, str]] | None = None,
    ) -> Correlation:
        """Build from values that are valid already: validation would cost several times what the whole path may."""
        new = cls.__new__(cls)
        _put(new, "__dict__", known)
        _put(new, "__pydantic_extra__", extra)
        _put(new, "__pydantic_fields_set__", given)
        _put(new, "__pydantic_private__", None)
        _put(new, "_members", None)  # an unset slot would cost pydantic's search through everything else
        _put(new, "_parts", parts)
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
        return self._assemble(known, extra, self.__pydantic_fields_set__, self._split())

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


MODELS: Final[dict[str, type[Correlation]]] = {
    "workflow": WorkflowCorrelation,
    "schedule": ScheduleCorrelation,
    "webhook": WebhookCorrelation,
}
_GIVEN: Final = {source: set(model.model_fields) for source, model in MODELS.items()}
_GIVEN_ELSE: Final = set(Correlation.model_fields)
OWNERS: Final = {name: source for source, model in MODELS.items() for name in model.OWN}


def _tag(value: Any) -> str:
    source = value.get("source") if isinstance(value, Mapping) else getattr(value, "source", None)
    return source if isinstance(source, str) and source in MODELS else "other"


AnyCorrelation = Annotated[
    Annotated[WorkflowCorrelation, Tag("workflow")]
    | Annotated[ScheduleCorrelation, Tag("schedule")]
    | Annotated[WebhookCorrelation, Tag("webhook")]
    | Annotated[Correlation, Tag("other")],
    Discriminator(_tag),
]
"""The union on `source`, for models of the user's that hold a correlation."""

UNION: Final[TypeAdapter[Correlation]] = TypeAdapter(AnyCorrelation)
