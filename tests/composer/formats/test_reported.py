"""Scores in model cards and in `.eval_results/*.yaml`, which anybody may have written."""

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData
from huggingface_hub import eval_result_entries_to_yaml as results_yaml
from hypothesis import given
from hypothesis import strategies as st

from composer.formats.checkpoints.reported import MAX_FINDINGS, MAX_SCORES, is_results_file, reported_scores
from composer.formats.recipes.elsewhere import ReportedBenchmark
from composer.formats.recipes.suite import NAME


def card(*results: EvalResult) -> bytes:
    data = ModelCardData(model_name="x", eval_results=list(results))
    return f"---\n{data.to_yaml()}\n---\n# x\n".encode()


def result(dataset: str = "squad", metric: str = "f1", value: object = 0.5, **fields: object) -> EvalResult:
    named = {"task_type": "question-answering", "dataset_type": dataset, "dataset_name": dataset.title()}
    return EvalResult(**named, metric_type=metric, metric_value=value, **fields)  # pyright: ignore[reportArgumentType]


def test_what_hugging_faces_own_writers_write_is_read() -> None:
    entries = [EvalResultEntry("cais/hle", "default", 20.9, dataset_revision="abc", notes="no-tools")]
    entries += [EvalResultEntry("Idavidrein/gpqa", "gpqa_diamond", 0.412)]
    files = {
        ".eval_results/b.yaml": yaml.safe_dump(results_yaml(entries)).encode(),
        "README.md": card(result(dataset_config="v2", dataset_split="test"), result(metric="eval_loss", value="1.25")),
    }
    scores, doubts = reported_scores(files)
    assert doubts == []
    rows = [
        (score.dataset, score.config, score.split, score.metric, score.value, score.higher_is_better)
        for score in scores
    ]
    assert rows == [
        ("cais/hle", None, None, "score", 20.9, True),
        ("Idavidrein/gpqa", "gpqa_diamond", None, "score", 0.412, True),
        ("squad", "v2", "test", "f1", 0.5, True),
        ("squad", None, None, "eval_loss", 1.25, False),
    ]
    assert (scores[0].revision, scores[0].source, scores[2].source) == (
        "abc",
        ".eval_results/b.yaml",
        "README.md (model-index)",
    )


def test_what_cannot_be_used_is_said_in_one_sentence_each() -> None:
    unusable = {
        "wer": "12 %",
        "f1": float("nan"),
        "rouge1": True,
        "fancy": 1.0,
        "!": 1.0,
    }
    scores, doubts = reported_scores(
        {"README.md": card(*(result(metric=name, value=own) for name, own in unusable.items()))}
    )
    assert scores == []
    whys = [doubt.message.partition(" is not kept: ")[2] for doubt in doubts]
    assert whys == [
        "'12 %' is not a number.",
        "nan is not a number.",
        "True is not a number.",
        "whether higher or lower fancy is better is not known.",
        "'!' is not the name of a metric.",
    ]
    for document, why in (
        ("x", "it is not a list"),
        ([{"name": "x"}], "`results` of a model is not a list"),
        ([{"name": "x", "results": [{"metrics": 3}]}], "`metrics` of a result is not a list"),
        ([1], "1 in it is not a mapping"),
    ):
        front = f"---\n{yaml.safe_dump({'model-index': document})}---\n".encode()
        ((doubt,),) = (reported_scores({"README.md": front})[1],)
        assert doubt.message == f"README.md (model-index): {why}."
    many = [result(f"d{number}", value="?") for number in range(50)]
    assert len(reported_scores({"README.md": card(*many)})[1]) == MAX_FINDINGS + 1
    several = [result(f"d{number}") for number in range(MAX_SCORES + 5)]
    kept, (doubt,) = reported_scores({"README.md": card(*several)})
    assert (len(kept), doubt.message) == (MAX_SCORES, "Only the first 100 of 105 reported scores are kept.")
    broken = b"- &a [1]\n- *a\n"
    assert "aliases" in reported_scores({".eval_results/a.yaml": broken})[1][0].message


FIELDS = st.sampled_from(["id", "type", "name", "dataset", "metrics", "results", "value", "task_id", "split", "config"])
YAML = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELDS, inner, max_size=5),
    max_leaves=20,
)


@given(document=YAML)
def test_no_document_is_an_error(document: object) -> None:
    text = yaml.safe_dump(document).encode()
    front = f"---\n{yaml.safe_dump({'model-index': document})}---\n".encode()
    for files in ({".eval_results/a.yaml": text}, {"README.md": front}):
        for score in reported_scores(files)[0]:
            benchmark = ReportedBenchmark(dataset=score.dataset, config=score.config, split=score.split)
            assert NAME.fullmatch(benchmark.name)


def test_only_plain_files_directly_in_the_directory_are_results() -> None:
    assert is_results_file(".eval_results/hle.yaml")
    assert is_results_file(".eval_results/a.b.yml")
    for path in (".eval_results/.hidden.yaml", ".eval_results/a/b.yaml", ".git/a.yaml", ".eval_results/a.sh", "a.yaml"):
        assert not is_results_file(path)
