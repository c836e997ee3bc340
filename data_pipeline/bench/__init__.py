"""Measures the loader against the loaders of others, against decoding alone, and on Ray: `weft bench data`."""
