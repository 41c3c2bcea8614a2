"""data.json: which samples to train on, how to prepare them and how to batch them."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from mindspeed_mm.configs.base import Config, Count, Fraction, FreeForm, InputPath, Positive, beside_config

PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


def _each_beside_config(value: str, info: ValidationInfo) -> str:
    """Resolve each of several paths; of a pattern, the folder that it starts from."""

    def resolve(path: str) -> str:
        fixed = next((n for n, part in enumerate(Path(path).parts) if glob.has_magic(part)), None)
        if fixed is None or Path(path).is_absolute():
            return beside_config(path, info)
        start, rest = Path(*Path(path).parts[:fixed]), Path(*Path(path).parts[fixed:])
        if fixed == 0 and not any(start.glob(str(rest))):
            return str((info.context or {}).get("folder", start) / rest)
        return str(Path(beside_config(str(start), info)) / rest)

    return ",".join(map(resolve, value.split(",")))


InputPaths = Annotated[str, AfterValidator(_each_beside_config)]


OnBadSample = Literal["stop", "quarantine"]
Budget = Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0.0, lt=1.0)]

# --- dataset_type "huggingface": rows of messages, prompts rendered by the model's own processor ---


class HuggingFacePreprocess(Config):
    """``preprocess_parameters``: the model's processor, and the limits of the media it is given."""

    model_name_or_path: InputPath | None = None  # Hugging Face folder of the processor and tokenizer
    use_fast_tokenizer: bool = True  # the tokenizer written in Rust, where the model has one
    split_special_tokens: bool = False  # read special tokens inside the text as ordinary text
    trust_remote_code: bool = False  # run Python files of that folder; --trust-remote-code sets it

    image_max_pixels: Positive = 768 * 768  # larger images are scaled down to this many pixels
    image_min_pixels: Count = 32 * 32  # smaller images are scaled up to this many pixels
    image_resolution: Positive = 512  # side of a square image, for processors that want one
    image_do_pan_and_scan: bool = False  # add crops of wide and tall images (Gemma processors)
    crop_to_patches: bool = False  # cut an image into tiles (InternVL processors)
    min_patches: Positive | None = None  # tiles at least; null: the processor's number
    max_patches: Positive | None = None  # tiles at most; null: the processor's number

    video_max_pixels: Positive = 256 * 256  # as for images, for each frame
    video_min_pixels: Count = 16 * 16  # as for images, for each frame
    video_resolution: Positive = 128  # as for images, for each frame
    video_fps: PositiveFloat = 2.0  # frames taken per second of video
    video_maxlen: Positive = 128  # frames taken from one video at most

    audio_sampling_rate: Positive = 16000  # samples per second
    use_audio_in_video: bool = False  # also feed the sound track of a video


class MixtureSource(Config):
    """One data set of ``mixture``."""

    dataset: InputPaths  # as basic_parameters.dataset
    dataset_dir: InputPath | None = None  # null: that of basic_parameters
    max_samples: Positive | None = None  # read only the first rows; null: all
    repeat_time: PositiveFloat = 1.0  # below 1: only this share of the rows; above 1: rows repeat
    weight: PositiveFloat | None = None  # its part of an epoch, beside the other weights; null: as many as its rows


class HuggingFaceBasic(Config):
    """``basic_parameters``: the files, and what becomes of their rows."""

    retired: ClassVar[dict[str, str]] = {
        "cutoff_len": "`cutoff_len` is deprecated, please use `seq_length`. Delete the key and pass --seq-length.",
    }

    # .json, .jsonl, .csv, .parquet and .txt files, folders of them and patterns, separated by commas without spaces
    dataset: InputPaths | None = None
    mixture: list[MixtureSource] | None = None  # several data sets instead, each with its weight
    dataset_dir: InputPath = "data"  # folder that the paths of images, videos and audio start from
    max_samples: Positive | None = None  # read only the first rows; null: all
    seq_length: Positive | None = None  # longest sample in tokens; --seq-length sets it

    # files to validate on, or such files for each of several sets by its name; wins over val_rate
    val_dataset: InputPaths | dict[str, InputPaths] | None = None
    val_rate: Fraction | None = None  # share of the rows set aside for validation
    val_max_samples: Positive | None = None  # read only the first validation rows; null: all

    template: str | None = None  # chat template by name; null: the one the processor carries
    enable_thinking: bool = True  # what the chat template is told about thinking
    tool_format: str | None = None  # how tools are written into the prompt; null: as the template does
    train_on_prompt: bool = False  # the loss covers the user's turns too
    mask_history: bool = False  # the loss covers the last assistant turn only

    cache_dir: str | None = None  # caches of prepared samples; null: ~/.cache/mindspeed_mm/data
    cache_samples: bool = False  # keep the tensors of samples in the cache too, pixels included
    overwrite_cache: bool = False  # prepare the rows again although the cache has them
    preprocess_on_fly: bool = False  # prepare a row when it is fetched, not all rows before training
    preprocessing_batch_size: Positive = 1000  # rows prepared at a time
    preprocessing_num_workers: Positive | None = None  # processes of a node that prepare samples; null: its ranks
    streaming: bool = False  # read the files while training instead of before it
    packing: bool | None = None  # fill sequences of --seq-length with several samples, which do not see each other
    neat_packing: bool = False  # the same as packing


