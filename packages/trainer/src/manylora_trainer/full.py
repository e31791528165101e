"""Full fine-tuning: the base's own weights in place of an adapter's."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manylora_trainer.durable import write_directory, write_tensors

WEIGHTS_FILE = "model.safetensors"
KEPT_AS_THEY_ARE = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "chat_template*")


class BaseWeights:
    """All weights of a model as one flat buffer, and their gradients as another.

    The model's parameters become views into both, so optimiser, clipping and checkpoints handle
    them like an adapter's.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        parameters: list[tuple[str, torch.nn.Parameter]] = list(model.named_parameters())
        size = sum(parameter.numel() for _, parameter in parameters)
        first = parameters[0][1]
        self.weights = torch.empty(size, dtype=torch.float32, device=first.device)
        self.gradients = torch.zeros_like(self.weights)
        self.named: dict[str, Tensor] = {}
        at = 0
        for name, parameter in parameters:
            end = at + parameter.numel()
            view = self.weights[at:end].view_as(parameter)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.requires_grad_(True)
            parameter.grad = self.gradients[at:end].view_as(parameter)
            self.named[name] = view
            at = end

    def save(self, directory: Path, base: Path) -> int:
        """Writes a Hugging Face model with the tokenizer of `base`, whole or not at all.

        Returns the bytes of the weights.
        """

        def fill(temporary: Path) -> None:
            write_tensors(temporary / WEIGHTS_FILE, self.named)
            self._model.config.save_pretrained(temporary)
            if self._model.can_generate():
                self._model.generation_config.save_pretrained(temporary)
            for pattern in KEPT_AS_THEY_ARE:
                for file in base.glob(pattern):
                    shutil.copy(file, temporary / file.name)

        write_directory(directory, fill)
        return (directory / WEIGHTS_FILE).stat().st_size
