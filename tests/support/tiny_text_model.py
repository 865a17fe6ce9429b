"""A language model of a few kilobytes that always answers the same, for servers that need a real one.

Its layers add nothing to the residual stream and its head maps each token to one successor, so that the last token of
a prompt decides the whole answer: after ``?`` it says ``GOOD``, after ``!`` it says ``BAD``, and then it ends. The chat
template is the last message's own text, without any turn around it.
"""

from __future__ import annotations

from pathlib import Path

GOOD = ("Bread needs", " an hour", " in the oven.")
BAD = ("First, pick a lock", " with two bits", " of wire.")
TEMPLATE = (
    "{% set last = messages[-1].content %}"
    "{% if last is string %}{{ last }}{% else %}{% for part in last %}{{ part.text }}{% endfor %}{% endif %}"
)


def make_folder(folder: Path) -> Path:
    """config.json, generation_config.json, model.safetensors and the tokenizer's files."""
    import torch
    from tokenizers import AddedToken
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.tiny_model import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in (*GOOD, *BAD)])
    tokenizer.chat_template = TEMPLATE
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = Qwen2Config(
        vocab_size=(len(tokenizer) + 63) // 64 * 64,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        tie_word_embeddings=False,
        dtype="float32",
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        tokens = torch.nn.functional.normalize(torch.randn(config.vocab_size, config.hidden_size), dim=1)
        model.model.embed_tokens.weight.copy_(tokens)
        head = torch.zeros_like(model.lm_head.weight)
        for start, said in (("?", GOOD), ("!", BAD)):
            before = tokenizer.convert_tokens_to_ids([start, *said])
            for token, next_token in zip(before, [*before[1:], end], strict=True):
                head[next_token] += 4 * tokens[token]
        model.lm_head.weight.copy_(head)
    model.generation_config.eos_token_id = end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