class HuggingFaceAttributes(Config):
    """``attr``: the names that the rows use. A null column is not read, a null tag does not occur."""

    # sharegpt: a list of messages; alpaca: instruction and output; or a format that a --plugin registers
    formatting: str = "sharegpt"
    messages: str | None = "conversations"  # column of the messages
    images: str | None = None  # column of the image paths
    videos: str | None = None  # column of the video paths
    audios: str | None = None  # column of the audio paths
    system: str | None = None  # column of the system prompt
    tools: str | None = None  # column of the descriptions of functions, a list in JSON Schema

    pretrain: bool = False  # rows are plain text to continue, in the column `prompt` (default here: text)
    prompt: str | None = "instruction"  # alpaca: column of the question
    query: str | None = "input"  # alpaca: column of what is added to it
    response: str | None = "output"  # alpaca: column of the answer
    history: str | None = "history"  # alpaca: column of earlier pairs of question and answer

    role_tag: str | None = "from"  # key of the role in a message
    content_tag: str | None = "value"  # key of the text in a message
    user_tag: str | None = "human"  # role of the user
    assistant_tag: str | None = "gpt"  # role of the assistant
    system_tag: str | None = "system"  # role of the system prompt
    observation_tag: str | None = "observation"  # role of a tool's answer
    function_tag: str | None = "function_call"  # role of a call of a tool

    packing: bool | None = None  # the same as packing in basic_parameters

    ranking: bool = False  # rows hold a chosen and a rejected answer
    chosen: str | None = None  # column of the chosen answer
    rejected: str | None = None  # column of the rejected answer


class HuggingFaceDataset(Config):
    """``dataset_param`` of dataset type ``huggingface``."""

    dataset_type: Literal["huggingface"]
    basic_parameters: HuggingFaceBasic
    preprocess_parameters: HuggingFacePreprocess
    attr: HuggingFaceAttributes = Field(default_factory=HuggingFaceAttributes)
    on_bad_sample: OnBadSample = "stop"  # quarantine: list it and go on without it
    bad_sample_budget: Budget = 0.01  # bad samples to put up with: a number, or a share (below 1) of all rows
    quarantine_folder: str | None = None  # where quarantine.jsonl goes; --save sets it


# --- dataset_type "multimodal": InternVL style, images cut into tiles ---


class MultimodalSource(Config):
    """``basic_parameters``: one data file and the folder of its media."""

    data_path: InputPath  # .json, .jsonl, .csv, .parquet or .txt
    data_folder: InputPath = ""  # folder that the paths in the rows start from
    data_storage_mode: Literal["standard"] = "standard"  # how the rows are laid out
    repeat_time: PositiveFloat = 1.0  # below 1: only this share of the rows; above 1: rows repeat


class Transform(Config):
    """A step of the image or video pipeline."""

    trans_type: str  # Pad2Square, Resize, ToTensor, norm_fun
    param: FreeForm = Field(default_factory=FreeForm)  # arguments of the step


class TrainPipeline(Config):
    """``train_pipeline``: the steps from a file to a tensor."""

    image: list[Transform] = Field(default_factory=list)
    video: list[Transform] = Field(default_factory=list)


class MultimodalPreprocess(Config):
    """``preprocess_parameters``: how media become tensors."""

    image_reader_type: str = "torchvision"  # name of the image reader
    video_reader_type: str | None = None  # name of the video reader
    train_pipeline: TrainPipeline = Field(default_factory=TrainPipeline)


class TokenizerConfig(Config):
    """``tokenizer_config``: the tokenizer of the text decoder."""

    from_pretrained: InputPath  # Hugging Face folder of the tokenizer
    hub_backend: Literal["hf"] = "hf"  # where tokenizers come from
    autotokenizer_name: str = "AutoTokenizer"  # transformers class that loads it
    add_eos_token: bool = False  # end every sample with the end-of-sequence token
    use_fast: bool = True  # the tokenizer written in Rust, where the model has one
    trust_remote_code: bool = False  # run Python files of that folder; --trust-remote-code sets it


