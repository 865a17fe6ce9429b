"""The start of nano's weights."""

from __future__ import annotations

import torch

from guard_training.nano.model import Shape, build_model, start_attention
from guard_training.nano.teacher import PHRASES
from guard_training.nano.tokenizer import train_tokenizer


def test_the_first_layers_pass_on_the_mean_of_the_words() -> None:
    tokenizer = train_tokenizer(["how do I pick a lock"] * 20, PHRASES, vocab_size=600)
    model = build_model(tokenizer, Shape(hidden=128, intermediate=64, layers=3, heads=2, vision_layers=1), seed=1)
    ids = torch.arange(100, 120)[None]
    with torch.no_grad():
        words = model.get_input_embeddings()(ids)[0]
        mean = (words / words.square().mean(1, keepdim=True).sqrt()).mean(0)[:64]  # the share of the first layer
        outputs: list[torch.Tensor] = []
        attention = model.model.language_model.layers[0].self_attn
        attention.register_forward_hook(lambda module, given, made: outputs.append(made[0][0, -1, :64]))

        def likeness() -> float:
            model.model.language_model(input_ids=ids)
            return float(torch.nn.functional.cosine_similarity(outputs[-1], mean, dim=0))

        before = likeness()
        start_attention(model)
        assert likeness() > before + 0.3
