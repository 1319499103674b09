"""Brings Hugging Face weights of a Qwen2.5-Omni thinker into a checkpoint of ours, and back.

    python tools/convert_weights.py import SRC DST [--dtype bfloat16]
    python tools/convert_weights.py export SRC DST [--shard-size 5]

`import` reads a directory with config.json and model.safetensors, or an index of shards. A full Omni checkpoint is recognised by its
`thinker.` names; its speech side (talker, token2wav) is left behind. The result is a directory for `--config.model.weights=DST`.
`export` writes a thinker-only directory that transformers reads. Import followed by export returns every tensor bit for bit. Tokenizer,
chat template and settings beside the weights go along both ways. DST must not exist; it appears only when all of it is written.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from omnisapiens_jax.convert import checkpoint, huggingface

DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # nothing is computed, and an accelerator may be too small for what it is not asked to hold
    console = Console(stderr=True)
    try:
        with checkpoint.whole_or_nothing(options.target) as unfinished:
            summary = options.run(options, unfinished, console)
            companions = huggingface.copy_companions(options.source, unfinished)
    except (ValueError, OSError) as reason:  # a config.json or tensors that are not what they should be; a disk that is full
        console.print(f"[red]Not converted:[/red] {reason}", highlight=False, soft_wrap=True)
        return 1
    console.print(f"{options.target}: {summary}; beside them {', '.join(companions) or 'no tokenizer'}", highlight=False, soft_wrap=True)
    return 0


def _import(options: argparse.Namespace, target: Path, console: Console) -> str:
    dtype = huggingface.parse_dtype(options.dtype) if options.dtype else None
    with _progress(console) as progress:
        imported = huggingface.read(options.source, dtype=dtype, progress=progress)
    for part, count in imported.skipped.items():
        console.print(f"left behind: {count} tensors of the {part}", highlight=False)
    console.print("writing", highlight=False)
    checkpoint.write_params(target, imported.params, imported.config, origin={"source": str(options.source), "skipped": imported.skipped})
    return _summary(imported.params)


def _export(options: argparse.Namespace, target: Path, console: Console) -> str:
    config = checkpoint.load_config(options.source)
    console.print("reading", highlight=False)
    params = checkpoint.load_params(options.source)
    with _progress(console) as progress:
        huggingface.write(params, config, target, shard_bytes=int(options.shard_size * 1e9), progress=progress)
    return _summary(params)


def _summary(params: huggingface.Params) -> str:
    leaves = jax.tree.leaves(params)
    dtypes = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
    return f"{sum(math.prod(leaf.shape) for leaf in leaves):,} parameters in {dtypes}, {sum(leaf.nbytes for leaf in leaves) / 1e9:,.2f} GB"


@contextmanager
def _progress(console: Console) -> Iterator[huggingface.Progress]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("")
        yield lambda name, done, total: bar.update(task, description=name, completed=done, total=total)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convert_weights.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    bring_in = commands.add_parser("import", help="Hugging Face directory -> our checkpoint")
    bring_in.add_argument("source", type=Path, metavar="SRC", help="directory with config.json and safetensors")
    bring_in.add_argument("target", type=Path, metavar="DST", help="checkpoint directory to make")
    bring_in.add_argument("--dtype", choices=DTYPES, help="cast every tensor to this (default: keep what is stored)")
    bring_in.set_defaults(run=_import)
    hand_out = commands.add_parser("export", help="our checkpoint -> Hugging Face directory")
    hand_out.add_argument("source", type=Path, metavar="SRC", help="checkpoint directory of ours")
    hand_out.add_argument("target", type=Path, metavar="DST", help="directory to make")
    hand_out.add_argument("--shard-size", type=float, default=5.0, metavar="GB", help="largest size of one file (default: 5)")
    hand_out.set_defaults(run=_export)
    return parser


if __name__ == "__main__":
    sys.exit(main())
