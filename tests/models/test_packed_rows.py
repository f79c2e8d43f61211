"""Rows that hold several samples, in every way a caller may say so: results are those of the samples one by one."""

import peft
import pytest
import torch
import transformers
from helpers import CONFIGS, DECODERS, PAD, VOCABULARY, build

import fastprompt
from fastprompt import PromptConfig, PromptModel

P = 3
MAKERS = ("prefix", "prompt", "fused prefix", "fused prompt", "fused p-tuning")
LENGTHS = 4, 3, 1, 6  # two rows of seven


def model_of(family: str, maker: str, auto: str = "AutoModel", task: str = "FEATURE_EXTRACTION"):
    kind = maker.removeprefix("fused ")
    if kind == maker:
        return PromptModel(build(family, auto), PromptConfig(kind, P, init_scale=1.0)).eval()
    config = {
        "prefix": peft.PrefixTuningConfig,
        "prompt": peft.PromptTuningConfig,
        "p-tuning": peft.PromptEncoderConfig,
    }[kind]
    model = peft.get_peft_model(build(family, auto), config(task_type=task, num_virtual_tokens=P)).double()
    return fastprompt.fuse(model).eval()


def samples(lengths=LENGTHS) -> list[torch.Tensor]:
    return [torch.randint(5, VOCABULARY, (length,)) for length in lengths]


def counted(lengths, begin: int = 0) -> torch.Tensor:
    return torch.cat([torch.arange(length) + begin for length in lengths])


def ways(rows: list[torch.Tensor], first: int) -> dict[str, dict]:
    """The same samples in the ways that callers pack them."""
    flat, places = torch.cat(rows).unsqueeze(0), counted(LENGTHS).unsqueeze(0)
    collated = [{"input_ids": row.tolist()} for row in rows]
    collate = transformers.DataCollatorWithFlattening
    sample = torch.arange(len(rows)).repeat_interleave(torch.tensor(LENGTHS))
    gaps = [torch.tensor([PAD] * 2), rows[0], torch.tensor([PAD]), *rows[1:3], torch.tensor([PAD] * 3)]
    gaps = torch.stack([torch.cat(gaps), torch.cat([rows[3], torch.full((8,), PAD)])])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0], [1] * 6 + [0] * 8])
    gap_places = torch.full_like(mask, 1).masked_scatter(mask.bool(), counted(LENGTHS))
    made = {
        "one row": {"input_ids": flat, "position_ids": places},
        "several rows": {"input_ids": flat.view(2, 7), "position_ids": places.view(2, 7)},
        "a mask of ones": {"input_ids": flat, "position_ids": places, "attention_mask": torch.ones_like(flat)},
        "padding and packing": {"input_ids": gaps, "position_ids": gap_places, "attention_mask": mask},
        "seq_idx alone": {"input_ids": flat.view(2, 7), "seq_idx": sample.view(2, 7).int()},
        "all at once": collate(return_flash_attn_kwargs=True, return_seq_idx=True)(collated),
        "bounds alone": collate(return_flash_attn_kwargs=True, return_position_ids=False)(collated),
        "the backbone's own positions": collate(position_ids_start=first)(collated),
    }
    return {name: {key: x for key, x in way.items() if key != "labels"} for name, way in made.items()}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("family", CONFIGS)
