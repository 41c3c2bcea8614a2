"""Pretrain a vision language model of megatron-core layers under tensor, pipeline, context and expert parallelism."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from mindspeed_mm.configs.config import mm_extra_args_provider
from mindspeed_mm.errors import UserError
from mindspeed_mm.training import get_args, pretrain, print_rank_0

_MODULES = ("image_encoder", "audio_encoder", "text_decoder")


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    modules: Any = None,
    vp_stage: int | None = None,
) -> Any:
    """Build this rank's pipeline chunk of the model of model.json.

    Args:
        pre_process: whether the chunk has the first layers.
        post_process: whether it has the last.
        modules: names of the parts to build; default all.
        vp_stage: number of the chunk in its stage, None where there is one.
    """
    from mindspeed_mm.models.vlm_model import VLMModel

    print_rank_0("building VLMModel ...")
    config = deepcopy(get_args().mm.model)
    for name in _MODULES:
        if name not in (modules or _MODULES):
            setattr(config, name, None)
    return VLMModel(config, pre_process, post_process, vp_stage)


def move_to_device(batch: dict[str, Any], float_dtype: Any) -> dict[str, Any]:
    """Copy the batch's tensors, also those in lists, to the device; floating ones become ``float_dtype``."""
    import torch

    from mindspeed_mm import accelerator

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            dtype = float_dtype if value.is_floating_point() else None
            return value.to(accelerator.device(), dtype, non_blocking=True)
        return [move(item) for item in value] if isinstance(value, list) else value

    return {key: move(value) for key, value in batch.items()}


def get_batch(data_iterator: Any) -> dict[str, Any]:
    """Return the next micro-batch, on the device."""
    if data_iterator is None:
        raise ValueError("Data iterator is None. Unable to retrieve batch.")
    return move_to_device(next(data_iterator), get_args().params_dtype)


def loss_func(output: dict[str, Any]) -> tuple[Any, ...]:
    """Return the loss of a micro-batch and what is logged of it.

    ``output["loss_dict"]`` holds ``loss`` (a scalar) and ``loss_mask`` (True at target tokens, shape
    ``(batch, sequence)``). With ``--calculate-per-token-loss`` the loss is a sum, and ``token_nums`` says over how many
    tokens; with ``--calculate-per-sample-loss`` it is a mean, and ``sample_nums`` says over how many samples.
    """
    args = get_args()
    if "loss_dict" not in output:
        raise UserError("the batch has no 'labels': the dataset or get_batch must provide them for training.")
    losses = output["loss_dict"]
    loss, count = losses["loss"], losses.get("token_nums")
    if "sample_nums" in losses:
        count = losses["sample_nums"]
        loss = loss * count
    report = {"loss": loss.detach() if count is None else (loss.detach(), count)}
    if args.log_tps:
        report["tokens per sample"] = losses["loss_mask"].sum() / args.micro_batch_size
    return (loss, report) if count is None else (loss, count, report)


def forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
    """Run this chunk of the model on the next micro-batch."""
    return model(**get_batch(data_iterator)), loss_func


def train_valid_test_datasets_provider(train_val_test_num_samples: list[int]) -> tuple[Any, Any, Any]:
    """Build the loaders of data.json; ``val_rate`` splits the training data when there is no validation set."""
    from mindspeed_mm.data import build_mm_dataloader, build_mm_dataset
    from mindspeed_mm.data.data_utils.utils import build_iterations
    from mindspeed_mm.distributed.state import loader_group

    args = get_args()
    dataset_param = args.mm.data.dataset_param
    datasets = build_mm_dataset(dataset_param)
    if isinstance(datasets, tuple):
        train, valid = datasets
    else:
        train, valid = datasets, None
        if val_rate := getattr(dataset_param.basic_parameters, "val_rate", None):
            split = train.train_test_split(test_size=val_rate, seed=args.seed)
            train, valid = split["train"], split["test"]

    def build(dataset: Any, dataloader_param: Any, consumed_samples: int = 0) -> Any:
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {name: build(one, dataloader_param) for name, one in dataset.items()}
        return build_mm_dataloader(
            dataset,
            dataloader_param=dataloader_param,
            process_group=loader_group(),
            dataset_param=dataset_param,
            consumed_samples=consumed_samples,
        )

    loader = args.mm.data.dataloader_param
    every_sample = loader.model_copy(update={"drop_last": False})  # of an evaluation, however few there are
    return build_iterations(build(train, loader, args.consumed_train_samples), build(valid, every_sample))


if __name__ == "__main__":
    train_valid_test_datasets_provider.is_distributed = True
    pretrain(
        train_valid_test_datasets_provider,
        model_provider,
        None,
        forward_step,
        extra_args_provider=mm_extra_args_provider,
        args_defaults={"dataloader_type": "external"},
    )
