"""Hugging Face <-> Flax: one name table for both directions."""
