"""JSONL and parquet give the same samples, row by row and in any order."""

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omnisapiens_jax.atlas.parquet import ParquetSource
from omnisapiens_jax.atlas.schema import SampleError
from omnisapiens_jax.atlas.sources import JsonlSource, open_source, open_splits
from tests.atlas.release import BYTES, TEXTS, write_release

LISTS = ("images", "videos", "audios", "ext_video_feats", "ext_audio_feats")


def rows(count):
    return [
        {
            "problem": f"<audio> Wie geht's {i}? 你好 é",
            "answer": "sad",
            "dataset": "cremad",
            "modality_signature": "text_audio",
            "task": "emotion_cls",
            "class_label": "sad",
            **{name: [] for name in LISTS},
            "audios": [f"audio/{i}.wav"],
        }
        for i in range(count)
    ]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows(23)) + "\n")  # blank lines are skipped
    (tmp_path / "audio").mkdir()
    for i in range(23):
        (tmp_path / "audio" / f"{i}.wav").write_bytes(b"RIFF" + bytes([i]))
    return path


@pytest.fixture
def parquet(tmp_path):
    """Two shards of uneven row groups, media as bytes, no `texts` column."""
    folder = tmp_path / "shards"
    folder.mkdir()
    schema = pa.schema(
        [(name, pa.string()) for name in ("problem", "answer", "dataset", "modality_signature", "task", "class_label")]
        + [(name, pa.list_(pa.binary())) for name in LISTS]
    )
    table = [{**row, "audios": [b"RIFF" + bytes([i])]} for i, row in enumerate(rows(23))]
    pq.write_table(pa.Table.from_pylist(table[:14], schema=schema), folder / "train-00000-of-00002.parquet", row_group_size=4)
    pq.write_table(pa.Table.from_pylist(table[14:], schema=schema), folder / "train-00001-of-00002.parquet", row_group_size=5)
    return folder / "train"


def test_both_kinds_hold_the_same_rows(jsonl, parquet):
    lines, shards = open_source(jsonl), open_source(parquet)
    assert len(lines) == len(shards) == 23
    for i in (22, 0, 13, 14, 7, 3, 4, 22):
        a, b = lines[i], shards[i]
        assert a.id == b.id == i and a.problem == b.problem == rows(23)[i]["problem"]
        assert isinstance(a.audios[0], Path) and a.audios[0].read_bytes() == b.audios[0] == b"RIFF" + bytes([i])


def test_sources_travel_to_workers(jsonl, parquet):
    for path in (jsonl, parquet):
        source = open_source(path)
        first = source[5]
        assert pickle.loads(pickle.dumps(source))[5] == first


def kept_bytes(source):
    return sum(table.nbytes for value in vars(source).values() if isinstance(value, dict) for table in value.values())


def test_row_groups_stay_in_memory_as_far_as_they_fit(parquet, monkeypatch):
    read, real = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda file, group: read.append(group) or real(file, group))
    shards = sorted(parquet.parent.glob("*.parquet"))
    order = [*range(0, 23, 5), *range(1, 23, 3), *range(23)]  # as prompts are drawn, here and there
    roomy = ParquetSource(shards)
    assert [roomy[i].id for i in order] == order and len(read) == 6  # each group once
    limit = kept_bytes(roomy) // 2
    narrow, read[:] = ParquetSource(shards, cached_bytes=limit), []
    for i in order:
        assert narrow[i].id == i and 0 < kept_bytes(narrow) <= limit
    assert 6 < len(read) < len(order)
    least = ParquetSource(shards, cached_bytes=1)
    assert least[3].id == 3 and kept_bytes(least) > 0


def test_rows_outside_and_files_that_are_not_there(jsonl, tmp_path):
    with pytest.raises(IndexError, match="row 23 of a source of 23"):
        open_source(jsonl)[23]
    with pytest.raises(IndexError, match="row -1"):
        open_source(jsonl)[-1]
    with pytest.raises(FileNotFoundError, match="no atlas at"):
        open_source(tmp_path / "nothing.jsonl")
    with pytest.raises(FileNotFoundError, match=r"the file test.jsonl, .*, test.parquet or shards test-"):
        open_source(tmp_path / "test")
    with pytest.raises(FileNotFoundError, match="is a folder: name a split in it, such as .*/train"):
        open_source(tmp_path)


