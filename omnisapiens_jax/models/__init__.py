"""Arrays in, arrays out: the omni thinker, its parts and the sentence embedder. Imports only jax and flax."""
