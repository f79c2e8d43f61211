"""One training step, forward and backward, of a PEFT model as it is and after `fastprompt.fuse`.

    python -m pytest benchmarks/bench_step.py --benchmark-json=step.json

Models of real shapes with random weights, since time does not depend on them. A ragged batch of sentence pairs,
padded to its longest. Loss and prompt gradient are checked equal, then both steps are timed in turn: `stock_over_ours`
is the median of the ratios turn by turn. And a step of a prefix in the upper half of the encoder, whole and begun from
what the lower half gave once.
"""

import copy
import statistics

import pytest
import torch
import transformers
from timing import in_turns, ratio

import fastprompt

peft = pytest.importorskip("peft")

ENCODER = dict(vocab_size=32_000, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
CONFIGS = {
    "encoder-12x384": transformers.XLMRobertaConfig(
        **ENCODER, hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536
    ),
    "decoder-30x576": transformers.LlamaConfig(
        vocab_size=49_152, hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536,
    ),
}  # fmt: skip
NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]
SENTENCES, MEAN_LENGTH, PROMPT_ROWS, TURNS = 8, 40, 32, 7


def models(shape: str, kind: str, device: str):
    torch.manual_seed(0)
    causal = shape.startswith("decoder")
    backbone = getattr(transformers, "AutoModelForCausalLM" if causal else "AutoModel").from_config(CONFIGS[shape])
    make = peft.PrefixTuningConfig if kind == "prefix" else peft.PromptTuningConfig
    config = make(task_type="CAUSAL_LM" if causal else "FEATURE_EXTRACTION", num_virtual_tokens=PROMPT_ROWS)
    stock = peft.get_peft_model(backbone, config).to(device)
    return stock.train(), fastprompt.fuse(copy.deepcopy(stock)).train()


def ragged_batch(vocabulary: int, device: str, causal: bool) -> dict[str, torch.Tensor]:
    lengths = torch.randint(MEAN_LENGTH // 2, MEAN_LENGTH * 3 // 2, (SENTENCES, 1))
    mask = (torch.arange(int(lengths.max()))[None, :] < lengths).long()
    ids = torch.randint(10, vocabulary, mask.shape).masked_fill(mask == 0, 1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if causal:  # one labelled token, the last
        inputs["labels"] = torch.full_like(ids, -100).scatter(1, lengths - 1, ids.gather(1, lengths - 1))
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("shape", CONFIGS)
def test_step(benchmark, shape, kind, device):
    stock, fused = models(shape, kind, device)
    causal = shape.startswith("decoder")
    inputs = ragged_batch(CONFIGS[shape].vocab_size, device, causal)
    mask = inputs["attention_mask"].unsqueeze(-1)

    def step(model):
        output = model(**inputs)
        if causal:
            loss = output.loss
        else:
            states = output.last_hidden_state[:, -mask.shape[1] :]
            loss = (states * mask).sum(1).square().mean()
        model.zero_grad()
        loss.backward()
        return loss.detach(), model.prompt_encoder["default"].embedding.weight.grad

    (loss, gradient), (stock_loss, stock_gradient) = step(fused), step(stock)
    torch.testing.assert_close(loss, stock_loss, rtol=1e-4, atol=0)
    assert (gradient - stock_gradient).abs().max() < 1e-4 * stock_gradient.abs().max()

    seconds = in_turns({"stock": lambda: step(stock), "ours": lambda: step(fused)}, TURNS, device)
    benchmark.group = f"{shape} {kind} {device}"
    benchmark.extra_info["stock_over_ours"] = ratio(seconds["stock"], seconds["ours"])
    benchmark.extra_info["stock_seconds"] = statistics.median(seconds["stock"])
    benchmark.pedantic(step, (fused,), rounds=TURNS)


@pytest.mark.parametrize("device", DEVICES)
def test_upper_half(benchmark, device):
    """Frozen lower layers, run each step and read from what they gave before."""
    torch.manual_seed(0)
    config = fastprompt.PromptConfig("prefix", PROMPT_ROWS, layers=range(6, 12))
    backbone = transformers.AutoModel.from_config(CONFIGS["encoder-12x384"])
    model = fastprompt.PromptModel(backbone, config).to(device).eval()
    inputs = ragged_batch(CONFIGS["encoder-12x384"].vocab_size, device, causal=False)
    lower = model.lower_states(**inputs)

    def step(lower_states):
        loss = model(**inputs, lower_states=lower_states).last_hidden_state.sum(1).square().mean()
        model.zero_grad()
        loss.backward()
        return loss.detach(), model.prompt.weight.grad

    for whole, started in zip(step(None), step(lower), strict=True):
        assert torch.equal(whole, started)
    seconds = in_turns({"whole": lambda: step(None), "started": lambda: step(lower)}, 3 * TURNS, device)
    benchmark.group = f"encoder-12x384 prefix in the upper half {device}"
    benchmark.extra_info["whole_over_started"] = ratio(seconds["whole"], seconds["started"])
    benchmark.extra_info["whole_seconds"] = statistics.median(seconds["whole"])
    benchmark.pedantic(step, (lower,), rounds=TURNS)
