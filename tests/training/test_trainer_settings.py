"""What does not fit is told in one error, before any work."""

import datasets
import pytest
import transformers
from helpers import paraphrases, save_backbone, translations
from runs import run, trainer
from simple_task import Classes

from fastprompt import tasks
from fastprompt.training import AlignmentConfig, TrainingArguments
from fastprompt.training.streams import examples_of

TASK = {"task": Classes(), "train_dataset": paraphrases(8)}
BOTH = TASK | {"pairs": translations(5)}
PAIRS = {"pairs": translations(9)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "train_dataset or pairs must hold at least one example, got none"),
        ({"pairs": []}, "train_dataset or pairs must hold at least one example, got none"),
        (TASK | {"train_dataset": []}, "train_dataset or pairs must hold at least one example, got none"),
        ({"train_dataset": paraphrases(2)}, "task must be given with train_dataset, got None"),
        (
            TASK | {"train_dataset": [{"text": "a", "label": "0"}]},
            "train_dataset, row 0: no column for text_pair, only",
        ),
        ({"pairs": [("w1", "w2", "w3")]}, r"pairs must have source, target in each row, got \('w1', .* in row 0"),
        (PAIRS | {"eval_dataset": paraphrases(2)}, "task must be given with eval_dataset, got None"),
        (TASK | {"alignment": AlignmentConfig()}, "pairs must be given with alignment, got none"),
        (TASK | {"num_examples": 9}, "examples must be at most 8, as many as there are, got 9|at most 8, got 9"),
        (PAIRS | {"num_examples": 10}, "examples must be at most 9, as many as there are, got 10"),
        (TASK | {"max_length": 61}, "max_length must be at most 60, .* room for beside the prompt, got 61"),
        (PAIRS | {"max_length": 2}, "max_length must be above 2, the special tokens and those of prefix_text, got 2"),
        (PAIRS | {"max_length": 4, "prefix_text": "w1 w2"}, "max_length must be above 4, the special tokens and"),
        (
            TASK | {"task": "classification", "max_length": 4},
            "max_length must be at least 5, for a token of each text beside the special ones",
        ),
        (TASK | {"top_layers": 3}, r"top_layers must be in \[0, 2\]"),
        (TASK | {"num_layers": 3}, r"num_layers must be in \[1, 2\], the backbone's, got 3"),
        (TASK | {"layers": [5]}, "layers must be indices of the backbone's 2 layers, got 5"),
        (TASK | {"num_virtual_tokens": 64}, "num_virtual_tokens must leave room"),
        (TASK | {"init_text": " "}, "init_text must have at least one token, got none in ' '"),
        (PAIRS | {"max_tokens": 6}, "max_tokens must have room for the longest sentence, 7 tokens and 0 prompt rows"),
        (
            BOTH | {"alignment": AlignmentConfig(layer=3)},
            "alignment layer must be at most 2, the backbone's layers, got 3",
        ),
        (
            BOTH | {"alignment": AlignmentConfig(form="task"), "cache_layers": True, "layers": [1]},
            "cache_layers must be False with alignment form 'task', whose inputs differ in each step",
        ),
        (
            PAIRS | {"static_shapes": True, "cache_layers": True, "layers": [1]},
            "static_shapes must be False with cache",
        ),
        (TASK | {"method": "head", "train_head": False}, "nothing trains with method 'head' and train_head False"),
        (
            PAIRS | {"alignment": AlignmentConfig(form="task")},
            "alignment form must be 'sentence' with nothing beside it",
        ),
        (
            PAIRS | {"alignment": AlignmentConfig(warmup_steps=2)},
            "alignment warmup_steps must be 0 with nothing beside it, got 2",
        ),
        (
            PAIRS | {"alignment": AlignmentConfig(weight=0.5)},
            "alignment weight must be 1.0 with nothing beside it, got 0.5",
        ),
    ],
)
def test_what_does_not_fit(backbone, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        run(backbone, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be a finite number, 0 or more, got -1.0"),
        ({"learning_rate": "1e-2"}, "learning_rate must be a finite number, 0 or more, got '1e-2'"),
        ({"weights_learning_rate": float("inf")}, "weights_learning_rate must be a finite number"),
        ({"projection_learning_rate": float("nan")}, "projection_learning_rate must be a finite number"),
        ({"head_learning_rate": True}, "head_learning_rate must be a finite number, 0 or more, got True"),
        ({"max_tokens": 0}, "max_tokens must be a positive integer, got 0"),
        ({"early_stopping_patience": 1.5}, "early_stopping_patience must be a positive integer, got 1.5"),
        ({"warmup_ratio": 1.0}, r"warmup_ratio must be in \[0, 1\), got 1.0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be a positive integer, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be a positive integer, got 0"),
        ({"num_train_epochs": 0}, "num_train_epochs must be a number above 0, got 0"),
        ({"max_steps": 0}, "max_steps must be a positive integer, or -1 for epochs, got 0"),
        ({"fsdp": True}, "fsdp must be None, nothing else is done here, got True"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0.0, nothing else is done here, got 0.1"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last must be False, nothing else is done here, got True"),
    ],
)
def test_bad_arguments(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(str(tmp_path / "run"), use_cpu=True, **settings)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_backbone_in_parts(tmp_path, monkeypatch, name):
    """As `accelerate launch` asks for it."""
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=f"ACCELERATE_USE_{name} must not be set: each process holds all of the"):
        TrainingArguments(str(tmp_path / "run"), use_cpu=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "pair"}, r"alignment form must be one of \('sentence', 'task'\), got 'pair'"),
        ({"schedule": "cosine"}, "alignment schedule must be one of"),
        ({"weight": -1.0}, "alignment weight must be a finite number, 0 or more, got -1.0"),
        ({"batch_size": 0}, "alignment batch_size must be an integer, 1 or more, got 0"),
        ({"warmup_steps": -1}, "alignment warmup_steps must be an integer, 0 or more, got -1"),
        ({"layer": 0}, "alignment layer must be an integer, 1 or more, got 0"),
        ({"distance": "cosine+l3"}, "distance must be one of .* got 'cosine.l3'"),
        ({"temperature": 0.0}, "temperature must be at least 1e-06 and finite, got 0.0"),
    ],
)
def test_bad_alignments(settings, message):
    with pytest.raises(ValueError, match=message):
        AlignmentConfig(**settings)


