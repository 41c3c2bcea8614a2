"""tools.json: the profiler and memory snapshots."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mindspeed_mm.configs.base import Config, Count, FreeForm, Positive

Ranks = list[Annotated[int, Field(ge=-1)]]


class StaticProfile(Config):
    """``static_param``: profile a range of iterations that is known before training."""

    start_step: Count = 10  # iterations of this run that pass first
    end_step: Count = 11  # iterations of this run after which recording ends
    save_path: str = "./npu_profiling"  # folder of the traces, for TensorBoard or chrome://tracing
    with_cpu: bool = True  # record the host as well as the device
    with_stack: bool = False  # record the Python line of each operation
    with_memory: bool = False  # record allocations
    record_shapes: bool = False  # record the shapes of inputs
    level: Literal["level0", "level1", "level2"] = "level1"  # detail (Ascend's own profiler only)
    aic_metrics_type: Literal["PipeUtilization", "ArithmeticUtilization"] = "PipeUtilization"  # (Ascend's only)
    data_simplification: bool = False  # delete raw data after the export (Ascend's only)


class DynamicProfile(Config):
    """``dynamic_param``: profile on request, while training runs."""

    config_path: str = "path to dynamic config folder"  # folder whose profiler_config.json holds the request


class ProfileRequest(Config):
    """profiler_config.json: what to profile next; read again at the step after every change."""

    start_step: Annotated[int, Field(ge=-1)] = 0  # 0: nothing; n: before iteration n + 1 of this run; -1: at once
    active: Positive = 1  # iterations to record
    warmup: Count = 0  # iterations before them that run under the profiler but are thrown away
    prof_dir: str = "./"  # folder of the traces
    is_rank: bool = False  # only the ranks of rank_list
    rank_list: Ranks = Field(default=[])
    activities: list[str] | None = None  # a list without "CPU" leaves the host out; null: host and device
    record_shapes: bool = False  # as in static_param
    profile_memory: bool = False
    with_stack: bool = False
    with_flops: bool = False  # estimate the operations of matrix products
    with_modules: bool = False  # record the module of each operation
    metadata: FreeForm = Field(default_factory=FreeForm)  # keys and values to store in the trace
    analyse: bool = False  # evaluate on the spot (Ascend's own profiler only)
    experimental_config: FreeForm = Field(default_factory=FreeForm)  # (Ascend's only)


class ProfileConfig(Config):
    """``profile``: which operations take how long."""

    enable: bool = False
    profile_type: Literal["static", "dynamic"] = "static"
    ranks: Ranks = Field(default=[0, 1, 2, 3])  # [-1]: all
    static_param: StaticProfile = Field(default_factory=StaticProfile)
    dynamic_param: DynamicProfile = Field(default_factory=DynamicProfile)


class MemoryProfileConfig(Config):
    """``memory_profile``: what fills the memory of the device."""

    enable: bool = False  # record allocations and write a snapshot for pytorch.org/memory_viz
    start_step: Count = 0  # 0: before the model is built; n: before iteration n
    end_step: Count = 2  # the snapshot is written before this iteration
    save_path: str = "./memory_snapshot"  # folder of snapshot_<time>_<rank>.pickle
    dump_ranks: Ranks = Field(default=[0])  # [-1]: all
    stacks: Literal["all", "python"] = "all"  # whose frames are recorded: Python and C++, or Python alone
    max_entries: Positive | None = None  # events kept; null: all
    mem_info: bool = False  # print reserved and allocated memory at every iteration


class ToolsConfig(Config):
    """tools.json."""

    profile: ProfileConfig = Field(default_factory=ProfileConfig)
    memory_profile: MemoryProfileConfig = Field(default_factory=MemoryProfileConfig)
    sorafeature: FreeForm = Field(default_factory=FreeForm)  # read by feature-extraction scripts only
