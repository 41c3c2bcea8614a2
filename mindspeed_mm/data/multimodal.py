"""The data set type ``multimodal``: InternVL's rows and keys, as another way to write those of ``huggingface``."""

from __future__ import annotations

from mindspeed_mm.configs.data import (
    HuggingFaceAttributes,
    HuggingFaceBasic,
    HuggingFaceDataset,
    HuggingFacePreprocess,
    MixtureSource,
    MultimodalDataset,
)
from mindspeed_mm.distributed.state import print_rank_0
from mindspeed_mm.errors import UserError

# The processor's tiles all have one size, which it brings along.
_LARGEST, _SMALLEST = 2**31, 1
_WITHOUT_EFFECT = ("image_size", "patch_size", "down_sample_ratio", "use_text_processer", "min_num_frame",
                   "max_num_frame", "sampling_method")  # fmt: skip


def as_huggingface(param: MultimodalDataset) -> HuggingFaceDataset:
    """Return what the keys mean in terms of data set type ``huggingface``.

    Rows are ``{"image": file or files, "conversations": [{"from", "value"}]}``. The processor in
    ``tokenizer_config.from_pretrained`` cuts images into tiles and renders the conversation with its own template.

    Raises:
        UserError: a key asks for something that this processor does not do.
    """
    for asked, key, value, advice in (
        (param.group_by_length, "group_by_length", True, "set dataloader_param.sampler_type to 'LengthGroupedSampler'"),
        (param.tokenizer_config.add_eos_token, "tokenizer_config.add_eos_token", True,
         "the chat template ends every answer; set it to false"),
        (param.dynamic_image_size and not param.use_thumbnail, "use_thumbnail", False,
         "the processors of transformers always add one to several tiles; set it to true"),
    ):  # fmt: skip
        if asked:
            raise UserError(f"data.json: dataset_param.{key}: {value} is not available; {advice}")
    given = [key for key in _WITHOUT_EFFECT if key in param]
    given += [f"preprocess_parameters.{key}" for key in sorted(param.preprocess_parameters.model_fields_set)]
    if given:
        print_rank_0(f"data.json: {', '.join(given)}: no effect, because the model's own processor decides")
    return HuggingFaceDataset(
        dataset_type="huggingface",
        preprocess_parameters=HuggingFacePreprocess(
            model_name_or_path=param.tokenizer_config.from_pretrained,
            trust_remote_code=param.tokenizer_config.trust_remote_code,
            image_max_pixels=_LARGEST,
            image_min_pixels=_SMALLEST,
            crop_to_patches=param.dynamic_image_size,
            min_patches=param.min_dynamic_patch,
            max_patches=param.max_dynamic_patch,
        ),
        basic_parameters=HuggingFaceBasic(
            mixture=[
                MixtureSource(
                    dataset=source.data_path,
                    dataset_dir=source.data_folder or ".",
                    repeat_time=source.repeat_time,
                )
                for source in param.basic_parameters
            ],
            seq_length=param.seq_length,
            template=param.template_name,
        ),
        attr=HuggingFaceAttributes(images="image", videos="video"),
        on_bad_sample=param.on_bad_sample,
        bad_sample_budget=param.bad_sample_budget,
        quarantine_folder=param.quarantine_folder,
    )
