"""Serves every adapter version from one base model behind gRPC."""
