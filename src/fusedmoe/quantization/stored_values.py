"""What the values of stored scales and group indices may be; a GPU is waited for."""

from __future__ import annotations

import torch


def check_scales(name: str, part: str, scale: torch.Tensor) -> None:
    """Raise ValueError where ``part`` of ``name`` holds inf or NaN, or an e4m3 number with a sign:
    NVFP4's scales are defined without one, and kernels read their bits so."""
    is_exponent = scale.dtype == torch.uint8
    _check_none(name, part, scale, scale == 255 if is_exponent else ~scale.float().isfinite())
    if scale.dtype == torch.float8_e4m3fn:
        _check_none(name, part, scale, scale.view(torch.uint8) > 127, "negative")


def _check_none(
    name: str, part: str, scale: torch.Tensor, bad: torch.Tensor, what: str = "not finite"
) -> None:
    if bad.any():
        at = bad.nonzero()[0].tolist()
        found = "NaN" if scale.dtype == torch.uint8 else float(scale[tuple(at)].float())
        raise ValueError(
            f"{name}: {int(bad.sum())} of {bad.numel()} numbers of its {part} are {what}; "
            f"the first is {found} at {at}"
        )


def check_group_index(name: str, index: torch.Tensor, groups: int, columns: int) -> None:
    """Raise ValueError where index [shards of all experts, K], of ``groups`` with ``columns`` each,
    names another group, or says of sorted columns that there are more or fewer."""
    K = index.shape[-1]
    is_sorted = (~index).sort(-1).values.eq(torch.arange(K, device=index.device)).all(-1)
    if is_sorted.any() and groups * columns != K:
        raise ValueError(f"{name}: {K} sorted columns for {groups} groups of {columns}")
    rest = index[~is_sorted]
    low, high = (int(bound) for bound in rest.aminmax()) if rest.numel() else (0, 0)
    if low < 0 or high >= groups:
        raise ValueError(f"{name}: group_index lies in [{low}, {high}], not in [0, {groups})")
