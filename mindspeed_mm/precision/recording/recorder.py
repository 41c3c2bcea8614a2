"""Recording a training loop that is not ours, as a reference."""

from __future__ import annotations

import inspect
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from mindspeed_mm.distributed.grad_norm import total_grad_norm
from mindspeed_mm.precision.recording.capture import Capture
from mindspeed_mm.precision.recording.effective import effective_values
from mindspeed_mm.precision.recording.plan import CapturePlan
from mindspeed_mm.precision.recording.sites import innermost
from mindspeed_mm.precision.recording.view import PlainView
from mindspeed_mm.precision.records.record import RecordWriter

_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "numpy", "mindspeed-mm")


class Recorder:
    """Records steps of any PyTorch training loop, in the format that ``mindspeed-mm precision`` compares.

    Three lines in a loop of your own::

        from mindspeed_mm.precision import Recorder
        recorder = Recorder("reference", model, optimizer)  # before the first step
        recorder.loss(loss)  # before loss.backward(); not where the model's output has the loss

    and in a script with Hugging Face's ``Trainer``::

        from mindspeed_mm.precision import Recorder
        recorder = Recorder("reference")
        trainer.add_callback(recorder.callback())

    It hooks the model and the optimizer; a step is what ends with ``optimizer.step()``. With several ranks the
    gradients are expected to be averaged over them, as DDP and FSDP do. Once the last step is recorded everything is
    taken away again.

    Args:
        folder: of the record.
        model: in any wrapper; None to :meth:`attach` it later.
        optimizer: over its parameters.
        steps: to record, counted from 0.
        tensors: patterns of modules and parameters whose tensors are kept whole.
        settings: what the manifest is to say of the run, beside what is read from the objects.
    """

    def __init__(
        self,
        folder: str | Path,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        *,
        steps: Iterable[int] = (0, 1),
        tensors: Sequence[str] = (),
        settings: dict[str, Any] | None = None,
    ) -> None:
        self._folder = Path(folder)
        self._plan = CapturePlan(frozenset(steps), True, tuple(tensors))
        self._settings = settings or {}
        self._handles: list[Any] = []
        self._capture: Capture | None = None
        self._step = 0
        self._depth = 0
        self._seen = 0
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        if model is not None and optimizer is not None:
            self.attach(model, optimizer)

    def attach(self, model: nn.Module, optimizer: Optimizer, first_step: int = 0) -> None:
        """Begin to record; with several ranks a collective.

        Args:
            model: in any wrapper.
            optimizer: over its parameters.
            first_step: the steps that a training which goes on has made already.
        """
        self._step = first_step
        while isinstance(getattr(optimizer, "optimizer", None), Optimizer):  # accelerate wraps it
            optimizer = optimizer.optimizer
        root = innermost(model)
        writer = RecordWriter(self._folder, self._rank, self._world)
        if self._rank == 0:
            about = {**_about(), **self._settings, "effective": effective_values(root, optimizer)}
            writer.start(about, first_step)
        if self._world > 1:
            dist.barrier()
        device = next(root.parameters()).device
        self._capture = Capture(PlainView(model), optimizer, writer, self._plan, device=device)
        self._optimizer = optimizer
        self._parameters = [parameter for parameter in root.parameters() if parameter.requires_grad]
        self._norm: Tensor | None = None
        self._arguments = tuple(inspect.signature(root.forward).parameters)
        self._handles = [
            root.register_forward_pre_hook(self._forward_begins, with_kwargs=True, prepend=True),
            root.register_forward_hook(self._forward_ends),
            optimizer.register_step_pre_hook(self._update_begins),
            optimizer.register_step_post_hook(self._update_ends),
        ]
        self._step_begins()

    def loss(self, loss: Tensor) -> None:
        """Take a micro-batch's loss, as its backward pass starts from it."""
        if self._capture and self._capture.is_recording:
            self._capture.loss(loss)

    def callback(self) -> Any:
        """Return a ``TrainerCallback`` that attaches this recorder when training begins."""
        from transformers import TrainerCallback

        recorder = self

        class Attach(TrainerCallback):
            """Attaches the recorder."""

            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                """Training begins; model and optimizer are as they will be."""
                recorder._settings.setdefault("training_arguments", args.to_dict())
                recorder.attach(kwargs["model"], kwargs["optimizer"], state.global_step)

            def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                """Training is over."""
                recorder.close()

        return Attach()

    def close(self) -> None:
        """Take all hooks away. What was recorded is on disk already."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._capture:
            self._capture.give_up()

    def _step_begins(self) -> None:
        assert self._capture is not None
        # The weights are those of the first forward pass: a loop may write to them behind the optimizer.
        self._capture.step_begins(self._step, weights=False)
        self._has_weights = False

    def _forward_begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._capture is not None
        if not (module.training and torch.is_grad_enabled() and self._capture.is_recording):
            return
        if not self._has_weights:
            self._capture.weights()
            self._has_weights = True
        batch = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        samples = self._capture.micro_batch(batch, first_position=self._seen if self._world == 1 else None)
        self._seen += samples

    def _forward_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        assert self._capture is not None
        if not (module.training and torch.is_grad_enabled() and self._capture.is_recording):
            return
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if isinstance(loss, Tensor) and loss.requires_grad:
            # What it is multiplied with before the backward pass, accumulation and the like, its gradient says. A hook
            # that held the loss itself would keep it, and its graph, for ever.
            value = loss.detach()
            loss.register_hook(lambda gradient: self.loss(value * gradient))
        values = [loss] if isinstance(loss, Tensor) else tree_leaves(output)
        first = next((value for value in values if isinstance(value, Tensor) and value.requires_grad), None)
        if first is not None:
            first.register_hook(lambda gradient: _at_end_of_backward(self._backward_ends))

    def _backward_ends(self) -> None:
        assert self._capture is not None
        self._norm = total_grad_norm(self._parameters)
        self._capture.gradients_reduced(1.0 / self._world)

    def _update_begins(self, *_: Any) -> None:
        assert self._capture is not None
        self._depth += 1  # the ``step`` of a class that calls its parent's: the hooks of both run
        if self._depth == 1 and self._capture.is_recording:
            self._rate = self._optimizer.param_groups[0]["lr"]
            self._capture.gradients_clipped(self._norm)

    def _update_ends(self, *_: Any) -> None:
        assert self._capture is not None
        self._depth -= 1
        if self._depth:
            return
        if self._capture.is_recording:
            self._capture.updated()
            self._capture.step_ends(learning_rate=self._rate)
        self._step += 1
        if self._step > max(self._plan.steps, default=-1):
            self.close()
        else:
            self._step_begins()


def _at_end_of_backward(function: Any) -> None:
    """Call ``function`` when the backward pass that runs is over, gradients reduced over ranks included."""
    engine = torch.autograd.Variable._execution_engine
    # DDP and FSDP finish in callbacks of the same kind: one that is queued by a callback comes after them.
    engine.queue_callback(lambda: engine.queue_callback(function))


def _about() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"command": sys.argv, "versions": versions, "recorded_by": "Recorder"}
