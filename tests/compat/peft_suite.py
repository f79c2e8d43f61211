"""PEFT's own tests of prompt learning, run with every prompt model fused: which pass, which are refused, and why.

    python tests/compat/peft_suite.py PEFT [--workers 2] [--select "t5 and prefix"]

PEFT is a checkout of github.com/huggingface/peft; only its `tests` folder is read, and the installed peft is what runs.
Those tests load small models and data sets from the hub by name: here a folder of the same name stands in the working
directory, with a random model of the same family, or with some sentences, so that no hub is asked. The tests run twice,
as they are and with `fastprompt.fuse` behind `get_peft_model` and `PeftModel.from_pretrained`. A test that fails as it
is (for want of another file of the hub, say) is left out of the count.

With `-p peft_suite` this file is also the plugin of pytest that fuses.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import types
from collections import Counter, defaultdict
from pathlib import Path

FILES = (
    *("test_decoder_models.py", "test_encoder_decoder_models.py", "test_feature_extraction_models.py"),
    *("test_seq_classifier.py", "test_cartridge.py", "test_cpt.py", "test_multitask_prompt_tuning.py"),
)
KINDS = "PromptTuning or PrefixTuning or PromptEncoder or CPT or Cartridge or Multitask"
KINDS += " or cartridge or cpt or multitask or prompt or prefix"
RESULTS, FUSED = "FASTPROMPT_PEFT_SUITE_RESULTS", "FASTPROMPT_PEFT_SUITE_FUSED"

SMALL = dict(vocab_size=1024, hidden_size=32, num_hidden_layers=2, intermediate_size=37, num_attention_heads=4)
ROPE = SMALL | dict(num_key_value_heads=2, max_position_embeddings=512)
ENCODER = SMALL | dict(max_position_embeddings=512)
GPT = dict(vocab_size=1024, n_embd=32, n_layer=2, n_head=4, n_positions=512)
OPT = dict(vocab_size=50265, hidden_size=16, num_hidden_layers=2, ffn_dim=20, num_attention_heads=4)
T5 = dict(vocab_size=1024, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, decoder_start_token_id=0)
BART = dict(vocab_size=1024, d_model=16, encoder_layers=2, decoder_layers=2, max_position_embeddings=100)
BART |= {
    f"{side}_{size}": n for side in ("encoder", "decoder") for size, n in (("attention_heads", 4), ("ffn_dim", 20))
}
GEMMA4 = ROPE | dict(
    num_hidden_layers=4,
    num_kv_shared_layers=2,
    head_dim=8,
    global_head_dim=16,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=1024,
    layer_types=["sliding_attention", "full_attention"] * 2,
)
MODELS = {  # name on the hub: class of the configuration, its values, class of the model
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTConfig", OPT, "OPTForCausalLM"),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2Config", GPT, "GPT2LMHeadModel"),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2Config", GPT, "GPT2LMHeadModel"),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2Config", GPT, "GPT2LMHeadModel"),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJConfig", GPT | {"rotary_dim": 4}, "GPTJForCausalLM"),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaConfig", ROPE, "LlamaForCausalLM"),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralConfig", ROPE, "MistralForCausalLM"),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2Config", ROPE, "Qwen2ForCausalLM"),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3Config", ROPE | {"head_dim": 8}, "Qwen3ForCausalLM"),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        *("Gemma3TextConfig", ROPE | {"head_dim": 8}, "Gemma3ForCausalLM"),
    ),
    "peft-internal-testing/tiny-random-gemma4-E2B": ("Gemma4TextConfig", GEMMA4, "Gemma4ForCausalLM"),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        *("T5Config", T5, "T5ForConditionalGeneration"),
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        *("BartConfig", BART, "BartForConditionalGeneration"),
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertConfig", ENCODER, "BertModel"),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaConfig", ENCODER, "RobertaModel"),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaConfig", ENCODER, "DebertaModel"),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Config", ENCODER, "DebertaV2Model"),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        *("BertConfig", ENCODER, "BertForSequenceClassification"),
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        *("RobertaConfig", ENCODER, "RobertaForSequenceClassification"),
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        *("LlamaConfig", ROPE | {"pad_token_id": 0}, "LlamaForSequenceClassification"),
    ),
}


def write_models(folder: Path) -> None:
    """A folder for each name in MODELS, with a random model and a tokenizer of bytes."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {token: n for n, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *sorted(_byte_letters())])}
    tokenizer = Tokenizer(models.BPE(alphabet, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    for name, (config, values, model) in MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, config)(**values)
        getattr(transformers, model)(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def write_data(folder: Path) -> None:
    """The data sets that the tests train on, with their columns."""
    quotes, sentences = folder / "ybelkada/english_quotes_copy", folder / "nyu-mll/glue"
    for place in (quotes, sentences):
        place.mkdir(parents=True)
    lines = [json.dumps({"quote": f"To be {n} times, or not to be.", "author": "W. S."}) for n in range(50)]
    (quotes / "train.jsonl").write_text("\n".join(lines))
    (sentences / "README.md").write_text(
        "---\nconfigs:\n- config_name: sst2\n  data_files:\n  - {split: train, path: sst2.jsonl}\n"
        "  - {split: validation, path: sst2.jsonl}\n---\n"
    )
    lines = [json.dumps({"sentence": f"{n} good and bad films", "label": n % 2, "idx": n}) for n in range(20)]
    (sentences / "sst2.jsonl").write_text("\n".join(lines))


def _byte_letters() -> list[str]:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


# -- the plugin ------------------------------------------------------------------------------------------------------


def pytest_configure(config) -> None:
    # PEFT's common test file imports it for image models, which prompt learning does not know.
    diffusers = types.ModuleType("diffusers")
    diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules.setdefault("diffusers", diffusers)
    if FUSED in os.environ:
        _fuse_everything()


SEEN = Counter()  # of the test that runs: models fused, and calls of fused forwards


def _fuse_everything() -> None:
    import peft

    import fastprompt
    from fastprompt.models.fuse import FusedForward

    def fused(model):
        if getattr(model, "active_peft_config", None) is not None and model.active_peft_config.is_prompt_learning:
            SEEN["fused"] += 1
            return fastprompt.fuse(model)
        return model

    def counted(forward):
        def call(self, *args, **kwargs):
            SEEN["called"] += 1
            return forward(self, *args, **kwargs)

        return call

    made, loaded = peft.get_peft_model, peft.PeftModel.from_pretrained.__func__
    peft.get_peft_model = peft.mapping_func.get_peft_model = lambda *args, **kwargs: fused(made(*args, **kwargs))
    peft.PeftModel.from_pretrained = classmethod(lambda *args, **kwargs: fused(loaded(*args, **kwargs)))
    FusedForward.forward = counted(FusedForward.forward)


def pytest_runtest_setup(item) -> None:
    SEEN.clear()


def pytest_runtest_makereport(item, call) -> None:
    if call.when == "teardown":
        return
    error, skipped = call.excinfo, call.excinfo is not None and call.excinfo.typename == "Skipped"
    if call.when == "setup" and error is None:
        return
    record = {
        "test": item.nodeid,
        "outcome": "skipped" if skipped else "failed" if error else "passed",
        "error": "" if error is None or skipped else f"{error.typename}: {error.value}".split("\n")[0][:300],
        **SEEN,
    }
    with open(os.environ[RESULTS], "a") as file:
        file.write(json.dumps(record) + "\n")


# -- the script ------------------------------------------------------------------------------------------------------


def run(tests: Path, work: Path, fused: bool, workers: int, select: str) -> dict[str, dict]:
    """A record of each test."""
    results = work / ("fused.jsonl" if fused else "stock.jsonl")
    environment = os.environ | {RESULTS: str(results), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["HF_DATASETS_CACHE"] = str(work / "cache")
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    if fused:
        environment[FUSED] = "1"
    line = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tests.parent), "--tb=no"]
    line += ["-p", "peft_suite", "-p", "no:cacheprovider", "-W", "ignore", "-n", str(workers), "-k", select]
    subprocess.run([*line, *(str(tests / name) for name in FILES)], cwd=work, env=environment, check=False)
    records = map(json.loads, results.read_text().splitlines())
    return {record["test"].split("tests/", 1)[-1]: record for record in records}


def report(stock: dict[str, dict], fused: dict[str, dict]) -> str:
    counted = [test for test, record in stock.items() if record["outcome"] == "passed"]
    passed = [test for test in counted if fused.get(test, {}).get("outcome") == "passed"]
    silent = [test for test in passed if fused[test].get("fused", 0) == 0]
    uncalled = [test for test in passed if fused[test].get("fused", 0) and not fused[test].get("called", 0)]
    outcomes = Counter(record["outcome"] for record in stock.values())
    lines = [
        f"As PEFT has them: {len(stock)} tests, of which {dict(outcomes)}.",
        f"Fused: {len(passed)} of the {len(counted)} that pass as they are. Of these, {len(silent)} make no prompt "
        f"model and {len(uncalled)} call no fused forward (they save, load or generate).",
    ]
    reasons = defaultdict(list)
    for test in counted:
        if test not in passed:
            reasons[fused.get(test, {"error": "did not run"})["error"]].append(test)
    for reason, tests in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines += ["", f"{len(tests)}: {reason}", *(f"  {test}" for test in tests)]
    broken = [f"  {test}: {record['error']}" for test, record in stock.items() if record["outcome"] == "failed"]
    return "\n".join(lines + (["", "Left out, since they fail as they are:", *broken] if broken else []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("peft", type=Path, help="a checkout of PEFT")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--select", default=KINDS, help="tests, as pytest's -k; those of prompt learning by default")
    parser.add_argument("--out", type=Path, help="a file for the report as well")
    given = parser.parse_args()
    tests = given.peft.resolve() / "tests"
    if not (tests / FILES[0]).is_file():
        parser.error(f"peft must be a checkout of PEFT with its tests, got {given.peft}")
    with tempfile.TemporaryDirectory() as work:
        write_models(Path(work))
        write_data(Path(work))
        text = report(*(run(tests, Path(work), fused, given.workers, given.select) for fused in (False, True)))
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
