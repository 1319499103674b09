"""OmniSapiens in JAX: the Qwen2.5-Omni thinker in pure Flax, trained on Human Behavior Atlas by SFT and on-device GRPO."""
