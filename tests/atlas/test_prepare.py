"""A prepared atlas holds the release, row for row, whoever prepared it and however often that was interrupted."""

import functools
import hashlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnisapiens_jax.atlas import prepare as prepare_module
from omnisapiens_jax.atlas.faults import BadSamples
from omnisapiens_jax.atlas.prepare import Config, damaged, main, prepare, summary
from omnisapiens_jax.atlas.records import Receipt
from omnisapiens_jax.atlas.schema import SampleError
from omnisapiens_jax.atlas.sources import ArrayRecordSource, open_source, open_splits
from omnisapiens_jax.processing.descriptors.read import Descriptor
from tests.atlas.planted import Deadly
from tests.atlas.release import TEXTS, sounds_described, torch_saved, videos_described, write_release
from tests.atlas.toys import edit_row

REPO = Path(__file__).resolve().parents[2]
TRAIN = "final_v8_train_cleaned_2.jsonl"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """96 rows, with the media in tars."""
    folder = tmp_path_factory.mktemp("release")
    return folder, write_release(folder, 96, "tar")


@pytest.fixture
def loose(tmp_path):
    """The same with every medium a file of its own."""
    write_release(tmp_path / "loose", 96, "jsonl")
    return tmp_path / "loose"


def checksums(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def prepared(release, tmp_path_factory):
    return prepare(release[0], tmp_path_factory.mktemp("prepared"), workers=0, shard_rows=10)


def test_every_row_of_every_form_is_prepared_as_it_was_written(release, prepared, tmp_path):
    write_release(tmp_path / "parquet", 96, "parquet")
    from_parquet = prepare(tmp_path / "parquet", tmp_path / "out", workers=0, shard_rows=10)
    for folder, named in ((prepared, True), (from_parquet, False)):
        for split, rows in release[1].items():
            source = open_source(folder / split)
            assert len(source) == len(rows) and source.datasets() == [row["dataset"] for row in rows]
            for i, row in enumerate(rows):
                sample = source[i]
                assert sample.id == i and {name: getattr(sample, name) for name in TEXTS} == {name: row[name] for name in TEXTS}
                for field in ("images", "videos", "audios"):
                    assert list(getattr(sample, field)) == [data for _, data in row[field]]
                paths = [path for field in ("images", "videos", "audios") for path, _ in row[field]]
                assert list(sample.names) == (paths if named else [])
                assert len(sample.ext_audio_feats) == len(row["ext_audio_feats"])
                seen = [data for _, data in row["ext_video_feats"] if data != videos_described()[3]]  # the one without any frame
                assert len(sample.ext_video_feats) == len(seen)


def test_descriptors_come_pooled_and_frame_by_frame_at_the_rate_of_the_video(release, prepared):
    """By the generator's own arrays; its videos have 8 frames a second."""
    source, rows = open_source(prepared / "train"), release[1]["train"]
    i = next(i for i, row in enumerate(rows) if row["ext_video_feats"] and row["ext_video_feats"][0][1] == videos_described()[0])
    rng = np.random.default_rng(0)
    parts = [rng.random((3, points, 3), np.float32).reshape(3, -1) for points in (33, 478, 21, 21)]
    frames = np.concatenate(parts, axis=1)
    (found,) = source[i].ext_video_feats
    assert isinstance(found, Descriptor)
    np.testing.assert_array_equal(found.frames, frames)
    np.testing.assert_allclose(found.times, (np.arange(3) + 0.5) / 8, rtol=1e-6)
    np.testing.assert_allclose(found.pooled, np.concatenate([frames.mean(0), frames.std(0)]), atol=1e-6)
    j = next(i for i, row in enumerate(rows) if row["ext_audio_feats"] and row["ext_audio_feats"][0][1] == sounds_described()[2])
    (sound,) = source[j].ext_audio_feats
    assert isinstance(sound, Descriptor)
    np.testing.assert_array_equal(sound.pooled, np.random.default_rng(2).normal(size=(1, 6373)).astype(np.float32)[0])
    assert len(sound.frames) == len(sound.times) == 0


def test_tfds_reads_it_and_nothing_imports_tensorflow(prepared, release):
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        "builder = tfds.builder_from_directory(sys.argv[1])\n"
        "rows = builder.as_data_source('train[:50%]+test')\n"
        "from omnisapiens_jax.atlas.sources import open_source\n"
        "open_source(sys.argv[1] + '/validation')[0]\n"
        "print(builder.info.name, len(rows), rows[0]['problem'].decode(), 'tensorflow' in sys.modules, sep='|')"
    )
    done = subprocess.run([sys.executable, "-c", code, prepared], cwd=REPO, capture_output=True, text=True, check=True)
    rows = release[1]
    wanted = ["human_behavior_atlas", str(round(len(rows["train"]) / 2) + len(rows["test"])), rows["train"][0]["problem"], "False"]
    assert done.stdout.strip() == "|".join(wanted)


