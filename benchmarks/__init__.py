"""Timings of compiled queries against other ways to run the same circuits."""
