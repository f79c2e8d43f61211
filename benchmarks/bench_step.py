"""One training step, forward and backward, of a PEFT model as it is and after `fastprompt.fuse`.

    FASTPROMPT_MODELS=DIR FASTPROMPT_PAIRS=FILE python -m pytest benchmarks/bench_step.py --benchmark-json=step.json

DIR holds folders of real models (those of CASES that are not there get random weights of the same shape: time does not
depend on them), FILE sentence pairs as PAWS-X has them (sentence, tab, sentence, tab, label; without it random tokens).
A ragged batch, padded to its longest. Losses, and errors of the prompt gradients against float64, are checked and
printed, then both steps are timed in turn: `stock_over_ours` is the median of the ratios turn by turn. `floor_seconds`
is what the FLOPs that must be done take at the rate of torch's own matrix product. Peak memory, with the weights, comes
from a process of its own each. And a step of a prefix in the upper half of the encoder, whole and begun from what the
lower half gave once.
"""

import copy
import json
import os
import statistics
import sys
from pathlib import Path

import pytest
import torch
import transformers
from memory import high_water, in_process
from timing import in_turns, matrix_rate, ratio

import fastprompt

peft = pytest.importorskip("peft")

ENCODER = dict(vocab_size=32_000, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
CONFIGS = {
    "encoder-12x384": transformers.XLMRobertaConfig(
        **ENCODER, hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536
    ),
    "encoder-12x768": transformers.XLMRobertaConfig(
        **ENCODER, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    ),
    "smollm2-135m": transformers.LlamaConfig(
        vocab_size=49_152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, tie_word_embeddings=True,
    ),
    "gemma-3-270m": transformers.Gemma3TextConfig(
        vocab_size=262_144, hidden_size=640, num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1,
        head_dim=256, intermediate_size=2048, sliding_window=512, tie_word_embeddings=True,
    ),
}  # fmt: skip
# Which model, what kind of prompt, and what is labelled: a class, a pair's last token, or every token.
CASES = [(name, kind, "last") for name in ("smollm2-135m", "gemma-3-270m") for kind in ("prompt", "prefix")]
CASES += [("smollm2-135m", "prompt", "all"), ("smollm2-135m", "prefix", "all")]
CASES += [
    (name, "prefix", "class") for name in ("encoder-12x768", "encoder-12x384")
]  # with a prompt PEFT pools wrongly
NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]
SENTENCES, MEAN_LENGTH, PROMPT_ROWS, TURNS = 8, 55, 32, 5
AUTO = {"class": "AutoModelForSequenceClassification"}
TASK = {"class": "SEQ_CLS"}


def folder_of(name: str) -> Path | None:
    folder = Path(os.environ.get("FASTPROMPT_MODELS", "")) / name
    return folder if "FASTPROMPT_MODELS" in os.environ and folder.is_dir() else None


def stock_model(name: str, kind: str, labelled: str, device: str):
    torch.manual_seed(0)
    auto = getattr(transformers, AUTO.get(labelled, "AutoModelForCausalLM"))
    folder = folder_of(name)
    backbone = auto.from_pretrained(folder, dtype=torch.float32) if folder else auto.from_config(CONFIGS[name])
    make = peft.PrefixTuningConfig if kind == "prefix" else peft.PromptTuningConfig
    config = make(task_type=TASK.get(labelled, "CAUSAL_LM"), num_virtual_tokens=PROMPT_ROWS)
    return peft.get_peft_model(backbone, config).to(device).train()