def test_the_tfds_builder_prepares_and_reads_one_dataset(release, prepared, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(REPO / "data")
    import tensorflow_datasets as tfds

    module = importlib.import_module("human_behavior_atlas.human_behavior_atlas_dataset_builder")
    monkeypatch.setattr(module.prepare, "prepare", functools.partial(prepare, workers=0))
    builder = module.Builder(config="meld_senti", data_dir=tmp_path)
    with pytest.raises(ValueError, match="manual_dir"):
        builder.download_and_prepare()
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=release[0]))
    wanted = [row["problem"] for row in release[1]["train"] if row["dataset"] == "meld_senti"]
    assert [row["problem"].decode() for row in builder.as_data_source("train")] == wanted
    assert Path(builder.data_dir) == Config.of("meld_senti").folder(tmp_path)
    assert module.Builder(config="meld_senti", data_dir=tmp_path).info.splits["train"].num_examples == len(wanted)
    assert {"all", "cremad", "without_cremad"} <= module.Builder.builder_configs.keys()


@settings(max_examples=4)
@given(shard_rows=st.integers(1, 100))
def test_rows_are_the_same_however_they_are_cut(release, prepared, tmp_path_factory, shard_rows):
    folder = prepare(release[0], tmp_path_factory.mktemp("cut"), Config.of("mosei_senti"), workers=0, shard_rows=shard_rows)
    for split, source in open_splits(folder).items():
        wanted = [row["problem"] for row in release[1][split] if row["dataset"] == "mosei_senti"]
        assert [source[i].problem for i in range(len(source))] == wanted


def test_a_transfer_study_leaves_datasets_out(release, tmp_path):
    config = Config.of(exclude=["meld_senti", "meld_emotion"])
    assert config.name == "without_meld_emotion_meld_senti"
    folder = prepare(release[0], tmp_path, config, workers=0)
    for split, source in open_splits(folder).items():
        assert source.datasets() == [row["dataset"] for row in release[1][split] if not row["dataset"].startswith("meld")]
    with pytest.raises(ValueError, match="unknown dataset iemocap; the atlas has cremad"):
        Config.of(exclude=["iemocap"])
    with pytest.raises(ValueError, match="not both"):
        Config.of("cremad", ["tess"])


BEAM = "--beam=--runner=DirectRunner --direct_num_workers=2 --direct_running_mode=multi_processing"


def beam_python():
    """Beam's interpreter: $OMNISAPIENS_BEAM_PYTHON, else that of `.venv-beam`; skips where there is none."""
    python = Path(os.environ.get("OMNISAPIENS_BEAM_PYTHON", REPO / ".venv-beam" / "bin" / "python"))
    if not python.exists():
        pytest.skip(f"NOT RUN UNDER BEAM: no {python} (run `make .venv-beam/.made`)")
    return python


def command(source, target, *options):
    return [
        str(beam_python()) if BEAM in options else sys.executable,
        "-m",
        "omnisapiens_jax.atlas.prepare",
        str(source),
        str(target),
        "--shard-rows=10",
        *options,
    ]


