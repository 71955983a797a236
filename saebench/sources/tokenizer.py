"""A model's tokenizer: text to token ids, and the bytes that each id stands for."""

from __future__ import annotations

import json
import re
from typing import Any

from saebench.core.errors import UserError
from saebench.sources.model_info import ModelInfo

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class ModelTokenizer:
    """The tokenizer of one model.

    ``bos`` is the id of the BOS token, or None. ``separator`` is the id put between documents (end of text).
    """

    def __init__(self, info: ModelInfo) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                info.folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the tokenizer of model {info.name} in {info.folder} cannot be read ({reason}); "
                "download its tokenizer files again"
            ) from None
        except Exception as error:  # the tokenizers library raises bare Exception
            raise UserError(
                f"the tokenizer of model {info.name} in {info.folder} cannot be read ({error}); "
                "download its tokenizer files again"
            ) from None
        ids = self.tokenizer.get_vocab().values()
        largest = max(ids, default=-1)
        if largest < 0:
            raise UserError(
                f"the tokenizer of model {info.name} has no tokens; put the model's tokenizer.json into "
                f"{info.folder}"
            )
        if largest >= info.vocab_size:
            raise UserError(
                f"the tokenizer of model {info.name} has token {largest}, but the model's vocabulary ends at "
                f"{info.vocab_size - 1}; download tokenizer and config of one revision of it"
            )
        self._vocab_size = info.vocab_size
        self.bos: int | None = self.tokenizer.bos_token_id
        ends = (self.tokenizer.eos_token_id, self.bos)
        separator = next((end for end in ends if end is not None), None)
        if separator is None:
            raise UserError(
                f"the tokenizer of model {info.name} has neither an eos_token nor a bos_token; set "
                "eos_token in its tokenizer_config.json"
            )
        self.separator: int = separator

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, without special tokens around them."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def adds_bos(self) -> bool:
        """True when the tokenizer by default begins a text with the BOS token."""
        ids = self.tokenizer("a", verbose=False)["input_ids"]
        return self.bos is not None and bool(ids) and ids[0] == self.bos

    def bytes(self) -> list[bytes]:
        """The bytes that each id of the model's vocabulary stands for, b'' for an id without a token.

        Covers byte-level BPE (GPT-2), SentencePiece pieces with byte fallback (Llama) and plain
        vocabularies. A special token stands for its own name.
        """
        table: list[bytes] = [b""] * self._vocab_size
        special = {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        added = set(self.tokenizer.added_tokens_decoder)
        byte_level = self._is_byte_level()
        for piece, id in self.tokenizer.get_vocab().items():
            if id in special or id in added:
                table[id] = piece.encode("utf-8")
            elif byte_level:
                table[id] = b"".join(_BYTES.get(char, char.encode("utf-8")) for char in piece)
            elif found := _BYTE_TOKEN.fullmatch(piece):
                table[id] = bytes([int(found[1], 16)])
            else:
                table[id] = piece.replace("\u2581", " ").encode("utf-8")
        return table

    def _is_byte_level(self) -> bool:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return False
        description = json.loads(backend.to_str())
        return '"ByteLevel"' in json.dumps([description.get("decoder"), description.get("pre_tokenizer")])


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