def ragged_batch(name: str, labelled: str, device: str) -> dict[str, torch.Tensor]:
    file, folder = os.environ.get("FASTPROMPT_PAIRS"), folder_of(name)
    torch.manual_seed(0)
    if file and folder:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        rows = [line.rstrip("\n").split("\t") for line in Path(file).read_text("utf-8").splitlines()[:SENTENCES]]
        texts = (f"{row[0]} {row[1]} Same meaning? {'yes' if row[2] == '1' else 'no'}" for row in rows)
        sentences = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    else:
        lengths = torch.randint(MEAN_LENGTH // 2, MEAN_LENGTH * 3 // 2, (SENTENCES,))
        sentences = [torch.randint(10, CONFIGS[name].vocab_size, (int(length),)) for length in lengths]
    ids = torch.nn.utils.rnn.pad_sequence(sentences, batch_first=True, padding_value=1)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sentences], batch_first=True)
    last = mask.sum(1, keepdim=True) - 1
    labels = {
        "last": torch.full_like(ids, -100).scatter(1, last, ids.gather(1, last)),
        "all": ids.masked_fill(mask == 0, -100),
        "class": torch.arange(SENTENCES) % 2,
    }[labelled]
    return {n: x.to(device) for n, x in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def step(model, inputs):
    loss = model(**inputs).loss
    model.zero_grad()
    loss.backward()
    return loss.detach(), model.prompt_encoder["default"].embedding.weight.grad


def least_flops(model, kind: str, inputs) -> int:
    """Two products a weight of the layers, forward and for the gradient of what goes in, and as much for the labels."""
    base, causal = model.get_base_model(), inputs["labels"].ndim == 2
    embedding = base.get_input_embeddings().weight
    layers = sum(p.numel() for n, p in base.base_model.named_parameters() if p.ndim == 2 and "embed" not in n)
    rows = int(inputs["attention_mask"].sum())
    if kind == "prompt":
        rows += PROMPT_ROWS * (1 if causal else SENTENCES)
    labelled = int((inputs["labels"] != -100).sum()) if causal else 0
    return 4 * (rows * layers + labelled * embedding.numel())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_step(benchmark, case, device):
    stock = stock_model(*case, device)
    inputs = ragged_batch(case[0], case[2], device)
    fused = fastprompt.fuse(copy.deepcopy(stock)).train()
    losses, errors = {}, {}
    _, exact = step(fused.double(), inputs)
    for way, model in (("stock", stock), ("ours", fused.float())):
        loss, gradient = step(model, inputs)
        losses[way], errors[way] = float(loss), float((gradient - exact).abs().max() / exact.abs().max())
    assert abs(losses["ours"] - losses["stock"]) < 1e-4 * losses["stock"]
    assert errors["ours"] < 2 * errors["stock"] + 1e-6
    exact = None

    seconds = in_turns({"stock": lambda: step(stock, inputs), "ours": lambda: step(fused, inputs)}, TURNS, device)
    benchmark.group = " ".join((*case, device))
    benchmark.extra_info |= {
        "real_model": folder_of(case[0]) is not None,
        "stock_over_ours": ratio(seconds["stock"], seconds["ours"]),
        "seconds": {name: statistics.median(each) for name, each in seconds.items()},
        "floor_seconds": least_flops(fused, case[1], inputs) / matrix_rate(device),
        "loss": losses,
        "gradient_error": errors,
        "tokens": [int(inputs["attention_mask"].sum()), inputs["input_ids"].numel()],
    }
    if device == "cpu":
        benchmark.extra_info["peak_mib"] = {name: in_process(__file__, name, *case) for name in seconds}
    print("", benchmark.group, benchmark.extra_info)
    benchmark.pedantic(step, (fused, inputs), rounds=1)


@pytest.mark.parametrize("device", DEVICES)
def test_upper_half(benchmark, device):
    """Frozen lower layers, run each step and read from what they gave before."""
    torch.manual_seed(0)
    config = fastprompt.PromptConfig("prefix", PROMPT_ROWS, layers=range(6, 12))
    backbone = transformers.AutoModel.from_config(CONFIGS["encoder-12x384"])
    model = fastprompt.PromptModel(backbone, config).to(device).eval()
    inputs = ragged_batch("encoder-12x384", "class", device)
    del inputs["labels"]
    lower = model.lower_states(**inputs)

    def run(lower_states):
        loss = model(**inputs, lower_states=lower_states).last_hidden_state.sum(1).square().mean()
        model.zero_grad()
        loss.backward()
        return loss.detach(), model.prompt.weight.grad

    for whole, started in zip(run(None), run(lower), strict=True):
        assert torch.equal(whole, started)
    seconds = in_turns({"whole": lambda: run(None), "started": lambda: run(lower)}, 3 * TURNS, device)
    benchmark.group = f"encoder-12x384 prefix in the upper half {device}"
    benchmark.extra_info["whole_over_started"] = ratio(seconds["whole"], seconds["started"])
    benchmark.extra_info["whole_seconds"] = statistics.median(seconds["whole"])
    benchmark.pedantic(run, (lower,), rounds=TURNS)


def _main() -> None:
    way, *case = json.loads(sys.argv[1])
    model, inputs = stock_model(*case, "cpu"), ragged_batch(case[0], case[2], "cpu")
    if way == "ours":
        fastprompt.fuse(model)
    step(model, inputs)
    print(high_water(lambda: step(model, inputs))[1])


if __name__ == "__main__":
    _main()