def test_each_way_is_the_samples_one_by_one(family, maker):
    model, rows = model_of(family, maker), samples()
    first = 2 if family == "xlm-roberta" else 0
    with torch.no_grad():
        apart = torch.cat([model(input_ids=row.unsqueeze(0)).last_hidden_state[0] for row in rows])
        for name, way in ways(rows, first).items():
            mask = way.get("attention_mask", torch.ones_like(way["input_ids"])).bool()
            got = model(**way).last_hidden_state
            error = float((got[mask] - apart).abs().max())
            assert error < 1e-10 and not got[~mask].any(), (name, error)
        same = torch.stack([torch.cat(rows[:2]), torch.cat(rows[:2]).flip(0)])  # (1, L) positions over all rows
        got = model(input_ids=same, position_ids=counted(LENGTHS[:2]).unsqueeze(0)).last_hidden_state
        assert float((got[0] - apart[:7]).detach().abs().max()) < 1e-10
        if not first:  # a sample whose beginning was cut off keeps its positions
            places = torch.cat([torch.arange(4) + 5, torch.arange(3)]).unsqueeze(0)
            got = model(input_ids=torch.cat(rows[:2]).unsqueeze(0), position_ids=places).last_hidden_state[0]
            cut = model(input_ids=rows[0].unsqueeze(0), position_ids=places[:, :4]).last_hidden_state[0]
            assert float((got - torch.cat([cut, apart[4:7]])).detach().abs().max()) < 1e-10


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("family", DECODERS)
def test_labels_at_the_bounds_are_not_predicted_from_the_sample_before(family, maker):
    """No -100 marks the first tokens: a prompt's last row predicts them, and without one nothing does."""
    model, rows = model_of(family, maker, "AutoModelForCausalLM", "CAUSAL_LM").train(), samples()
    trained = [p for p in model.parameters() if p.requires_grad]
    apart = [model(input_ids=row[None], labels=row[None], num_items_in_batch=1).loss for row in rows if len(row) > 1]
    if "prefix" not in maker:  # a single token is predicted there, and not by a prefix
        apart.append(model(input_ids=rows[2][None], labels=rows[2][None], num_items_in_batch=1).loss)
    gradients = torch.autograd.grad(sum(apart), trained)
    for name, way in ways(rows, 0).items():
        mask = way.get("attention_mask", torch.ones_like(way["input_ids"])) == 0
        loss = model(**way, labels=way["input_ids"].masked_fill(mask, -100), num_items_in_batch=1).loss
        assert float((loss - sum(apart)).detach().abs()) < 1e-9, name
        for got, expected in zip(torch.autograd.grad(loss, trained), gradients, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
@pytest.mark.parametrize("family", ["gemma3_text", "xlm-roberta"])
def test_each_sample_of_several_rows_reads_its_prompt(family, kind):
    model, rows = model_of(family, kind), samples()
    model.add_prompt("cy")
    ids = ["cy", "default", "default", "cy"]
    apart = [
        model(input_ids=row[None], prompt_ids=[id]).last_hidden_state[0] for row, id in zip(rows, ids, strict=True)
    ]
    for way in "one row", "several rows":
        got = model(**ways(rows, 0)[way], prompt_ids=ids).last_hidden_state
        assert float((got.flatten(0, 1) - torch.cat(apart)).detach().abs().max()) < 1e-10
    with pytest.raises(ValueError, match=r"prompt_ids must be \(4,\), one a sentence, got \(2,\)"):
        model(**ways(rows, 0)["several rows"], prompt_ids=ids[:2])


@pytest.mark.parametrize("family", CONFIGS)
def test_positions_that_pack_nothing(family):
    """Shifted, with the gap that the mask has, or counted over left padding: a row stays one sample."""
    model, ids = model_of(family, "prefix"), torch.randint(5, VOCABULARY, (2, 6))
    first = 2 if family == "xlm-roberta" else 0
    mask = torch.tensor([[1, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1]])
    places = torch.arange(6).expand(2, 6) + first
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    got = model(input_ids=ids, attention_mask=mask, position_ids=places).last_hidden_state
    assert float((got - expected).detach().abs().max()) < 1e-10
    left = {"input_ids": ids.roll(2, 1), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)}
    places = torch.arange(6).unsqueeze(0) + first
    if first:
        with pytest.raises(ValueError, match=r"position_ids must begin every sample at 2, .* 0, got \[4\]"):
            model(**left, position_ids=places)
    else:
        alone = model(input_ids=ids[1:, :4], position_ids=places[:, 2:]).last_hidden_state[0]
        got = model(**left, position_ids=places).last_hidden_state[1, 2:]
        assert float((got - alone).detach().abs().max()) < 1e-10
        assert not torch.allclose(alone, model(input_ids=ids[1:, :4]).last_hidden_state[0])  # positions are honoured


