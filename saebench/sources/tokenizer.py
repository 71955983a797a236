"""A model's tokenizer: documents to token ids, and the bytes that each id stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from saebench.core.errors import UserError
from saebench.core.reading import shown
from saebench.sources.model_info import ModelInfo, has_tokenizer
from saebench.sources.text import Document

SPECIAL = "special"
"""Stands for all special tokens."""
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class ModelTokenizer:
    """The tokenizer of one model.

    ``bos`` is the id of the BOS token, or None. ``separator`` is the id put between documents (end of text);
    it is None only if the model has no tokenizer and its config no end-of-text token.
    """

    bos: int | None
    separator: int | None

    def __init__(self, info: ModelInfo) -> None:
        from transformers import AutoTokenizer

        self._info = info
        self._has_tokens_beyond = False
        """Tokens that were added without a row of the embedding (<image_soft_token>, [PAD]): a text has them
        only if it spells one out."""
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                info.folder, local_files_only=True, trust_remote_code=False
            )
            self.encode("a")
            ids = self.tokenizer.get_vocab().values()
            self._special_ids()
        except Exception as error:  # the tokenizers library raises bare Exception
            reason = shown(str(error) or type(error).__name__, 200)
            raise UserError(
                f"the tokenizer of model {info.name} in {info.folder} cannot be read ({reason}); "
                "download its tokenizer files again"
            ) from None
        largest = max(ids, default=-1)
        if largest < 0:
            raise UserError(
                f"the tokenizer of model {info.name} has no tokens; put the model's tokenizer.json into "
                f"{info.folder}"
            )
        added = set(self.tokenizer.added_tokens_decoder)
        beyond = [id for id in ids if id >= info.vocab_size]
        if any(id not in added for id in beyond):
            raise UserError(
                f"the tokenizer of model {info.name} has token {largest}, but the model's vocabulary ends at "
                f"{info.vocab_size - 1}; download tokenizer and config of one revision of it"
            )
        self._has_tokens_beyond = bool(beyond)
        self.bos = self.tokenizer.bos_token_id
        if self.bos is None:
            self.bos = self.tokenizer.cls_token_id  # the first token of an encoder's input
        ends = (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id, self.bos)
        separator = next((end for end in ends if end is not None), None)
        if separator is None:
            raise UserError(
                f"the tokenizer of model {info.name} has neither an eos_token nor a bos_token; set "
                "eos_token in its tokenizer_config.json"
            )
        for id in (self.bos, separator):
            if id is not None and id >= info.vocab_size:
                raise UserError(
                    f"the tokenizer of model {info.name} puts token {id} between texts, but the model's "
                    f"vocabulary ends at {info.vocab_size - 1}; download tokenizer and config of one "
                    "revision of it"
                )
        self.separator = separator

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens around them."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if self._has_tokens_beyond and max(ids, default=0) >= self._info.vocab_size:
            spelled = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"a text holds {spelled!r}, token {max(ids)}, which was added to the tokenizer of "
                f"{self._info.name} and for which the model has no embedding (its vocabulary ends at "
                f"{self._info.vocab_size - 1}); remove it from the text"
            )
        return ids

    def encode_document(self, document: Document) -> list[int]:
        """Token ids of a document, and the separator after them.

        A chat is rendered with the model's chat template. Token ids are used as they are; the separator
        follows unless they end with it.

        Raises:
            UserError: a chat, but the tokenizer has no chat template or the template refuses it; or token ids
                outside the model's vocabulary.
        """
        if document.tokens is None:
            text = self._render(document) if document.is_chat else document.text
            ids = self.encode(text)
        else:
            ids = list(document.tokens)
            if max(ids, default=0) >= self._info.vocab_size:
                raise UserError(
                    f"a document of --text has the token id {max(ids)}, but the vocabulary of "
                    f"{self._info.name} ends at {self._info.vocab_size - 1}; give ids of its own tokenizer"
                )
            if ids[-1:] == [self.separator]:
                return ids
        return ids if self.separator is None else [*ids, self.separator]

    def _render(self, document: Document) -> str:
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise UserError(
                f"--text holds chats, but the tokenizer of {self._info.name} has no chat template; give "
                f"texts, or put chat_template.jinja into {self._info.folder}"
            )
        try:
            text: str = self.tokenizer.apply_chat_template(document.messages, tokenize=False)
        except (TemplateError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the chat template of {self._info.name} refuses a chat of --text ({reason}); leave it out"
            ) from None
        return text

    def ids_of(self, tokens: Iterable[str | int]) -> list[int]:
        """The ids, in order, of tokens given as ids, as texts of one token, or as 'special'.

        Raises:
            UserError: an id outside the vocabulary, or a text of several tokens.
        """
        found: set[int] = set()
        for token in tokens:
            if token == SPECIAL:
                found.update(self._special_ids())
                continue
            if isinstance(token, int) or token.isdecimal():
                ids, why = [int(token)], f"is not in the vocabulary of {self._info.vocab_size:,} tokens"
            else:
                ids = self.encode(token)
                why = f"is {len(ids)} tokens ({', '.join(map(str, ids))})"
            if len(ids) != 1 or not 0 <= ids[0] < self._info.vocab_size:
                raise UserError(
                    f"--exclude-tokens {token!r} {why} of {self._info.name}; give token ids, texts of one "
                    f"token, or {SPECIAL!r}"
                )
            found.update(ids)
        return sorted(found)

    def _special_ids(self) -> set[int]:
        """Ids of the special tokens: BOS, end of text, padding, and the markers of chats."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {*self.tokenizer.all_special_ids, *(id for id, token in added if token.special)}

    def adds_bos(self) -> bool:
        """True when the tokenizer by default begins a text with the BOS token."""
        ids = self.tokenizer("a", verbose=False)["input_ids"]
        return self.bos is not None and bool(ids) and ids[0] == self.bos

    def bytes(self) -> list[bytes]:
        """The bytes that each id of the model's vocabulary stands for, b'' for an id without a token.

        Covers byte-level BPE (GPT-2), SentencePiece pieces with byte fallback (Llama) and plain
        vocabularies. A special token stands for its own name.
        """
        table: list[bytes] = [b""] * self._info.vocab_size
        added = self.tokenizer.added_tokens_decoder
        byte_level = self._is_byte_level()
        for piece, id in self.tokenizer.get_vocab().items():
            if id >= len(table):
                continue
            if id in added:
                table[id] = self._added_text(id, piece, added[id].special).encode("utf-8")
            elif byte_level:
                table[id] = b"".join(_BYTES.get(char, char.encode("utf-8")) for char in piece)
            elif found := _BYTE_TOKEN.fullmatch(piece):
                table[id] = bytes([int(found[1], 16)])
            else:
                table[id] = piece.replace("\u2581", " ").encode("utf-8")
        return table

    def _added_text(self, id: int, piece: str, special: bool) -> str:
        """What an added token stands for: its name if it is special, otherwise what it is decoded to.

        Some are runs of spaces, written with U+2581 as the pieces of SentencePiece are (Gemma).
        """
        if special or "\u2581" not in piece:
            return piece
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        # Decoded between other tokens: some decoders take a space from the beginning of a text.
        around = "a"
        text = decoder.decode([around, piece, around]) if decoder is not None else None
        if text is not None and text.startswith(around) and text.endswith(around) and len(text) > 2:
            return str(text[1:-1])
        return piece.replace("\u2581", " ")

    def _is_byte_level(self) -> bool:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return False
        description = json.loads(backend.to_str())
        return '"ByteLevel"' in json.dumps([description.get("decoder"), description.get("pre_tokenizer")])


