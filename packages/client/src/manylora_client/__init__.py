"""Synchronous and asynchronous gRPC client of a manylora gateway."""