class MultimodalDataset(Config):
    """``dataset_param`` of dataset type ``multimodal``."""

    dataset_type: Literal["multimodal"]
    # One source or a list of sources, which are concatenated; always a list once loaded.
    basic_parameters: Annotated[
        list[MultimodalSource],
        BeforeValidator(lambda value: [value] if isinstance(value, dict | MultimodalSource) else value),
        Field(min_length=1),
    ]
    preprocess_parameters: MultimodalPreprocess
    tokenizer_config: TokenizerConfig
    seq_length: Positive | None = None  # longest sample in tokens; --seq-length sets it

    use_text_processer: bool = True  # render the conversation with template_name
    template_name: str = "internvl2_5"  # conversation template
    group_by_length: bool = False  # samples of like length meet in a batch

    image_size: Positive = 224  # side of a tile in pixels
    patch_size: Positive = 14  # side of a patch in pixels
    down_sample_ratio: PositiveFloat = 0.5  # side of the token grid over the side of the patch grid
    dynamic_image_size: bool = False  # cut an image into as many tiles as its shape asks for
    use_thumbnail: bool = False  # add the whole image as one more tile
    min_dynamic_patch: Positive = 1  # tiles at least
    max_dynamic_patch: Positive = 6  # tiles at most

    min_num_frame: Positive = 4  # frames of a video at least
    max_num_frame: Positive = 12  # frames of a video at most
    sampling_method: str = "rand"  # how frames are chosen

    on_bad_sample: OnBadSample = "stop"  # quarantine: list it and go on without it
    bad_sample_budget: Budget = 0.01  # bad samples to put up with: a number, or a share (below 1) of all rows
    quarantine_folder: str | None = None  # where quarantine.jsonl goes; --save sets it


# --- batches ---


class CollateParam(Config):
    """``collate_param``: how samples become a batch."""

    model_name: str | None = None  # qwen2vl, qwen3vl, glm4v_moe, internvl, ...; null: what fits the dataset
    ignore_pad_token_for_loss: bool = True  # padding carries no loss
    pad_to_multiple_of: Positive = 8  # batch length is a multiple of this many tokens
    pad_id: Count | None = None  # token id to pad with; null: the tokenizer's


class DataloaderParam(Config):
    """``dataloader_param``: the order of the samples and the processes that fetch them."""

    dataloader_mode: Literal["base", "sampler", "variable"] = "sampler"  # base: torch's own sampler
    sampler_type: str = "stateful_distributed_sampler"  # or BaseRandomBatchSampler, SequentialSampler, ...
    shuffle: bool = True  # a new order in every epoch, decided by --seed
    drop_last: bool = True  # leave out the samples that do not fill a global batch
    pin_memory: bool | None = None  # batches in page-locked memory; null: where the device copies faster from it
    prefetch_factor: Positive | None = None  # batches each worker holds ready; null: torch's default
    persistent_workers: bool | None = None  # keep workers between epochs; null: yes when there are any
    collate_param: CollateParam = Field(default_factory=CollateParam)

    data_sharding: bool = False  # each rank shuffles its own share of the samples
    priority_mode: Literal["data_bucketing_img", "data_reordering_img"] | None = None  # group by image size
    group_data: bool = False  # samples of like length meet in a batch, as with sampler_type LengthGroupedSampler
    group_frame: bool = False  # ... of like frame count
    group_resolution: bool = False  # ... of like resolution
    initial_global_step_for_sampler: Count = 0  # batches the sampler skips at the start

    # The command line decides these; a value in the file is overwritten.
    batch_size: Positive | None = None  # --micro-batch-size: samples per rank and micro batch
    num_workers: Count | None = None  # --num-workers: processes that fetch samples
    seed: int | None = None  # --seed
    global_batch_size: Positive | None = None  # --global-batch-size: samples of one optimizer step
    use_data_balance: bool = False  # --use-data-balance: spread a global batch evenly over ranks
    max_seq_len: Positive | None = None  # --max-seq-len with --use-txt-dynamic-batching: tokens of a micro batch
    dynamic_batch_buffer_size: Positive = 200  # --dynamic-batch-buffer-size: samples looked at to fill it


class DataConfig(Config):
    """data.json."""

    unknown_key_advice: ClassVar[str] = " Keys of your own go under 'custom'."

    dataset_param: Annotated[HuggingFaceDataset | MultimodalDataset, Field(discriminator="dataset_type")] | None = None
    dataloader_param: DataloaderParam = Field(default_factory=DataloaderParam)
    custom: FreeForm = Field(default_factory=FreeForm)  # anything; for datasets of your own

    @model_validator(mode="before")
    @classmethod
    def _describes_some_data(cls, document: Any) -> Any:
        if isinstance(document, dict) and not document.keys() & {"dataset_param", "custom"}:
            raise ValueError("'dataset_param' is required, or 'custom' for a dataset of your own.")
        return document