def test_form_of_a_task_that_has_none(backbone, tmp_path):
    class Formless(Classes):
        from fastprompt.tasks.base import Task

        align = Task.align

    with pytest.raises(
        ValueError, match="alignment form must be 'sentence' for the task 'classes', which has no other, got 'task'"
    ):
        trainer(backbone, tmp_path, **BOTH | {"task": Formless(), "alignment": AlignmentConfig(form="task")})


def test_a_head_of_zeros_that_does_not_train(backbone, tmp_path):
    class Blank(Classes):
        def build(self, *args):
            super().build(*args)
            self.head.weight.data.zero_()

    with pytest.raises(ValueError, match="train_head must be True for 'classes', whose head begins at 0, got False"):
        trainer(backbone, tmp_path, **TASK | {"task": Blank(), "train_head": False})


def test_defaults(tmp_path):
    """Ours where prompts need others, transformers' else; steps where steps are asked for."""
    made = TrainingArguments(str(tmp_path), use_cpu=True)
    assert (made.eval_strategy, made.save_strategy, made.load_best_model_at_end) == ("epoch", "epoch", True)
    assert (made.warmup_steps, made.max_grad_norm, made.weight_decay, made.report_to) == (0.1, 0.0, 0.0, [])
    assert isinstance(made, transformers.TrainingArguments) and made.get_warmup_steps(40) == 4
    for given, every in (({"max_steps": 12}, 3), ({"max_steps": 12, "eval_steps": 5}, 5), ({"eval_steps": 7}, 7)):
        made = TrainingArguments(str(tmp_path), use_cpu=True, **given)
        assert (made.eval_strategy, made.save_strategy) == ("steps", "steps")
        assert made.eval_steps == made.save_steps == every
    for given, steps in (
        ({"save_steps": 4, "max_steps": 12}, (4, 4)),  # what is said is not overruled
        ({"save_steps": 4}, (4, 4)),
        ({"save_steps": 6, "eval_steps": 3}, (3, 3)),  # or the best were lost
        ({"save_strategy": "steps"}, (500, 500)),
    ):
        made = TrainingArguments(str(tmp_path), use_cpu=True, **given)
        assert (made.eval_strategy, made.save_strategy, made.eval_steps, made.save_steps) == ("steps", "steps", *steps)
    for given, every in (({}, 10), ({"eval_steps": 2, "save_steps": 4}, 2), ({"save_strategy": "steps"}, 10)):
        made = TrainingArguments(str(tmp_path), use_cpu=True, eval_strategy="steps", **given)
        assert made.save_strategy == "steps" and made.save_steps == made.eval_steps == every  # or the best were lost
    for given in ({"eval_strategy": "no"}, {"save_strategy": "no"}):
        assert not TrainingArguments(str(tmp_path), use_cpu=True, **given).load_best_model_at_end
    assert TrainingArguments(str(tmp_path), use_cpu=True, warmup_steps=7).get_warmup_steps(40) == 7
    assert TrainingArguments(str(tmp_path), use_cpu=True, warmup_ratio=0.0).get_warmup_steps(40) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_dataset": translations(3)}, "train_dataset must have rows with text, text_pair of 'classes', or its"),
        ({"train_dataset": "rows.csv"}, "rows.csv: no such file"),
        ({"eval_dataset": {"de": paraphrases(2)}}, "eval_dataset, split de, row 0: got Text"),
        ({"pairs": [{"source": "w1", "target": 3}]}, "pairs, row 0, target: must be a text, got 3"),
    ],
)
def test_what_is_no_example(backbone, tmp_path, given, message):
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        trainer(backbone, tmp_path / "run", **BOTH | given)


def test_columns_that_are_not_there(backbone, tmp_path):
    for given, column in (
        (TASK | {"train_dataset": [{"text": "w1", "label": "a"}]}, "text_pair"),
        ({"pairs": [{"source": "w1"}]}, "target"),
    ):
        with pytest.raises((KeyError, ValueError), match=column):
            trainer(backbone, tmp_path / "run", **given)


def test_an_encoder_has_no_language_model_head(tmp_path):
    """A causal model comes with its head where there is a task, and without for the alignment alone."""
    folder = str(save_backbone("llama", tmp_path / "llama", "AutoModelForCausalLM", num_hidden_layers=1))
    with_head = trainer(folder, tmp_path / "task", **TASK).learner
    assert (
        with_head.backbone.get_output_embeddings() is not None and with_head.adapted.backbone is not with_head.backbone
    )
    assert trainer(folder, tmp_path / "alone", **PAIRS).learner.backbone.get_output_embeddings() is None


def test_rows_are_read_as_a_table_is():
    """A dataset's classes have their names; columns may have usual names; what cannot be used is left out."""
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    given = datasets.Dataset.from_list([{"sentence": "a", "label": n} for n in (1, -1, 0)], features=features)
    read = examples_of(tasks.get("classification"), given, "train_dataset")
    assert [(each.id, each.text, each.label) for each in read] == [(0, "a", "yes"), (2, "a", "no")]
