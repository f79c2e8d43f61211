"""TRL's SFTTrainer over a PromptModel and a fused PeftModel: its loss is its own, of its own head."""

import copy
import warnings

import peft
import pytest
import torch
from helpers import VOCABULARY, build, save_backbone
from test_trainers import model_of, pairs, trained
from torch.nn.functional import cross_entropy

from fastprompt import PromptModel

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

LENGTHS = 6, 4, 5, 7
CLM = "AutoModelForCausalLM"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    import transformers

    folder = save_backbone("llama", tmp_path_factory.mktemp("trl"), CLM)
    made = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    made.eos_token = "</s>"
    return made


def rows() -> datasets.Dataset:
    made = [torch.randint(5, VOCABULARY, (n,)).tolist() for n in LENGTHS]
    return datasets.Dataset.from_list([{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in made])


def trainer(model, data, tokenizer, folder, metrics=None, **more):
    arguments = {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 0.5, "optim": "sgd"}
    arguments |= {"lr_scheduler_type": "constant", "max_grad_norm": 0, "report_to": "none", "use_cpu": True}
    arguments |= {"save_strategy": "no", "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False} | more
    arguments["shuffle_dataset"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trl.SFTTrainer(
            *(model, trl.SFTConfig(str(folder), **arguments)),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
            compute_metrics=metrics,
        )


def logits_and_labels(model, data) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all that is predicted from the text, sample by sample."""
    logits, labels = [], []
    for row in data:
        logits.append(model(input_ids=torch.tensor([row["input_ids"]])).logits[0, -len(row["input_ids"]) : -1])
        labels.append(torch.tensor(row["input_ids"][1:]))
    return torch.cat(logits), torch.cat(labels)


def by_hand(model, data, smoothing: float = 0.0, dft: bool = False) -> tuple[torch.Tensor, ...]:
    """The gradients of one step, the loss and the share of labels that are the likeliest."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    logits, labels = logits_and_labels(model, data)
    each = cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    loss = (each * (-each).exp().detach() if dft else each).mean()
    right = (logits.argmax(-1) == labels).float().mean()
    return torch.autograd.grad(loss, parameters), float(loss.detach()), float(right)


MODES = {
    "nll": {},
    "dft": {"loss_type": "dft"},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "padding free": {"padding_free": True, "max_length": None},
    "packing": {"packing": True, "max_length": 32},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
}


@pytest.mark.parametrize(("maker", "mode"), pairs(MODES, ("nll", "padding free")))
def test_a_step(maker, mode, tokenizer, tmp_path):
    model, data = model_of(maker), rows()
    before = trained(model)
    options = {"smoothing": 0.1} if mode == "label smoothing" else {"dft": True} if mode == "dft" else {}
    gradients, loss, accuracy = by_hand(model.train(), data, **options)
    run = trainer(model, data, tokenizer, tmp_path, **MODES[mode] | {"max_steps": 1, "logging_steps": 1})
    assert run.train().training_loss == pytest.approx(loss, rel=1e-4)
    logged = run.state.log_history[0]
    if mode != "accumulation":  # there it is the mean over the pieces
        assert logged["mean_token_accuracy"] == pytest.approx(accuracy, rel=1e-4)
    assert logged["entropy"] > 0 and logged["num_tokens"] == sum(LENGTHS)
    for (name, was), gradient, now in zip(before.items(), gradients, trained(model).values(), strict=True):
        torch.testing.assert_close(now, was - 0.5 * gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_fused_trains_as_unfused(kind, tokenizer, tmp_path):
    """With labels of first tokens, which PEFT's prompts predict; and the evaluation, with metrics, is the same."""
    made = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}[kind]
    data = rows().map(lambda row: {"labels": row["input_ids"]})
    stock = peft.get_peft_model(build("llama", CLM, torch.float32), made(task_type="CAUSAL_LM", num_virtual_tokens=3))
    fused = model_of(f"fused {kind}")
    fused.load_state_dict(stock.state_dict())
    got = []
    for model in (stock, fused):
        run = trainer(model, data, tokenizer, tmp_path, metrics=lambda predicted: {})
        loss, evaluated = run.train().training_loss, run.evaluate()
        got.append((loss, evaluated["eval_loss"], evaluated["eval_mean_token_accuracy"], evaluated["eval_entropy"]))
    assert got[1] == pytest.approx(got[0], rel=1e-4)
    torch.testing.assert_close(trained(fused), trained(stock), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("maker", ["prefix", "fused prompt"])
def test_checkpoints(maker, tokenizer, tmp_path):
    """With TRL's defaults, of bfloat16 and checkpointing: what resumes ends where what ran through does."""
    start, data, ended = model_of(maker), rows(), []
    for resume in (None, str(tmp_path / "checkpoint-1")):
        model = copy.deepcopy(start)
        options = {"bf16": True, "gradient_checkpointing": True, "save_strategy": "steps", "save_steps": 1}
        trainer(model, data, tokenizer, tmp_path, **options).train(resume_from_checkpoint=resume)
        ended.append(trained(model))
    torch.testing.assert_close(*ended)
    for name, was in trained(start).items():
        assert (ended[0][name] - was).abs().max() > 0.01
    assert (tmp_path / "README.md").is_file()
    assert PromptModel.model_tags == ["fastprompt", "prompt-tuning"], "TRL's are the instance's"


@pytest.mark.parametrize("maker", ["prefix", "fused prompt"])
def test_places_of_log_probabilities(maker):
    """Where other trainers of TRL, which cut off the first columns, look for them."""
    model, data = model_of(maker).eval(), rows()
    trl.trainer.utils.add_fused_lm_head(model.get_base_model() if "fused" in maker else model)
    ids = torch.tensor([row["input_ids"][:4] for row in data])
    out = model(input_ids=ids, labels=ids, fused_lm_head=True)
    expected = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(out.log_probs[:, -3:], expected, rtol=1e-4, atol=1e-5)
    if "fused" in maker:
        with pytest.raises(ValueError, match="labels must be given with fused_lm_head, got None"):
            model(input_ids=ids, fused_lm_head=True)
