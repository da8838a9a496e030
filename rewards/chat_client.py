"""Asks an OpenAI-compatible chat endpoint: many prompts at a time, each until it has an answer or a reason for none.

The requests run on an event loop in a thread of the client's own, so that callers stay synchronous and all threads
share one set of limits.
"""

from __future__ import annotations

import asyncio
import email.utils
import importlib.util
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rewards.call_limits import BudgetSpent, CallLimits, Spent
from rewards.records import Status

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0  # before a retry: doubled each time, unless the server names a time
_PASSING = (408, 409, 425, 429)  # and 5xx: another try may succeed
_BYTES_PER_TOKEN = 3  # a low guess, for limits and where a server does not count
_SCHEMA_WORDS = ("response_format", "json_schema", "structured", "guided", "grammar")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to ask and how. Names are OpenAI's; 0 stands for no limit, None for leaving it to the server."""

    base_url: str
    model: str
    api_key_env: str = ""
    temperature: float | None = 0.0
    max_tokens: int = 1024
    seed: int | None = 0
    timeout: float = 120.0  # seconds an attempt may take
    retries: int = 4
    concurrency: int = 16
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_requests: int = 0
    max_total_tokens: int = 0

    def sampling(self) -> tuple[object, ...]:
        """What decides the answers, for Rule.version."""
        return self.model, self.temperature, self.max_tokens, self.seed


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one prompt; `text` is empty unless status is OK. `usage`: requests, and tokens in and out."""

    text: str = ""
    status: Status = Status.OK
    reason: str = ""
    usage: Mapping[str, int] = field(default_factory=dict)
    refused_schema: bool = False  # the server has no response_format
    queue_s: float = 0.0  # waited for limits and before retries
    run_s: float = 0.0  # the last attempt


class _Failed(Exception):
    """An attempt without an answer. `wait`: seconds that the server asks for; `final`: another try is no use."""

    def __init__(
        self, reason: str, status: Status = Status.ERROR, wait: float | None = None, final: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason, self.status, self.wait, self.final = reason, status, wait, final


class _SchemaRefused(Exception):
    pass


class ChatClient:
    """Safe to use from any thread; starts on first use. The budget lasts as long as the object."""

    def __init__(self, name: str, endpoint: Endpoint) -> None:
        """ValueError naming the reward's option: a bad URL or number, no such environment variable, no httpx2."""
        _check(name, endpoint)
        self.endpoint, self.spent = endpoint, Spent()
        self._headers = {"Content-Type": "application/json"}
        if endpoint.api_key_env:
            self._headers["Authorization"] = f"Bearer {os.environ[endpoint.api_key_env]}"
        self._url = endpoint.base_url.rstrip("/") + "/chat/completions"
        self._length_key = "max_tokens"
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._limits: CallLimits | None = None
        self._http: Any = None

    def ask(self, prompts: Sequence[str], schema: Mapping[str, Any] | None = None) -> list[Reply]:
        """A reply to each prompt, in order. A prompt given k times is drawn with k seeds.

        `schema`: the JSON the answer must fit; where the server refuses that, the reply says so.
        """
        if not prompts:
            return []
        seen = Counter[str]()
        draws = []
        for prompt in prompts:
            draws.append(seen[prompt])
            seen[prompt] += 1
        future = asyncio.run_coroutine_threadsafe(self._ask_all(prompts, draws, schema), self._start())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Drop what is under way and the connections. The client starts anew when it is used again."""
        with self._lock:
            loop, thread, http = self._loop, self._thread, self._http
            self._loop = self._thread = self._http = self._limits = None
        if loop is None or thread is None:
            return
        asyncio.run_coroutine_threadsafe(_shut(http), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    def _start(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                import httpx2

                limited = asdict(self.endpoint)
                names = ("concurrency", "requests_per_minute", "tokens_per_minute", "max_requests", "max_total_tokens")
                self._limits = CallLimits(self.spent, **{key: limited[key] for key in names})
                size = httpx2.Limits(max_connections=self.endpoint.concurrency)
                self._http = httpx2.AsyncClient(headers=self._headers, timeout=None, limits=size)
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="chat-client", daemon=True)
                self._thread.start()
            return self._loop

    async def _ask_all(
        self, prompts: Sequence[str], draws: Sequence[int], schema: Mapping[str, Any] | None
    ) -> list[Reply]:
        return await asyncio.gather(*(self._ask(prompt, draw, schema) for prompt, draw in zip(prompts, draws)))

    async def _ask(self, prompt: str, draw: int, schema: Mapping[str, Any] | None) -> Reply:
        usage = Counter({"requests": 0, "prompt_tokens": 0, "completion_tokens": 0})
        limits, http, begin = self._limits, self._http, time.perf_counter()
        run_s, text, failed, refused = 0.0, "", None, False
        most = len(prompt.encode(errors="replace")) // _BYTES_PER_TOKEN + 1 + self.endpoint.max_tokens
        for attempt in range(self.endpoint.retries + 1):
            try:
                assert limits is not None and http is not None
                async with limits.call(most) as call:
                    usage["requests"] += 1
                    started, before = time.perf_counter(), usage.total() - usage["requests"]
                    try:
                        text, failed = await self._attempt(http, self._payload(prompt, draw, schema), usage), None
                    finally:
                        run_s = time.perf_counter() - started
                        call.tokens = usage.total() - usage["requests"] - before
            except _Failed as error:
                failed = error
            except _SchemaRefused:
                refused = True
            except BudgetSpent as error:
                failed = _Failed(str(error), final=True)
            except Exception as error:  # the judge boundary: an odd answer costs its own sample only
                failed = _Failed(f"{type(error).__name__}: {error}", final=True)
            if refused or failed is None or failed.final or attempt == self.endpoint.retries:
                break
            backoff = min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S) * random.uniform(0.5, 1.0)  # no stampede
            await asyncio.sleep(backoff if failed.wait is None else failed.wait)
        queue_s = time.perf_counter() - begin - run_s
        if failed is None:
            return Reply(text, usage=usage, refused_schema=refused, queue_s=queue_s, run_s=run_s)
        tries = f" ({usage['requests']} attempts)" if usage["requests"] > 1 else ""
        return Reply("", failed.status, failed.reason + tries, usage, queue_s=queue_s, run_s=run_s)

    async def _attempt(self, http: Any, payload: Mapping[str, Any], usage: Counter[str]) -> str:
        """The text of one answer; adds the tokens it took to `usage`, also where there is no text in the end."""
        import httpx2

        try:
            async with asyncio.timeout(self.endpoint.timeout):  # of the whole: a server may drip bytes for ever
                response = await http.post(self._url, content=json.dumps(payload).encode())
        except TimeoutError:
            raise _Failed(f"no answer after {self.endpoint.timeout:g} s", Status.TIMEOUT) from None
        except httpx2.HTTPError as error:
            raise _Failed(f"{type(error).__name__}: {error or 'no details'}") from None
        if response.status_code != 200:
            self._refused(response, "response_format" in payload)
        try:
            answer = response.json()
            choice = answer["choices"][0]
            message, finish = choice["message"], choice.get("finish_reason")
            content = message.get("content")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _Failed(f"not a chat completion: {response.text[:100]!r}") from None
        text = content if isinstance(content, str) else _joined(content)
        counted = answer.get("usage") if isinstance(answer.get("usage"), Mapping) else {}
        guesses = {"prompt_tokens": payload["messages"][0]["content"], "completion_tokens": text}
        for key, guess in guesses.items():
            known = counted.get(key)
            usage[key] += known if isinstance(known, int) else len(guess.encode(errors="replace")) // _BYTES_PER_TOKEN
        if finish == "length":
            raise _Failed(f"the answer was cut at max_tokens {self.endpoint.max_tokens}; raise it", final=True)
        if not text:
            said = message.get("refusal") or f"finish_reason {finish!r}"
            raise _Failed(f"an answer without text: {said}"[:200], final=True)
        return text

    def _payload(self, prompt: str, draw: int, schema: Mapping[str, Any] | None) -> dict[str, Any]:
        endpoint = self.endpoint
        payload: dict[str, Any] = {"model": endpoint.model, "messages": [{"role": "user", "content": prompt}]}
        payload[self._length_key] = endpoint.max_tokens
        if endpoint.temperature is not None:
            payload["temperature"] = endpoint.temperature
        if endpoint.seed is not None:
            payload["seed"] = endpoint.seed + draw
        if schema is not None:
            json_schema = {"name": "verdict", "strict": True, "schema": schema}
            payload["response_format"] = {"type": "json_schema", "json_schema": json_schema}
        return payload

    def _refused(self, response: Any, with_schema: bool) -> None:
        """Raises what a status other than 200 means."""
        code, said = response.status_code, " ".join(response.text.split())[:200]
        if code in (400, 404, 415, 422, 501) and with_schema and any(word in said for word in _SCHEMA_WORDS):
            raise _SchemaRefused
        if code == 400 and "max_completion_tokens" in said and self._length_key == "max_tokens":
            self._length_key = "max_completion_tokens"  # the newer name, which some models insist on
            raise _Failed(f"HTTP {code}: {said}", wait=0.0)
        if code not in _PASSING and code < 500:
            raise _Failed(f"HTTP {code}: {said}", final=True)
        wait = _retry_after(response.headers.get("retry-after"))
        if wait is not None and wait > LONGEST_WAIT_S:
            raise _Failed(f"HTTP {code}, to be retried after {wait:g} s: {said}", final=True)
        if wait is not None and self._limits is not None:
            self._limits.pause(wait)
        raise _Failed(f"HTTP {code}: {said}", wait=wait)


async def _shut(http: Any) -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await http.aclose()


def _joined(content: Any) -> str:
    """The text of a message whose content comes in parts; "" where it has none."""
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    return "".join(text for text in texts if isinstance(text, str))


def _retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for: a number, or a date."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def _check(name: str, endpoint: Endpoint) -> None:
    if importlib.util.find_spec("httpx2") is None:
        raise ValueError(f"rewards.{name} over an endpoint needs httpx2; pip install 'grpo-v3[rewards]'")
    if not str(endpoint.base_url).startswith(("http://", "https://")):
        raise ValueError(
            f"rewards.{name}.base_url is {endpoint.base_url!r}; give the URL before /chat/completions, such as "
            "http://127.0.0.1:8000/v1"
        )
    if not endpoint.model or not isinstance(endpoint.model, str):
        raise ValueError(f"rewards.{name}.model is {endpoint.model!r}; give the name that the server knows it by")
    if endpoint.api_key_env and not os.environ.get(endpoint.api_key_env):
        raise ValueError(
            f"rewards.{name}.api_key_env names the environment variable {endpoint.api_key_env!r}, which is not set; "
            "export it"
        )
    for option in ("retries", "requests_per_minute", "tokens_per_minute", "max_requests", "max_total_tokens"):
        _whole(name, option, getattr(endpoint, option), 0)
    _whole(name, "concurrency", endpoint.concurrency, 1)
    check_sampling(name, endpoint.temperature, endpoint.max_tokens, endpoint.seed)


def check_sampling(name: str, temperature: float | None, max_tokens: int, seed: int | None) -> None:
    """ValueError naming the option of the reward that no model can sample with."""
    _whole(name, "max_tokens", max_tokens, 1)
    if seed is not None:
        _whole(name, "seed", seed, 0)
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if temperature is not None and not (number and 0 <= temperature <= 2):
        raise ValueError(f"rewards.{name}.temperature is {temperature!r}; give a number from 0 to 2")


def _whole(name: str, option: str, value: Any, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"rewards.{name}.{option} is {value!r}; give a whole number, {lowest} or more")
