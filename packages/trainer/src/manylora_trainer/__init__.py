"""Trains many LoRA adapters over one base model in one run."""
