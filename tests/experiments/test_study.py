"""Studies: small grids from end to end, what is not done twice, and one clear error for each thing that is wrong."""

import gc
from pathlib import Path

import pytest
import yaml
from helpers import paraphrases, questions, save_backbone, translations, write_examples, write_questions

from fastprompt.data.examples import Answer, Question
from fastprompt.experiments import study
from fastprompt.experiments.config import read_study
from fastprompt.experiments.records import Record, read_results
from fastprompt.experiments.report import write_report
from fastprompt.experiments.study import run_study
from fastprompt.tasks import qa

SETTINGS = dict(num_virtual_tokens=2, max_length=40, stride=8, max_steps=2, per_device_train_batch_size=4, eval_steps=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A backbone, and data of every task."""
    folder = tmp_path_factory.mktemp("files")
    save_backbone("bert", folder / "backbone", num_hidden_layers=2)
    for name, count in (("train-en", 9), ("dev-en", 3), ("test-en", 4), ("test-de", 4), ("dev-de", 2)):
        write_examples(folder / f"{name}.tsv", paraphrases(count, seed=count))
    write_questions(folder / "train.json", questions(7))
    write_questions(folder / "xquad.en.json", questions(3, seed=1))
    write_questions(folder / "xquad.de.json", questions(3, seed=2))
    write_questions(folder / "test" / "test-context-de-question-en.json", questions(3, seed=3))
    text = "Anna Berg saw the old farm near Bonn in 1912. Her uncle Karl Stein sold it to Emma Wolf for 350 coins, "
    text += "and went to Paris by the night train. Later Hugo Brandt built a large school for 80 children in Kiel."
    write_questions(folder / "prose.json", [Question("1", "?", text, [Answer("Anna", 0)])])
    pairs = [f"{pair.source}\t{pair.target}\n" for pair in translations(40)]
    (folder / "de.tsv").write_text("".join(pairs))
    (folder / "cy.tsv").write_text("".join(pairs[:30]))
    return folder


@pytest.fixture(scope="module", autouse=True)
def frozen_objects():
    """A Trainer collects garbage before each run: it need not look at all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def trained(monkeypatch):
    """The settings and the data of the trainings that were run."""
    calls, train = [], study._train

    def counted(settings, *args, **data):
        calls.append((settings, data))
        return train(settings, *args, **data)

    monkeypatch.setattr(study, "_train", counted)
    return calls


@pytest.fixture
def configured(files, tmp_path):
    def make(**about):
        base = dict(study="scarcity", task="pawsx", backbone=str(files / "backbone"), data=str(files))
        base |= dict(languages=["en", "de"], methods=["head", "prefix"], examples=[4], seeds=[0], settings=SETTINGS)
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump(base | about))
        return read_study(file)

    return make


def runs(records: list[Record]) -> list[tuple]:
    return [(record.task, record.variant, record.examples, record.seed, record.method) for record in records]


def check_report(out) -> str:
    page, markdown = write_report(out)
    assert page.stat().st_size > 1000
    return markdown.read_text()


