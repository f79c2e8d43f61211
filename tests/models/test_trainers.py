"""transformers' Trainer over a PromptModel and a fused PeftModel: its options, its losses, its checkpoints, the Hub."""

import itertools
import pickle
from pathlib import Path

import accelerate
import huggingface_hub
import numpy as np
import peft
import pytest
import torch
import transformers
from helpers import VOCABULARY, build, save_backbone
from safetensors import safe_open
from torch.nn.functional import cross_entropy

import fastprompt
from fastprompt import PromptConfig, PromptModel

P, RATE, CLM = 3, 0.5, "AutoModelForCausalLM"
MAKERS = ["prefix", "prompt", "fused prefix", "fused prompt"]
SMOOTHING, LENGTHS = 0.1, (6, 4, 5, 6)
TASKS = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}


def model_of(maker: str, family: str = "llama", auto: str = CLM, **config):
    backbone, kind = build(family, auto, torch.float32, **config), maker.split()[-1]
    if maker == kind:
        return PromptModel(backbone, PromptConfig(kind, P, init_scale=1.0))
    made = peft.PrefixTuningConfig if kind == "prefix" else peft.PromptTuningConfig
    return fastprompt.fuse(peft.get_peft_model(backbone, made(task_type=TASKS[auto], num_virtual_tokens=P)))


def pairs(options, whole=()) -> list[tuple[str, str]]:
    """Makers with options: all with those of `whole`, one of each class with the others."""
    return [(maker, option) for option in options for maker in (MAKERS if option in whole else MAKERS[0::3])]


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def examples() -> list[dict]:
    """The first token has no label: nothing stands before it in a batch that is flattened."""
    made = [{"input_ids": torch.randint(5, VOCABULARY, (n,)).tolist()} for n in (6, 4, 5, 7)]
    return [each | {"labels": [-100, *each["input_ids"][1:]]} for each in made]


def padded(data: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(each["input_ids"]) for each in data)

    def rows(values, fill):
        return torch.tensor([each + [fill] * (longest - len(each)) for each in values])

    mask = rows([[1] * len(each["input_ids"]) for each in data], 0)
    ids, labels = ([each[name] for each in data] for name in ("input_ids", "labels"))
    return {"input_ids": rows(ids, 1), "attention_mask": mask, "labels": rows(labels, -100)}


def trainer(model, data, folder: Path, kind=transformers.Trainer, **more) -> transformers.Trainer:
    """Whole batches, and plain gradient descent: what the options change can be told from what they must not."""
    names = ("data_collator", "compute_metrics", "callbacks")
    own = {"data_collator": padded} | {name: more.pop(name) for name in names if name in more}
    arguments = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": RATE, "optim": "sgd"}
    arguments |= {"lr_scheduler_type": "constant", "max_grad_norm": 0, "report_to": "none", "use_cpu": True}
    arguments |= {"save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"} | more
    which = transformers.Seq2SeqTrainingArguments
    if kind is transformers.Trainer:
        which = transformers.TrainingArguments
    return kind(model, which(str(folder), **arguments), train_dataset=data, eval_dataset=data, **own)


