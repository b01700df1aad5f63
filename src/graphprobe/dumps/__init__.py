"""Dumps: what is written of a graph after each transform, and what such a directory tells."""