def test_scarcity_of_pairs(files, configured, tmp_path, trained):
    config = configured(
        methods=["head", "prefix+alignment", "prefix+adapters+norms"],
        examples=[4, "all", 50],
        seeds=[0, 1],
        parallel={"de": str(files / "de.tsv")},
        adapter_size=4,
        alignment=0.5,
        languages=["en", "de", "de@dev"],
        examples_settings={"all": {"learning_rate": 0.5, "head_learning_rate": 0.75}},
        method_settings={"head": {"head_learning_rate": 0.25}},
        title="Few pairs",
    )
    told = []
    records = run_study(config, tmp_path / "out", on_run=lambda *run: told.append(run))
    about, read = read_results(tmp_path / "out")
    assert runs(read) == [
        ("pawsx", "", count, seed, method) for count in (4, 9) for seed in (0, 1) for method in config.methods
    ]
    assert len(records) == len(trained) == 12 and about["title"] == "Few pairs"
    assert [(number, total, record is None) for number, total, _, record in told] == [
        (number, 12, first) for number in range(1, 13) for first in (True, False)
    ]
    assert [len(data["train_dataset"]) for _, data in trained] == [4] * 6 + [9] * 6
    head, aligned, adapted = (settings for settings, _ in trained[:3])
    assert aligned.alignment.weight == 0.5 and head.alignment is None and adapted.alignment is None
    assert (aligned.adapter.adapter_size, adapted.adapter.adapter_size) == (None, 4)
    assert adapted.adapter.norms and not head.adapter.norms and head.adapter.method == "head"
    rates = [settings.arguments.get("learning_rate") for settings, _ in trained]
    assert rates == [None] * 6 + [0.5] * 6
    assert [settings.arguments.get("head_learning_rate") for settings, _ in trained[5:8]] == [None, 0.25, 0.75]
    assert [len(data["pairs"] or ()) for _, data in trained[:3]] == [0, 40, 0]
    assert [settings.arguments["seed"] for settings, _ in trained[:6]] == [0] * 3 + [1] * 3
    record = read[0]
    assert set(record.scores) == {"en", "de", "de@dev"} and record.steps == len(record.losses) == 2
    assert record.baseline["majority"] == {"en": 50.0, "de": 50.0, "de@dev": 50.0}
    assert record.trained_parameters == 2 * 48 + 2 and record.validation > 0
    assert "Few pairs" in check_report(tmp_path / "out")


def test_scarcity_of_answers_in_two_tasks(files, configured, tmp_path, trained, monkeypatch):
    """Each task is scored by its own rules, mlqa's by those of the context's language."""
    monkeypatch.setattr(
        qa, "answer_scores", lambda rules, *args: {"exact_match": 1.5, "f1": float((rules, args[2]) == ("mlqa", "de"))}
    )
    also = {"mlqa": {"data": str(files), "languages": ["de-en"], "split": "test"}}
    about = dict(
        task="xquad", train_split=str(files / "train.json[1:]"), validation_split=None, also=also, test_limit=2
    )
    config = configured(**about, methods=["head", "prefix", "frozen"], examples=[3, "all"])
    out = tmp_path / "out"
    run_study(config, out)
    _, read = read_results(out)
    assert [record.task for record in read] == ["mlqa", "xquad"] * 6 and len(trained) == 4
    assert {record.examples for record in read} == {3, 6}
    assert read[0].scores == {"de-en": {"exact_match": 1.5, "f1": 1.0}} and read[1].scores["de"]["f1"] == 0.0
    assert read[0].validation == 0.0 and read[0].losses == read[1].losses
    frozen = [record for record in read if record.method == "frozen"]
    assert [(record.task, record.examples) for record in frozen] == [(t, n) for n in (3, 6) for t in ("mlqa", "xquad")]
    assert frozen[0].scores == frozen[2].scores and frozen[1].scores == frozen[3].scores
    assert {(record.steps, record.trained_parameters, record.validation) for record in frozen} == {(0, 0, 0.0)}
    check_report(out)

    # It died while it wrote, of two lines, the second: the run is done again, and each line is there once.
    lines = (out / "results.jsonl").read_bytes().splitlines(keepends=True)
    for rest in (lines[:9], [*lines[:9], lines[9][:30]], [*lines[:8], lines[8][:9]]):
        (out / "results.jsonl").write_bytes(b"".join(rest))
        trained.clear()
        assert len(run_study(config, out)) == 4 and len(trained) == 1
        assert runs(read_results(out)[1]) == runs(read)


def test_stability(configured, tmp_path):
    config = configured(study="stability", methods=["prefix", "full", "lora"], seeds=[0, 1])
    run_study(config, tmp_path / "out")
    assert len(read_results(tmp_path / "out")[1]) == 6
    check_report(tmp_path / "out")


