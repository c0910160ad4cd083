"""Code generators, one folder each."""

if __name__ != "pcc.backends":
    raise ImportError(f"import this package as 'pcc.backends', not {__name__!r}")
