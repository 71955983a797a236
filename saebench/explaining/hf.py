"""The provider ``hf``: a causal language model in a local folder, run in this process.

Shapes: B questions, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from saebench.core.errors import UserError
from saebench.core.reading import shown
from saebench.explaining.provider import Question, Reply, shown_name

BATCH = 8


class HuggingFace:
    """Answers with transformers; for yes-or-no questions with P(yes | yes or no).

    Raises:
        UserError: there is no such folder, or it has no language model with safetensors weights.
    """

    name = "hf"

    def __init__(self, model: str, device: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        from saebench.core.device import pick_device
        from saebench.sources.model_info import peek_model
        from saebench.sources.pretrained import load_pretrained

        info = peek_model(model, local_only=True)
        self.model, self.version = shown_name(model), info.hash
        self._n_ctx = info.n_ctx or 2**31
        local = {"local_files_only": True, "trust_remote_code": False}
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(info.folder, **local)
            lm = load_pretrained(AutoModelForCausalLM, info.folder, model)
        except Exception as error:  # each class of model raises errors of its own
            reason = shown(str(error) or type(error).__name__, 200)
            raise UserError(f"model {model} cannot be asked ({reason}); give another --model") from None
        self._lm = lm.to(pick_device(device)).eval()
        self._chat = bool(getattr(self._tokenizer, "chat_template", None))

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """Greedy text, or the probability of yes; a prompt that is too long for the model is ``failed``."""
        prompts = [self._ids(question) for question in questions]
        replies: list[Reply | None] = [
            self._too_long(ids, q) for ids, q in zip(prompts, questions, strict=True)
        ]
        left = [i for i, reply in enumerate(replies) if reply is None]
        choices = sorted((i for i in left if questions[i].yes_or_no), key=lambda i: len(prompts[i]))
        for start in range(0, len(choices), BATCH):
            batch = choices[start : start + BATCH]
            for i, chance in zip(batch, self._chances([prompts[i] for i in batch]), strict=True):
                if math.isnan(chance):  # as in half precision, when something overflows
                    replies[i] = Reply("failed", reason="the model's probabilities are not numbers")
                    continue
                text = "Yes" if chance >= 0.5 else "No"
                replies[i] = Reply("ok", text, probability=chance, tokens=len(prompts[i]))
        for i in left:
            if not questions[i].yes_or_no:
                replies[i] = self._generate(prompts[i], questions[i].max_tokens)
        return [reply for reply in replies if reply is not None]

    def _ids(self, question: Question) -> list[int]:
        if self._chat:
            turns = [
                {"role": "system", "content": question.system},
                {"role": "user", "content": question.user},
            ]
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            return list(self._tokenizer.encode(text, add_special_tokens=False))
        text = f"{question.system}\n\n{question.user}"
        return list(self._tokenizer.encode(f"{text}\nAnswer:" if question.yes_or_no else text))

    def _too_long(self, ids: list[int], question: Question) -> Reply | None:
        if len(ids) + question.max_tokens <= self._n_ctx:
            return None
        reason = (
            f"the prompt has {len(ids)} tokens, and with {question.max_tokens} for the answer these are more "
            f"than the {self._n_ctx} that the model reads; lower --examples or --window"
        )
        return Reply("failed", reason=reason)

    def _chances(self, prompts: list[list[int]]) -> list[float]:
        """P(yes) of each prompt: the probabilities of the two answers, normalized to sum to 1."""
        import torch

        answers = [self._answer(word) for word in ("Yes", "No")]
        rows = [ids + answer for ids in prompts for answer in answers]
        longest = max(map(len, rows))
        # Padding comes after the text: a causal model does not see it, and positions stay as they are.
        ids_BT = torch.tensor(
            [row + [row[-1]] * (longest - len(row)) for row in rows], device=self._lm.device
        )
        with torch.inference_mode():
            logits_BTV = self._lm(input_ids=ids_BT).logits
        totals: list[float] = []
        for b, row in enumerate(rows):
            n_answer = len(answers[b % 2])
            at = slice(len(row) - n_answer - 1, len(row) - 1)
            logprobs_TV = logits_BTV[b, at].float().log_softmax(-1)
            totals.append(sum(float(logprobs_TV[t, token]) for t, token in enumerate(row[-n_answer:])))
        yes_minus_no = -torch.tensor(totals, dtype=torch.float64).view(-1, 2).diff(dim=1)[:, 0]
        return [float(chance) for chance in yes_minus_no.sigmoid()]

    def _answer(self, word: str) -> list[int]:
        return list(self._tokenizer.encode(word if self._chat else f" {word}", add_special_tokens=False))

    def _generate(self, ids: list[int], max_tokens: int) -> Reply:
        import torch

        ids_BT = torch.tensor([ids], device=self._lm.device)
        with torch.inference_mode():
            made_BT = self._lm.generate(
                input_ids=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=self._tokenizer.eos_token_id,
            )
        made = made_BT[0, len(ids) :]
        return Reply(
            "ok", self._tokenizer.decode(made, skip_special_tokens=True), tokens=len(ids) + len(made)
        )