@pytest.mark.parametrize("task", ["pawsx", "xquad"])
def test_pseudo(files, configured, tmp_path, trained, task):
    train = "train" if task == "pawsx" else str(files / "prose.json")
    config = configured(
        study="pseudo",
        task=task,
        variants=["real", "pseudo", "pseudo+real"],
        methods=["prefix"],
        examples=[1],
        pseudo_examples=6,
        train_split=train,
        validation_split="dev" if task == "pawsx" else None,
        parallel={"de": str(files / "de.tsv")},
    )
    run_study(config, tmp_path / "out")
    assert [len(data["train_dataset"]) for _, data in trained] == [1, 6, 7]
    _, read = read_results(tmp_path / "out")
    assert [record.variant for record in read] == ["real", "pseudo", "pseudo+real"]
    check_report(tmp_path / "out")


def test_retrieval(files, configured, tmp_path, trained):
    config = configured(
        task="retrieval",
        methods=["frozen", "head", "prefix"],
        examples=[8, "all"],
        languages=[],
        parallel={name: str(files / f"{name}.tsv") for name in ("de", "cy")},
        parallel_test=10,
        method_settings={"prefix": {"max_steps": 3}},
    )
    run_study(config, tmp_path / "out")
    _, read = read_results(tmp_path / "out")
    assert [(record.examples, record.method) for record in read] == [
        (count, method) for count in (8, 20) for method in config.methods
    ]
    assert len(trained) == 8 and [len(record.losses) for record in read[:3]] == [0, 2, 3]
    assert all(set(record.scores) == {"de", "cy"} for record in read)
    assert [record.trained_parameters for record in read[:3]] == [0, 48 * 48, 48 * 48 + 2 * 2 * 2 * 48]
    assert {record.validation for record in read} == {0.0}  # nothing is chosen by the scores
    assert read[0].scores == read[3].scores  # by the backbone as it is, whatever it could train on
    check_report(tmp_path / "out")


def test_what_is_done_is_not_done_again(configured, tmp_path, trained, monkeypatch):
    out = tmp_path / "out"
    train = study._train

    def dies(*args, **more):
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(*args, **more)

    config = configured(seeds=[0, 1])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(study, "_train", dies)
        run_study(config, out)
    assert len(read_results(out)[1]) == 2
    with (out / "results.jsonl").open("a") as file:
        file.write('{"task": "pawsx", "meth')
    trained.clear()
    assert len(run_study(config, out)) == len(trained) == 2
    assert run_study(config, out) == [] and len(trained) == 2

    more = dict(seeds=[0, 1, 2], methods=["prefix", "head", "lora"], method_settings={"lora": {"lora_rank": 2}})
    assert [(record["seed"], record["method"]) for record in run_study(configured(**more), out)] == [
        (0, "lora"), (1, "lora"), (2, "prefix"), (2, "head"), (2, "lora"),
    ]  # fmt: skip
    more |= dict(seeds=[0], methods=["head", "lora"], examples=[4, 6], examples_settings={6: {"max_steps": 3}})
    assert {(record["examples"], record["steps"]) for record in run_study(configured(**more), out)} == {(6, 3)}
    before = (out / "results.jsonl").read_bytes()
    for changed, message in (
        ({"settings": SETTINGS | {"max_steps": 3}}, r"settings must be as in the study in .*'max_steps': 2"),
        ({"languages": ["de"]}, r"languages must be as in the study in .*: \['en', 'de'\], got \['de'\]"),
        ({"test_limit": 2}, "test_limit must be as in the study in .*: None, got 2"),
        ({"method_settings": {"lora": {"lora_rank": 4}}}, "method_settings of 'lora' must be as in the study in"),
        (
            {"method_settings": more["method_settings"] | {"head": {"head_learning_rate": 0.5}}},
            "method_settings of 'head' must be as in the study in",
        ),
        (more | {"examples_settings": {4: {"max_steps": 3}}}, "examples_settings of '4' must be as in the study in"),
    ):
        with pytest.raises(ValueError, match=message):
            run_study(configured(**more | changed), out)
    assert (out / "results.jsonl").read_bytes() == before


