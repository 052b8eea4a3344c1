"""
For tests: of code that uses otelexec, and of stores.

    with IncrementalIdGenerator(), SteppingClock(), OtlpReceiver() as receiver:
        ...
        assert span_tree(receiver.wait_for(2)) == [("invoice.run", [("charge", [])])]

A store passes `StoreContract` (needs pytest and hypothesis):

    class TestMyStore(StoreContract):
        @pytest.fixture
        def store(self): ...

        @pytest.fixture
        def other_store(self, store): ...  # a function that gives one more Store on the same database
"""

from otelexec.receiver import Answer, OtlpReceiver
from otelexec.testing.contract import StoreContract
from otelexec.testing.deterministic import IncrementalIdGenerator, SteppingClock
from otelexec.testing.trees import span_tree

__all__ = ["Answer", "IncrementalIdGenerator", "OtlpReceiver", "SteppingClock", "StoreContract", "span_tree"]
