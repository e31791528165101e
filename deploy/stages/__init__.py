"""Stages: a gateway each, the alias it serves, and how a version earns its way into one."""
