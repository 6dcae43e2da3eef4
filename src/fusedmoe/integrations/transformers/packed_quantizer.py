"""How Transformers is told to leave experts out of a model that it builds."""

from __future__ import annotations

from typing import Any

from torch import nn

from fusedmoe.integrations.transformers.packed import PackedExperts
from fusedmoe.integrations.transformers.seats import find_seats

QUANT_METHOD = "fusedmoe"
_MISMATCHED = "_fusedmoe_mismatched"


def register_packed_experts() -> type[Any]:
    """Makes ``QUANT_METHOD`` one that Transformers knows; the class of its quantizer."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
    from transformers.quantizers.base import HfQuantizer

    if QUANT_METHOD in AUTO_QUANTIZER_MAPPING:
        known: type[Any] = AUTO_QUANTIZER_MAPPING[QUANT_METHOD]
        return known

    @register_quantizer(QUANT_METHOD)
    class PackedExpertsQuantizer(HfQuantizer):  # type: ignore[misc]
        """Replaces the experts of a model on the meta device; loads nothing itself."""

        def __reduce__(self) -> Any:
            return _quantizer_with, (vars(self),)

        def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
            self._shapes = {name: p.shape for name, p in model.named_parameters()}
            for seat in find_seats(model):
                parent, _, name = seat.path.rpartition(".")
                block = model.get_submodule(parent)
                setattr(block, name, PackedExperts(seat))
                # Everything is read from files: some blocks initialise their experts' tensors.
                block._is_hf_initialized = True  # type: ignore[assignment]

        def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
            model.__dict__[_MISMATCHED] = {
                (name, found.shape, self._shapes[name])
                for name, found in model.named_parameters()
                if name in self._shapes and found.shape != self._shapes[name]
            }

        def is_serializable(self) -> bool:
            """Asked by ``save_pretrained`` alone, which would not say why."""
            raise ValueError(
                "a model with packed experts cannot be saved: keep the checkpoint that it was "
                "read from"
            )

        @property
        def is_trainable(self) -> bool:
            return False

    return PackedExpertsQuantizer


def _quantizer_with(state: dict[str, Any]) -> Any:
    """One as it was pickled; its class is made anew in each process."""
    cls: Any = register_packed_experts()
    made = cls.__new__(cls)
    vars(made).update(state)
    return made


def mismatched(model: nn.Module) -> set[tuple[Any, ...]]:
    """(name, shape in the files, shape in the model) of tensors that were loaded all the same.

    Transformers 5.17 leaves it to quantizers whether a tensor fits, whatever its shape.
    """
    found: set[tuple[Any, ...]] = model.__dict__.pop(_MISMATCHED)
    return found
