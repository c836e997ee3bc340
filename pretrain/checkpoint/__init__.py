"""Checkpoints: one canonical form, whole tensors by name, that loads under any layout."""
