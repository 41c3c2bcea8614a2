"""What differs on the Megatron road about saving, loading and exporting."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from mindspeed_mm import accelerator
from mindspeed_mm.checkpoint.adapters import ADAPTER_NAME, boxed_adapter_files, written_config
from mindspeed_mm.checkpoint.hf_boxes import export_hf_boxes, load_hf_boxes
from mindspeed_mm.distributed import parallel
from mindspeed_mm.distributed.main_parameters import unwrap
from mindspeed_mm.engine.megatron import MegatronEngine
from mindspeed_mm.errors import UserError
from mindspeed_mm.models.megatron.layout import boxes, pieces
from mindspeed_mm.optimizer.schedule import Schedule
from mindspeed_mm.training.checkpointing import Checkpointer
from mindspeed_mm.training.megatron_state import MegatronState


class MegatronCheckpointer(Checkpointer):
    """Saves and restores a run of a :class:`~mindspeed_mm.engine.megatron.MegatronEngine`."""

    def __init__(self, args: Namespace, engine: MegatronEngine, schedule: Schedule, keeper: bool | None = None) -> None:
        self.engine = engine
        self._first: Any = unwrap(engine.module[0])
        super().__init__(
            args, engine.module, engine.optimizer, schedule, state=MegatronState(engine, pieces), keeper=keeper
        )

    @property
    def layout(self) -> dict[str, Any]:
        """How the model is split: a rank's own state is for the same rank of the same layout only."""
        return vars(parallel.sizes())

    def random_state(self) -> dict[str, Any]:
        """Return the state of all generators, of those that megatron-core keeps for split layers as well."""
        return {**accelerator.rng_state(), "tracker": parallel.tracker_state()}

    def set_random_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`random_state` returned."""
        accelerator.set_rng_state(state)
        parallel.set_tracker_state(state["tracker"])

    def adapter_config(self) -> Any:
        """Return peft's configuration of the adapters on the Hugging Face model, None without adapters."""
        configs = getattr(self._first, "peft_config", None)
        return configs and written_config(configs[ADAPTER_NAME], self._first.blueprint.model)

    def adapter_files(self) -> dict[str, bytes]:
        """Return the files of the adapters, on rank 0. A collective."""
        self.engine.mains.publish()
        return boxed_adapter_files(self._adapters, boxes(*self.engine.module, adapters=True))

    def read_hf(self, folder: str) -> list[str]:
        """Read the weights of a Hugging Face folder into this rank's parts."""
        warnings = load_hf_boxes(
            self._blueprint("--load").model, folder, boxes(*self.engine.module), strict=self.args.load_strict
        )
        self.engine.mains.adopt()
        return warnings

    def export_hf(self, folder: str) -> None:
        """Write the trained model, and its averaged weights, as Hugging Face folders. A collective."""
        try:
            super().export_hf(folder)
        finally:
            self.engine.mains.publish()  # the weights themselves, where averages took their place

    def write_hf(self, folder: str) -> None:
        """Write the values that the optimizer has."""
        self.engine.mains.publish()  # a forward pass may not have gathered them yet
        if self._adapters:
            super().write_hf(folder)
            return
        export_hf_boxes(
            self._blueprint("--export-hf").model, folder, boxes(*self.engine.module), assets_from=self._assets()
        )

    def check_export(self, folder: str) -> None:
        """See that `export_hf` will be able to write ``folder``. A collective."""
        if not self._adapters:
            self._blueprint("--export-hf")
        super().check_export(folder)

    def _assets(self) -> str | None:
        folder: str | None = self.args.mm.model.init_from_hf_path
        return folder

    def weights_source(self) -> Any:
        """Return the folder that the model starts from, None for random weights."""
        return getattr(self._first, "weights_source", None)

    def _blueprint(self, flag: str) -> Any:
        if not hasattr(self._first, "blueprint"):
            raise UserError(
                f"{flag}: {type(self._first).__name__} says of no Hugging Face model what it is the same as."
            )
        return self._first.blueprint