class NoTokenizer(ModelTokenizer):
    """Stands in for the tokenizer of a model without one: documents of token ids can be read, texts cannot.

    ``bos`` and ``separator`` are the config's bos_token_id and eos_token_id.
    """

    def __init__(self, info: ModelInfo) -> None:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(info.folder, local_files_only=True, trust_remote_code=False)
        config = config.get_text_config()
        self._info = info
        self.bos, self.separator = (
            next((id for id in (ids if isinstance(ids, list) else [ids]) if id is not None), None)
            for ids in (getattr(config, name, None) for name in ("bos_token_id", "eos_token_id"))
        )

    @property
    def tokenizer(self) -> Any:
        raise UserError(
            f"model {self._info.name} has no tokenizer in {self._info.folder}; put its tokenizer.json there, "
            "or give a text of token ids"
        )

    def adds_bos(self) -> bool:
        return False

    def _special_ids(self) -> set[int]:
        return {id for id in (self.bos, self.separator) if id is not None}

    def bytes(self) -> list[bytes]:
        """Placeholders: b'<17>' for the id 17."""
        return [b"<%d>" % id for id in range(self._info.vocab_size)]


def open_tokenizer(info: ModelInfo) -> ModelTokenizer:
    """The tokenizer of a model; a stand-in for one that its folder lacks.

    Raises:
        UserError: the tokenizer cannot be read or does not fit the model.
    """
    return ModelTokenizer(info) if has_tokenizer(info.folder) else NoTokenizer(info)


def _byte_alphabet() -> dict[str, bytes]:
    """Character -> byte in GPT-2's byte-level BPE (Radford et al. 2019, encoder.py)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    return table | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()
