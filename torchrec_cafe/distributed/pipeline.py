"""A train pipeline that knows the coming batches and brings their rows in ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

from torchrec_cafe.distributed._torchrec import (
    PrefetchTrainPipelineContext,
    PrefetchTrainPipelineSparseDist,
    receive_input,
)
from torchrec_cafe.distributed.embedding_bag import ShardedCompressedEmbeddingBagCollection

In = TypeVar("In", bound=Any)
Out = TypeVar("Out")

# Stages of a batch, in order.
_LOADED, _SENT, _LOOKED_AHEAD = range(3)


class LookaheadTrainPipeline(PrefetchTrainPipelineSparseDist[In, Out]):
    """TorchRec's prefetch pipeline, with as many batches ahead as are asked for.

    While a batch trains, the ids of the next ``depth`` batches are already where their rows lie,
    and the rows of :class:`torchrec_cafe.Lookahead` tables are on their way to their slots. Results
    are those of training without a pipeline, for any depth. Models may mix all kinds of tables, and
    need none that looks ahead.

    Args:
        model: as TorchRec's.
        optimizer: as TorchRec's.
        device: as TorchRec's.
        depth: batches to look ahead, >= 1. Each takes the slots of its distinct rows, and the
            memory of a batch.
        options: further arguments of :class:`torchrec.distributed.train_pipeline
            .PrefetchTrainPipelineSparseDist`.

    Raises:
        ValueError: if ``depth`` is less than 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        depth: int = 4,
        **options: Any,
    ) -> None:
        """Note the depth; see the class."""
        if depth < 1:
            raise ValueError(f"depth must be >= 1, got {depth}")
        super().__init__(model, optimizer, device, **options)
        self._depth = depth
        self._stages: dict[int | None, int] = {}  # by index of the context

    def fill_pipeline(self, dataloader_iter: Iterator[In]) -> None:
        """Load batches and look ahead for them, until there are as many as there should be.

        Args:
            dataloader_iter: gives batches.
        """
        # TorchRec's rule: otherwise the batches that are left when the data ends are not trained.
        loads = self._execute_all_batches or not self.batches
        while loads and len(self.batches) <= self._depth:
            loads = self._take_in(dataloader_iter)
        for number in range(min(len(self.batches), self._depth + 1)):
            self._look_ahead(number)

    def progress(self, dataloader_iter: Iterator[In]) -> Out:
        """Train one batch, in order.

        Args:
            dataloader_iter: gives batches.

        Returns:
            What the model returns besides the losses.

        Raises:
            StopIteration: when all batches have been trained.
        """
        if not self._model_attached:
            self.attach(self._model)
        self.fill_pipeline(dataloader_iter)
        if not self.batches:
            raise StopIteration
        batch, context = self.batches[0], self.contexts[0]
        self._set_module_context(context)
        if self._model.training:
            self._optimizer.zero_grad()
        self._wait_for_batch()
        self._wait_for_look_ahead()
        # The batch that is looked ahead for next: its ids travel while this one trains.
        coming = len(self.batches)
        self._take_in(dataloader_iter)
        try:
            losses, output = self._model_fwd(batch)
            if coming < len(self.batches):
                self._wait_for_sizes(coming)
            if self._model.training:
                self._backward(losses)
                self._optimizer.step()
            if coming < len(self.batches):
                self._look_ahead(coming)
        finally:  # a batch that has failed is left out, and the next call goes on
            self._stages.pop(context.index, None)
            self.dequeue_batch()
        return output

    def _wait_for_look_ahead(self) -> None:
        """Let the training's stream wait for what looking ahead has made of the ids."""
        if self._prefetch_stream is not None:
            current = torch.get_device_module(self._device).current_stream()
            current.wait_stream(self._prefetch_stream)

    def reset(self) -> None:
        """Forget the batches that were loaded; rows that were brought in for them stay."""
        super().reset()
        self._stages.clear()

    def _stage(self, number: int) -> int:
        return self._stages.get(self.contexts[number].index, _LOADED)

    def _take_in(self, dataloader_iter: Iterator[In]) -> bool:
        """Load a batch and begin to send its ids; says whether there was one.

        One that is refused is left out, and those before it go on in the next call.
        """
        if not self.enqueue_batch(dataloader_iter):
            return False
        try:
            self._send(len(self.batches) - 1)
        except BaseException:
            self.batches.pop()
            self.contexts.pop()
            raise
        return True

    def _send(self, number: int) -> None:
        """Begin to send a batch's ids to where their rows lie."""
        batch, context = self.batches[number], self.contexts[number]
        if self._pipelined_modules:
            self._set_module_context(context)
            self.start_sparse_data_dist(batch, context)
        else:
            first: Any = batch
            self._init_pipelined_modules(first, context, self._pipelined_forward_type)  # pyright: ignore[reportArgumentType]
        self._stages[context.index] = _SENT
        self._set_module_context(self.contexts[0])

    def _wait_for_sizes(self, number: int) -> None:
        """Wait until all ranks know how many ids they will get; the ids themselves set off."""
        context = self.contexts[number]
        if context.fused_splits_awaitables:
            self.wait_sparse_data_dist(context)

    def _look_ahead(self, number: int) -> None:
        """Wait for a batch's ids and begin to bring in their rows."""
        if self._stage(number) == _LOOKED_AHEAD:
            return
        self._wait_for_sizes(number)
        context = self.contexts[number]
        assert isinstance(context, PrefetchTrainPipelineContext)
        # On a GPU the training's stream must not wait for the ids of a batch that comes later.
        with self._stream_context(self._prefetch_stream):  # pyright: ignore[reportArgumentType]
            for module in self._pipelined_modules:
                ids = receive_input(self, module, context)
                if isinstance(module, ShardedCompressedEmbeddingBagCollection):
                    module.look_ahead(ids)
        self._stages[context.index] = _LOOKED_AHEAD