def by_hand(model, data, steps: int = 2) -> dict[str, torch.Tensor]:
    """What the same steps make of a model; it stays as it is."""
    twin = pickle.loads(pickle.dumps(model)).train()
    parameters = [p for p in twin.parameters() if p.requires_grad]
    for _ in range(steps):
        gradients = torch.autograd.grad(twin(**padded(data)).loss, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0 if gradient is None else RATE * gradient
    return trained(twin)


OPTIONS = {
    "plain": {},
    "Seq2SeqTrainer": {"kind": transformers.Seq2SeqTrainer},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "checkpointing": {"activation_checkpointing": True},
    "bf16": {"bf16": True},
    "flattening": {"data_collator": transformers.DataCollatorWithFlattening()},
    "flattening with bounds": {
        "data_collator": transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    },
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
}


@pytest.mark.parametrize(("maker", "option"), pairs(OPTIONS, ("plain", "accumulation")))
def test_it_trains_what_the_same_steps_by_hand_do(maker, option, tmp_path):
    model, data = model_of(maker), examples()
    before, expected = trained(model), by_hand(model, data)
    trainer(model, data, tmp_path, **OPTIONS[option]).train()
    tolerance = {"rtol": 0.1, "atol": 0.02} if option == "bf16" else {"rtol": 1e-3, "atol": 1e-5}
    got = trained(model)
    torch.testing.assert_close(got, expected, **tolerance)
    assert any((got[name] - before[name]).abs().max() > 0.03 for name in got)


@pytest.mark.parametrize("maker", ["prefix", "fused prompt"])
def test_torch_compile(maker, tmp_path):
    model, data = model_of(maker, num_hidden_layers=1), examples()
    expected = by_hand(model, data, 1)
    torch.compiler.reset()
    trainer(model, data, tmp_path, torch_compile=True, torch_compile_backend="eager", max_steps=1).train()
    torch.testing.assert_close(trained(model), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("maker", MAKERS[1:3])
def test_neftune(maker, tmp_path):
    """Its noise is that of a padded batch, and is gone after training."""
    model, data, shapes = model_of(maker), examples(), []
    expected = by_hand(model, data)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    trainer(model, data, tmp_path, neftune_noise_alpha=5.0).train()
    noisy = trained(model)
    assert shapes[-1] == (4, 7, 48) and any(not torch.allclose(noisy[name], expected[name]) for name in noisy)


@pytest.mark.parametrize("maker", MAKERS[1:3])
def test_metrics_and_generation(maker, tmp_path):
    model, data = model_of(maker), examples()

    def metrics(predicted):
        labels = predicted.label_ids[:, 1:]
        right = (predicted.predictions.argmax(-1)[:, :-1] == labels)[labels != -100]
        return {"accuracy": float(right.mean()), "columns": predicted.predictions.shape[1]}

    got = trainer(model, data, tmp_path, compute_metrics=metrics).evaluate()
    with torch.no_grad():
        out = model.eval()(**padded(data))
    labels = padded(data)["labels"][:, 1:]
    right = (out.logits.argmax(-1)[:, :-1] == labels)[labels != -100]
    assert got["eval_loss"] == pytest.approx(float(out.loss), rel=1e-5)
    assert (got["eval_accuracy"], got["eval_columns"]) == (pytest.approx(float(right.float().mean())), 7)
    shapes = []
    run = trainer(
        *(
            model,
            [each | {"input_ids": each["input_ids"][:4], "labels": each["labels"][:4]} for each in data],
            tmp_path,
        ),
        kind=transformers.Seq2SeqTrainer,
        predict_with_generate=True,
        generation_max_length=9,
        compute_metrics=lambda predicted: shapes.append(predicted.predictions.shape) or {},
    )
    run.evaluate()
    assert shapes[0][0] == 4 and shapes[0][1] > 4


# -- losses ---------------------------------------------------------------------------------------------------------

ONE_STEP = {"max_steps": 1, "data_collator": transformers.default_data_collator}
CASES = [
    ("llama", CLM),
    ("gemma3_text", CLM),
    ("bert", "AutoModelForSequenceClassification"),
    ("xlm-roberta", "AutoModelForTokenClassification"),
    ("bert", "AutoModelForQuestionAnswering"),
]


def examples_of(auto: str) -> list[dict]:
    made = []
    for n, length in enumerate(LENGTHS):
        ids = torch.randint(5, VOCABULARY, (length,)).tolist()
        pad = max(LENGTHS) - length
        made.append({"input_ids": ids + [1] * pad, "attention_mask": [1] * length + [0] * pad})
        if auto == "AutoModelForQuestionAnswering":
            made[-1] |= {"start_positions": n % 3, "end_positions": 3}
        elif auto == "AutoModelForSequenceClassification":
            made[-1]["labels"] = n % 2
        else:
            labels = ids if auto == CLM else [i % 2 for i in ids]
            made[-1]["labels"] = labels + [-100] * pad
    return made


def expected_loss(model, auto: str, data: list[dict], smoothing: float) -> float:
    """Over all that is labelled and predicted from the text, as transformers' LabelSmoother takes it."""
    inputs = {name: torch.tensor([each[name] for each in data]) for name in data[0]}
    labels = inputs.pop("labels", None)
    with torch.no_grad():
        if labels is None:
            return float(model.eval()(**inputs).loss)
        logits = model.eval()(**inputs).logits
    if auto == CLM:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return float(cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=smoothing))


@pytest.mark.parametrize("maker", ["prefix", "prompt", "fused prefix", "fused prompt"])
@pytest.mark.parametrize(("family", "auto"), CASES)
def test_label_smoothing(family, auto, maker, tmp_path):
    model, data = model_of(maker, family, auto), examples_of(auto)
    run = trainer(model, data, tmp_path, **ONE_STEP, label_smoothing_factor=SMOOTHING)
    before = expected_loss(model, auto, data, SMOOTHING)
    assert run.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-5)
    assert run.train().training_loss == pytest.approx(before, rel=1e-5)
    after = expected_loss(model, auto, data, SMOOTHING)
    assert after != before and run.evaluate()["eval_loss"] == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize("maker", ["prefix", "fused prompt"])
