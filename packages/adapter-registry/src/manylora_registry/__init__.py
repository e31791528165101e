"""Immutable, verified adapter versions with aliases, history and lineage."""
