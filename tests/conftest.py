"""Before jax is first imported: eight virtual CPU devices, and a compile cache that outlives the checkout."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# Compiling is most of what the suite does; a warm cache makes it about eight times faster, if small programs are kept too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "omnisapiens_jax" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Nothing on CPU, but parity run on an accelerator would otherwise compare with bf16 or tf32 products.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

from absl import flags  # noqa: E402
from hypothesis import settings  # noqa: E402

if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # grain reads its options from absl, which no app.run has parsed here

# The first example compiles, so a deadline would be noise; the same examples every time, so a failure can be seen again.
settings.register_profile("omnisapiens", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("omnisapiens")
