"""``accelerate(model, ep_group=...)``: experts of a Transformers model over four ranks."""

from __future__ import annotations

import pytest
import rank_models

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("same_tokens", "mover"), [(True, None), (False, None), (False, "all_to_all")]
)
def test_the_model_gives_what_it_gives_alone(ranks, same_tokens, mover):
    ranks.run(rank_models.check_accelerate, same_tokens, mover)


def test_different_models_are_refused(ranks):
    ranks.run(rank_models.check_different_models)