@pytest.mark.parametrize(("family", "auto"), [CASES[0], *CASES[2:]])
def test_the_loss_of_a_step_in_two_pieces(family, auto, maker, tmp_path):
    """Under gradient accumulation the loss is the whole step's, counted as transformers counts labels."""
    model, data = model_of(maker, family, auto), examples_of(auto)
    run = trainer(model, data, tmp_path, **ONE_STEP, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    evaluated = run.evaluate()["eval_loss"]
    with torch.no_grad():
        inputs = {name: torch.tensor([each[name] for each in data]) for name in data[0]}
        more = {}
        if auto == CLM:
            more["num_items_in_batch"] = int((inputs["labels"][:, 1:] != -100).sum())
        expected = float(model.eval()(**inputs, **more).loss)
    assert evaluated == pytest.approx(expected, rel=1e-5)
    if auto == CLM:
        assert run.train().training_loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("auto", [CLM, "AutoModelForSequenceClassification"])
def test_a_loss_of_ones_own(auto, tmp_path):
    model, data = model_of("prefix", auto=auto), examples_of(auto)
    run, seen = trainer(model, data, tmp_path, **ONE_STEP), []
    run.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: (
        seen.append((outputs.logits.shape, labels.shape)) or outputs.logits.square().mean()
    )
    run.train()
    assert seen == [((4, 6, VOCABULARY), (4, 6)) if auto == CLM else ((4, 2), (4,))]


def test_its_name_is_its_own():
    model = model_of("prefix", "bert", "AutoModelForQuestionAnswering")
    assert repr(model).startswith("PromptModelForQuestionAnswering(\n  (backbone): BertForQuestionAnswering(")
    assert isinstance(model, PromptModel)
    assert repr(model_of("prompt")).startswith("PromptModel(\n  (backbone): Llama")


# -- checkpoints, the Hub, and what else is asked ---------------------------------------------------------------------


class Scores:
    """Of evaluations, whatever was predicted: the second is the best."""

    def __init__(self) -> None:
        self.scores = itertools.chain([1.0, 2.0], itertools.repeat(0.0))

    def __call__(self, predicted) -> dict[str, float]:
        return {"score": next(self.scores)}


def bank():
    """All that a PromptModel may have: tied weights, an encoder, adapters, several prompts."""
    backbone = build("llama", CLM, torch.float32, tie_word_embeddings=True)
    model = PromptModel(backbone, PromptConfig("prefix", P, encoder="mlp", adapter_size=4))
    model.add_prompt("cy")
    return model


@pytest.mark.parametrize("maker", ["prompt", "bank", "fused prefix", "fused prompt"])
def test_checkpoints_hold_the_adapter_alone(maker, tmp_path):
    """They resume, the best one is loaded at the end, training stops early, and `from_pretrained` reads them."""
    made = bank() if maker == "bank" else model_of(maker)
    start, data = pickle.dumps(made), examples()
    every = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    straight = pickle.loads(start)
    trainer(straight, data, tmp_path / "a", **every, optim="adamw_torch").train()
    size = sum(tensor.numel() for tensor in trained(straight).values())
    for file in (tmp_path / "a/checkpoint-2").rglob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            assert sum(stored.get_tensor(name).numel() for name in stored.keys()) <= 2 * size  # noqa: SIM118
    again = pickle.loads(start)
    run = trainer(again, data, tmp_path / "a", **every, optim="adamw_torch")
    run.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    torch.testing.assert_close(trained(again), trained(straight), rtol=1e-5, atol=1e-6)

    best = pickle.loads(start)
    every |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    run = trainer(
        *(best, data, tmp_path / "b"),
        **every,
        metric_for_best_model="score",
        greater_is_better=True,
        compute_metrics=Scores(),
        callbacks=[transformers.EarlyStoppingCallback(1)],
    )
    run.train()
    assert run.state.global_step == 3 and run.state.best_model_checkpoint.endswith("checkpoint-2")
    torch.testing.assert_close(trained(best), by_hand(pickle.loads(start), data), rtol=1e-3, atol=1e-5)
    backbone = build("llama", CLM, torch.float32, tie_word_embeddings=maker == "bank")
    if maker.startswith("fused"):
        read = peft.PeftModel.from_pretrained(backbone, tmp_path / "b/checkpoint-2")
        read = fastprompt.fuse(read)
    else:
        read = PromptModel.from_pretrained(backbone, tmp_path / "b/checkpoint-2")
        assert read.prompt_names == best.prompt_names
    inputs = {name: x for name, x in padded(data).items() if name != "labels"}
    torch.testing.assert_close(read.eval()(**inputs).logits, best.eval()(**inputs).logits)


def test_a_model_whose_tensors_are_elsewhere(tmp_path):
    """accelerate's way: the tensors come with the call, as of a model that is sharded over processes."""
    model, whole = bank(), bank()
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    accelerator = accelerate.Accelerator(cpu=True)
    options = {"save_function": accelerator.save, "state_dict": accelerator.get_state_dict(whole)}
    accelerator.unwrap_model(model).save_pretrained(tmp_path / "not", is_main_process=False, **options)
    with pytest.raises(ValueError, match="state_dict must be given for a model whose tensors are not whole.* prompt.w"):
        model.save_pretrained(tmp_path / "not")
    assert not (tmp_path / "not").exists()
    accelerator.unwrap_model(model).save_pretrained(tmp_path, is_main_process=accelerator.is_main_process, **options)
    assert all(not len(parameter) for parameter in model.parameters()), "it stays as it was"
    read = PromptModel.from_pretrained(whole.backbone, tmp_path, trainable=True)
    torch.testing.assert_close(trained(read), trained(whole))


class Hub:
    """In the place of huggingface_hub's."""

    uploads = []

    def __init__(self, token=None) -> None:
        pass

    def create_repo(self, repo_id, private=None, exist_ok=False):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.uploads.append((repo_id, {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}))


def test_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    save_backbone("llama", tmp_path / "base", CLM)
    backbone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model, data = PromptModel(backbone, PromptConfig("prefix", P)), examples()
    model.push_to_hub("someone/prompt")
    repo_id, files = Hub.uploads.pop()
    assert repo_id == "someone/prompt"
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "fastprompt_config.json"}
    about = huggingface_hub.ModelCard(files["README.md"].decode()).data
    assert (about.base_model, about.library_name) == (str(tmp_path / "base"), "fastprompt")
    assert about.tags == ["fastprompt", "prompt-tuning"]
    run = trainer(model, data, tmp_path / "run")
    run.save_model()
    model.config._name_or_path = "someone/base"  # no folder
    run.create_model_card()
    assert huggingface_hub.ModelCard.load(tmp_path / "run/README.md").data.base_model == "someone/base"


def test_what_is_asked_of_a_prompt_model():
    model = model_of("prompt", tie_word_embeddings=True)
    assert isinstance(model, transformers.PreTrainedModel)
    assert model.config is model.backbone.config and model.prompt_config == PromptConfig("prompt", P, init_scale=1.0)
    assert model.config.get_text_config().vocab_size == VOCABULARY
    assert model.generation_config is model.backbone.generation_config and not hasattr(model, "hf_device_map")
    assert model.device == model.prompt.weight.device and model.dtype == torch.float32
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert model.resize_token_embeddings(70).weight is model.get_output_embeddings().weight
    for name in ("cuda", "half"):  # of modules, and transformers'
        assert callable(getattr(model, name))
    with pytest.raises(TypeError, match="backbone must be a transformers model, got PromptModel"):
        PromptModel(model, PromptConfig("prompt", P))
    np.testing.assert_equal(model.num_parameters(only_trainable=True), P * 48)
