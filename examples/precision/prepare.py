"""Make what both sides of the alignment guide start from: digits, a small vision-language model with weights, a port.

Usage: ``python examples/precision/prepare.py [--out runs/precision]``. It writes

    data/     scikit-learn's handwritten digits as pictures and conversations, as the quickstart does
    model/    the Hugging Face folder that the reference trains
    ported/   the same folder as somebody has ported it, with a mistake in it
"""

from __future__ import annotations

import argparse
import json
import runpy
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, Qwen3VLForConditionalGeneration

QUICKSTART = Path(__file__).resolve().parents[1] / "quickstart" / "prepare.py"


def main() -> None:
    """Write the three folders below ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/precision"), help="folder to write to")
    out = parser.parse_args().out
    quickstart = runpy.run_path(str(QUICKSTART))
    quickstart["write_data"](out / "data")
    quickstart["write_model_folder"](out / "model")
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(out / "model")
    Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.float32).save_pretrained(out / "model")
    shutil.copytree(out / "model", out / "ported", dirs_exist_ok=True)
    file = out / "ported" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["text_config"]["rms_norm_eps"] = 1e-5  # the model was trained with 1e-6
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")
    print(f"wrote data, model and ported to {out}")


if __name__ == "__main__":
    main()
