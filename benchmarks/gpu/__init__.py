"""Measurements that need a GPU. None of them decides anything."""
