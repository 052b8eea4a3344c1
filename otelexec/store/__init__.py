"""The durable execution log: what is written, and where."""
