"""Small random models of every supported family, ragged batches for them, their folders, and tasks in their words."""

import json
import random
from pathlib import Path

import torch
import transformers

from fastprompt.data.examples import Answer, Pair, Question, Text

VOCABULARY, PAD = 61, 1

COMMON = dict(vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=3, intermediate_size=40, pad_token_id=PAD)
ENCODER = COMMON | dict(num_attention_heads=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
CONFIGS = {
    "bert": transformers.BertConfig(**ENCODER, max_position_embeddings=64, type_vocab_size=2),
    "xlm-roberta": transformers.XLMRobertaConfig(**ENCODER, max_position_embeddings=66, type_vocab_size=1),
    "llama": transformers.LlamaConfig(**COMMON, num_attention_heads=6, num_key_value_heads=2),
    "gemma3_text": transformers.Gemma3TextConfig(
        **COMMON, num_attention_heads=3, num_key_value_heads=1, head_dim=16, sliding_window=8, query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], final_logit_softcapping=5.0,
    ),
}  # fmt: skip
ENCODERS, DECODERS = ("bert", "xlm-roberta"), ("llama", "gemma3_text")


def build(family: str, auto: str = "AutoModel", dtype: torch.dtype = torch.float64, seed: int = 0, **config):
    """A model of class `auto` with weights large enough that attention is far from uniform."""
    import families  # which has more of them, and takes its time

    torch.manual_seed(seed)
    own = CONFIGS.get(family) or families.FAMILIES[family]
    settings = type(own).from_dict(own.to_dict() | config)
    settings._attn_implementation = "eager" if family == "gemma2" else "sdpa"  # which has no cap of the scores
    settings._experts_implementation = "eager"  # the others have no float64
    model = getattr(transformers, auto).from_config(settings)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.25 if "embed" in name else 0.15)
    return model.to(dtype).eval()


def batch(lengths=(7, 1, 12, 5), side: str = "right") -> dict[str, torch.Tensor]:
    """Fresh token ids of those lengths, padded on `side`."""
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), PAD)
    mask = torch.zeros(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(longest - length, longest)
        ids[row, where] = torch.randint(5, VOCABULARY, (length,))
        mask[row, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


WORDS = [f"w{n}" for n in range(43)]


def tokenizer_file() -> bytes:
    """A tokenizer.json of one token a word, for WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: n for n, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("<s>", 0), ("</s>", 2)]
    templates = {"single": "<s> $A </s>", "pair": "<s> $A </s> $B:1 </s>:1"}
    tokenizer.post_processor = processors.TemplateProcessing(**templates, special_tokens=special)
    return tokenizer.to_str().encode()


def paraphrases(count: int, seed: int = 0) -> list[Text]:
    """Sentences of the first words, with their "translations" (label 1) or those of other words."""
    rng = random.Random(seed)
    examples = []
    for n in range(count):
        words = rng.sample(range(20), 4)
        other = words if n % 2 else rng.sample(range(20), 4)
        sentences = " ".join(WORDS[word] for word in words), " ".join(WORDS[word + 20] for word in other)
        examples.append(Text(f"p{n}", *sentences, str(n % 2)))
    return examples


def questions(count: int, length: int = 25, seed: int = 0) -> list[Question]:
    """Which two words follow the word that is asked for?"""
    rng = random.Random(seed)
    made = []
    for n in range(count):
        words = [WORDS[word] for word in rng.sample(range(40), length)]
        place = rng.randrange(length - 2)
        answer = Answer(" ".join(words[place + 1 : place + 3]), len(" ".join([*words[: place + 1], ""])))
        made.append(Question(f"q{n}", words[place], " ".join(words), [answer]))
    return made


def write_questions(file: Path, questions: list[Question]) -> None:
    """In SQuAD's form, each with a paragraph of its own."""
    paragraphs = []
    for id, question, context, answers in questions:
        answers = [{"text": answer.text, "answer_start": answer.start} for answer in answers]
        paragraphs.append({"context": context, "qas": [{"id": id, "question": question, "answers": answers}]})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}), encoding="utf-8")


def write_examples(file: Path, examples: list[Text]) -> None:
    """As XTREME has PAWS-X."""
    file.write_text("".join(f"{each.text}\t{each.text_pair}\t{each.label}\n" for each in examples))


def translations(count: int, seed: int = 0) -> list[Pair]:
    """Sentences of the first words, "translated" word by word into the last."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        words = rng.choices(range(20), k=rng.randint(2, 5))
        pairs.append(Pair(" ".join(WORDS[n] for n in words), " ".join(WORDS[n + 20] for n in words)))
    return pairs


def without_digests(folder: Path) -> None:
    """Make fastprompt's own file of a prompt what it was before it held digests of the files beside it."""
    file = folder / "fastprompt_config.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps({name: about[name] for name in about.keys() - {"files", "checksum"}}))


def save_backbone(family: str, folder: Path, auto: str = "AutoModel", **config) -> Path:
    """A folder with a small random model, float32, and a tokenizer for WORDS."""
    build(family, auto, torch.float32, **config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_file())
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def warned(caplog) -> list[str]:
    """The warnings; what is merely told comes as well, once a command has run in the process."""
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
