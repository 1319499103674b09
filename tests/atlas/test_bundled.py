"""The rows that come with the package can all be used: schema, labels, media and budget."""

import pytest

from omnisapiens_jax import resources
from omnisapiens_jax.atlas.lengths import length_index, shortened
from omnisapiens_jax.atlas.recipe import Recipe, target_text
from omnisapiens_jax.atlas.sources import open_source
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.processing.options import ProcessingConfig
from omnisapiens_jax.processing.tokenizers import MiniTokenizer


@pytest.mark.parametrize("split", ["mini/train", "mini/validation", "mini/test", "real/clips"])
def test_every_bundled_row_has_a_length(split):
    tokenizer = MiniTokenizer(resources.resource("data/mini/tokenizer.model"))
    recipe = Recipe(tokenizer, ThinkerConfig.preset("mini"), ProcessingConfig(), max_tokens=1024, target=target_text)
    source = open_source(resources.resource("data") / split)
    index, faults = length_index(source, recipe, on_error="raise")
    assert len(index) == len(source) > 0 and not faults and not shortened(index)
    for signature, size in zip(index.signatures, index.sizes, strict=True):
        parts = index.names[signature].split("_")
        assert ("audio" in parts, "video" in parts) == (size[2] > 0, size[3] > 0)
