"""A seeded generator of a small tri-modal atlas in the benchmark's schema: it tests machinery, it is no evidence of skill with people."""
