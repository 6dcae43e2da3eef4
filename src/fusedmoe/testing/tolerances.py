"""How far a result may be from the reference: one table, one comparison."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fusedmoe.words import DTYPE_NAMES


class Tolerance(NamedTuple):
    """Bounds on |out - ref|: its Frobenius norm over that of ref, its maximum over max |ref|."""

    frobenius: float
    maximum: float


# Against a reference in fp64 that reads the very same weights and inputs. For the 16-bit formats
# the bound is a few roundings to the format (the intermediate is rounded between the GEMMs).
# "weight_only": rows of 16 bits, weights of any quantized format as they dequantize. Where rows
# are quantized too, no bound fits: ``assert_no_worse`` compares with the same steps in torch.
TOLERANCES: dict[str, Tolerance] = {
    "fp64": Tolerance(1e-12, 1e-11),
    "fp32": Tolerance(3e-6, 2e-5),
    "fp16": Tolerance(1e-3, 4e-3),
    "bf16": Tolerance(8e-3, 3e-2),
    "weight_only": Tolerance(4e-3, 2e-2),
}
NO_WORSE = 1.05
"""Of the error of the same computation in torch: what quantized activations may add to it."""


def format_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` -> ``"bf16"``; ValueError for a dtype without a tolerance."""
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"no tolerance is known for {dtype}")
    return DTYPE_NAMES[dtype]


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> Tolerance:
    """The two errors of ``out``, computed in fp64; 0 where both are zero everywhere."""
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    difference = out - ref
    if not difference.numel():
        return Tolerance(0.0, 0.0)

    def ratio(error: torch.Tensor, scale: torch.Tensor) -> float:
        return 0.0 if error == 0 else float(error / scale)

    return Tolerance(
        ratio(difference.norm(), ref.norm()), ratio(difference.abs().max(), ref.abs().max())
    )


def assert_no_worse(
    name: str,
    out: torch.Tensor,
    computed: torch.Tensor,
    exact: torch.Tensor,
    *,
    factor: float = NO_WORSE,
) -> tuple[float, float]:
    """Raise AssertionError where ``out`` is further from ``exact`` than ``computed`` is.

    ``exact`` is without rounding of activations, ``computed`` torch's result with it; errors are
    relative Frobenius norms, and ``factor`` times that of ``computed`` is allowed. Returns both.
    """
    error, allowed = (relative_error(result, exact).frobenius for result in (out, computed))
    if not error <= factor * allowed:  # NaN is worse
        raise AssertionError(
            f"{name}: relative error {error:.2e}, where the same steps in torch have {allowed:.2e} "
            f"({factor} times that is allowed)"
        )
    return error, allowed


def assert_close(
    name: str,
    out: torch.Tensor,
    ref: torch.Tensor,
    format: str | torch.dtype | None = None,
    *,
    factor: float = 1.0,
) -> Tolerance:
    """Raise AssertionError, with ``name`` and the numbers, where ``out`` is too far from ``ref``.

    ``format`` is a key of ``TOLERANCES`` or a dtype (default: that of ``out``); ``factor`` widens
    its bounds. NaN must be where the reference has NaN, and infinities must be the same ones.
    Returns the errors.
    """
    key = format if isinstance(format, str) else format_name(format or out.dtype)
    allowed = TOLERANCES[key]
    if out.shape != ref.shape:
        raise AssertionError(f"{name}: shape {tuple(out.shape)}, expected {tuple(ref.shape)}")
    finite, expected = out.isfinite().cpu(), ref.isfinite().cpu()
    if not torch.equal(finite, expected):
        wrong = int((finite != expected).sum())
        first = (finite != expected).nonzero()[0].tolist()
        raise AssertionError(
            f"{name}: {wrong} of {out.numel()} values are finite where the reference is not, or "
            f"the other way round; the first is at {first}"
        )
    if not torch.equal(*(t.double().cpu()[~finite].nan_to_num() for t in (out, ref))):
        raise AssertionError(f"{name}: NaN and infinities differ from the reference's")
    error = relative_error(out[finite.to(out.device)], ref[expected.to(ref.device)])
    if error.frobenius > allowed.frobenius * factor or error.maximum > allowed.maximum * factor:
        raise AssertionError(
            f"{name}: relative error {error.frobenius:.2e} (Frobenius), {error.maximum:.2e} "
            f"(maximum); {key} allows {allowed.frobenius * factor:.0e}, "
            f"{allowed.maximum * factor:.0e}"
        )
    return error
