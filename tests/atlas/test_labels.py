"""The published label map, number by number."""

import dataclasses
import hashlib
import json

import pytest

from omnisapiens_jax.atlas.labels import HBA, Dataset, Domain, LabelScheme
from omnisapiens_jax.atlas.schema import Sample, SampleError

# Table of the published file: dataset -> (head, global indices of the labels that occur).
PUBLISHED = {
    "chsimsv2": (0, {0, 2, 3, 4, 6}),
    "meld_senti": (0, {1, 3, 5}),
    "mosei_senti": (0, {0, 1, 2, 3, 4, 5, 6}),
    "cremad": (1, {7, 8, 9, 10, 11, 13}),
    "meld_emotion": (1, {7, 8, 9, 10, 11, 13, 14}),
    "tess": (1, {7, 8, 9, 10, 11, 13, 14}),
    "mosei_emotion": (1, {7, 8, 9, 10, 13, 14}),
    "ptsd_in_the_wild": (2, {15, 16}),
    "mmpsy_depression": (3, {17, 18}),
    "daicwoz": (3, {17, 18}),
    "mmpsy_anxiety": (4, {19, 20}),
    "mmsd": (5, {21, 22}),
    "urfunny": (6, {23, 24}),
}


def test_the_map_has_53_entries_25_classes_and_16_datasets():
    assert len(HBA.mapping) == 53 and len(HBA.classes) == 25 and len(HBA.datasets) == 16
    assert {d.name for d in HBA.datasets if d.kind == "qa"} == {"intentqa", "siq2", "mimeqa"}
    for dataset, (head, indices) in PUBLISHED.items():
        assert HBA.head(dataset) == head
        assert {HBA.index(dataset, label) for label in HBA.dataset(dataset).labels} == indices
        assert indices <= set(HBA.head_classes(head))


def test_the_scheme_is_written_as_the_published_file_has_it():
    """All of `unified_label_map.json` but when it was made and four notes: the digest is that of its content without these, keys sorted."""
    content = HBA.released()
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert digest == "fa977c75ead59a5a87b87c7100106bfb8a1388beb16dac42ef28ad008e8a2b9f"
    assert [*content["meta"]["global_classes"]] == [domain.name for domain in HBA.domains]  # their order is that of the heads
    for dataset, (_, indices) in PUBLISHED.items():
        assert {content["label_mapping"][f"{dataset}_{label}"] for label in content["dataset_labels"][dataset]} == indices


def test_the_table_has_the_papers_sizes_modalities_and_metrics():
    counts = {d.name: d.samples or 0 for d in HBA.datasets}
    assert sum(counts.values()) - counts["mmpsy_depression"] == 101_963  # the figure counts MMPsy once
    by_signature = {s: sum(counts[d.name] for d in HBA.datasets if d.signature == s) for s in {d.signature for d in HBA.datasets}}
    assert by_signature["text_audio"] == 10_431 and by_signature["text"] == 2_550  # as the released parquet has them
    metrics = {}
    for dataset in HBA.datasets:
        metrics.setdefault(dataset.benchmark, set()).add(dataset.metric)
    assert metrics == {
        "EMO": {"emotion_weighted_accuracy_mean"},
        "SEN": {"F1w2"},
        **{task: {"weighted_f1"} for task in ("HUM", "PTSD", "ANX", "DEP", "SAR")},
        **{task: {"judge_accuracy"} for task in ("INT", "SOC", "NVC")},
    }


def test_an_answer_has_a_head_and_a_class_within_it_and_a_free_form_one_has_neither():
    for dataset in HBA.datasets:
        for label in dataset.labels:
            head, index = HBA.place(dataset.name, label.upper())
            assert head == HBA.head(dataset.name) and index == HBA.index(dataset.name, label) and index in HBA.head_classes(head)
        if dataset.domain is None:
            assert HBA.place(dataset.name, "whatever") == (-1, -1)
    for wrong in (("cremad", "sarcasm"), ("diary", "happy")):
        with pytest.raises(KeyError, match="unknown"):
            HBA.place(*wrong)


@pytest.mark.parametrize(
    ("dataset", "answer", "index"),
    [
        ("mosei_senti", "neutral", 3),
        ("cremad", "neutral", 11),
        ("chsimsv2", "Weakly Positive", 4),
        ("mmsd", "not sarcasm", 21),
        ("meld_emotion", "surprise", 14),
        ("urfunny", "humour", 24),
        ("daicwoz", "depression", 18),
        ("mmpsy_anxiety", "no anxiety", 19),
    ],
)
def test_lookups_know_their_domain_and_ignore_case(dataset, answer, index):
    assert HBA.index(dataset, answer) == index == HBA.prediction(dataset, answer.upper())


def test_a_prediction_may_be_any_label_of_the_domain_but_of_no_other():
    assert HBA.prediction("cremad", "calm") == 12
    assert HBA.prediction("cremad", "positive") == -1
    assert HBA.index_any_domain("Neutral") == 11 and HBA.index_any_domain("whatever") == -1


def test_unknown_names_list_what_is_allowed():
    with pytest.raises(KeyError, match=r"unknown label 'joy' of dataset 'cremad'.*anger, disgust, fear, happy, neutral, sad"):
        HBA.index("cremad", "joy")
    with pytest.raises(KeyError, match=r"unknown dataset 'iemocap'.*cremad.*mimeqa"):
        HBA.head("iemocap")
    with pytest.raises(KeyError, match="free-form"):
        HBA.index("siq2", "anger")


def test_checking_a_sample_names_row_and_field():
    sample = Sample(4, "val.jsonl", "p", "sad", "cremad", "text_audio", "emotion_cls", "sad")
    HBA.check(sample)
    for change, field in (({"answer": "joy"}, "answer"), ({"dataset": "x"}, "dataset"), ({"task": "emotion_qa"}, "task")):
        with pytest.raises(SampleError, match="val.jsonl, row 4") as caught:
            HBA.check(dataclasses.replace(sample, **change))
        assert (caught.value.kind, caught.value.field) == ("label", field)


def test_a_scheme_that_contradicts_itself_is_refused():
    domains = (Domain("emotion", ("sad",)),)
    with pytest.raises(ValueError, match="unknown domain"):
        LabelScheme(domains, (Dataset("d", "EMO", "text", "mood", ("sad",)),))
    with pytest.raises(ValueError, match="outside its domain"):
        LabelScheme(domains, (Dataset("d", "EMO", "text", "emotion", ("joy",)),))
