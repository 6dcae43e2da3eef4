"""Hugging Face Transformers: our experts inside its models. Transformers is imported on use."""

from __future__ import annotations

EXPERTS_IMPLEMENTATION = "fusedmoe"


def register() -> None:
    """Make ``experts_implementation="fusedmoe"`` a choice of every Transformers model.

    Call it before the model is built: ``from_pretrained``, ``from_config`` and
    ``set_experts_implementation`` then take the name, for plain and for fp8 checkpoints. Calling
    it again changes nothing. Raises ImportError where Transformers is missing or too old.
    """
    try:
        from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        raise ImportError(
            "fusedmoe.register() needs transformers >= 5.17 (pip install 'fusedmoe[hf]')"
        ) from error
    from fusedmoe.integrations.transformers.experts_function import experts_forward
    from fusedmoe.integrations.transformers.fp8_experts import fp8_experts_forward

    ExpertsInterface.register(EXPERTS_IMPLEMENTATION, experts_forward)
    FP8ExpertsInterface.register(EXPERTS_IMPLEMENTATION, fp8_experts_forward)
