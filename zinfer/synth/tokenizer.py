"""A byte-level tokenizer for a synthetic checkpoint: one id a byte, no merges, the config's special ids.

Special tokens take the ids that the config names, bytes the lowest ids left. So config and tokenizer
agree whatever the config says. The other ids, which a random model mostly emits and no text encodes to, read
as their number: ` <27936>`.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

_SPECIAL_IDS = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "pad_token_id"}
_SPECIAL_TEXT = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_OTHER_IDS = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")


def settle_special_ids(config: PreTrainedConfig) -> None:
    """Drop the config's special ids outside its vocabulary; name the decoder's first token."""
    size = vocab_size(config)
    if size is None:
        return
    for part in _parts(config):
        for key in (*_SPECIAL_IDS.values(), *_OTHER_IDS):
            value = getattr(part, key, None)
            ids = value if isinstance(value, list) else [value]
            inside = [one for one in ids if one is None or 0 <= one < size]
            if len(inside) < len(ids):
                logger.info("%s=%s reaches outside the vocabulary of %d: dropped", key, value, size)
                setattr(part, key, inside or None)
    if config.is_encoder_decoder and _start_id(config) is None:
        pad = getattr(config, "pad_token_id", None)
        config.decoder_start_token_id = 0 if pad is None else pad  # as T5 and BART do


def _start_id(config: PreTrainedConfig) -> int | None:
    start = getattr(config, "decoder_start_token_id", None)
    return getattr(config, "bos_token_id", None) if start is None else start


def vocab_size(config: PreTrainedConfig) -> int | None:
    """Rows of the (text) model's embedding, None where there is none."""
    size = getattr(config.get_text_config(decoder=True), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


def byte_tokenizer(config: PreTrainedConfig) -> PreTrainedTokenizerFast | None:
    """The tokenizer for `config`, None for a model without a vocabulary.

    A vocabulary too small for all 256 bytes gets the commonest; text loses the others.
    """
    size = vocab_size(config)
    if size is None:
        return None
    specials = _special_tokens(config)
    taken = {token_id for token_id, _ in specials.values()}
    free = (token_id for token_id in range(size) if token_id not in taken)
    alphabet = _alphabet()
    vocab = {text: token_id for token_id, text in specials.values()}
    vocab.update(zip(alphabet, itertools.islice(free, len(alphabet)), strict=False))
    if (lost := len(alphabet) + len(taken) - len(vocab)) > 0:
        logger.warning("vocabulary of %d: the tokenizer has no id for %d of the 256 bytes", size, lost)
    vocab.update({f"Ġ<{token_id}>": token_id for token_id in free})
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for _, text in specials.values()]
    )
    names: dict[str, Any] = {name: text for name, (_, text) in specials.items() if name in _SPECIAL_IDS}
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(limit, int) and limit > 0:
        names["model_max_length"] = limit
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    text = config.get_text_config(decoder=True)
    return [config] if text is config else [config, text]


def _special_tokens(config: PreTrainedConfig) -> dict[str, tuple[int, str]]:
    """Token and id of each role; roles that share an id share its token."""
    found: dict[str, tuple[int, str]] = {}
    texts: dict[int, str] = {}
    for role, key in _SPECIAL_IDS.items():
        value = next((ids for part in _parts(config) if (ids := getattr(part, key, None)) is not None), None)
        for number, token_id in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(token_id, int):
                continue
            text = _SPECIAL_TEXT[role] if number == 0 else f"<{role.removesuffix('_token')}_{number}>"
            name = role if number == 0 else f"{role}_{number}"
            found[name] = (token_id, texts.setdefault(token_id, text))
    return found


def _alphabet() -> list[str]:
    """The 256 byte symbols, space and newline first, then printable ASCII, then the rest by code point."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    return sorted(symbols, key=lambda symbol: "ĠĊ".find(symbol) if symbol in "ĠĊ" else 2 + ord(symbol))