TWO = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
BAD = [
    (
        {"attention_mask": torch.tensor([[1, 1, 1, 1, 2, 2, 2]])},
        "attention_mask must hold 0 and 1, got 2: samples",
    ),
    ({"attention_mask": torch.ones(1, 1, 7, 7)}, r"attention_mask must be \(1, 7\), as the batch, got \(1, 1, 7, 7\)"),
    ({"attention_mask": {"full_attention": None}}, r"attention_mask must be \(1, 7\), as the batch, got dict"),
    ({"position_ids": TWO[0]}, r"position_ids must be \(1, 7\), as the batch, got \(7,\)"),
    ({"position_ids": TWO.expand(2, 7)}, r"position_ids must be \(1, 7\), as the batch, got \(2, 7\)"),
    ({"position_ids": TWO, "cu_seq_lens_q": torch.tensor([0, 3, 7])}, "begin anew .* got 2 and 3 at columns 2 and 3"),
    ({"position_ids": TWO, "cu_seq_lens_q": torch.tensor([0, 7])}, "begin anew .* got 3 and 0 at columns 3 and 4"),
    ({"position_ids": TWO, "seq_idx": torch.tensor([[0, 0, 0, 0, 0, 1, 1]])}, "position_ids must begin anew"),
    (
        {"cu_seq_lens_q": torch.tensor([0, 4, 7]), "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 1]])},
        "seq_idx must change where cu_seq_lens_q says",
    ),
    ({"cu_seq_lens_q": torch.tensor([0, 4, 7]), "cu_seq_lens_k": torch.tensor([0, 3, 7])}, "cu_seq_lens_k must be"),
    ({"cu_seq_lens_k": torch.tensor([0, 3, 7])}, "cu_seq_lens_k must be cu_seq_lens_q, None, got"),
    (
        {"cu_seq_lens_q": torch.tensor([0, 4, 6]), "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0]])},
        r"cu_seq_lens_q is for a batch of one row without padding, got \(1, 7\) with 6 tokens",
    ),
    (
        {"position_ids": torch.tensor([[0, 1, 2, 7, 8, 9, 10]])},
        "must go up by one or begin anew, got 2 and 7",
    ),
]


@pytest.mark.parametrize(("extra", "message"), BAD)
def test_what_cannot_be_told_is_refused(extra, message):
    with pytest.raises(ValueError, match=message):
        model_of("llama", "prompt")(input_ids=torch.randint(5, VOCABULARY, (1, 7)), **extra)


def test_positions_beside_the_table():
    bert, ids = model_of("bert", "prompt"), torch.randint(5, VOCABULARY, (1, 3))
    for places, message in (
        (torch.tensor([[60, 61, 62]]), "input_ids must have at most 61 tokens a sentence.* got 63"),
        (torch.tensor([[-1, 0, 1]]), "position_ids must not be negative, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            bert(input_ids=ids, position_ids=places)
    with pytest.raises(ValueError, match=r"position_ids must begin every sample at 2, .* at 0, got \[0, 2\]"):
        model_of("xlm-roberta", "prompt")(
            input_ids=torch.randint(5, VOCABULARY, (1, 5)), position_ids=torch.tensor([[2, 3, 4, 0, 1]])
        )
    with pytest.raises(ValueError, match="cu_seq_lens_q is for a batch of one row without padding, got"):
        bert(input_ids=ids.expand(2, 3), cu_seq_lens_q=torch.tensor([0, 3, 6]))


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "llama"])
def test_heads(family):
    rows, places = torch.randint(5, VOCABULARY, (1, 7)), TWO
    for auto in ("AutoModelForSequenceClassification", "AutoModelForQuestionAnswering"):
        with pytest.raises(ValueError, match="samples that share a row are not for a head with one result a row"):
            model_of(family, "prompt", auto)(input_ids=rows, position_ids=places)
    # A single sample in a single row came not packed.
    label = model_of(family, "prompt", "AutoModelForSequenceClassification")
    alone = label(input_ids=rows, position_ids=torch.arange(7).unsqueeze(0)).logits
    assert float((alone - label(input_ids=rows).logits).detach().abs().max()) < 1e-10
    tags = model_of(family, "prompt", "AutoModelForTokenClassification")
    apart = [tags(input_ids=part).logits[0] for part in (rows[:, :4], rows[:, 4:])]
    assert float((tags(input_ids=rows, position_ids=places).logits[0] - torch.cat(apart)).detach().abs().max()) < 1e-10
