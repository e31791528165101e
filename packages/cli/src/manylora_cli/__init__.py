"""The manylora command: train, publish, serve and evaluate LoRA adapters."""
