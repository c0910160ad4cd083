"""The immutable, hash-consed graph that both levels share: types, text form, verifier."""
