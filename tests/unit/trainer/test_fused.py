"""Fusing small operations changes how they are computed, not what."""

import numpy as np
import torch

from manylora_trainer.base_model import BaseModel
from manylora_trainer.fused import fuse_small_operations
from manylora_trainer.packing import Batch, pack_batches
from manylora_trainer.tokenization import Example


def test_a_rewired_model_computes_the_same_in_the_same_modules(tiny_base):
    base = BaseModel(tiny_base, torch.float32, torch.device("cpu"))
    other = BaseModel(tiny_base, torch.float32, torch.device("cpu"))
    tokens = np.random.default_rng(0).integers(3, 250, 40).astype(np.int32)
    (pack,) = pack_batches([Batch(0, [Example(tokens, np.arange(40) >= 10)])], 64)
    before = base.logits(pack)
    # Without the compiler: what it makes of them is for a GPU to show.
    with torch.compiler.set_stance("force_eager"):
        fuse_small_operations(base.model)
        changed = {type(m).__name__ for m in base.model.modules() if "forward" in vars(m)}
        assert changed == {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention"}
        assert torch.equal(base.logits(pack), before)
    assert not any("forward" in vars(m) for m in other.model.modules())
