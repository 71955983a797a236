"""The provider ``openai``: a server that speaks OpenAI's chat completions, local or not.

The key is read from the environment and sent in one header; it is not stored. Answers are cached on disk
under a hash of the whole question, so a question is paid for once.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from saebench.core.errors import UserError
from saebench.core.files import make_directory, sha256_json, write_json_atomic
from saebench.core.reading import read_json
from saebench.explaining.provider import Question, Reply

if TYPE_CHECKING:
    import httpx

LARGEST_ANSWER = 4 << 20
LONGEST_WAIT = 60.0
MOST_TOKENS = 10_000_000
"""A larger number of tokens in a server's answer is ignored."""
NEEDS_A_KEY = ("api.openai.com",)
LOGPROBS = {"logprobs": True, "top_logprobs": 20}


class _Retry(Exception):
    """A temporary failure; ``wait`` is the number of seconds that the server asks to wait, if it does."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class OpenAICompatible:
    """Answers by asking a server.

    Args:
        timeout: seconds within which a complete answer must arrive.
        retries: further attempts after a temporary failure: no answer in time, an answer that cannot be
            parsed, or status 408, 409, 429 or 5xx. Before each, it waits as long as the server asks, or twice
            as long as the last time, with jitter.
        answers: directory in which answers are cached.

    Raises:
        UserError: the server needs a key and there is none. While asking: the server refuses the key, does
            not know the model, or cannot be reached.
    """

    name = "openai"

    def __init__(
        self,
        model: str,
        *,
        base_url: str,
        key_env: str,
        timeout: float,
        retries: int,
        concurrency: int,
        answers: Path,
        first_wait: float = 0.5,
    ) -> None:
        import httpx

        self.model, self.version = model, ""
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._timeout, self._retries, self._first_wait = timeout, retries, first_wait
        self._concurrency, self._answers, self._key_env = concurrency, answers, key_env
        key = os.environ.get(key_env, "").strip()
        if not key and urlsplit(base_url).hostname in NEEDS_A_KEY:
            raise UserError(f"{base_url} needs a key; put it into the environment variable {key_env}")
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"the environment variable {key_env} does not hold a valid key; check it")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._certificates = httpx.create_ssl_context()  # loading them takes longer than many questions do
        self._answered = False
        self._logprobs = True

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """Replies in the order of the questions, which are sent concurrently."""
        loop = asyncio.new_event_loop()
        work = loop.create_task(self._ask_all(questions))
        try:
            # In its own thread, because the thread of a notebook already runs an event loop.
            with ThreadPoolExecutor(1) as thread:
                replies = thread.submit(loop.run_until_complete, work)
                try:
                    return replies.result()
                except BaseException:
                    loop.call_soon_threadsafe(work.cancel)
                    raise
        finally:
            loop.close()

    async def _ask_all(self, questions: Sequence[Question]) -> list[Reply]:
        import httpx

        several = asyncio.Semaphore(self._concurrency)
        async with httpx.AsyncClient(
            headers=self._headers, timeout=self._timeout, follow_redirects=False, verify=self._certificates
        ) as client:

            async def ask(question: Question) -> Reply:
                async with several:
                    return await self._ask(client, question)

            tasks = [asyncio.create_task(ask(question)) for question in questions]
            try:
                return list(await asyncio.gather(*tasks))
            except BaseException:
                for task in tasks:
                    task.cancel()
                raise

    async def _ask(self, client: httpx.AsyncClient, question: Question) -> Reply:
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": 0,
            "max_tokens": question.max_tokens,
            "messages": [
                {"role": "system", "content": question.system},
                {"role": "user", "content": question.user},
            ],
        }
        kept = self._answers / f"{sha256_json([self._url, body, question.yes_or_no])}.json"
        if (answer := _kept(kept)) is not None:
            return Reply("ok", answer["text"], answer["probability"], tokens=answer["tokens"], kept=True)
        reply = await self._attempts(client, body, question.yes_or_no)
        if reply.status == "ok":
            make_directory(self._answers)
            content = {"text": reply.text, "probability": reply.probability, "tokens": reply.tokens}
            write_json_atomic(kept, content)
        return reply

    async def _attempts(self, client: httpx.AsyncClient, body: dict[str, Any], yes_or_no: bool) -> Reply:
        reason = ""
        for attempt in range(self._retries + 1):
            try:
                with_logprobs = yes_or_no and self._logprobs
                status, headers, text = await self._post(client, body | (LOGPROBS if with_logprobs else {}))
                if status == 400 and with_logprobs and "logprob" in text:
                    self._logprobs = False
                    status, headers, text = await self._post(client, body)
                return self._read(status, headers, text, yes_or_no)
            except _Retry as failure:
                reason = str(failure)
                if attempt < self._retries:
                    doubled = self._first_wait * 2**attempt * random.uniform(0.5, 1.5)
                    await asyncio.sleep(min(doubled if failure.wait is None else failure.wait, LONGEST_WAIT))
        return Reply("failed", reason=reason)

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[int, Any, str]:
        """Status, headers and text of the answer, which must be complete within the timeout."""
        import httpx

        data = bytearray()
        try:
            async with (
                asyncio.timeout(self._timeout),
                client.stream("POST", self._url, json=body) as response,
            ):
                async for part in response.aiter_bytes():
                    data += part
                    if len(data) > LARGEST_ANSWER:
                        raise _Retry(f"the answer is larger than {LARGEST_ANSWER >> 20} MiB")
                return response.status_code, response.headers, data.decode("utf-8", "replace")
        except httpx.ConnectError as error:
            if not self._answered:
                raise UserError(
                    f"nothing answers at {self._url} ({type(error).__name__}); check --base-url"
                ) from None
            raise _Retry("the server is gone") from None
        except (httpx.TimeoutException, TimeoutError):
            raise _Retry(f"no whole answer within {self._timeout:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _Retry(f"the connection failed ({type(error).__name__})") from None

    def _read(self, status: int, headers: Any, text: str, yes_or_no: bool) -> Reply:
        if status in (401, 403):
            raise UserError(f"{self._url} refuses the key in {self._key_env} (status {status}); check it")
        if status == 404:
            raise UserError(
                f"{self._url} does not know the model {self.model!r} (status 404); check --model, --base-url"
            )
        if status in (408, 409, 429) or status >= 500:
            raise _Retry(f"the server answers with status {status}", _retry_after(headers))
        if status != 200:
            return Reply("failed", reason=f"the server answers with status {status}")
        try:
            answer = json.loads(text)
            choice = answer["choices"][0]
            message = choice["message"]
            refused = bool(message.get("refusal")) or choice.get("finish_reason") == "content_filter"
            content = message.get("content")
            usage = (answer.get("usage") or {}).get("total_tokens")
            tokens = len(text) // 3
            if isinstance(usage, int) and 0 <= usage <= MOST_TOKENS:
                tokens = usage
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise _Retry("the server's answer is not understood") from None
        self._answered = True
        if refused:
            return Reply("refused", reason="the server declines to answer", tokens=tokens)
        if not isinstance(content, str):
            raise _Retry("the server's answer is not understood")
        content = content.encode("utf-8", "replace").decode()  # a lone surrogate cannot be stored
        return Reply("ok", content, chance_of_yes(choice) if yes_or_no else None, tokens=tokens)


def chance_of_yes(choice: dict[str, Any]) -> float | None:
    """P(yes | yes or no), from the log-probabilities of the first token; None when there are none."""
    try:
        first = choice["logprobs"]["content"][0]["top_logprobs"]
        mass = {"yes": 0.0, "no": 0.0}
        for entry in first:
            word = str(entry["token"]).strip().lower()
            if word in mass:
                mass[word] += math.exp(min(float(entry["logprob"]), 0.0))
        total = mass["yes"] + mass["no"]
        return mass["yes"] / total if total > 0 else None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None


def _retry_after(headers: Any) -> float | None:
    """Seconds that the server asks to wait; the header has a number or a date."""
    said = headers.get("retry-after")
    if said is None:
        return None
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(said).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _kept(path: Path) -> dict[str, Any] | None:
    """A cached answer; None when there is none or it cannot be read."""
    if not path.exists():
        return None
    from saebench.core.shapes import Count, Number, Shape, Text

    class Answer(Shape):
        text: Text
        tokens: Count
        probability: Number | None

    try:
        answer: dict[str, Any] = read_json(path, what="the kept answer", shape=Answer)
    except UserError:
        return None
    return answer if 0 <= (answer["probability"] or 0) <= 1 else None
