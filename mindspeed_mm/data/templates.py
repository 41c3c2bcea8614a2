"""The published names of chat templates, which all mean the template of the model's own folder."""

from __future__ import annotations

from pathlib import Path

from mindspeed_mm.errors import UserError, did_you_mean

# Published data.json files name a template since trainers used to bring their own copies.
_NAMES = (
    *("default", "qwen", "qwen3", "qwen3_nothink", "mistral", "chatml"),
    *("qwen2vl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_nothink"),
    *("qwen2_omni", "qwen3_omni", "qwen3_omni_nothink"),
    *("glm4v", "glm4.1v", "glm4_5v", "glm4v_moe", "intern_vl", "internvl", "internvl2_5"),
)


def resolve_template(name: str | None) -> tuple[str | None, bool]:
    """Find out what ``basic_parameters.template`` asks for.

    Args:
        name: a published name, or the path of a ``.jinja`` file.

    Returns:
        The text of the template, None for the one in the model's folder; and whether the model may think.

    Raises:
        UserError: the name is not known, or there is no such file.
    """
    if name is not None and name.endswith(".jinja"):
        if not Path(name).is_file():
            raise UserError(f"data.json: dataset_param.basic_parameters.template: no file {name!r}; check the path")
        return Path(name).read_text(encoding="utf-8"), True
    if name is not None and name not in _NAMES:
        raise UserError(
            f"data.json: dataset_param.basic_parameters.template: {name!r} is not known; leave it out to use the chat "
            f"template of the model's own folder, or name a .jinja file.{did_you_mean(name, _NAMES)}"
        )
    return None, not (name or "").endswith("_nothink")
