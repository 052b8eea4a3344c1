"""
For tests: of code that uses otelexec, and of stores.

    with IncrementalIdGenerator(), SteppingClock(), OtlpReceiver() as receiver:
        otelexec.configure(store=f"sqlite:///{tmp_path}/store.db", otlp_endpoint=receiver.endpoint)
        run_invoice(7)
        otelexec.shutdown()  # sends what is left, and leaves neither thread nor connection
        assert span_tree(receiver.wait_for(2)) == [("invoice.run", [("charge", [])])]

Each `configure()` ends what the one before began, so every test can have a store of its own:

    @pytest.fixture(autouse=True)
    def store(tmp_path):
        otelexec.configure(store=f"sqlite:///{tmp_path}/store.db", relay=False)  # nothing is sent
        yield
        otelexec.shutdown()

Without records: `configure(store="none")`, and OTEL_TRACES_EXPORTER=none where nothing listens for spans. Clocks may be frozen
(freezegun, time-machine): records and spans show the frozen time, waits go on by the real one.

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
