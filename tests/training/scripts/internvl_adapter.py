"""Steps 1 and 2 of the guide's adapter, in a file of the user's: the class, and its name in the hub."""

from transformers import InternVLForConditionalGeneration as InternVLChatModel

from mindspeed_mm.models.common.modelzoo import ModelHub
from mindspeed_mm.models.transformers.base_model import FSDP2Mixin, WeightInitMixin


class InternVLChatModelGeneration(InternVLChatModel, FSDP2Mixin, WeightInitMixin):
    """InternVL 模型的 FSDP2 适配版本."""

    def __init__(self, config, vision_model=None, language_model=None, use_flash_attn=True):
        super().__init__(config)

    def _pre_fully_shard(self, *args, **kwargs):
        super()._pre_fully_shard(*args, **kwargs)
        print(f"sharding {type(self).__name__}", flush=True)


ModelHub.MODEL_MAPPINGS["internvl"] = InternVLChatModelGeneration
