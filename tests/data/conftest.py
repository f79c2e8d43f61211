"""Small data sets, in the forms in which the real ones come."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def write_squad(tmp_path):
    """Write questions in SQuAD's form, each with a paragraph of its own; the path is below tmp_path."""

    def write(name: str, questions: list) -> Path:
        paragraphs = [
            {
                "context": question.context,
                "qas": [
                    {
                        "id": question.id,
                        "question": question.question,
                        "answers": [{"text": answer.text, "answer_start": answer.start} for answer in question.answers],
                    }
                ],
            }
            for question in questions
        ]
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {"version": "1.1", "data": [{"title": "A title", "paragraphs": paragraphs}]}
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        return file

    return write


@pytest.fixture
def write_dataset(tmp_path, monkeypatch):
    """Write tmp_path/dataset as the hub lays it out: {config: {split: columns, or a list of questions}}."""
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"

    def write(configs: dict[str, dict]) -> Path:
        lines = ["---", "configs:"]
        for config, splits in configs.items():
            lines += [f"- config_name: {config}", "  data_files:"]
            for split, content in splits.items():
                lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
                file = folder / config / f"{split}-00000-of-00001.parquet"
                file.parent.mkdir(parents=True, exist_ok=True)
                columns = content if isinstance(content, dict) else question_columns(content)
                pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), file)
        (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
        return folder

    return write


def question_columns(questions: list) -> dict[str, list]:
    columns = {name: [getattr(question, name) for question in questions] for name in ("id", "context", "question")}
    columns["answers"] = [
        {
            "text": [answer.text for answer in question.answers],
            "answer_start": [answer.start for answer in question.answers],
        }
        for question in questions
    ]
    return columns
