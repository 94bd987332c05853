"""Tokenizers of all kinds become a tokenizer.json that gives the same tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    CamembertTokenizer,
    DebertaV2Tokenizer,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

from fpabee.exporter.checkpoint import load_checkpoint
from fpabee.exporter.model import MultiExitModel
from fpabee.exporter.tokenizer import save_tokenizer
from fpabee.runtime.artifact.folder import sha256_of
from fpabee.runtime.artifact.manifest import TokenizerSpec
from fpabee.runtime.encoding import Text, TextEncoder
from fpabee.runtime.errors import ModelError

from ..bad_input.cases import change_json

GOLDEN = Path(__file__).parents[1] / "golden" / "pabee_bert"
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "film", "##s", ".")
TEXTS: tuple[Text, ...] = ("", "A good film.", ("good", "films"), "Ünï 東京 😀", "film " * 99)


@pytest.fixture(scope="module")
def model() -> MultiExitModel:
    return load_checkpoint(GOLDEN)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model_dir with a tokenizer, to be changed."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "source"))


def with_vocabulary(folder: Path) -> None:
    """The files of a tokenizer as BERT's authors published it."""
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 32}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def check_tokens(source: Path, model: MultiExitModel, folder: Path) -> TokenizerSpec:
    """The runtime must give the tokens of the tokenizer in a model_dir."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    spec = save_tokenizer(source, model, folder, None)
    rows = TextEncoder(folder, spec).encode(TEXTS)
    for row, text in zip(rows, TEXTS, strict=True):
        pair = (text, None) if isinstance(text, str) else text
        expected = tokenizer(*pair, truncation=True, max_length=spec.max_length)
        assert row.input_ids.tolist() == expected["input_ids"]
        types = expected.get("token_type_ids", [0] * len(row))
        assert row.token_type_ids.tolist() == types
    assert [row.truncated for row in rows] == [False, False, False, False, True]
    return spec


def test_tokens_are_those_of_the_model_dir(
    source: Path, model: MultiExitModel, tmp_path: Path
) -> None:
    check_tokens(source, model, tmp_path / "out")
    with_vocabulary(source)
    spec = check_tokens(source, model, tmp_path / "converted")
    assert spec.max_length == 32, "the tokenizer's limit is below the model's 64"
    assert spec.pad_id == 0
    assert spec.inputs == ("input_ids", "token_type_ids", "attention_mask")
    assert spec.sha256 == sha256_of(tmp_path / "converted" / spec.file)


WORD_PIECES = {piece: index for index, piece in enumerate(VOCABULARY)}
# All bytes would be more than the tiny models know.
BYTES = [character for character in sorted(ByteLevel.alphabet()) if character <= "~"]
MERGES: Any = [("f", "i"), ("Ġ", "fi")]
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
BPE = {piece: index for index, piece in enumerate([*SPECIALS, *BYTES, "Ġ", "fi", "Ġfi"])}


def unigrams(*specials: str) -> list[tuple[str, float]]:
    words = [("▁A", -2.0), ("▁good", -2.0), ("▁film", -2.0), ("▁", -3.0)]
    letters = [(letter, -5.0) for letter in "adfgilmnos."]
    return [*((token, 0.0) for token in specials), *words, *letters]


OF_FAMILIES: dict[str, Callable[[], Any]] = {
    "roberta": lambda: RobertaTokenizer(vocab=BPE, merges=MERGES),
    "xlm-roberta": lambda: XLMRobertaTokenizer(vocab=unigrams(*SPECIALS)),
    "camembert": lambda: CamembertTokenizer(
        vocab=unigrams(*SPECIALS), additional_special_tokens=[]
    ),
    "electra": lambda: BertTokenizer(vocab=WORD_PIECES),
    "deberta-v2": lambda: DebertaV2Tokenizer(vocab=unigrams("[PAD]", "[CLS]", "[SEP]", "[UNK]")),
}


@pytest.mark.parametrize("family", OF_FAMILIES)
def test_tokens_are_those_of_the_familys_own_tokenizer(
    family: str, tiny_models: Mapping[str, Path], tmp_path: Path
) -> None:
    tokenizer = OF_FAMILIES[family]()
    tokenizer.save_pretrained(tmp_path / "source")
    model = load_checkpoint(tiny_models[family])
    spec = check_tokens(tmp_path / "source", model, tmp_path / "out")
    assert spec.max_length == model.backbone.max_positions() == 64
    assert spec.pad_id == tokenizer.pad_token_id == model.backbone.config.pad_token_id
    has_types = family in ("electra", "deberta-v2")
    assert ("token_type_ids" in spec.inputs) is has_types


def test_max_length_is_limited_by_the_model_and_by_the_tokenizer(
    source: Path, model: MultiExitModel, tmp_path: Path
) -> None:
    for length in (4, 17, 64):
        spec = save_tokenizer(source, model, tmp_path, length)
        assert spec.max_length == length
        (row,) = TextEncoder(tmp_path, spec).encode(["film " * 99])
        assert len(row) == length
    for length in (1, 3, 65):
        with pytest.raises(ModelError, match=f"max_length {length} .*between 4 and 64"):
            save_tokenizer(source, model, tmp_path, length)
    change_json(source / "tokenizer_config.json", lambda c: c.update(model_max_length=10**30))
    assert save_tokenizer(source, model, tmp_path, None).max_length == 64


def test_a_panic_of_the_library_is_refused(
    source: Path, model: MultiExitModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not an Exception, and cannot be imported."""
    panic = type("PanicException", (BaseException,), {})("index out of bounds")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", Mock(side_effect=panic))
    with pytest.raises(ModelError, match=r"no tokenizer that can be read: index out of bounds"):
        save_tokenizer(source, model, tmp_path / "out", None)


def test_a_tokenizer_that_cannot_be_written_is_not_called_damaged(
    source: Path, model: MultiExitModel, tmp_path: Path
) -> None:
    (tmp_path / "engines" / "tokenizer" / "tokenizer.json").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        save_tokenizer(source, model, tmp_path / "engines", None)


def test_a_tokenizer_that_keeps_the_end_of_texts_is_refused(
    source: Path, model: MultiExitModel, tmp_path: Path
) -> None:
    change_json(
        source / "tokenizer_config.json", lambda config: config.update(truncation_side="left")
    )
    with pytest.raises(ModelError, match="keeps the end of long texts"):
        save_tokenizer(source, model, tmp_path, None)
