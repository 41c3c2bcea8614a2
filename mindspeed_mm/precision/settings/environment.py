"""Whether a run, on this machine and with these settings, can be repeated bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mindspeed_mm.accelerator import Condition
from mindspeed_mm.precision.finding import Finding, Verdict
from mindspeed_mm.precision.settings.config_side import Side


def judge_environment(rows: Sequence[Condition], side: Side, asked: bool) -> Verdict:
    """Judge what is in force.

    Args:
        rows: what is in force in this process.
        side: the settings of a run; empty where none was named.
        asked: determinism is asked for. Then whatever is not repeatable is an error; otherwise only what cannot go
            together with it is, once the run's own settings ask for it.
    """
    verdict = Verdict("env")
    asked = asked or side.value("deterministic") is True
    for row in rows:
        if row.repeatable is False or row.contradicts:
            severity = "error" if asked else "warning"
            verdict.findings.append(_finding(row.name, f"{row.value}: not repeatable", row.advice, severity))
    for site, evidence, advice in _settings(side):
        verdict.findings.append(_finding(site, evidence, advice, "error" if asked else "warning"))
    if not asked:
        verdict.notes.append("determinism is not asked for: --use-deter-comp in the run, or --deterministic here")
    verdict.findings.sort(key=lambda finding: finding.severity != "error")
    return verdict


def _settings(side: Side) -> Iterator[tuple[str, str, str]]:
    """Yield the settings of a run that make numbers depend on chance."""
    for key in ("attention_dropout", "hidden_dropout", "vision_dropout", "lora_dropout", "embedding_noise"):
        if side.value(key) and side.value("seed") is None:
            yield key, f"{side.settings[key]} without a seed", "set it to 0 while aligning, or give a seed"
    if side.value("compiled"):
        yield "compiled", str(side.settings["compiled"]), "compiled kernels are chosen by timing; turn it off to align"
    if side.value("router_jitter"):
        yield "router_jitter", str(side.settings["router_jitter"]), "random noise in the router; set it to 0"
    if side.value("attention_kernel") == "flash" and side.value("deterministic") is not True:
        advice = "its backward adds in any order; use sdpa with --use-deter-comp, or FLASH_ATTENTION_DETERMINISTIC=1"
        yield "attention_kernel", str(side.settings["attention_kernel"]), advice
    if side.value("tf32") is True:
        yield "tf32", str(side.settings["tf32"]), "fp32 products round their inputs; turn it off while aligning"
    for key in ("hccl_deterministic", "lccl_deterministic", "matmul_k_shift_closed"):
        if side.value(key) is False:
            yield key, str(side.settings[key]), "set the variable to true in the launch script"
    if side.value("te_nondeterministic_allowed") is True:
        yield "te_nondeterministic_allowed", "NVTE_ALLOW_NONDETERMINISTIC_ALGO=1", "set it to 0 in the launch script"


def _finding(site: str, evidence: str, advice: str, severity: str) -> Finding:
    return Finding("environment", site, None, evidence, advice or "see the row", severity)
