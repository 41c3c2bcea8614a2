"""Pretrain a Hugging Face or custom model under FSDP2."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from mindspeed_mm.configs.config import mm_extra_args_provider
from mindspeed_mm.training import get_args, pretrain, print_rank_0


def model_provider(*args: Any, **kwargs: Any) -> Any:
    """Build the model of model.json."""
    from mindspeed_mm.models.transformers_model import TransformersModel

    print_rank_0("building VLMModel ...")
    return TransformersModel(deepcopy(get_args().mm.model))


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

    ``output`` holds ``loss`` (a scalar) and ``loss_mask`` (True at target tokens, shape ``(batch, sequence)``).
    With ``--calculate-per-token-loss`` the loss is a sum, and ``token_nums`` says over how many tokens; with
    ``--calculate-per-sample-loss`` it is a mean, and ``sample_nums`` says over how many samples. What is logged as
    ``loss`` is what is optimised; a router loss, times its coefficient, is part of it.
    """
    args = get_args()
    loss, count = output["loss"], output.get("token_nums")
    if "sample_nums" in output:
        count = output["sample_nums"]
        loss = loss * count
    report = {"loss": loss.detach() if count is None else (loss.detach(), count)}
    if "aux_loss" in output:
        aux_loss = output["aux_loss"].detach()
        report["aux_loss"] = aux_loss if count is None else (aux_loss * count, count)
    if args.log_tps:
        report["tokens per sample"] = output["loss_mask"].sum() / args.micro_batch_size
    return (loss, report) if count is None else (loss, count, report)


def forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
    """Run the model on the next micro-batch."""
    return model(**get_batch(data_iterator)), loss_func


def train_valid_test_datasets_provider(train_val_test_num_samples: list[int]) -> tuple[Any, Any, Any]:
    """Build the loaders of data.json; ``val_rate`` splits the training data when there is no validation set."""
    from mindspeed_mm.data import build_mm_dataloader, build_mm_dataset
    from mindspeed_mm.data.data_utils.utils import build_iterations
    from mindspeed_mm.distributed.state import data_parallel_group

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
            process_group=data_parallel_group(),
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
