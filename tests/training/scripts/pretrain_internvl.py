"""Step 3 of the guide's adapter: the registered class through the standard interface."""

from copy import deepcopy

import internvl_adapter  # noqa: F401 - registers the class

from mindspeed_mm.models.transformers_model import TransformersModel
from mindspeed_mm.training import get_args, pretrain
from pretrain_transformers import forward_step, mm_extra_args_provider, train_valid_test_datasets_provider


def model_provider(*args, **kwargs):
    """Builds the model."""
    args = get_args()
    vlm_config = deepcopy(args.mm.model)
    model = TransformersModel(vlm_config)

    return model


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
