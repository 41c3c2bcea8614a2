"""Choosing the optimizer, grouping parameters for it, and scheduling its learning rate and weight decay."""

from mindspeed_mm.optimizer.muon import muon_matrices
from mindspeed_mm.optimizer.param_groups import ParameterGroup, build_param_groups, param_group_table
from mindspeed_mm.optimizer.schedule import build_schedule
from mindspeed_mm.optimizer.selection import build_optimizer

__all__ = [
    "ParameterGroup",
    "build_optimizer",
    "build_param_groups",
    "build_schedule",
    "muon_matrices",
    "param_group_table",
]
