"""Runs graphs on an NVIDIA GPU: memory, streams, captured rounds, and the engines below them."""
