"""The paper's recipe for any Qwen2.5-VL: reasoning SFT, rejection sampling, concatenation, online RL."""
