"""The store contract suite: what any store must do, whatever database it keeps its rows in."""

from __future__ import annotations

from otelexec.testing.attempts import AttemptContract
from otelexec.testing.family import FamilyContract
from otelexec.testing.model import check_against_model
from otelexec.testing.outbox import OutboxContract
from otelexec.testing.pruning import PruningContract
from otelexec.testing.queueing import QueueContract
from otelexec.testing.reading import ReadingContract
from otelexec.testing.rows import OpenStore
from otelexec.testing.run_attempts import RunAttemptContract
from otelexec.testing.sharing import SharingContract


class StoreContract(
    AttemptContract, FamilyContract, OutboxContract, PruningContract, QueueContract, ReadingContract, RunAttemptContract, SharingContract
):
    """
    Tests that a store inherits. The class that inherits them has two fixtures.

    `store` gives a `Store` on a database of the test's own, empty at first; `other_store` gives a function without
    arguments that opens one more `Store` on that database. `Settings(store=store.url)` must name it too, for other
    processes.
    """

    def test_the_state_follows_the_model_whatever_order_things_happen_in(self, other_store: OpenStore) -> None:
        check_against_model(other_store)
