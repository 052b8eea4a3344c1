"""The W3C formats: what we write every reader takes, and what anybody wrote we read."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry import baggage, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from otelexec import w3c
from otelexec.correlation import Correlation

MEMBER = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+[ \t]*=[ \t]*(?:[\x21\x23\x24\x26-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]|%[0-9A-Fa-f]{2})*(?:;[^,]*)?"
GRAMMAR = re.compile(rf"{MEMBER}(?:,{MEMBER})*")

any_text = st.text(st.characters(codec=None))
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=12,
)


class TestCodec:
    @given(st.dictionaries(st.text(), st.text(), max_size=20))
    def test_any_text_comes_back_as_it_went(self, values: dict[str, str]) -> None:
        """Whatever is not reported as dropped is read as it was written."""
        header, dropped = w3c.encode_baggage({f"otelexec.{name}": value for name, value in values.items()}, {})
        ours, others = w3c.decode_baggage(header)
        expected = {f"otelexec.{name}".strip(): value for name, value in values.items() if f"otelexec.{name}" not in dropped}
        assert {name.strip(): value for name, value in ours.items()} == expected
        assert others == {}

    @given(st.dictionaries(any_text, any_text, max_size=8), st.dictionaries(any_text | st.integers(), any_json, max_size=8))
    def test_a_written_header_is_always_valid_and_within_the_limits(self, ours: dict[str, str], others: dict[Any, Any]) -> None:
        """W3C Baggage, section 3.3: 8,192 bytes, 180 members of 4,096, tokens and baggage octets only."""
        header, _ = w3c.encode_baggage(ours, others)
        assert len(header.encode("ascii")) <= 8_192
        assert not header or GRAMMAR.fullmatch(header)
        assert all(len(member) <= 4_096 for member in header.split(","))

    @given(st.integers(0, 9_000), st.integers(0, 400))
    def test_the_ids_are_written_whatever_else_there_is(self, long: int, many: int) -> None:
        """Ids of the greatest length survive beside any number and size of other members, and what was dropped is named."""
        correlation = Correlation(execution_id="~" * 127 + '"', request_id="," * 128, source="é" * 128, parent_execution_id=" " * 128)
        others = {"long": "x" * long} | {f"m{number}": "y" * 40 for number in range(many)}
        header, dropped = w3c.encode_baggage(correlation.members(), others)
        ours, kept = w3c.decode_baggage(header)
        assert ours == correlation.members()
        assert {*kept, *dropped} == set(others)
        assert len(header) <= 8_192
        assert header.count(",") < 180

    def test_a_small_member_after_one_that_is_too_big_is_still_written(self) -> None:
        """The SDK drops everything after the first that does not fit."""
        header, dropped = w3c.encode_baggage({}, {"a": "x" * 4_097, "b": "1", "": "no name"})
        assert header == "b=1"
        assert dropped == ("a", "")

    def test_spaces_and_pluses_are_written_so_that_every_reader_agrees(self) -> None:
        """A reader that takes `+` for a space sees none."""
        assert w3c.encode_baggage({"k": "a b+c"}, {})[0] == "k=a%20b%2Bc"

    def test_an_incoming_plus_stays_a_plus_and_leaves_as_one(self) -> None:
        """W3C has no special meaning for it; a Python SDK further on still reads the space that another one wrote."""
        _, others = w3c.decode_baggage("k=a+b")
        assert others == {"k": "a+b"}
        assert w3c.encode_baggage({}, others)[0] == "k=a+b"

    def test_lone_surrogates_and_control_characters_never_raise(self) -> None:
        """What UTF-8 can't hold becomes U+FFFD, line ends are encoded."""
        assert w3c.encode_baggage({"k": "\ud800"}, {"\udfff": "\r\nx: y\0"})[0] == "k=%EF%BF%BD,%EF%BF%BD=%0D%0Ax%3A%20y%00".replace(
            "%3A", ":"
        )

    def test_foreign_members_are_passed_on_byte_for_byte(self) -> None:
        """Properties, spelling and blanks of members that are not ours survive."""
        text = "a=1;p;q=2,b = x%2fy ;r= %41,c=(d)"
        _, others = w3c.decode_baggage(text)
        assert others == {"a": "1", "b": "x/y", "c": "(d)"}
        assert w3c.encode_baggage({}, others)[0] == text

    def test_a_foreign_member_that_is_not_valid_is_written_anew(self) -> None:
        """What goes out is always valid, whatever came in."""
        _, others = w3c.decode_baggage('a="q",b=%zz,c=é')
        assert w3c.encode_baggage({}, others)[0] == "a=%22q%22,b=%25zz,c=%C3%A9"

    def test_a_foreign_value_under_another_name_is_an_ordinary_value(self) -> None:
        """Copying a value never brings its old name back."""
        _, others = w3c.decode_baggage("a=1;p")
        assert w3c.encode_baggage({}, {"b": others["a"]})[0] == "b=1"

    def test_the_last_of_two_members_with_one_name_counts(self) -> None:
        """Ours and others alike."""
        assert w3c.decode_baggage("k=1,otelexec.x=1,k=2,otelexec.x=2") == ({"otelexec.x": "2"}, {"k": "2"})

    @pytest.mark.parametrize(
        "name",
        [
            *("otelexec%2Eexecution_id", "%6ftelexec.execution_id", "%20otelexec.execution_id", "otelexec.execution_id%09"),
            *("\xa0otelexec.execution_id", "\x85otelexec.execution_id", "\x1fotelexec.execution_id\u2003", "\xa0%6ftelexec.execution_id"),
            *("+otelexec.execution_id", "+%20+otelexec%2Eexecution_id+", "otelexec.execution_id\xa0"),
        ],
    )
    def test_no_spelling_hides_a_member_of_ours(self, name: str) -> None:
        """Else a stranger's id would pass an edge as foreign and become ours behind the next Python SDK."""
        ours, others = w3c.decode_baggage(f"{name}=victim")
        assert ours == {"otelexec.execution_id": "victim"}
        assert others == {}

    @given(any_text)
    def test_any_text_can_be_read(self, text: str) -> None:
        """Seed behaviour 41."""
        w3c.decode_baggage(text)
        w3c.decode_trace(text, text)

    def test_a_huge_header_is_read_in_part(self) -> None:
        """Ours lead, so they are in the part that is read."""
        ours, others = w3c.decode_baggage("otelexec.execution_id=e," + "k=v," * 1_000_000)
        assert ours == {"otelexec.execution_id": "e"}
        assert others == {"k": "v"}

    @given(
        st.from_regex(r"[ \t]?[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[a-z0-9-]{0,4})?[ \t]?", fullmatch=True)
        | st.sampled_from(["00", "ff", "01"]).map(lambda version: f"{version}-{'0' * 32}-{'1' * 16}-01")
        | st.text(),
        st.none()
        | st.from_regex(r"[a-z]{1,3}=[a-z0-9]{1,3}(,[a-z]{1,3}=[a-z]{1,3}){0,3}", fullmatch=True)
        | st.integers(0, 40).map(lambda members: ",".join(f"vendor{member}={'x' * 250}" for member in range(members)))
        | st.text(),
    )
    @example(f"00-{1:032x}-{1:016x}-01", f"a={'x' * 250},b={'y' * 250},c={'z' * 250}")
    def test_trace_context_is_read_as_the_sdk_reads_it(self, traceparent: str, tracestate: str | None) -> None:
        """The same span context, or none, for any text."""
        carrier = {"traceparent": traceparent} | ({} if tracestate is None else {"tracestate": tracestate})
        context = TraceContextTextMapPropagator().extract(carrier, Context())
        expected = trace.get_current_span(context).get_span_context()
        found = w3c.decode_trace(traceparent, tracestate)
        assert (found or trace.INVALID_SPAN_CONTEXT) == expected
        if found is not None:
            written: dict[str, str] = {}
            TraceContextTextMapPropagator().inject(written, context)
            assert w3c.encode_traceparent(found) == written["traceparent"]


