"""A compiler for probabilistic circuits."""
