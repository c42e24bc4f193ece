"""Methods of policy optimisation by name: what `train.method` sets. docs/methods.md has their papers and equations.

Each sets every key that any of them sets, so that of a method chosen before (in a file's `base`) nothing is left over.
`grpo` is what the schema's defaults are.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

Method = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"]

_GRPO: dict[str, Any] = {  # Shao et al. 2024, DeepSeekMath, arXiv 2402.03300
    "train.scale_rewards": "group",
    "train.surrogate": "clip",
    "train.ratio_level": "token",
    "train.clip_low": 0.2,
    "train.clip_high": 0.2,
    "train.aggregation": "grpo",
    "train.kl_coef": 0.05,
    "data.resample_rounds": 0,
}

SETTINGS: dict[Method, dict[str, Any]] = {
    "grpo": _GRPO,
    # Liu et al. 2025, arXiv 2503.20783
    "dr_grpo": _GRPO | {"train.scale_rewards": "none", "train.aggregation": "dr_grpo", "train.kl_coef": 0.0},
    # Yu et al. 2025, arXiv 2503.14476; the paper samples until no group is flat
    "dapo": _GRPO
    | {"train.clip_high": 0.28, "train.aggregation": "dapo", "train.kl_coef": 0.0, "data.resample_rounds": 4},
    # Zheng et al. 2025, arXiv 2507.18071
    "gspo": _GRPO
    | {"train.ratio_level": "sequence", "train.clip_low": 3e-4, "train.clip_high": 4e-4, "train.kl_coef": 0.0},
    # MiniMax 2025, arXiv 2506.13585; the bound of 5 is among those of Khatri et al. 2025, arXiv 2510.13786
    "cispo": _GRPO
    | {
        "train.surrogate": "cispo",
        "train.clip_low": 1.0,
        "train.clip_high": 4.0,
        "train.aggregation": "dapo",
        "train.kl_coef": 0.0,
    },
    # Ahmadian et al. 2024, arXiv 2402.14740; a completion is one action: the sum over its tokens, not their mean
    "rloo": _GRPO | {"train.scale_rewards": "leave_one_out", "train.aggregation": "dr_grpo"},
}
KEY = "train.method"


def settings(name: Any) -> dict[str, Any]:
    """Return what a method sets, by dotted key; nothing for a name that is none (the schema refuses it)."""
    return SETTINGS[name] if name in get_args(Method) else {}
