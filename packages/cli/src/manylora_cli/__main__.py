"""Lets `python -m manylora_cli` run the command."""

from manylora_cli.main import main

main()
