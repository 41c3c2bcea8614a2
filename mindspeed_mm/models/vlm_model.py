"""The documented import path of the model that ``pretrain_vlm.py`` assembles from Megatron parts."""

from __future__ import annotations

from typing import Any, NoReturn

from mindspeed_mm.errors import UserError


class VLMModel:
    """Not available yet: importing it works, so that scripts which only name it run; building it is an error."""

    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UserError(
            "VLMModel needs the Megatron road, which this version does not have; use "
            "mindspeed_mm.models.transformers_model.TransformersModel with pretrain_transformers.py and "
            "--use-torch-fsdp2, and set init_from_hf_path in model.json."
        )
