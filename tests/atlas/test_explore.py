"""What `python -m omnisapiens_jax.atlas` shows."""

import dataclasses
import io
import re

import numpy as np
import pytest
from rich.console import Console

from omnisapiens_jax.atlas.__main__ import main
from omnisapiens_jax.atlas.explore import Lengths, dataset_table, sample_page
from omnisapiens_jax.atlas.lengths import length_index
from omnisapiens_jax.atlas.plan import PlanConfig
from omnisapiens_jax.atlas.sources import open_source
from tests.atlas.toys import CONFIG, OPTIONS, edit_row, recipe, write_atlas

DATASETS = (
    "cremad meld_emotion mosei_emotion tess urfunny intentqa ptsd_in_the_wild mmpsy_anxiety mmpsy_depression daicwoz meld_senti chsimsv2 "
    "mosei_senti mmsd siq2 mimeqa"
)


@pytest.fixture
def atlas(tmp_path):
    return write_atlas(tmp_path, count=9)


def test_the_table_has_every_dataset_with_what_it_is_scored_by():
    console = Console(width=240, record=True, file=io.StringIO())
    console.print(dataset_table())
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines() if line.startswith("│")]
    rows = {line[0]: line[1:] for line in lines if line[0]}
    assert [*rows] == DATASETS.split()
    assert rows["urfunny"] == ["HUM humour detection", "humour", "not humour, humour", "text + video + audio", "weighted_f1"]
    assert rows["siq2"][2:] == ["free text", "text + video + audio", "judge_accuracy"]


def test_a_page_shows_a_sample_and_needs_nothing_else(atlas):
    edit_row(atlas, 2, problem="Transcript: <script>alert(1)</script> & so\nWhich of anger, sad?")
    page = sample_page(open_source(atlas)[2], OPTIONS)
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; so" in page
    assert "&lt;|audio_bos|&gt;" in page and "meld_emotion" in page
    assert len(re.findall(r'src="data:image/jpeg;base64,[^"]+" alt="frame', page)) == 4
    assert page.count('src="data:image/png;base64,') == 1  # the log-mel
    assert page.count("<polygon") == 1 and "0.38 s heard" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


def test_a_page_tells_why_media_cannot_be_decoded(atlas):
    (atlas.parent / "audio/2.wav").write_bytes(b"RIFF" + b"\xff" * 400)
    (atlas.parent / "video/2.mp4").unlink()
    page = sample_page(open_source(atlas)[2], OPTIONS)
    assert "corrupt audio file" in page and "No such file" in page and "2.mp4 is missing" in page
    sample = dataclasses.replace(open_source(atlas)[2], problem="<audio><audio>?")
    assert "There is no prompt: more placeholders than media" in sample_page(sample, OPTIONS)


def test_the_waste_is_what_is_left_of_the_slots(atlas):
    index, _ = length_index(open_source(atlas), recipe(), on_error="raise")
    plan = PlanConfig(batch_size=2, shuffle=False)
    found = Lengths.of(index, CONFIG, plan, count=3)
    tokens = audio = slots = heard = 0
    for step in range(len(found.plan)):
        bucket, ids = found.plan[step].bucket, found.plan[step].ids.ravel()
        slots, heard = slots + 2 * bucket.tokens, heard + 2 * bucket.audio_tokens
        for row in ids[ids >= 0]:
            example = recipe().build(open_source(atlas)[row])
            tokens, audio = tokens + len(example.tokens), audio + len(example.audio_pairs)
    waste = found.waste()
    np.testing.assert_allclose([waste["tokens"], waste["audio_tokens"]], [1 - tokens / slots, 1 - audio / heard])


def test_the_command_line(atlas, tmp_path, capsys):
    assert main(["datasets"]) == 0
    assert "Human Behavior Atlas" in capsys.readouterr().out
    out = tmp_path / "page.html"
    assert main(["show", str(atlas), "4", "--out", str(out)]) == 0
    assert "cremad, row 4" in out.read_text() and str(out) in capsys.readouterr().out
    assert main(["show", str(atlas), "99", "--out", str(out)]) == 1
    assert "row 99 of a source of 9 rows" in capsys.readouterr().err
    (tmp_path / "audio/4.wav").unlink()
    assert main(["lengths", str(atlas), "--batch-size", "2", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "1 samples cannot be used" in told and "Padding:" in told and "% of tokens" in told and "Buckets of an epoch" in told
    page = out.read_text()
    assert page.count("<svg") == 3 and "8 samples" in page and not re.findall(r'(?:src|href)="(?!data:)', page)
    assert main(["lengths", str(atlas), "--size", "7b", "--out", str(out)]) == 1
    assert "needs --tokenizer" in capsys.readouterr().err
    assert main(["lengths", str(tmp_path / "nothing"), "--out", str(out)]) == 1
    assert "no atlas at" in capsys.readouterr().err
