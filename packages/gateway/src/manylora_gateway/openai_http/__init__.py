"""OpenAI's HTTP API in front of the same core as the gRPC services."""
