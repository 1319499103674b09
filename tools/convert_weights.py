"""Brings checkpoints of the Qwen2.5-Omni and OmniSapiens family into ours, and carries ours back to the PyTorch world.

    convert_weights.py import  SRC DST [--base DIR] [--dtype bfloat16] [--merge]
    convert_weights.py export  SRC DST [--merge | --peft] [--omni DIR]
    convert_weights.py merge   SRC DST
    convert_weights.py inspect SRC
    convert_weights.py verify  SRC [REFERENCE]

SRC is a directory, or OWNER/NAME[@REVISION] on the Hugging Face hub. What it is shows by its files: a thinker or a full Omni model of Hugging
Face (its speech side stays behind), also with released heads and adapters beside it; a PEFT adapter; a step_N directory of the original SFT
or BAM trainers; verl's shards; a checkpoint of ours, or a stage of a run of ours (runs/rl/rl). Nothing in a torch file is executed, and torch is not needed.

DST must not exist and appears only when all of it is written. A conversion that was killed goes on where it stopped when the same command
is given again. Memory does not grow with the checkpoint. Every tensor's origin, shape, dtype and SHA-256 is in DST's manifest, and an import
that neither casts nor merges exports the very bytes it read.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from omnisapiens_jax.convert import checkpoint, huggingface, peft, verify
from omnisapiens_jax.convert.hub import resolve
from omnisapiens_jax.convert.kinds import open_source
from omnisapiens_jax.convert.names import mappings
from omnisapiens_jax.convert.parts import write_released
from omnisapiens_jax.convert.source import FLOATS, Source
from omnisapiens_jax.convert.source import Progress as Report
from omnisapiens_jax.convert.unfinished import whole_or_nothing


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be too small for what it is not asked to hold
    console = Console(stderr=True)
    try:
        return options.run(options, console)
    except (ValueError, OSError) as reason:  # a checkpoint that is not what it should be; a disk that is full
        console.print(f"[red]Not done:[/red] {reason}", highlight=False, soft_wrap=True)
        return 1


def _import(options: argparse.Namespace, console: Console) -> int:
    source = _open(options)
    source.check()
    if options.merge:
        if source.lora is None:
            raise ValueError(f"{options.source} has no LoRA factors to merge")
        source = source.merged()
    _tell(source, console)
    if options.dry_run:
        _plan(source, console)
        return 0
    facts = _facts(options, source)
    with whole_or_nothing(options.target, facts) as (folder, journal), _progress(console) as progress:
        manifest = checkpoint.write_checkpoint(source, folder, journal, dtype=options.dtype and FLOATS[options.dtype], progress=progress)
        companions = huggingface.copy_companions(source.companions, folder)
    kept = f", LoRA of rank {source.lora.config.rank}" if source.lora else ""
    _done(options.target, f"{manifest['parameters']:,} parameters in {', '.join(manifest['dtypes'])}{kept}", companions, console)
    return 0


def _export(options: argparse.Namespace, console: Console) -> int:
    source = _open(options)
    source.check()
    _tell(source, console)
    if source.lora is None and (options.merge or options.peft):
        raise ValueError(f"{options.source} has no LoRA factors")
    if source.lora is not None and not (options.merge or options.peft):
        raise ValueError(f"{options.source} has LoRA factors beside its weights: export them alone with --peft, or all with --merge")
    if options.merge:
        source = source.merged()
    if options.dry_run:
        _plan(source, console)
        return 0
    parts = []
    with whole_or_nothing(options.target, _facts(options, source)) as (folder, journal), _progress(console) as progress:
        if options.peft:
            peft.write_adapter(source, folder, journal, progress=progress)
        else:
            if options.omni:
                huggingface.write_omni(source, resolve(options.omni), folder, journal, progress=progress)
            else:
                shard_bytes = int(options.shard_size * 1e9) if options.shard_size else huggingface.SHARD_BYTES
                layout = None if options.shard_size else checkpoint.file_layout(source.path)
                huggingface.write_thinker(source, folder, journal, shard_bytes=shard_bytes, layout=layout, progress=progress)
            parts = write_released(source.parts, folder)
        companions = huggingface.copy_companions(source.companions, folder)
    what = "LoRA factors for PEFT" if options.peft else "a full Omni model" if options.omni else "a thinker"
    _done(options.target, what, [*parts, *companions], console)
    return 0


def _inspect(options: argparse.Namespace, console: Console) -> int:
    source = _open(options)
    _tell(source, console)
    table = Table("tensor", "dtype", "shape", "file")
    factors = source.lora.factors if source.lora else {}
    for name, tensor in (*source.tensors.items(), *factors.items(), *source.parts.items()):
        table.add_row(name, str(tensor.dtype), " x ".join(map(str, tensor.shape)), tensor.file.name)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    source.check()
    return 0


def _verify(options: argparse.Namespace, console: Console) -> int:
    with _progress(console) as progress:
        found = verify.verify(resolve(options.source), options.reference and resolve(options.reference), python=options.python, progress=progress)
    table = Table("what", "result", "bound")
    for row in found:
        table.add_row(row.what, row.result, row.bound, style=None if row.good else "red")
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0 if all(row.good for row in found) else 1


def _open(options: argparse.Namespace) -> Source:
    return open_source(resolve(options.source), base=options.base and resolve(options.base), lora_alpha=options.lora_alpha)


def _facts(options: argparse.Namespace, source: Source) -> dict[str, Any]:
    """What makes two conversions the same: the settings, and the files by size and time."""
    files = {tensor.file for tensor in (*source.tensors.values(), *source.parts.values(), *(source.lora.factors if source.lora else {}).values())}
    stats = {str(file): [(stat := file.stat()).st_size, stat.st_mtime_ns] for file in sorted(files)}
    return {"options": {key: str(value) for key, value in vars(options).items() if key != "run"}, "files": stats}


def _tell(source: Source, console: Console) -> None:
    console.print(f"{source.path} is {source.kind}: {len(source.tensors)} tensors", highlight=False, soft_wrap=True)
    if source.lora:
        lora = source.lora.config
        targets = "; ".join(f"{tower}: {', '.join(names)}" for tower, names in lora.targets.items())
        console.print(f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, scale {lora.scale:g}, on {targets}", highlight=False, soft_wrap=True)
    for part, count in Counter(name.split(".")[0] for name in source.parts).items():
        console.print(f"{part}: {count} tensors", highlight=False)
    for part, count in huggingface.skipped_parts(source).items():
        console.print(f"left behind: {count} tensors of the {part}", highlight=False)


def _plan(source: Source, console: Console) -> None:
    table = Table("theirs", "ours", "shape", "dtype", title="nothing is written: this is the plan")
    for row in mappings(source.config):
        dtypes = {str(source.tensors[name].dtype) for name in row.their_names}
        table.add_row(row.theirs, ".".join(row.ours), " x ".join(map(str, row.shape)), ", ".join(sorted(dtypes)))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    size = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in source.tensors.values())
    console.print(f"{size / 1e9:,.2f} GB to read", highlight=False)


def _done(target: Path, what: str, companions: list[str], console: Console) -> None:
    console.print(f"{target}: {what}; beside them {', '.join(companions) or 'no tokenizer'}", highlight=False, soft_wrap=True)


@contextmanager
def _progress(console: Console) -> Iterator[Report]:
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda name, done, total: bar.update(task, description=name, completed=done, total=total)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convert_weights.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace, Console], int], help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help)
        made.add_argument("source", metavar="SRC", help="directory of a checkpoint, or OWNER/NAME[@REVISION] on the hub")
        made.add_argument("--base", metavar="DIR", help="where to find what SRC lacks: config.json, and for a PEFT adapter the weights")
        made.add_argument(
            "--lora-alpha", type=float, metavar="ALPHA", help="of a trainer's state dict, which does not say it (default: twice the rank)"
        )
        made.set_defaults(run=run)
        return made

    def writes(made: argparse.ArgumentParser) -> None:
        made.add_argument("target", type=Path, metavar="DST", help="directory to make")
        made.add_argument("--dry-run", action="store_true", help="say what would be done, write nothing")

    for name, help in (
        ("import", "any checkpoint of the family -> one of ours"),
        ("merge", "a checkpoint with LoRA factors -> one of ours with the factors added to the weights, in float32"),
    ):
        made = command(name, _import, help)
        writes(made)
        made.add_argument("--dtype", choices=FLOATS, help="cast the weights to this (default: keep what is stored)")
        made.set_defaults(merge=name == "merge")
        if name == "import":
            made.add_argument("--merge", action="store_true", help="as the command merge")
    made = command("export", _export, "a checkpoint -> a directory for transformers, PEFT or vLLM")
    writes(made)
    lora = made.add_mutually_exclusive_group()
    lora.add_argument("--merge", action="store_true", help="add LoRA factors to the weights, in float32, cast to the weights' dtype")
    lora.add_argument("--peft", action="store_true", help="write the LoRA factors alone, as a PEFT adapter")
    made.add_argument("--omni", metavar="DIR", help="write a full Omni model, what the thinker has not from this one (default: a thinker alone)")
    made.add_argument("--shard-size", type=float, metavar="GB", help="largest size of one file (default: the files SRC came from, else 5)")
    command("inspect", _inspect, "what a checkpoint is, and its tensors")
    made = command("verify", _verify, "compare a checkpoint of ours with its receipt, and with the model it came from")
    made.add_argument(
        "reference", nargs="?", metavar="REFERENCE", help="Hugging Face directory; where transformers is installed both sides are run"
    )
    made.add_argument("--python", default=sys.executable, help="an interpreter that has transformers (default: this one)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
