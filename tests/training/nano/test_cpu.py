"""bfloat16 only where the processor has it, and attention in fp32 within it."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from guard_training.nano import cpu


class Model:
    attention = "sdpa"

    def set_attn_implementation(self, name: str) -> None:
        self.attention = name


@pytest.mark.parametrize(("has", "attention"), [(True, cpu.ATTENTION), (False, "sdpa")])
def test_attention_is_changed_where_the_processor_has_bfloat16(
    has: bool, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: has)
    model = Model()
    cpu.hasten(model)  # type: ignore[arg-type]
    assert model.attention == attention


def test_attention_is_computed_in_fp32_and_keeps_its_type() -> None:
    module = torch.nn.Module()
    module.is_causal = True
    drawn = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 8, generator=drawn).bfloat16() for _ in range(3))
    exact, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), None)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = cpu._attention(module, query, key, value, None)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, exact.bfloat16())
