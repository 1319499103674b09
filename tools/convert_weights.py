"""Brings checkpoints of the Qwen2.5-Omni and OmniSapiens family into ours, and carries ours back to the PyTorch world.

    convert_weights.py import  SRC DST [--base DIR] [--dtype bfloat16] [--merge]
    convert_weights.py export  SRC DST [--merge | --peft] [--omni DIR] [--shard-size GB]
    convert_weights.py merge   SRC DST
    convert_weights.py inspect SRC
    convert_weights.py verify  SRC [REFERENCE] [--python PYTHON]

SRC is a directory, or OWNER/NAME[@REVISION] on the Hugging Face hub, which is fetched into the hub's cache. What it is shows by its files:

    a thinker or a full Omni model of Hugging Face, with released heads and adapters beside it (the speech side stays behind)
    a PEFT adapter (--base names the weights that it belongs to)
    a step_N directory of the original SFT or BAM trainers, or verl's shards (--base names a directory with the config.json)
    a checkpoint of ours, or a stage of a run of ours such as runs/rl/rl

Nothing in a torch file is executed, and torch is not needed. Memory does not grow with the checkpoint. DST must not exist and appears
only when all of it is on disk; a conversion that was killed or found the disk full goes on where it stopped when the same command is given
again. Every tensor's origin, shape, dtype and SHA-256, and what was left behind, is in DST's receipt (manifest.json; after an export
conversion_manifest.json). An import that neither casts nor merges keeps every bit, and an export of it gives the same files again.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import jax
from absl import logging
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from omnisapiens_jax.convert import checkpoint, huggingface, peft, verify
from omnisapiens_jax.convert.hub import resolve
from omnisapiens_jax.convert.kinds import open_source
from omnisapiens_jax.convert.label_files import write_companions
from omnisapiens_jax.convert.names import Mapping as Row
from omnisapiens_jax.convert.names import lora_mappings, mappings
from omnisapiens_jax.convert.parts import ADAPTERS, HEADS, OURS
from omnisapiens_jax.convert.source import FLOATS, Source, files_of
from omnisapiens_jax.convert.source import Progress as Report
from omnisapiens_jax.convert.unfinished import Journal, refuse_existing, whole_or_nothing
from omnisapiens_jax.processing.tensors import Tensor, nbytes, some


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # an accelerator may be too small for what it is not asked to hold
    logging.set_verbosity(logging.ERROR)  # Orbax warns that it merges no files where there are none to merge
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    try:
        return options.run(options, console)
    except (ValueError, OSError, KeyboardInterrupt) as reason:  # a checkpoint that is not what it should be; a disk that is full
        why = [str(reason) or "interrupted", *getattr(reason, "__notes__", [])]
        console.print(Text.assemble(("Not done: ", "red"), _plain(". ".join(why))))
        return 1


def _import(options: argparse.Namespace, console: Console) -> int:
    refuse_existing(options.target)
    source = _open(options)
    source.check()
    if options.merge:
        if source.lora is None:
            raise ValueError(f"{options.source} has no LoRA factors to merge")
        source = source.merged()
    _tell(source, console)
    dtype = options.dtype and FLOATS[options.dtype]
    arrays = checkpoint.arrays(source, dtype)
    if options.dry_run:
        _plan_import(source, arrays, console)
        return 0
    with _writing(options, source.files, console) as (folder, journal, progress):
        manifest = checkpoint.write_checkpoint(source, folder, journal, dtype=dtype, progress=progress)
        companions = write_companions(source, folder)
    kept = f", LoRA of rank {source.lora.config.rank}" if source.lora else ""
    _done(options.target, f"{manifest['parameters']:,} parameters in {', '.join(manifest['dtypes'])}{kept}", companions, console)
    return 0


def _export(options: argparse.Namespace, console: Console) -> int:
    refuse_existing(options.target)
    if options.peft and (options.omni or options.shard_size):
        raise ValueError("--peft writes the LoRA factors alone, in one file: it goes with neither --omni nor --shard-size")
    source = _open(options)
    source.check()
    if options.peft:
        source = peft.alone(source)
    _tell(source, console)
    if source.lora is None and (options.merge or options.peft):
        raise ValueError(f"{options.source} has no LoRA factors")
    if source.lora is not None and not (options.merge or options.peft):
        raise ValueError(f"{options.source} has LoRA factors beside its weights: export them alone with --peft, or all with --merge")
    if options.merge:
        source = source.merged()
    omni = resolve(options.omni) if options.omni else None
    shard_bytes = int(options.shard_size * 1e9) if options.shard_size else huggingface.SHARD_BYTES
    layout = None if options.shard_size else checkpoint.file_layout(source.path)
    if options.peft:
        files = peft.adapter_files(source)
    elif omni:
        files = huggingface.omni_files(source, omni)
    else:
        files = huggingface.thinker_files(source, shard_bytes=shard_bytes, layout=layout)
    if options.dry_run:
        _plan_export(source, files, omni, console)
        return 0
    read = source.files | files_of(tensor for _, tensor in files.values())
    with _writing(options, read | set(huggingface.settings(omni) if omni else ()), console) as (folder, journal, progress):
        if options.peft:
            peft.write_adapter(source, folder, journal, progress=progress)
        elif omni:
            huggingface.write_omni(source, omni, folder, journal, progress=progress)
        else:
            huggingface.write_thinker(source, folder, journal, shard_bytes=shard_bytes, layout=layout, progress=progress)
        companions = write_companions(source, folder)
        parts = [file for file in (HEADS, ADAPTERS) if (folder / file).is_file()]
    what = "LoRA factors for PEFT" if options.peft else "a full Omni model" if omni else "a thinker"
    _done(options.target, what, [*parts, *companions], console)
    return 0


def _inspect(options: argparse.Namespace, console: Console) -> int:
    source = _open(options)
    _tell(source, console)
    factors = source.lora.factors if source.lora else {}
    rows = (
        (name, str(tensor.dtype), _by(tensor.shape), tensor.file.name)
        for name, tensor in (*source.tensors.items(), *factors.items(), *source.parts.items())
    )
    _print_table(("tensor", "dtype", "shape", "file"), rows)
    source.check()
    return 0


def _verify(options: argparse.Namespace, console: Console) -> int:
    reference = options.reference and resolve(options.reference)
    with _progress(console) as progress:
        found = verify.verify(resolve(options.source), reference, python=options.python, progress=progress)
    _print_table(("what", "result", "bound", ""), ((row.what, row.result, row.bound, "" if row.good else "WRONG") for row in found))
    return 0 if all(row.good for row in found) else 1


def _open(options: argparse.Namespace) -> Source:
    return open_source(options.source, base=options.base, lora_alpha=options.lora_alpha)


@contextmanager
def _writing(options: argparse.Namespace, files: set[Path], console: Console) -> Iterator[tuple[Path, Journal, Report]]:
    """The unfinished DST, what of it is done already, and where to report what is."""
    # What makes two conversions the same: the program, its options, and everything that is read, by size and time.
    stats = {str(file): [(stat := file.stat()).st_size, stat.st_mtime_ns] for file in sorted(files)}
    facts = {
        "version": [version("omnisapiens-jax"), checkpoint.VERSION],
        "options": {key: str(value) for key, value in vars(options).items() if key != "run"},
        "files": stats,
    }
    with whole_or_nothing(options.target, facts) as (folder, journal), _progress(console) as progress:
        if journal.done:
            console.print(f"going on where it stopped: {len(journal.done)} {'files' if options.run is _export else 'tensors'} are there")
        yield folder, journal, progress


def _tell(source: Source, console: Console) -> None:
    def tell(text: str) -> None:
        console.print(_plain(text))

    tell(f"{source.path} is {source.kind}: {len(source.tensors)} tensors, {nbytes(source.tensors.values()) / 1e9:,.2f} GB")
    if source.lora:
        lora = source.lora.config
        targets = "; ".join(f"{tower}: {', '.join(names)}" for tower, names in lora.targets.items())
        tell(f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, scale {lora.scale:g}, on {targets}")
    for part, count in Counter(name.split(".")[0] for name in source.parts).items():
        tell(f"{part}: {count} tensors")
    for why in dict.fromkeys(skipped.why for skipped in source.skipped):
        names = [skipped.name for skipped in source.skipped if skipped.why == why]
        tell(f"left behind: {len(names)} tensors ({why}): {some(names, 3)}")


def _plan(
    source: Source,
    rows: Iterable[tuple[Row, str]],
    place: Callable[[str], str],
    files: Iterable[tuple[str, str]],
    beside: Iterable[Path],
    console: Console,
) -> None:
    """What would be written: the rows of the name table and their dtypes, heads and adapters at their `place`, `files`, and companions."""
    console.print("this is the plan; nothing is written")
    lines = [(row.theirs, ".".join(row.ours), _by(row.shape), dtype) for row, dtype in rows]
    lines += [(name, place(name), _by(tensor.shape), str(tensor.dtype)) for name, tensor in source.parts.items()]
    left = Counter((re.sub(r"(?<=\.)\d+(?=\.)", "{}", skipped.name), skipped.why) for skipped in source.skipped)
    lines += [(name, f"left behind: {why}", f"{count} tensors", "") for (name, why), count in left.items()]
    _print_table(("theirs", "ours", "shape", "dtype"), lines)
    held = Counter(map(place, source.parts))
    copied = {name: f"copied from {folder}" for folder in beside for name in huggingface.companions(folder)}
    if source.scheme is not None:
        copied[huggingface.LABELS] = "what the classes of the heads are called"
    _print_table(("file", "what is in it"), [*files, *((file, f"{count} tensors") for file, count in held.items()), *copied.items()])


def _plan_import(source: Source, arrays: Sequence[checkpoint.Array], console: Console) -> None:
    rows = [(array.row, str(array.dtype)) for array in arrays]
    trees = Counter(array.tree for array in arrays)
    files = [(f"{tree}/", f"{count} arrays") for tree, count in trees.items()]
    _plan(source, rows, lambda _: OURS, files, [source.companions], console)


def _plan_export(source: Source, files: huggingface.Files, omni: Path | None, console: Console) -> None:
    rows, tensors = (*mappings(source.config),), source.tensors
    if source.lora:  # which goes out alone
        rows, tensors = lora_mappings(source.config, source.lora.config), source.lora.factors
    dtypes = [(row, ", ".join(sorted({str(tensors[name].dtype) for name in row.their_names}))) for row in rows]
    held: dict[str, list[Tensor]] = {}
    for file, tensor in files.values():
        held.setdefault(file, []).append(tensor)
    sizes = [(file, f"{len(inside)} tensors, {nbytes(inside) / 1e9:,.2f} GB") for file, inside in held.items()]
    beside = [source.companions] if omni is None else [omni, source.companions]
    _plan(source, dtypes, lambda name: HEADS if name.startswith("heads.") else ADAPTERS, sizes, beside, console)


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*columns)
    for row in rows:
        table.add_row(*map(_plain, row))
    Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False).print(table)


def _done(target: Path, what: str, companions: list[str], console: Console) -> None:
    console.print(f"{target}: {what}; beside them {', '.join(companions) or 'no tokenizer'}")


@contextmanager
def _progress(console: Console) -> Iterator[Report]:
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda name, done, total: bar.update(task, description=_plain(name), completed=done, total=total)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convert_weights.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace, Console], int], help: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help, epilog=f"Example: convert_weights.py {name} {example}")
        made.add_argument("source", metavar="SRC", help="directory of a checkpoint, or OWNER/NAME[@REVISION] on the hub")
        made.set_defaults(run=run)
        return made

    def opens(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "--base", metavar="DIR", help="where to find what SRC lacks, likewise named: config.json, and for a PEFT adapter the weights"
        )
        alpha = "of the LoRA factors in a trainer's state dict, which does not say it (default: twice the rank)"
        made.add_argument("--lora-alpha", type=_positive, metavar="ALPHA", help=alpha)

    def writes(made: argparse.ArgumentParser) -> None:
        made.add_argument("target", type=Path, metavar="DST", help="directory to make")
        made.add_argument(
            "--dry-run", action="store_true", help="check what SRC has, but not its values, and print what would go where; write nothing"
        )

    for name, help, example in (
        ("import", "any checkpoint of the family -> one of ours; LoRA factors are kept beside the weights", "Qwen/Qwen2.5-Omni-7B omni-7b"),
        (
            "merge",
            "a checkpoint with LoRA factors -> one of ours with the factors added to the weights, in float32",
            "step_900 merged --base Qwen/Qwen2.5-Omni-7B",
        ),
    ):
        made = command(name, _import, help, example)
        writes(made)
        opens(made)
        made.add_argument("--dtype", choices=FLOATS, help="cast the weights to this (default: keep what is stored)")
        made.set_defaults(merge=name == "merge")
        if name == "import":
            made.add_argument("--merge", action="store_true", help="as the command merge")
    made = command(
        "export",
        _export,
        "any checkpoint -> a directory for transformers or PEFT; heads and adapters as they are released",
        "runs/rl/rl exported --merge",
    )
    writes(made)
    opens(made)
    lora = made.add_mutually_exclusive_group()
    lora.add_argument("--merge", action="store_true", help="add LoRA factors to the weights, in float32, rounded to the weights' dtype")
    lora.add_argument("--peft", action="store_true", help="write the LoRA factors alone, as a PEFT adapter")
    made.add_argument("--omni", metavar="DIR", help="write a full Omni model: this one, its thinker replaced (default: a thinker alone)")
    size = "largest size of one file (default: the files that SRC was imported from, else 5)"
    made.add_argument("--shard-size", type=_positive, metavar="GB", help=size)
    help = "what a checkpoint is, and its tensors; exit status 1 if they are not what its config asks for"
    opens(command("inspect", _inspect, help, "Qwen/Qwen2.5-Omni-3B"))
    help = "compare every tensor of a checkpoint of ours with its receipt, and with the model it came from; exit status 1 if one differs"
    made = command("verify", _verify, help, "omni-7b Qwen/Qwen2.5-Omni-7B --python .venv-oracle/bin/python")
    reference = "Hugging Face model to compare the weights with; where there is transformers both are run in float32, one after the other"
    made.add_argument("reference", nargs="?", metavar="REFERENCE", help=reference)
    made.add_argument("--python", default=sys.executable, help="an interpreter that has transformers (default: this one)")
    return parser


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def _plain(text: str) -> str:
    """Without what would steer a terminal: names in files may be anything."""
    return "".join(character if character.isprintable() or character == "\n" else repr(character)[1:-1] for character in text)


if __name__ == "__main__":
    sys.exit(main())
