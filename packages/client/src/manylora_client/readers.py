"""What both clients do with the messages of a server stream, without any I/O of their own."""

import manylora.inference.v1.inference_pb2 as pb
from manylora_client import wire
from manylora_client.errors import ProtocolError, StatusError
from manylora_client.status import batch_error
from manylora_client.types import Choice, Delta, Finished, FinishReason, Generation, Started


class StreamReader:
    """Reads the events of one stream in their order, and puts them together again."""

    def __init__(self) -> None:
        self.started: Started | None = None
        self.finished: Finished | None = None
        self._deltas: list[Delta] = []

    def feed(self, message: pb.GenerateStreamResponse) -> Delta | None:
        """Takes the next event; returns it if it is a delta.

        Raises:
            ProtocolError: when the event is out of order.
        """
        kind = message.WhichOneof("event")
        if (self.started is None) != (kind == "started") or self.finished is not None:
            raise ProtocolError(f"the server sent the stream event {kind!r} out of order")
        if kind == "started":
            self.started = wire.started(message.started)
        elif kind == "finished":
            self.finished = wire.finished(message.finished)
        elif kind == "delta":
            delta = wire.delta(message.delta)
            self._deltas.append(delta)
            return delta
        # An event of a later protocol is passed over.
        return None

    def end(self) -> None:
        """Takes the end of the stream.

        Raises:
            ProtocolError: when the last event is missing.
        """
        if self.finished is None:
            raise ProtocolError("the server ended the stream without its last event")

    def generation(self) -> Generation:
        """The whole answer, equal to what `generate` would have returned."""
        if self.started is None or self.finished is None:
            raise ProtocolError("the stream was closed before its last event")
        # A server that knows nothing of several choices names no reasons for each.
        reasons = self.finished.finish_reasons or (self.finished.finish_reason,)
        choices = tuple(self._choice(index, reason) for index, reason in enumerate(reasons))
        return Generation(
            text=choices[0].text,
            token_ids=choices[0].token_ids,
            adapter=self.started.adapter,
            finish_reason=choices[0].finish_reason,
            usage=self.finished.usage,
            logprobs=choices[0].logprobs,
            request_id=self.started.request_id,
            choices=choices if len(choices) > 1 else (),
            timing=self.finished.timing,
        )

    def _choice(self, index: int, reason: FinishReason) -> Choice:
        deltas = [delta for delta in self._deltas if delta.choice == index]
        return Choice(
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(token for delta in deltas for token in delta.token_ids),
            finish_reason=reason,
            logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        )


class BatchReader:
    """Collects the results of one batch, which come in any order, in the order of its requests."""

    def __init__(self, size: int) -> None:
        self._results: list[Generation | StatusError | None] = [None] * size

    def feed(self, message: pb.BatchGenerateResponse) -> None:
        """Takes the next result.

        Raises:
            ProtocolError: when it belongs to no request of the batch.
        """
        if message.index >= len(self._results):
            raise ProtocolError(f"the server answered request {message.index}, which was not sent")
        if message.WhichOneof("result") == "error":
            self._results[message.index] = batch_error(message.error)
        else:
            self._results[message.index] = wire.generation(message.response)

    def results(self) -> list[Generation | StatusError]:
        """Every result.

        Raises:
            ProtocolError: when requests were left unanswered.
        """
        answered = [result for result in self._results if result is not None]
        if len(answered) < len(self._results):
            missing = len(self._results) - len(answered)
            raise ProtocolError(f"the server left {missing} requests of the batch unanswered")
        return answered
