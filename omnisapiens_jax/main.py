"""Runs the job that a config names.

    python -m omnisapiens_jax.main --config=configs/rl.py --workdir=runs/rl
    python -m omnisapiens_jax.main --config=rl:7b --workdir=runs/7b --config.model.weights=DIR --config.rl.optim.lr=5e-7

A bare name (`rl`) is one of the configs that travel with the package; what follows the colon selects the size.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from omnisapiens_jax.resources import resource


def main(argv: list[str]) -> None:
    """Flags to config to job."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # orbax and grain tell each step of theirs
    from omnisapiens_jax.parallel import mesh

    mesh.start(_PROCESSES.value)
    from omnisapiens_jax.atlas.faults import BadSamples
    from omnisapiens_jax.training import jobs  # after the flags are read, so that --help does not wait for jax

    try:
        jobs.run(_CONFIG.value, Path(_WORKDIR.value))
    except BadSamples as reason:
        sys.exit(str(reason))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last checkpoint")


_FLAG = ("--config", "-config")


def _arguments(given: list[str]) -> list[str]:
    """The command line with bundled configs as paths; `--config rl` is `--config=rl`."""
    joined: list[str] = []
    for argument in given:
        if joined and joined[-1] in _FLAG:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return [*map(_bundled, joined)]


def _bundled(argument: str) -> str:
    """`--config=rl:7b` -> `--config=<where the package keeps configs>/rl.py:7b`; any other argument as it is."""
    flag, _, value = argument.partition("=")
    name, colon, size = value.partition(":")
    if flag not in _FLAG or not name.isidentifier():
        return argument
    known = sorted(path.stem for path in resource("configs").glob("*.py"))
    if name not in known:
        sys.exit(f"no config {name!r} travels with the package; known: {', '.join(known)}. A file of your own: --config=./{name}.py")
    return f"{flag}={resource(f'configs/{name}.py')}{colon}{size}"


_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file or bundled name (rl, generative, sft, qa, bam, text, evaluate) and :size (mini, 3b, 7b). --config.X=VALUE sets one value.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; a run found there goes on.", required=True)
_PROCESSES = flags.DEFINE_string("processes", "", "Of a run over several hosts: 'auto' (as the cluster says) or 'HOST:PORT,N,I'.")

if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, argv=[sys.argv[0], *_arguments(sys.argv[1:])])
