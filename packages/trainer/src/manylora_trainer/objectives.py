"""What a step makes smaller: from the cross-entropy of each example to one adapter's loss."""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false

from collections.abc import Sequence
from typing import Literal, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its name everywhere)
from torch import Tensor

from manylora_trainer.device import on_device
from manylora_trainer.packing import Batch, Pack


class Objective(Protocol):
    """The loss of one adapter's batch, whose parts come pack by pack."""

    def loss(self, sequences: Sequence[int], summed: Tensor) -> Tensor:
        """What some examples of the batch add to its loss.

        Args:
            sequences: their numbers in the batch.
            summed: cross-entropy of each, summed over its trained tokens, [examples].
        """
        ...


class MeanCrossEntropy:
    """Supervised fine-tuning: the mean cross-entropy of a whole step's completions."""

    def __init__(
        self, batch: Batch, normalizer: Literal["tokens", "examples"], device: torch.device
    ) -> None:
        # Divided by what the whole step holds: averaging the averages of packs would weigh tokens
        # by the pack they happen to be in.
        trained = batch.trained
        match normalizer:
            case "tokens":
                weights = np.full(len(trained), 1.0 / trained.sum())
            case "examples":
                weights = 1.0 / (trained * len(trained))
        self._weights = on_device(weights.astype(np.float32), device)

    def loss(self, sequences: Sequence[int], summed: Tensor) -> Tensor:
        """See `Objective`."""
        return (summed * _taken(self._weights, sequences)).sum()


class DirectPreference:
    """DPO (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290), the mean over a step's pairs.

    Examples 2k and 2k + 1 of the batch are the chosen and the rejected half of a pair.
    """

    def __init__(self, beta: float, reference: Tensor) -> None:
        """`reference` holds what the examples' cross-entropy sums up to before training, [2k]."""
        self._beta = beta
        self._reference = reference
        self.margins: list[Tensor] = []
        """How much more each pair's chosen answer has gained than its rejected one, times beta."""

    def loss(self, sequences: Sequence[int], summed: Tensor) -> Tensor:
        """See `Objective`."""
        place = {number: at for at, number in enumerate(sequences)}
        chosen = [number for number in sequences if number % 2 == 0]
        # Log-probabilities are the negated cross-entropies, so gains are differences from before.
        gained = _taken(self._reference, sequences) - summed
        ahead = _taken(gained, [place[number] for number in chosen])
        behind = _taken(gained, [place[number + 1] for number in chosen])
        margins = self._beta * (ahead - behind)
        # Read once the step is over: a GPU would have to be waited for here.
        self.margins.append(margins.detach())
        return -F.logsigmoid(margins).sum() / (len(self._reference) // 2)


def _taken(values: Tensor, numbers: Sequence[int]) -> Tensor:
    return values[on_device(np.array(numbers), values.device)]


def sums_by_example(pack: Pack, losses: Tensor) -> Tensor:
    """Adds up the losses of a pack's targets for each of its examples, [examples]."""
    examples = sum(len(span.sequences) for span in pack.spans)
    targets = on_device(pack.target_sequences, losses.device)
    return losses.new_zeros(examples).index_add(0, targets, losses)


def margin_sums(objective: Objective | None, device: torch.device) -> Tensor:
    """Pairs of a step seen here, those whose chosen answer is ahead, and by how much in all."""
    if not (isinstance(objective, DirectPreference) and objective.margins):
        return torch.zeros(3, device=device)
    margins = torch.cat(objective.margins)
    return torch.stack([torch.ones_like(margins), (margins > 0).float(), margins]).sum(dim=1)


def preference_figures(pairs: float, ahead: float, margin: float) -> dict[str, float]:
    """What is worth knowing of a step of preferences, of its `margin_sums`; empty for others."""
    if not pairs:
        return {}
    return {"preference_accuracy": ahead / pairs, "preference_margin": margin / pairs}


def losses_by_adapter(
    pack: Pack, summed: Tensor, objectives: Sequence[Objective | None], counts: bool = True
) -> list[tuple[int, Tensor]]:
    """What a pack adds to the loss of each adapter that has examples in it.

    Zero, but with a gradient, for a pack that does not count.
    """
    lengths = [len(span.sequences) for span in pack.spans]
    parts = cast("tuple[Tensor, ...]", summed.split(lengths))
    losses: list[tuple[int, Tensor]] = []
    for span, part in zip(pack.spans, parts, strict=True):
        objective = objectives[span.adapter]
        assert objective is not None, "every batch has an objective"
        if not counts:
            losses.append((span.adapter, part.sum() * 0.0))
            continue
        losses.append((span.adapter, objective.loss(span.sequences, part)))
    return losses
