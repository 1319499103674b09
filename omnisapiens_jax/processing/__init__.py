"""Host-side numpy: media decoding, log-mel, patches, prompts, tokenizers, TMRoPE positions. Imports no jax."""
