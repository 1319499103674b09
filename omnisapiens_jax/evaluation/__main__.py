"""Compares what models answered, lets judges read free-form answers, and writes the original's prediction files. Needs no model.

    python -m omnisapiens_jax.evaluation compare RUN [RUN ...] [--out DIR] [--groups FILE --by COLUMN] [--atlas SPLIT]
    python -m omnisapiens_jax.evaluation judge RUN --with openai|anthropic|embedding|f1|exact [--out FILE]
    python -m omnisapiens_jax.evaluation export RUN FILE --as classes|texts|qa

RUN is the folder of a run, a file `evaluation-NAME.json`, or a prediction file of the original (heads, policies, free-form answers);
NAME=RUN gives it a name. The later runs are tested against the first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text

from omnisapiens_jax import resources
from omnisapiens_jax.atlas.labels import SCHEMES
from omnisapiens_jax.atlas.schema import SampleError
from omnisapiens_jax.atlas.sources import open_source
from omnisapiens_jax.evaluation.answers import save_answers
from omnisapiens_jax.evaluation.compare import compare, open_run, read_columns
from omnisapiens_jax.evaluation.comparison import markdown, write_comparison
from omnisapiens_jax.evaluation.evaluate import question_of
from omnisapiens_jax.evaluation.judges import MODELS, Embedding, Exact, Judge, Language, Service, TokenF1, judged
from omnisapiens_jax.evaluation.predictions import FORMS, write_predictions


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False)
    try:
        options.run(options, console)
    except (ValueError, OSError, KeyboardInterrupt) as reason:
        Console(stderr=True, soft_wrap=True).print(Text.assemble(("Not done: ", "red"), str(reason) or "interrupted"))
        return 1
    return 0


def _compare(options: argparse.Namespace, console: Console) -> None:
    if bool(options.groups) != bool(options.by):
        raise ValueError("--groups FILE and --by COLUMN belong together")
    scheme = SCHEMES[options.scheme]
    runs = [open_run(argument, scheme) for argument in options.runs]
    columns = read_columns(options.groups, options.by) if options.groups else None
    found = compare(runs, scheme=scheme, any_domain=options.any_domain, columns=columns, resamples=options.resamples)
    page = write_comparison(options.out, found, source=open_source(options.atlas) if options.atlas else None)
    console.print(Markdown(markdown(found)))
    console.print(f"The page is {page.absolute()}; the same as .md and .json beside it", soft_wrap=True, markup=False)


def _judge(options: argparse.Namespace, console: Console) -> None:
    run = open_run(options.runs)
    answers = judged(run.answers, judge := _made(options), questions=_questions(options.atlas) if options.atlas else None)
    scores = [answer.verdict for answer in answers if answer.judge and answer.verdict is not None]
    lost = sum(bool(answer.judge) for answer in answers) - len(scores)
    save_answers(options.out, answers)
    if isinstance(judge, Language):
        console.print(judge.told(), markup=False)
    mean = f"{sum(scores) / len(scores):.3f}" if scores else "of nothing"
    console.print(f"{judge.name}: {mean}, {len(scores)} free-form answers, {lost} dropped; {options.out}", soft_wrap=True, markup=False)


def _made(options: argparse.Namespace) -> Judge:
    if options.judge == "embedding":
        from omnisapiens_jax.rl.similarity import Similarity  # loads jax, which no other judge needs

        return Embedding(Similarity.load(), options.threshold)
    if options.judge in MODELS:
        made = {"timeout": options.timeout, "tries": options.tries, "concurrency": options.concurrency}
        prices = tuple(options.price) if options.price else None
        cache = options.cache or resources.cache() / "judges" / f"{options.judge}.jsonl"
        return Language(Service(options.judge, options.model, options.base_url, prices=prices, **made), cache)
    return {"exact": Exact, "f1": TokenF1}[options.judge]()


def _questions(path: Path) -> dict[str, str]:
    """The question of every free-form row by its gold answer in lower case; the last where several have the same."""
    source, found = open_source(path), {}
    for i in range(len(source)):
        try:
            sample = source[i]
        except SampleError:
            continue  # such a row was not answered either
        if sample.kind == "qa":
            found[sample.answer.strip().lower()] = question_of(sample.problem)
    return found


def _export(options: argparse.Namespace, console: Console) -> None:
    run = open_run(options.runs, SCHEMES[options.scheme])
    left_out = write_predictions(options.file, run.answers, options.form, SCHEMES[options.scheme])
    told = f", {left_out} rows have no place in it" if left_out else ""
    console.print(f"{len(run.answers) - left_out} rows are in {options.file}{told}", soft_wrap=True, markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m omnisapiens_jax.evaluation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    made = commands.add_parser("compare", help="tables, tests and a page of one or more runs")
    made.add_argument("runs", metavar="RUN", nargs="+", help="[NAME=]folder or file")
    made.add_argument("--out", type=Path, default=Path("."), help="folder of comparison.html, .md and .json (default: here)")
    made.add_argument("--any-domain", action="store_true", help='read "neutral" as an emotion everywhere, as the published evaluation did')
    made.add_argument("--groups", type=Path, metavar="FILE", help="JSONL or parquet whose row i says something about row i of the split")
    made.add_argument("--by", nargs="+", metavar="COLUMN", help="its columns to group by")
    made.add_argument(
        "--atlas", type=Path, metavar="SPLIT", help="the split that was answered: the page then shows examples with their media"
    )
    made.add_argument("--scheme", choices=SCHEMES, default="hba", help="of datasets and labels (default: hba)")
    made.add_argument("--resamples", type=int, default=2000, help="of the bootstrap (default: 2000)")
    made.set_defaults(run=_compare)

    made = commands.add_parser("judge", help="verdicts on free-form answers")
    made.add_argument("runs", metavar="RUN", help="folder or file")
    made.add_argument("--with", dest="judge", required=True, choices=(*MODELS, "embedding", "f1", "exact"), help="who judges")
    made.add_argument("--out", type=Path, required=True, help="file to write the answers with their verdicts to (it may be RUN itself)")
    made.add_argument("--atlas", type=Path, metavar="SPLIT", help="finds questions by their answers, for files that have none")
    made.add_argument("--threshold", type=float, default=0.7, help="cosine from which the embedding judge calls it right (default: 0.7)")
    made.add_argument("--model", default="", help="language model (default: the benchmark's judge of that company)")
    made.add_argument("--base-url", help="a compatible service (default: the company's own)")
    made.add_argument("--cache", type=Path, metavar="FILE", help="where replies are kept, so that nothing is asked twice")
    made.add_argument("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="US dollars for a million tokens")
    made.add_argument("--timeout", type=float, default=60.0, help="seconds that one try may take (default: 60)")
    made.add_argument("--tries", type=int, default=8, help="of one question (default: 8)")
    made.add_argument("--concurrency", type=int, default=16, help="questions at the same time (default: 16)")
    made.set_defaults(run=_judge)

    made = commands.add_parser("export", help="a prediction file of the original")
    made.add_argument("runs", metavar="RUN", help="folder or file")
    made.add_argument("file", metavar="FILE", type=Path, help="what to write")
    made.add_argument("--scheme", choices=SCHEMES, default="hba", help="of datasets and labels (default: hba)")
    made.add_argument("--as", dest="form", required=True, choices=FORMS, help="class indices, whole texts, or the free-form rows")
    made.set_defaults(run=_export)
    return parser


if __name__ == "__main__":
    sys.exit(main())
