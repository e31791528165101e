"""Our LoRA kernels for vLLM on a CPU, where vLLM's own answer with the wrong adapter."""
