"""Why vLLM refuses to start, by the names that its settings have here."""

NAMES = {
    "`gpu_memory_utilization` (which also controls CPU memory on the CPU backend)": (
        "engine.kv_cache_gib"
    ),
    "`gpu_memory_utilization`": "engine.gpu_memory",
    "the model's max seq len": "engine.max_context",
    "`max_model_len`": "engine.max_context",
    "max_model_len": "engine.max_context",
    "max_num_batched_tokens": "engine.max_batched_tokens",
    "max_num_seqs": "engine.max_concurrent and engine.express",
    " when initializing the engine": "",
}
"""What vLLM calls them, and what the gateway's configuration does; earlier ones first."""


def by_our_names(text: str) -> str:
    """A text of vLLM's that an operator of the gateway can act on."""
    for theirs, ours in NAMES.items():
        text = text.replace(theirs, ours)
    return text
