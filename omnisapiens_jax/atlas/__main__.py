"""Looks into Human Behavior Atlas.

    python -m omnisapiens_jax.atlas datasets
    python -m omnisapiens_jax.atlas show PATH ROW [--size 7b] [--out sample.html]
    python -m omnisapiens_jax.atlas lengths PATH [--size 7b] [--tokenizer DIR] [--batch-size 64] [--buckets 8] [--workers 2] [--out FILE]

PATH is a `.jsonl` or `.parquet` file, or a split such as DIR/train. Pages are one file each and need nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from omnisapiens_jax import defaults, resources
from omnisapiens_jax.atlas import explore
from omnisapiens_jax.atlas.lengths import length_index
from omnisapiens_jax.atlas.plan import PlanConfig
from omnisapiens_jax.atlas.recipe import Recipe, target_text
from omnisapiens_jax.atlas.sources import open_source
from omnisapiens_jax.models.config import ThinkerConfig
from omnisapiens_jax.processing.chat import FORMAT_PROMPTS
from omnisapiens_jax.processing.options import ProcessingConfig
from omnisapiens_jax.processing.tokenizers import open_tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    try:
        options.run(options, console)
    except (ValueError, OSError, IndexError, KeyboardInterrupt) as reason:
        Console(stderr=True, soft_wrap=True).print(Text.assemble(("Not done: ", "red"), str(reason) or "interrupted"))
        return 1
    return 0


def _datasets(options: argparse.Namespace, console: Console) -> None:
    console.print(explore.dataset_table())


def _show(options: argparse.Namespace, console: Console) -> None:
    sample = open_source(options.path)[options.row]
    options.out.write_text(explore.sample_page(sample, _processing(options.size)), encoding="utf-8")
    console.print(f"The page is {options.out.absolute()}", soft_wrap=True, markup=False)


def _lengths(options: argparse.Namespace, console: Console) -> None:
    config, model = defaults.base(options.size), ThinkerConfig.preset(options.size)
    if options.tokenizer is None and options.size != "mini":
        raise ValueError(f"--size {options.size} needs --tokenizer DIR: the folder of a checkpoint, which has its vocabulary")
    tokenizer = open_tokenizer(options.tokenizer or resources.resource("data/mini"))
    recipe = Recipe(tokenizer, model, _processing(options.size), max_tokens=config.atlas.max_tokens, target=target_text)
    source = open_source(options.path)
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(source))
        index, faults = length_index(
            source,
            recipe,
            on_error="skip",
            cache=resources.cache() / "lengths",
            workers=options.workers,
            progress=lambda done, _: progress.update(task, completed=done),
        )
    if faults:
        console.print(faults.report(), markup=False)
    if not len(index):
        raise ValueError(f"{options.path}: no sample can be used")
    plan = PlanConfig(options.batch_size, mode=config.atlas.batches)
    found = explore.Lengths.of(index, model, plan, count=options.buckets or config.atlas.buckets)
    for shown in found.shown():
        console.print(shown)
    options.out.write_text(found.page(str(options.path)), encoding="utf-8")
    console.print(f"The page is {options.out.absolute()}", soft_wrap=True, markup=False)


def _processing(size: str) -> ProcessingConfig:
    """How a run of that size reads media."""
    settings = defaults.base(size).processing.to_dict()
    return ProcessingConfig(**{**settings, "format_prompt": FORMAT_PROMPTS[settings["format_prompt"]]})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m omnisapiens_jax.atlas", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    made = commands.add_parser("datasets", help="the sixteen datasets, with their tasks, labels, modalities and metrics")
    made.set_defaults(run=_datasets)
    for name, run, help in (
        ("show", _show, "one sample as a page: prompt, waveform, log-mel and frames"),
        ("lengths", _lengths, "how long the samples are, which buckets are chosen for them, and what padding wastes"),
    ):
        made = commands.add_parser(name, help=help, description=help)
        made.add_argument("path", metavar="PATH", type=Path, help="a .jsonl or .parquet file, or a split such as DIR/train")
        made.add_argument("--size", choices=defaults.SIZES, default="mini", help="whose settings of media and batches (default: mini)")
        made.add_argument("--out", type=Path, default=Path(f"{'sample' if name == 'show' else name}.html"), help="the page to write")
        made.set_defaults(run=run)
        if name == "show":
            made.add_argument("row", metavar="ROW", type=int, help="its number, from 0")
        else:
            made.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of a checkpoint (default: mini's vocabulary)")
            made.add_argument("--batch-size", type=int, default=64, help="slots of a batch (default: 64)")
            made.add_argument("--buckets", type=int, default=0, help="the most buckets (default: as the size has it)")
            made.add_argument("--workers", type=int, default=0, help="processes that measure (default: 0, in this one)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