def test_a_run_that_was_interrupted_is_not_kept(configured, tmp_path, monkeypatch):
    """A Trainer ends well on Ctrl-C; a study must not take what it has then for a run."""
    monkeypatch.setattr(study._Trainer, "stopped", True)
    with pytest.raises(KeyboardInterrupt):
        run_study(configured(methods=["head"]), tmp_path / "out")
    assert read_results(tmp_path / "out")[1] == []


def test_the_frozen_backbone_is_scored_once_for_each_of_its_settings(configured, tmp_path, monkeypatch):
    made, run = [], study._run
    monkeypatch.setattr(study, "_run", lambda *args: made.append(args[2].examples) or run(*args))
    config = configured(methods=["frozen"], examples=[4, 5, 6], seeds=[0, 1], examples_settings={5: {"max_length": 8}})
    assert len(run_study(config, tmp_path / "out")) == 6
    assert made == [4, 5]


def test_the_same_study_gives_the_same_results(configured, tmp_path):
    first, second = (run_study(configured(methods=["lora"]), tmp_path / name) for name in "ab")
    for name in ("losses", "scores", "gradient_norms", "validation"):
        assert first[0][name] == second[0][name]


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"study": "scaling"}, r"study must be one of \('scarcity', 'stability', 'pseudo'\), got 'scaling'"),
        ({"lr": 0.1}, r"unknown names \['lr'\]; there are"),
        ({"methods": ["prefix+glue"]}, r"methods must be one of AdapterConfig's with any of .*got 'prefix\+glue'"),
        ({"methods": ["suffix"]}, "method must be one of .* got 'suffix'"),
        ({"methods": "prefix"}, "methods must be a list, got 'prefix'"),
        ({"methods": []}, "methods must hold at least one, got none"),
        ({"methods": ["prefix+alignment"]}, "parallel must name a file at least, for methods with alignment, got none"),
        ({"task": "retrieval"}, "parallel must name a file at least, for scarcity of retrieval, got none"),
        ({"study": "pseudo", "variants": ["pseudo"]}, "parallel must name a file at least, for pseudo of pawsx"),
        ({"study": "pseudo"}, r"variants must be of \('real', .* got \[''\]"),
        (
            {"study": "pseudo", "task": "retrieval", "variants": ["real"]},
            "task must have labels for the study 'pseudo'",
        ),
        ({"variants": ["real"]}, r"variants must be of \('',\) in the study 'scarcity', got \['real'\]"),
        ({"languages": "de"}, "languages must be a list, got 'de'"),
        ({"languages": []}, "languages must hold at least one, got none"),
        ({"examples": 8}, "examples must be a list, got 8"),
        ({"examples": [0]}, 'examples must be positive integers or "all", got 0'),
        ({"examples": ["every"]}, "examples must be positive integers or \"all\", got 'every'"),
        ({"seeds": ["a"]}, r"seeds must be a list, each of it an integer, got \['a'\]"),
        ({"seeds": [1, 1]}, r"seeds must not hold one twice, got \[1, 1\]"),
        ({"settings": None}, "settings must be names and values, got None"),
        ({"task": "poetry"}, "task must be one of .* got 'poetry'"),
        (
            {"settings": {"learning_rat": 1}},
            r"settings must be of .*, got 'learning_rat'; did you mean learning_rate\?",
        ),
        ({"settings": {"lr": 0.1}}, "settings: lr is called learning_rate now"),
        ({"settings": {"seed": 1}}, "settings must not have seed"),
        ({"settings": {"learning_rate": "fast"}}, "settings: learning_rate must be a number, got 'fast'"),
        ({"settings": {"alignment_layer": 0}}, "alignment layer must be an integer, 1 or more, got 0"),
        (
            {"task": "retrieval", "parallel": {"de": "de.tsv"}, "settings": {"alignment_batch_size": 8}},
            "settings: alignment_batch_size must not be given for retrieval",
        ),
        (
            {"task": "retrieval", "parallel": {"de": "de.tsv"}, "alignment": 0.5},
            "alignment must be 1 for retrieval, where there is nothing else, got 0.5",
        ),
        ({"parallel": "de.tsv"}, "parallel must be names and values, got 'de.tsv'"),
        ({"parallel_test": 0}, "parallel_test must be a positive integer, got 0"),
        ({"test_limit": 0}, "test_limit must be a positive integer, got 0"),
        ({"method_settings": {"lora": {}}}, r"method_settings must be of \['head', 'prefix'\], got \['lora'\]"),
        ({"examples_settings": {8: {}}}, r"examples_settings must be of \[4\], got \[8\]"),
        ({"examples_settings": {4: {"learning_rate": -1}}}, "learning_rate must be a finite number, 0 or more, got -1"),
        ({"also": {"mlqa": {}}}, "also must be mlqa beside xquad or the other way round"),
        ({"task": "xquad", "also": {"mlqa": ["de"]}}, "also must be names and values, each of them names and values"),
        ({"also": ["mlqa"]}, r"also must be names and values, got \['mlqa'\]"),
    ],
)
def test_a_file_that_is_wrong(configured, about, message):
    with pytest.raises(ValueError, match=rf"study\.yaml: {message}"):
        configured(**about)