class TestStockSdk:
    @given(
        st.dictionaries(
            st.text(min_size=1).filter(lambda name: name.strip() == name), st.text().filter(lambda v: v.strip() == v), max_size=8
        )
    )
    def test_the_python_sdk_reads_what_we_write(self, values: dict[str, str]) -> None:
        """All members, whatever is in them; the SDK strips blanks around values, so there are none here."""
        header, dropped = w3c.encode_baggage({}, values)
        read = baggage.get_all(W3CBaggagePropagator().extract({"baggage": header}, Context()))
        assert read == {name: value for name, value in values.items() if name not in dropped}

    @given(st.dictionaries(st.text(min_size=1).filter(lambda name: name.strip() == name), st.text(), max_size=8))
    def test_we_read_what_the_python_sdk_writes(self, values: dict[str, str]) -> None:
        """But for its `+`, which W3C does not know and which goes out as it came in."""
        context = Context()
        for name, value in values.items():
            context = baggage.set_baggage(name, value, context=context)
        carrier: dict[str, str] = {}
        W3CBaggagePropagator().inject(carrier, context)
        ours, others = w3c.decode_baggage(carrier.get("baggage", ""))
        read = {**ours, **others}
        assert {name.replace("+", " "): value.replace("+", " ") for name, value in read.items()} == {
            name.replace("+", " "): value.replace("+", " ") for name, value in values.items()
        }
        again, _ = w3c.encode_baggage({}, others)
        assert baggage.get_all(W3CBaggagePropagator().extract({"baggage": again}, Context())) == {
            name: value.strip() for name, value in values.items() if not name.startswith("otelexec.")
        }
