"""Makes the miniature atlas: python data/generate.py TARGET [--samples N] [--seed S] [--descriptors] [--parquet]."""

from omnisapiens_jax.atlas.miniature.generate import main

if __name__ == "__main__":
    main()
