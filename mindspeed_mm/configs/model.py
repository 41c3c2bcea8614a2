"""model.json: which model to train, what of it is frozen, and how its loss is counted."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from mindspeed_mm.configs.base import Config, FreeForm, InputPath, Positive
from mindspeed_mm.configs.towers import AudioEncoder, TextDecoder, VisionEncoder, VisionProjector

LossType = Literal["default", "per_sample_loss", "per_token_loss"]


class ImageEncoder(Config):
    """``image_encoder``: from pixels to tokens."""

    vision_encoder: VisionEncoder | None = None
    vision_projector: VisionProjector | None = None
    tp: Positive | None = None  # tensor parallel size of its own
    pp: Positive | None = None  # pipeline parallel size of its own
    cp: Positive | None = None  # context parallel size of its own


class AudioTower(Config):
    """``audio_encoder``: from sound to tokens."""

    audio_encoder: AudioEncoder | None = None
    tp: Positive | None = None  # as in image_encoder
    pp: Positive | None = None
    cp: Positive | None = None


class LossConfig(Config):
    """``loss_cfg``."""

    # default: mean over the tokens of a micro batch; per_sample_loss: mean over the tokens of a sample, then over
    # samples; per_token_loss: mean over the tokens of the global batch.
    loss_type: LossType = "default"  # --calculate-per-token-loss and --calculate-per-sample-loss set it
    # default: logits of the whole micro batch; chunk: of chunk_size tokens at a time; auto: chunk where those of the
    # micro batch would take more than 2 GiB in fp32.
    compute_mode: Literal["auto", "default", "chunk"] = "auto"
    chunk_size: Positive = 1024  # tokens of the micro batch
    router_aux_loss_coef: float = Field(default=0.0, ge=0.0)  # weight of the experts' load-balancing loss


class Patch(Config):
    """``patch``: switches that published files carry. They change the code of trainers that are not used here."""

    clip_grad_async: bool = False
    scale_grad: bool = False
    ae_float32: bool = False
    adaptive_clip_grad_norm: bool = False
    infer_fa: bool = False
    use_fsdp1: bool = False
    get_dist_model_load_from_pt: bool = False
    hetero_parallel_cp: bool = False
    muon_optimizer: bool = False


class ModelConfig(Config):
    """model.json."""

    unknown_key_advice: ClassVar[str] = " Keys of your own go under 'custom'."

    # Which model, and where from.
    model_id: str | None = None  # key of ModelHub; null: by the architecture in the Hugging Face config.json
    init_from_hf_path: InputPath | None = None  # Hugging Face folder: config.json, and the weights to start from
    random_init: bool = False  # take only config.json from there and start from random weights
    load_strict: bool = True  # its weights must fit the model; false here or by --load-strict: use what fits
    trust_remote_code: bool = False  # run Python files of that folder; --trust-remote-code sets it

    freeze: list[str] = Field(default_factory=list)  # modules and parameters that are not trained; paths as in the yaml

    # Towers.
    image_encoder: ImageEncoder | None = None
    audio_encoder: AudioTower | None = None
    text_decoder: TextDecoder | None = None
    loss_cfg: LossConfig = Field(default_factory=LossConfig)

    # Token ids that stand for media in the text.
    img_context_token_id: int | None = None  # one token of an image
    video_token_id: int | None = None  # one token of a video
    vision_start_token_id: int | None = None  # comes before an image or a video

    # Models put together by pretrain_vlm.py.
    pre_process: bool = True  # this stage has the encoders and the embedding
    post_process: bool = True  # this stage has the output layer
    add_text_encoder: bool = False
    img_embedding_idx: int | None = None  # place of the image in the sequence
    downsample_ratio: float | None = None  # as in image_encoder.vision_encoder
    select_layer: int | None = None  # as in image_encoder.vision_encoder
    ps_version: Literal["v1", "v2"] | None = None  # as in image_encoder.vision_encoder
    add_rmsnorm_offset: bool = False  # norm weights are stored minus one
    patch: Patch = Field(default_factory=Patch)

    # Generation models. The subtrees belong to the model that reads them.
    task: str | None = None  # t2v, i2v, t2i, ...
    predictor: FreeForm | None = None
    ae: FreeForm | None = None
    diffusion: FreeForm | None = None
    text_encoder: FreeForm | list[FreeForm] | None = None
    video_encoder: FreeForm | None = None
    load_video_features: bool = False  # samples hold features of the ae, not pixels
    load_text_features: bool = False  # samples hold features of the text encoder, not token ids
    encoder_offload_interval: Positive | None = None  # batches encoded between two moves of the encoders
    enable_encoder_dp: bool = False  # encoders split a batch over tensor-parallel ranks

    # Fields of megatron-core's TransformerConfig, by name; the command line adds those that its flags decide.
    megatron: FreeForm = Field(default_factory=FreeForm)
    custom: FreeForm = Field(default_factory=FreeForm)  # anything; for models of your own