COMMITTED = sorted((Path(__file__).parents[2] / "benchmarks" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("file", COMMITTED, ids=[file.stem for file in COMMITTED])
def test_committed_studies_are_read(file):
    assert read_study(file).settings["max_steps"] > 0


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        read_study(tmp_path / "none.yaml")
    file = tmp_path / "study.yaml"
    for text, message in (
        ("- a\n", "must hold names and values, got list"),
        ("a: [\n", "must be YAML"),
        ("study: scarcity\n", r"missing names \['backbone', 'task'\]"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"study\.yaml: {message}"):
            read_study(file)
    with pytest.raises(ValueError, match="study must be one of"):
        read_study(file, study="scaling", task="xquad", backbone="x", languages=["en"])


def test_data_that_does_not_fit_is_told_before_any_run(files, configured, tmp_path, trained):
    pairs = {"de": str(files / "cy.tsv")}
    for about, message in (
        ({"languages": ["cy"]}, "language must be one of .* got 'cy'"),
        ({"test_split": "trial"}, "split must be one of .* got 'trial'"),
        ({"parallel": {"de": str(files / "none.tsv")}}, r"none\.tsv"),
        ({"task": "retrieval", "parallel": pairs, "parallel_test": 30}, r"parallel_test must be below 30, .*cy\.tsv"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            run_study(configured(**about), tmp_path / "out")
    assert not trained and not (tmp_path / "out").exists()


def test_the_source_is_told_in_other_splits_too():
    record = Record(**dict.fromkeys(Record.__dataclass_fields__) | {"source": "en"})
    assert record.is_source("en@dev") and record.is_source("en-en") and not record.is_source("de@en")


def test_a_run_that_diverges_does_not_end_the_study(configured, tmp_path):
    config = configured(method_settings={"head": {"head_learning_rate": 3e37, "max_steps": 4}})
    with pytest.raises(FloatingPointError, match="1 runs are missing.*head with 4 examples and seed 0: the loss is"):
        run_study(config, tmp_path / "out")
    assert [record.method for record in read_results(tmp_path / "out")[1]] == ["prefix"]


def test_what_a_study_leaves_out_is_told(files, configured, tmp_path, caplog):
    """Examples that training can make nothing of, and numbers of examples that are not there."""
    moved = [each._replace(id=f"m{n}", answers=[each.answers[0]._replace(start=each.answers[0].start + 1)])
             for n, each in enumerate(questions(3, seed=7))]  # fmt: skip
    write_questions(tmp_path / "mixed.json", questions(7) + moved)
    about = dict(task="xquad", languages=["de"], train_split=str(tmp_path / "mixed.json"), validation_split=None)
    config = configured(**about, examples=[4, 8], methods=["head"], seeds=[0])
    data = study.read_data(config)
    assert len(data.train) == 7
    assert "mixed.json: 3 of 10 examples of 'en', whose answers do not stand where they say, are left" in caplog.text
    assert [run.examples for run in study.plan(config, data)] == [4]
    assert "examples [8], of which there are 7: 1 of 2 numbers are left out" in caplog.text
