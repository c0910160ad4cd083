"""Loads and runs bundles; needs no part of the compiler."""