def kill_after(files, arguments, target):
    """Starts the command, waits for so many finished files, and kills it and all that it started."""
    process = subprocess.Popen(arguments, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while process.poll() is None and len(list(target.rglob("*.receipts/*-of-*.json"))) < files:
            time.sleep(0.005)
        assert process.poll() is None, "it ended before it could be killed"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return {path: path.stat().st_ino for path in target.rglob("*.part/*.array_record-*")}


def killed_and_again(files, options, release, tmp_path):
    """The inode of every finished file before the kill, the folder after it."""
    kept = kill_after(files, command(release, tmp_path, *options), tmp_path)
    assert not Config.of().folder(tmp_path).exists()
    subprocess.run(command(release, tmp_path, *options), cwd=REPO, capture_output=True, check=True)
    folder = Config.of().folder(tmp_path)
    receipts = len(kept) - 2  # a worker may have been killed between a file and its receipt
    assert sum((folder / path.name).stat().st_ino == inode for path, inode in kept.items()) >= receipts
    return folder


def test_killed_and_run_again_it_is_the_same_dataset_and_no_file_is_made_twice(release, prepared, tmp_path):
    folder = killed_and_again(4, ["--workers=1"], release[0], tmp_path)
    assert checksums(folder) == checksums(prepared)
    assert [path.name for path in folder.parent.iterdir()] == ["1.0.0"]


@pytest.mark.slow
@pytest.mark.parametrize(("files", "option"), [(1, "--workers=2"), (6, "--workers=2"), (1, BEAM)])
def test_killed_with_two_workers_or_under_beam_it_is_the_same_dataset(release, prepared, tmp_path, files, option):
    assert checksums(killed_and_again(files, [option], release[0], tmp_path)) == checksums(prepared)


@pytest.mark.slow
def test_beam_does_it_in_two_processes(release, prepared, tmp_path):
    """Two files are being written at a moment, by nobody else: workers of one thread each."""
    process = subprocess.Popen(command(release[0], tmp_path, BEAM), cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    at_once = 0
    while process.poll() is None:
        at_once = max(at_once, len(list(tmp_path.rglob("*.part/.*.draft"))))
        time.sleep(0.002)
    assert process.returncode == 0 and at_once >= 2
    assert checksums(Config.of().folder(tmp_path)) == checksums(prepared)


def plant(patch, **deeds: int):
    """Rows of train that do a deed when they are read."""
    patch.setattr(
        "omnisapiens_jax.atlas.shards.open_source",
        lambda path: Deadly.of(open_source(path), **deeds) if path.endswith("train") else open_source(path),
    )


def without(rows, lost):
    return [row["problem"] for i, row in enumerate(rows) if i not in lost]


def problems(source):
    return [source[i].problem for i in range(len(source))]


def test_a_row_on_which_a_library_crashes_hangs_or_takes_all_memory_is_lost_alone(release, prepared, tmp_path, monkeypatch):
    deeds = {"crash": 3, "quit": 14, "flood": 25, "hang": 36}
    plant(monkeypatch, **deeds)
    folder = prepare(release[0], tmp_path, workers=1, shard_rows=10, on_error="skip", deadline=1.5, memory=2**29)
    faults = Receipt.load(folder).splits["train"]
    assert [(fault.row, fault.kind) for shard in faults for fault in shard.faults] == [
        (3, "crash"),
        (14, "crash"),
        (25, "memory"),
        (36, "timeout"),
    ]
    assert problems(open_source(folder / "train")) == without(release[1]["train"], deeds.values())
    spoiled = {f"train.array_record-0000{i}" for i in range(4)}
    whole = {name: digest for name, digest in checksums(prepared).items() if "array_record-" in name}
    same = {name for name, digest in checksums(folder).items() if whole.get(name) == digest}
    assert {*whole} - same == {name for name in whole if any(part in name for part in spoiled)}


def test_what_ran_out_of_time_before_a_kill_is_tried_again(loose, tmp_path, monkeypatch):
    """The machine may have been busy; the row is as good as any."""
    again = functools.partial(prepare, loose, tmp_path, workers=1, shard_rows=10, on_error="skip", deadline=1.5)
    with monkeypatch.context() as patch:
        plant(patch, hang=3)
        patch.setattr(prepare_module, "_publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            again()
    assert len(open_source(again() / "train")) == len((loose / TRAIN).read_text().splitlines())


def test_media_that_change_between_a_kill_and_the_next_call_are_read_anew(loose, tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (loose / TRAIN).read_text().splitlines()]
    heard = [i for i, row in enumerate(rows) if row["audios"] and row["ext_audio_feats"]]
    changed, described = heard[0], heard[-1]
    assert changed // 10 != described // 10
    again = functools.partial(prepare, loose, tmp_path, workers=0, shard_rows=10)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            again()
    made = {path.name: path.stat().st_ino for path in tmp_path.rglob("*.part/*-train.*")}
    path = loose / rows[changed]["audios"][0]
    path.write_bytes(bytes(reversed(path.read_bytes())))  # as long as before
    (loose / rows[described]["ext_audio_feats"][0]).unlink()
    source = open_source((folder := again()) / "train")
    assert source[changed].audios == (path.read_bytes(),) and not source[described].ext_audio_feats
    kept = {name for name, inode in made.items() if (folder / name).stat().st_ino == inode}
    assert {*made} - kept == {name for name in made for row in (changed, described) if f"-{row // 10:05d}-of" in name}


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_under_beam_too(loose, tmp_path):
    """A pipe that nobody fills, and a file larger than memory: what the reader does with them needs no help from us."""
    rows = [json.loads(line) for line in (loose / TRAIN).read_text().splitlines()]
    hung, flooded = [i for i, row in enumerate(rows) if row["audios"]][:2]
    (loose / rows[hung]["audios"][0]).unlink()
    os.mkfifo(loose / rows[hung]["audios"][0])
    os.truncate(loose / rows[flooded]["audios"][0], 2**40)
    folder = Config.of().folder(tmp_path)
    subprocess.run(command(loose, tmp_path, BEAM, "--on-error=skip", "--deadline=1"), cwd=REPO, capture_output=True, check=True)
    found = [fault for shard in Receipt.load(folder).splits["train"] for fault in shard.faults]
    assert {fault.row: fault.kind for fault in found} == {hung: "timeout", flooded: "memory"}
    assert problems(open_source(folder / "train")) == without(rows, {hung, flooded})


def test_a_damaged_file_is_found_and_made_again(release, tmp_path):
    folder = prepare(release[0], tmp_path, workers=0, shard_rows=10)
    before = checksums(folder)
    files = sorted(path.name for path in folder.glob("*array_record*"))
    with (folder / files[1]).open("r+b") as file:
        file.seek(40_000)
        file.write(b"\0\1\2\3")
    (folder / files[2]).unlink()
    assert {*damaged(folder)} == {*files[1:3]}
    with pytest.raises(SystemExit, match="damaged or missing"):
        main([str(folder)])
    assert prepare(release[0], tmp_path, workers=0, shard_rows=10) == folder
    assert checksums(folder) == before and damaged(folder) == []
    assert [path.name for path in folder.parent.iterdir()] == ["1.0.0"]


def test_a_record_that_is_damaged_is_one_rows_fault(release, tmp_path):
    folder = prepare(release[0], tmp_path, Config.of("cremad"), workers=0)
    with next(folder.glob("*train*")).open("r+b") as file:
        file.seek(70_000)
        file.write(b"\0\1\2\3")
    source, bad = open_source(folder / "train"), []
    for i in range(len(source)):
        try:
            source[i]
        except SampleError as fault:
            bad.append((fault.row, fault.kind, fault.file))
            assert "is damaged, prepare again" in str(fault)
    assert bad == [(bad[0][0], "schema", str(folder / "train"))]


def test_what_lies_beside_the_files_is_told_when_it_is_broken_and_mended(release, tmp_path):
    folder = prepare(release[0], tmp_path, Config.of("cremad"), workers=0)
    (folder / "features.json").write_text("{")
    (folder / ".left.draft").touch()  # by a call that was killed while it mended
    with pytest.raises(ValueError, match="features.json is broken; prepare again"):
        open_source(folder / "train")
    with pytest.raises(SystemExit, match="features.json is broken; prepare again"):
        main([str(folder)])
    prepare(release[0], tmp_path, Config.of("cremad"), workers=0)
    assert open_source(folder / "train")[0].dataset == "cremad" and not (folder / ".left.draft").exists()
    (folder / "atlas.json").write_text("{")
    with pytest.raises(ValueError, match=r"atlas.json is broken .* prepare it anew"):
        open_source(folder / "train")


def test_a_source_that_changes_between_two_calls_is_read_anew(loose, tmp_path):
    prepare(loose, tmp_path / "before", Config.of("cremad"), workers=0)
    row = next(i for i, line in enumerate((loose / TRAIN).read_text().splitlines()) if json.loads(line)["dataset"] == "cremad")
    edit_row(loose / TRAIN, row, problem="changed")
    assert open_source(prepare(loose, tmp_path / "after", Config.of("cremad"), workers=0) / "train")[0].problem == "changed"


def test_a_row_of_an_unknown_dataset_is_told_and_in_no_configuration(loose, tmp_path):
    edit_row(loose / TRAIN, 0, dataset="iemocap")
    with pytest.raises(BadSamples, match="iemocap: 1 label"):
        prepare(loose, tmp_path, Config.of("cremad"), workers=0)
    next(tmp_path.rglob("*.receipts/*-test.*.json")).write_text("")  # what a crash of the machine may leave
    next(tmp_path.rglob("*.part/*-validation.*")).write_bytes(b"")
    folder = prepare(loose, tmp_path, Config.of("cremad"), workers=0, on_error="skip")
    assert {*open_source(folder / "train").datasets()} == {"cremad"} and damaged(folder) == []


def test_the_command_line_tells_what_it_can_go_on_from(release, tmp_path, monkeypatch):
    def fill_the_disk(job):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            make(job)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    make, arguments = prepare_module.make_shard, [str(release[0]), str(tmp_path), "--workers=0"]
    for deed, told in ((interrupt, "interrupted; the same command goes on"), (fill_the_disk, "cannot be written .*too large")):
        monkeypatch.setattr(prepare_module, "make_shard", deed)
        with pytest.raises(SystemExit, match=told):
            main(arguments)
    assert not list(tmp_path.rglob("*.draft"))


def test_a_missing_file_is_told_when_the_atlas_is_opened(release, tmp_path):
    folder = prepare(release[0], tmp_path, Config.of("cremad"), workers=0)
    next(folder.glob("*train*")).unlink()
    with pytest.raises(FileNotFoundError, match="train.array_record-00000-of-00001 is missing.*mends it"):
        open_source(folder / "train")
    with pytest.raises(FileNotFoundError, match="is missing"):  # and not an atlas that has no such split
        open_splits(folder)
    with pytest.raises(FileNotFoundError, match="no split 'dev'; it has train"):
        ArrayRecordSource(folder, "dev")


def test_unusable_rows_are_all_told_and_mended_ones_are_taken(loose, tmp_path):
    rows = [json.loads(line) for line in (loose / TRAIN).read_text().splitlines()]
    a, b, c = [i for i, row in enumerate(rows) if row["videos"] and row["audios"]][:3]
    medium = loose / rows[a]["audios"][0]
    sound = medium.read_bytes()
    medium.unlink()
    (loose / rows[b]["ext_audio_feats"][0]).write_bytes(b"PK\3\4 not a descriptor")
    (loose / rows[c]["ext_video_feats"][0]).unlink()  # a file that was never made is no fault
    with pytest.raises(BadSamples, match="2 samples cannot be used") as told:
        prepare(loose, tmp_path / "out", workers=0, shard_rows=10)
    assert medium.name in str(told.value) and "1 descriptor" in str(told.value) and "1 media" in str(told.value)

    folder = prepare(loose, tmp_path / "without", workers=0, shard_rows=10, on_error="skip")
    source = open_source(folder / "train")
    kept = [row["problem"] for i, row in enumerate(rows) if i != a]
    assert [source[i].problem for i in range(len(source))] == kept
    without = {row["problem"]: source[i] for i, row in enumerate(row for j, row in enumerate(rows) if j != a)}
    assert not without[rows[b]["problem"]].ext_audio_feats and not without[rows[c]["problem"]].ext_video_feats

    medium.write_bytes(sound)
    (loose / rows[b]["ext_audio_feats"][0]).write_bytes(torch_saved({"features": np.zeros((1, 6373), np.float32)}))
    assert len(open_source(prepare(loose, tmp_path / "out", workers=0, shard_rows=10) / "train")) == len(rows)


def test_descriptors_of_our_own_take_the_place_of_the_releases(release, prepared, tmp_path):
    rows = [row for row in release[1]["train"] if row["dataset"] == "urfunny"]
    (video, _), (sound, _) = rows[0]["videos"][0], rows[0]["audios"][0]
    low_level, times = np.arange(130, dtype=np.float32).reshape(2, 65), np.array([0.03, 0.04], np.float32)
    arrays = {"features": np.full((1, 6373), 3, np.float32), "low_level": low_level, "times": times}
    points = {name: np.full((1, n, 3), 0.5, np.float32) for name, n in (("pose", 33), ("face", 478), ("left_hand", 21), ("right_hand", 21))}
    for path, content in ((f"opensmile/{sound}.npz", arrays), (f"pose/{video}.npz", {**points, "times": times[:1]})):
        (tmp_path / path).parent.mkdir(parents=True)
        np.savez(tmp_path / path, **content)
    folder = prepare(release[0], tmp_path / "out", Config.of("urfunny"), descriptors=tmp_path, workers=0)
    ours, theirs = open_source(folder / "train"), open_source(prepared / "train")
    theirs = [theirs[i] for i in range(len(theirs)) if theirs.datasets()[i] == "urfunny"]
    (seen,), (heard,) = ours[0].ext_video_feats, ours[0].ext_audio_feats
    assert isinstance(seen, Descriptor) and isinstance(heard, Descriptor)
    np.testing.assert_array_equal(heard.frames, low_level)
    np.testing.assert_array_equal(heard.times, times)
    np.testing.assert_array_equal(seen.frames, np.full((1, 1659), 0.5))
    for a, b in zip([ours[i] for i in range(1, len(ours))], theirs[1:], strict=True):
        for mine, released in zip(a.ext_audio_feats, b.ext_audio_feats, strict=True):
            assert isinstance(mine, Descriptor) and isinstance(released, Descriptor)
            np.testing.assert_array_equal(mine.pooled, released.pooled)
    with pytest.raises(ValueError, match="different: descriptors"):
        prepare(release[0], tmp_path / "out", Config.of("urfunny"), workers=0)
    with pytest.raises(FileNotFoundError, match="no descriptors in"):
        prepare(release[0], tmp_path / "other", descriptors=tmp_path / "nothing", workers=0)


def test_another_source_or_other_arguments_do_not_mix(release, loose, tmp_path):
    edit_row(loose / TRAIN, 0, dataset="mosei_senti", problem="changed")
    folder = prepare(release[0], tmp_path, Config.of("tess"), workers=0, shard_rows=10)
    with pytest.raises(ValueError, match="different: shard_rows"):
        prepare(release[0], tmp_path, Config.of("tess"), workers=0, shard_rows=9)
    with pytest.raises(ValueError, match="different: splits"):
        prepare(loose, tmp_path, Config.of("tess"), workers=0, shard_rows=10)
    assert damaged(folder) == []
    with pytest.raises(SystemExit, match="no atlas in"):
        main([str(tmp_path / "nothing"), str(tmp_path / "out")])


def test_the_summary_counts_what_is_there(release, prepared):
    rows = release[1]["train"]
    seen = sum(data != videos_described()[3] for row in rows for _, data in row["ext_video_feats"])
    heard = sum(len(row["ext_audio_feats"]) for row in rows)
    line = summary(prepared).splitlines()[0]
    assert f"train: {len(rows)} rows of 16 datasets" in line and f"descriptors: {seen} video, {heard} audio; 0 rows at fault" in line


def test_progress_ends_at_all_rows(release, tmp_path):
    seen = []
    prepare(release[0], tmp_path, workers=0, shard_rows=10, progress=lambda *at: seen.append(at))
    assert seen[-1] == (96, 96) and seen == sorted(seen)
