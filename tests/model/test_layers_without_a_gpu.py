"""Where no GPU is visible a model has none of Transformer Engine's layers, also where that package imports."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.usefixtures("megatron")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
def test_an_engine_that_imports_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.extensions import transformer_engine as te
    from small_model import small_config, small_model

    from nemotron_h.model import layers

    monkeypatch.setattr(te, "HAVE_TE", True)
    model = small_model(small_config())
    assert isinstance(model.decoder.final_norm, layers.RMSNorm)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    assert model(input_ids=tokens, position_ids=None, attention_mask=None).isfinite().all()
