"""Scores adapters through a gateway on held-out rows."""
