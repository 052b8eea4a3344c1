"""The tests; `python -m tests.benchmarks` and `from tests.servers import ...` need them to be a package."""
