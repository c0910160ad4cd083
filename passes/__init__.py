"""Rewrites of the circuit and tensor levels, and the driver that checks each of them."""

if __name__ != "pcc.passes":
    raise ImportError(f"import this package as 'pcc.passes', not {__name__!r}")
