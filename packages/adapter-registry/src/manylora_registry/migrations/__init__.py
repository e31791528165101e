"""Schema migrations, applied by Alembic when a registry is opened."""

REVISIONS = ("0001", "0002", "0003", "0004")
"""Every schema this library can read, oldest first. Listed here so that opening a registry that is
up to date needs no Alembic, which takes a third of a second to import."""
