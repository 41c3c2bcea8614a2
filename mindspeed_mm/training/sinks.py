"""Where the numbers of a run can be watched: TensorBoard and Weights & Biases."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy

from mindspeed_mm.distributed.state import is_last_rank
from mindspeed_mm.errors import UserError
from mindspeed_mm.extras import import_extra


@dataclass(frozen=True)
class Shown:
    """A sample that is shown as text, with its pictures.

    Attributes:
        name: the same at every step, so that it can be followed through training.
        text: Markdown.
        pictures: PIL images.
    """

    name: str
    text: str
    pictures: list[Any]


class Sink(Protocol):
    """Takes scalars as training goes on."""

    def write(self, values: Mapping[str, float], iteration: int, samples: int) -> None:
        """Show ``values`` at ``iteration``, by which ``samples`` samples had been consumed."""

    def show(self, samples: Sequence[Shown], iteration: int) -> None:
        """Show samples as they are at ``iteration``."""

    def close(self) -> None:
        """Write out what is left."""


def open_sinks(args: Namespace) -> list[Sink]:
    """Open what the command line asks for; only the last rank has sinks.

    Raises:
        UserError: a package is missing, or wandb does not start.
    """
    if not is_last_rank():
        return []
    sinks: list[Sink] = []
    if args.tensorboard_dir:
        sinks.append(TensorBoardSink(args.tensorboard_dir))
    if args.wandb_project:
        folder = args.wandb_save_dir or args.save
        sinks.append(WandbSink(args.wandb_project, args.wandb_exp_name, folder, _plain(args)))
    return sinks


class TensorBoardSink:
    """Event files in ``folder``, with every value over the iterations and, as Megatron has it, over the samples."""

    def __init__(self, folder: str) -> None:
        tensorboard = import_extra("torch.utils.tensorboard", "tensorboard", "--tensorboard-dir")
        self._writer = tensorboard.SummaryWriter(log_dir=folder)

    def write(self, values: Mapping[str, float], iteration: int, samples: int) -> None:
        """Add a point to both curves of each value."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, iteration)
            self._writer.add_scalar(f"{key} vs samples", value, samples)

    def show(self, samples: Sequence[Shown], iteration: int) -> None:
        """Add each sample's text and its pictures."""
        for sample in samples:
            self._writer.add_text(sample.name, sample.text, iteration)
            for i, picture in enumerate(sample.pictures):
                pixels = numpy.asarray(picture.convert("RGB"))
                self._writer.add_image(f"{sample.name}/picture {i}", pixels, iteration, dataformats="HWC")

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()


class WandbSink:
    """A run of a Weights & Biases project; ``WANDB_MODE=offline`` and wandb's other variables work as ever.

    Args:
        project: the project's name.
        name: the run's name; None lets wandb find one.
        folder: where wandb keeps its ``wandb`` folder; None is the current folder.
        config: settings shown beside the run.
    """

    def __init__(self, project: str, name: str | None, folder: str | None, config: Mapping[str, Any]) -> None:
        self._wandb = wandb = import_extra("wandb", "wandb", "--wandb-project")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)  # wandb would fall back to a temporary folder
        try:
            self._run = wandb.init(project=project, name=name, dir=folder, config=dict(config))
        except wandb.Error as error:
            raise UserError(
                f"--wandb-project {project}: wandb did not start ({error}); run 'wandb login' first, "
                "or set WANDB_MODE=offline."
            ) from error
        # wandb's own step may only grow, and validation comes before the rows of the steps around it are written.
        self._run.define_metric("*", step_metric="iteration")

    def write(self, values: Mapping[str, float], iteration: int, samples: int) -> None:
        """Add a row; ``iteration`` is the x axis and ``samples`` may be chosen instead."""
        self._run.log({**values, "iteration": iteration, "samples": samples})

    def show(self, samples: Sequence[Shown], iteration: int) -> None:
        """Add each sample's pictures with the text below; without a picture, the text."""
        for sample in samples:
            pictures = [self._wandb.Image(picture, caption=sample.text) for picture in sample.pictures]
            self._run.log({sample.name: pictures or self._wandb.Html(sample.text), "iteration": iteration})

    def close(self) -> None:
        """Upload what is left and mark the run as finished."""
        self._run.finish()


def _plain(args: Namespace) -> dict[str, Any]:
    """Return the settings that are numbers, words or lists; the rest is what the program has derived from them."""
    return {key: value for key, value in vars(args).items() if isinstance(value, (bool, int, float, str, list))}
