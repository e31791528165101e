"""The processes that train one run together, and what they tell each other.

Every worker reads the same rows and plans the same step; each computes its share of the step's
packs, and sums of losses and gradients make them all agree again. So the loop is the same for one
worker and for many, and the workers' weights stay equal without ever being exchanged.
"""

# torch is only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Sequence
from typing import Protocol, TypeVar, cast

from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from manylora_trainer.packing import Pack

T = TypeVar("T")


class Workers(Protocol):
    """One worker's view of all."""

    rank: int
    """Of this worker, counted from 0; only worker 0 writes into the run directory."""
    size: int
    sharded: bool
    """Whether the base is divided among them, so that each forward needs all of them."""

    def add_up(self, *tensors: Tensor) -> None:
        """Replaces each tensor by its sum over all workers."""
        ...

    def wait(self) -> None:
        """Returns once every worker has called it."""
        ...

    def agreed(self, word: T | None) -> T | None:
        """What the first of them with anything to say says, for all to act on."""
        ...

    def share(self, decoder: nn.Module) -> None:
        """Divides the frozen layers of a decoder among the workers, if that was asked for."""
        ...


class Alone:
    """The one worker of a run in a single process."""

    rank = 0
    size = 1
    sharded = False

    def add_up(self, *tensors: Tensor) -> None:
        """Nothing to add."""

    def wait(self) -> None:
        """Nobody to wait for."""

    def agreed(self, word: T | None) -> T | None:
        """What it says itself."""
        return word

    def share(self, decoder: nn.Module) -> None:
        """Nobody to share with."""


class ProcessGroup:
    """A worker of torch's default process group, which who starts the workers has set up."""

    def __init__(self, *, sharded: bool) -> None:
        self.rank = distributed.get_rank()
        self.size = distributed.get_world_size()
        self.sharded = sharded

    def add_up(self, *tensors: Tensor) -> None:
        """Replaces each tensor by its sum over all workers."""
        for tensor in tensors:
            distributed.all_reduce(tensor)

    def wait(self) -> None:
        """Returns once every worker has called it."""
        distributed.barrier()

    def agreed(self, word: T | None) -> T | None:
        """What the first of them with anything to say says, for all to act on."""
        said: list[T | None] = [None] * self.size
        distributed.all_gather_object(said, word)
        return next((each for each in said if each is not None), None)

    def leave(self) -> None:
        """Closes the group: what the others wait for fails."""
        distributed.destroy_process_group()

    def share(self, decoder: nn.Module) -> None:
        """FSDP2 (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html).

        The layers are divided, each gathered only while it computes. Embedding and norm stay
        whole, as they are read outside of the decoder's own forward too.
        """
        if not self.sharded:
            return
        device = next(decoder.parameters()).device.type
        mesh = init_device_mesh(device, (self.size,))
        layers = cast("Sequence[nn.Module]", decoder.layers)
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        within = {id(parameter) for layer in layers for parameter in layer.parameters()}
        rest = {p for p in decoder.parameters() if id(p) not in within}
        fully_shard(decoder, mesh=mesh, ignored_params=rest)
        # All layers take part in each backward, wherever the adapters of a worker's pack begin:
        # else its neighbour would wait for it to gather those below.
        embedding = cast("nn.Module", decoder.get_input_embeddings())  # pyright: ignore[reportCallIssue]
        embedding.register_forward_hook(lambda _, __, states: states.requires_grad_())


def own_share(packs: Sequence[Pack], workers: Workers) -> list[tuple[Pack, bool]]:
    """This worker's packs of a step, each with whether it counts.

    Workers that share the base must compute equally often: who has too few packs repeats the
    first without counting it.
    """
    own = [(pack, True) for pack in packs[workers.rank :: workers.size]]
    if workers.sharded and len(own) < -(-len(packs) // workers.size):
        own.append((packs[0], False))
    return own
