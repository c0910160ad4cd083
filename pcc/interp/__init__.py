"""The reference evaluators: one interpreter over semirings."""
