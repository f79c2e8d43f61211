"""What is kept on disk: starting above the frozen layers is exact, and no file is ever half there."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from helpers import CONFIGS, DECODERS, batch, build

from fastprompt import PromptConfig, PromptModel
from fastprompt.models.methods import AdaptedBackbone, AdapterConfig
from fastprompt.tasks.base import Item
from fastprompt.training.batch import Collator
from fastprompt.training.cache import cached
from fastprompt.training.teacher import Digest, encode, lower_states, plain, teacher_vectors

SHAPE = (6, 5)
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "training"


def rows(value: float, pause: float = 0.0):
    """Blocks of the cached tensor, the writer taking its time."""
    for _ in range(3):
        yield torch.full((2, 5), value)
        time.sleep(pause)


def keep(folder, key="key", value=1.0, pause=0.0):
    return cached(folder, key, SHAPE, torch.float32, lambda: rows(value, pause))


def never():
    pytest.fail("computed again")


# -- frozen layers ------------------------------------------------------------------------------------------------


def saved_tensors(model: PromptModel, **inputs) -> list[int]:
    """What autograd keeps for each layer, and before the first and after the last."""
    counts = [0]
    (layers,) = (m for m in model.backbone.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    hooks = [layer.register_forward_pre_hook(lambda *_: counts.append(0)) for layer in layers]

    def pack(tensor):
        counts[-1] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize("family", CONFIGS)
def test_no_gradient_is_computed_that_nobody_needs(family):
    inputs = batch()
    for first in range(3):
        model = PromptModel(build(family), PromptConfig("prefix", 4, layers=range(first, 3)))
        embedding, *layers = saved_tensors(model, **inputs)
        assert embedding == 0 and not any(layers[:first])
        assert all(layers[first:])


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("first", [1, 2])
def test_start_above_the_frozen_layers_is_exact(family, first, head):
    auto = "AutoModelForCausalLM" if family in DECODERS else "AutoModelForTokenClassification"
    model = PromptModel(
        build(family, auto if head else "AutoModel", torch.float32),
        PromptConfig("prefix", 4, layers=[first], init_scale=1.0),
    ).train()
    inputs = batch(lengths=(7, 1, 0, 12), side="left")
    lower = model.lower_states(**inputs)
    assert lower.shape == (20, 48) and not lower.requires_grad
    before = model.backbone.state_dict()
    if head:
        inputs["labels"] = inputs["input_ids"] % 2
    results = []
    for extra in ({}, {"lower_states": lower}):
        model.zero_grad()
        output = model(**inputs, **extra)
        loss = output.loss if head else output.last_hidden_state.square().sum()
        loss.backward()
        results.append([loss, model.prompt.weight.grad.clone(), output.to_tuple()[-1]])
    for whole, started in zip(*results, strict=True):
        assert torch.equal(whole, started)
    after = model.backbone.state_dict()
    assert list(before) == list(after) and all(a.data_ptr() == before[n].data_ptr() for n, a in after.items())


def test_wrong_starts():
    inputs, lower = batch(), torch.zeros(25, 48, dtype=torch.float64)
    everywhere = PromptModel(build("bert"), PromptConfig("prefix", 4))
    with pytest.raises(ValueError, match="start must be at a layer above 0 with no prompt below it, got layer 0"):
        everywhere(**inputs, lower_states=lower)
    upper = PromptModel(build("bert"), PromptConfig("prefix", 4, layers=[1]))
    with pytest.raises(ValueError, match="start must have the batch's 25 rows, got 24"):
        upper(**inputs, lower_states=lower[:24])
    with pytest.raises(ValueError, match="output_hidden_states must not be set with a start"):
        upper(**inputs, lower_states=lower, output_hidden_states=True)
    assert len(upper(**inputs, output_hidden_states=True).hidden_states) == 4  # all layers are back


def test_states_are_known_by_content(folder):
    items = [Item([0, 5, 6, 2], 4), Item([0, 7, 2], 3)]
    model = build("bert", dtype=torch.bfloat16)
    digest = Digest(model)

    def lower(layers=(1, 2), types=False, items=items, **config):
        adapted = AdaptedBackbone(model, AdapterConfig("prefix", layers=layers, **config))
        return lower_states(digest, adapted, items, Collator(types), "cpu")

    first = lower()
    assert [tuple(each.shape) for each in first] == [(4, 48), (3, 48)] and first[0].dtype == torch.bfloat16
    assert torch.equal(lower(layers=[1])[1], first[1]) and len(list(folder.iterdir())) == 1
    for other in (lower(num_virtual_tokens=3), lower(layers=[2])):
        assert not torch.equal(other[0], first[0])
    assert len(list(folder.iterdir())) == 3
    two = [items[0]._replace(second=2), items[1]]  # the second of two texts has another kind
    typed = lower(types=True, items=two)
    assert torch.equal(typed[1], lower(types=True)[1]) and not torch.equal(typed[0], first[0])


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_vectors_are_those_of_the_sentences_one_by_one(pooling):
    model = build("bert", dtype=torch.float32)
    sentences = [[0, *torch.randint(5, 48, (length,)).tolist(), 2] for length in (1, 9, 4, 0, 20) * 7]
    together = encode(plain(model), sentences, pooling, "cpu")
    for vector, tokens in list(zip(together, sentences, strict=True))[:5]:
        hidden = model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
        expected = {"mean": hidden.mean(0), "first": hidden[0], "last": hidden[-1]}[pooling]
        torch.testing.assert_close(vector, expected.detach(), rtol=1e-4, atol=1e-5)


def test_teacher_is_computed_once_for_the_same_content(folder, monkeypatch):
    model = build("bert", dtype=torch.float32)
    sentences = [[0, 5, 6, 2], [0, 7, 2]]

    def vectors(sentences, *args):
        return teacher_vectors(Digest(model), sentences, *(args or ("mean",)), "cpu")

    first = vectors(sentences)
    (file,) = folder.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("fastprompt.training.teacher.encode", lambda *_: never())
        assert torch.equal(vectors(sentences), first)
    file.write_bytes(file.read_bytes()[:-3])  # damaged
    assert torch.equal(vectors(sentences), first)

    vectors(sentences, "first")
    vectors([[0, 5, 6, 2], [0, 8, 2]])
    table = model.get_input_embeddings().weight.data
    table[40] += 1.0  # a word of none of the sentences
    vectors(sentences)
    assert len(list(folder.iterdir())) == 3
    model.encoder.layer[2].output.dense.bias.data[3] += 1e-3
    changed = vectors(sentences)
    table[7] += 1e-3
    vectors(sentences)
    teacher_vectors(Digest(model), sentences, "mean", "cpu", layer=1)
    assert len(list(folder.iterdir())) == 6
    assert not torch.equal(changed, first)


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_torn_file_is_made_anew(folder):
    first = keep(folder)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    assert torch.equal(cached(folder, "key", SHAPE, torch.float32, never), first)
    for torn in (b"", whole[:-3], bytes(len(whole)), whole[:40] + b"\1" + whole[41:], whole + b"\0"):
        file.write_bytes(torn)
        assert torch.equal(keep(folder, value=2.0), torch.full(SHAPE, 2.0))
    assert list(folder.iterdir()) == [file]


def test_a_killed_writer_leaves_no_file(folder):
    writer = FORK.Process(target=keep, args=(folder,), kwargs={"pause": 60.0})
    writer.start()
    deadline = time.monotonic() + 20
    while not list(folder.glob(".*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    (aside,) = folder.iterdir()
    assert aside.name.startswith(".key.")
    assert torch.equal(keep(folder, value=2.0), torch.full(SHAPE, 2.0))
    assert aside.exists()  # it might be a living writer's,
    os.utime(aside, (time.time() - 2 * 86400,) * 2)
    keep(folder, key="other")
    assert not aside.exists()  # but not for days


def test_an_error_leaves_no_file(folder):
    def broken():
        yield torch.zeros(2, 5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(folder, "key", SHAPE, torch.float32, broken)
    with pytest.raises(RuntimeError, match=r"blocks must give \(6, 5\) of torch.float64"):
        cached(folder, "key", SHAPE, torch.float64, lambda: rows(1.0))
    assert not list(folder.iterdir())


def hammer(folder, together, results):
    together.wait()
    got = []
    for _ in range(40):
        got.append(torch.equal(keep(folder), torch.ones(SHAPE)))
        (folder / "key.tensor").unlink(missing_ok=True)  # so that another writes while this one reads
    results.put(all(got))


def test_several_processes_write_and_read_the_same_key(folder):
    mapped = keep(folder)
    together, results = FORK.Barrier(3), FORK.Queue()
    processes = [FORK.Process(target=hammer, args=(folder, together, results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert all(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert torch.equal(mapped, torch.ones(SHAPE))  # its file is long gone
    assert not list(folder.glob(".*"))


def test_the_least_recently_used_go_first(folder, monkeypatch):
    size = 4 * 6 * 5 + 4
    monkeypatch.setenv("FASTPROMPT_CACHE_BYTES", str(3 * size))
    for age, key in enumerate("cba"):
        keep(folder, key)
        os.utime(folder / f"{key}.tensor", (age, age))
    (folder / "mine.txt").write_text("not the cache's")
    cached(folder, "c", SHAPE, torch.float32, never)  # used now
    keep(folder, "d")
    assert {file.name for file in folder.iterdir()} == {"a.tensor", "c.tensor", "d.tensor", "mine.txt"}
    monkeypatch.setenv("FASTPROMPT_CACHE_BYTES", str(size - 1))
    with pytest.raises(ValueError, match=f"FASTPROMPT_CACHE_BYTES must be at least the {size} bytes .* got {size - 1}"):
        keep(folder, "e")
    assert len(list(folder.iterdir())) == 4
