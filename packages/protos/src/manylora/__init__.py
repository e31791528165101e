"""Generated protobuf and gRPC stubs of manylora; regenerate with `make protos`."""