def test_a_split_is_found_by_its_name(jsonl, parquet, tmp_path):
    assert open_source(tmp_path / "train")[3] == open_source(jsonl)[3]
    assert len(open_source(parquet.parent / "train-00001-of-00002.parquet")) == 9
    pq.write_table(pq.read_table(parquet.parent / "train-00001-of-00002.parquet"), tmp_path / "test.parquet")
    (parquet.parent / "test-00000-of-00001.parquet").write_bytes((tmp_path / "test.parquet").read_bytes())
    assert len(open_source(tmp_path / "test")) == len(open_source(parquet.parent / "test")) == 9
    assert len(open_source(parquet)) == 23  # the shards of another split beside them do not count


def test_a_split_of_which_a_shard_is_missing_is_no_split(parquet):
    """A download that stopped must not look like a smaller atlas, nor like one without this split."""
    first, last = sorted(parquet.parent.glob("*.parquet"))
    content = last.read_bytes()
    last.unlink()
    for open_ in (open_source, lambda path: open_splits(path.parent)):
        with pytest.raises(FileNotFoundError, match="1 of its 2 shards are missing, such as train-00001-of-00002.parquet; fetch"):
            open_(parquet)
    last.write_bytes(content)
    (parquet.parent / "train-extra-00000-of-00001.parquet").write_bytes(content)  # a split of another name
    assert len(open_source(parquet)) == 23 and len(open_source(f"{parquet}-extra")) == 9
    (parquet.parent / "train-00000-of-00001.parquet").write_bytes(content)  # another download
    with pytest.raises(ValueError, match="more than one set"):
        open_source(parquet)


def test_a_broken_line_is_an_error_of_that_row_only(jsonl):
    text = jsonl.read_text().replace('{"problem": "<audio> Wie geht\'s 3?', '{"problem: "<audio> Wie geht\'s 3?')
    jsonl.write_text(text)
    source = JsonlSource(jsonl)
    assert source[2].id == 2 and source[4].id == 4
    with pytest.raises(SampleError, match="row 3.*not JSON"):
        source[3]


def test_fingerprints_follow_the_content(jsonl, parquet):
    before = open_source(jsonl).fingerprint(), open_source(parquet).fingerprint()
    assert before == (open_source(jsonl).fingerprint(), open_source(parquet).fingerprint())
    jsonl.write_text(jsonl.read_text().replace("sad", "mad", 1))
    last = parquet.parent / "train-00001-of-00002.parquet"
    pq.write_table(pq.read_table(last).slice(1), last)
    assert open_source(jsonl).fingerprint() != before[0] and open_source(parquet).fingerprint() != before[1]


def test_every_form_of_the_release_is_found_by_its_splits_and_holds_the_same(tmp_path):
    for form in ("parquet", "tar", "jsonl"):
        written = write_release(tmp_path / form, 96, form)
        splits = open_splits(tmp_path / form)
        assert [*splits] == ["train", "validation", "test"]
        for split, source in splits.items():
            rows = written[split]
            assert len(source) == len(rows) and source.datasets() == [row["dataset"] for row in rows]
            for i, row in enumerate(rows):
                sample = source[i]
                assert all(getattr(sample, name) == row[name] for name in TEXTS)
                for field in BYTES:
                    items = [item if isinstance(item, bytes) else item.read_bytes() for item in getattr(sample, field)]
                    assert items == [data for _, data in row[field]]
                    assert all(isinstance(item, Path) == (form == "jsonl") for item in getattr(sample, field))
                paths = [path for field in ("images", "videos", "audios") for path, _ in row[field]]
                assert list(sample.names) == ([] if form == "parquet" else paths)
    with pytest.raises(FileNotFoundError, match="final_v8_test_cleaned.jsonl"):
        open_splits(tmp_path)


def test_what_a_tar_does_not_hold_stays_a_path_beside_it(tmp_path):
    write_release(tmp_path, 96, "tar")
    (tmp_path / "media.tar").unlink()
    sample = next(sample for sample in map(open_source(tmp_path / "train").__getitem__, range(10)) if sample.audios)
    assert sample.audios == (tmp_path / sample.names[-1],) and isinstance(sample.ext_audio_feats[0], bytes)


def test_a_row_that_does_not_say_its_dataset_has_none(jsonl):
    jsonl.write_text("not JSON\n" + jsonl.read_text() + "[]\n")
    assert JsonlSource(jsonl).datasets() == ["", *["cremad"] * 23, ""]
