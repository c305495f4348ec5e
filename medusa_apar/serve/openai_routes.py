"""OpenAI's routes: chats, completions and models, and vLLM's two for tokens."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from medusa_apar.engine.admission import check_ids
from medusa_apar.engine.outputs import RequestOutput
from medusa_apar.events.texts import TokenTexts
from medusa_apar.threads.request import TokenLogprobs

from .answers import Choice, Delta, echoed, joined, usage
from .aside import Aside
from .bodies import AnyBody, inlined, read
from .errors import ApiError, refused
from .event_texts import EventTexts, GuessTexts
from .exchange import exchange_of
from .forms import ChatForm, CompletionForm, Form
from .prompts import chat_ids, text_ids
from .schemas import ChatBody, CompletionBody, DetokenizeBody, Generation, TokenizeBody
from .streams import EventStream, begun, merged
from .translate import Asked, Place, chat, completion

if TYPE_CHECKING:
    from .service import Service

_MANY = 8  # choices, for each of which much is made, however short the body is
_TOLD_BYTES = 64  # of an answer, for each token whose log-probabilities it tells
_ERROR = {
    "description": "What is wrong, in one sentence.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    },
}
_ERRORS: dict[int | str, dict[str, Any]] = dict.fromkeys((400, 401, 404, 413, 429, 500, 503), _ERROR)

AnyGeneration = TypeVar("AnyGeneration", bound=Generation)


def router(service: Service, prefix: str = "/v1") -> APIRouter:
    """prefix: of OpenAI's own routes."""
    routes, serving = APIRouter(responses=_ERRORS), _Serving(service)

    def post(path: str, schema: type[AnyBody]) -> Callable:
        """A route whose body is read by ourselves, since FastAPI tells of an error in many sentences."""
        content = {"application/json": {"schema": inlined(schema)}}
        return routes.post(path, openapi_extra={"requestBody": {"required": True, "content": content}})

    @post(f"{prefix}/chat/completions", ChatBody)
    async def chat_completions(http: Request) -> Response:
        body = await read(http, ChatBody, serving.aside)
        return await _answer(serving, http, body, ChatForm, chat, body.logprobs is True)

    @post(f"{prefix}/completions", CompletionBody)
    async def completions(http: Request) -> Response:
        body = await read(http, CompletionBody, serving.aside)
        return await _answer(serving, http, body, CompletionForm, completion, body.logprobs is not None)

    @routes.get(f"{prefix}/models")
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [serving.card()]})

    @routes.get(f"{prefix}/models/{{model:path}}")
    async def retrieve_model(model: str) -> Response:
        serving.check(model)
        return JSONResponse(serving.card())

    @post("/tokenize", TokenizeBody)
    async def tokenize(http: Request) -> Response:
        body = await read(http, TokenizeBody, serving.aside)
        serving.check(body.model)

        def answer() -> Response:
            ids = _tokens_of(service, body)
            names = serving.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
            known = {"count": len(ids), "max_model_len": service.facts.context}
            return JSONResponse({**known, "tokens": ids, "token_strs": names})

        return await serving.aside(answer, len(await http.body()))

    @post("/detokenize", DetokenizeBody)
    async def detokenize(http: Request) -> Response:
        body = await read(http, DetokenizeBody, serving.aside)
        serving.check(body.model)

        def answer() -> Response:
            with refused("tokens"):
                check_ids(service.facts.vocabulary, body.tokens, "tokens")
            return JSONResponse({"prompt": serving.tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False)})

        return await serving.aside(answer, len(await http.body()))

    @routes.api_route(f"{prefix}/responses", methods=["GET", "POST"], include_in_schema=False)
    @routes.api_route(f"{prefix}/responses/{{rest:path}}", methods=["GET", "POST", "DELETE"], include_in_schema=False)
    async def responses() -> Response:
        said = f"there is no {prefix}/responses here, as answers are not kept: use {prefix}/chat/completions"
        raise ApiError(404, said)

    return routes


class _Serving:
    """The one model there is, and what its answers share."""

    def __init__(self, service: Service) -> None:
        self.service, self._created = service, int(time.time())
        self.aside = Aside(service.options.max_queue)
        self.written = Aside()  # what has been answered is not refused

    @property
    def tokenizer(self) -> Any:
        return self.service.facts.tokenizer

    @cached_property
    def guesses(self) -> GuessTexts:
        return GuessTexts(self.tokenizer)

    def card(self) -> dict[str, Any]:
        name, context = self.service.model_name, self.service.facts.context
        return {
            **{"id": name, "object": "model", "created": self._created, "owned_by": "medusa-apar"},
            **{"root": name, "parent": None, "max_model_len": context},
        }

    def check(self, name: str | None) -> None:
        """ApiError 404 for another; None is the one there is."""
        if name is not None and name != self.service.model_name:
            said = f"there is no model {name[:200]!r} here, only {self.service.model_name!r}"
            raise ApiError(404, said, param="model", code="model_not_found")


async def _answer(
    serving: _Serving,
    http: Request,
    body: AnyGeneration,
    form_of: Callable[[TokenTexts, bool], Form],
    translate: Callable[[AnyGeneration, Place], Asked],
    logprobs: bool,
) -> Response:
    serving.check(body.model)
    service, texts = serving.service, TokenTexts.of(serving.tokenizer)
    form = form_of(texts, logprobs)
    id = service.new_id(form.prefix)
    place = Place(service.facts, id, service.backend.pool_slots, exchange_of(http).tenant)

    def translated() -> tuple[Asked, _Answer]:
        asked = translate(body, place)
        return asked, _Answer(serving, body, form, asked, texts, id)

    # A grammar that is seen for the first time is compiled.
    always = body.response_format is not None or bool(body.must_call) or (body.n or 1) > _MANY
    asked, answer = await serving.aside(translated, len(await http.body()), always)
    if asked.scorings:
        told = await _scored(service, http, asked)
        await serving.written(lambda: answer.echo(told), _TOLD_BYTES * sum(map(len, told)))
    streams = [service.run(request, http) for request in asked.requests]
    firsts = await begun(streams)
    if body.stream:
        return EventStream(answer.chunks(firsts, streams), streams)
    wholes = await answer.wholes(firsts, streams)
    size = _TOLD_BYTES * sum(len(whole.told) for whole in wholes)
    return await serving.written(lambda: JSONResponse(answer.of(wholes)), size)


async def _scored(service: Service, http: Request, asked: Asked) -> list[list[TokenLogprobs]]:
    """Log-probabilities of each prompt's tokens but the first, where `Asked.scorings` ask for them."""
    scorings = [(place, request) for place, request in enumerate(asked.scorings) if request is not None]
    found: list[list[TokenLogprobs]] = [[] for _ in asked.scorings]
    streams = [service.run(request, http) for _, request in scorings]
    firsts = await begun(streams)
    async with aclosing(merged(firsts, streams)) as outputs:
        async for index, output in outputs:
            found[scorings[index][0]] += output.prompt_logprobs
    return found


class _Answer:
    """What one HTTP request is answered with."""

    def __init__(
        self, serving: _Serving, body: Generation, form: Form, asked: Asked, texts: TokenTexts, id: str
    ) -> None:
        self._body, self._form, self._asked, self._texts = body, form, asked, texts
        self._head = {"id": id, "created": int(time.time()), "model": serving.service.model_name}
        self._echoes = [Delta(text) for text in asked.echoes]  # of each choice
        self._choices = [
            Choice(asked, texts, EventTexts(serving.tokenizer, serving.guesses) if body.events else None)
            for _ in asked.requests
        ]
        self._give_echoes()

    def echo(self, logprobs: Sequence[Sequence[TokenLogprobs]]) -> None:
        """The prompts come with what `_scored` has found."""
        echoes = self._asked.echoes[:: self._asked.n]
        each = zip(echoes, self._asked.prompts, logprobs, strict=True)
        made = [echoed(text, ids, its, self._texts) for text, ids, its in each]
        self._echoes = [made[index // self._asked.n] for index in range(len(self._echoes))]
        self._give_echoes()

    def _give_echoes(self) -> None:
        for choice, echo in zip(self._choices, self._echoes, strict=False):
            choice.echo = echo

    async def wholes(
        self, firsts: list[RequestOutput], streams: list[AsyncGenerator[RequestOutput, None]]
    ) -> list[Delta]:
        """All of each choice, once it has ended."""
        deltas: list[list[Delta]] = [[] for _ in self._choices]
        async with aclosing(merged(firsts, streams)) as outputs:
            async for index, output in outputs:
                deltas[index].append(self._choices[index].take(output))
        return list(map(joined, deltas)) if deltas else self._unwritten()

    def of(self, wholes: list[Delta]) -> dict[str, Any]:
        choices = []
        for index, whole in enumerate(wholes):
            entry = {"index": index, **self._form.whole(whole), "finish_reason": whole.finish_reason}
            if self._body.return_token_ids:
                entry |= {"token_ids": whole.token_ids, "prompt_token_ids": self._prompt(index)}
            choices.append(entry)
        answer = {**self._head, "object": self._form.object, "choices": choices}
        answer |= {"usage": usage(self._asked, self._choices), "system_fingerprint": None}
        if self._body.events:
            answer["apar"] = {"events": wholes[0].events, "stats": self._choices[0].stats()}
        return answer

    async def chunks(
        self, firsts: list[RequestOutput], streams: list[AsyncGenerator[RequestOutput, None]]
    ) -> AsyncGenerator[dict[str, Any], None]:
        form, ids = self._form, self._body.return_token_ids
        for index in range(len(self._asked.prompts) * self._asked.n):
            opening = form.opening()
            if ids:
                opening = (opening or form.end()) | {"prompt_token_ids": self._prompt(index)}
            if opening is not None:
                yield self._chunk(index, opening)
        for index, whole in enumerate(self._unwritten()):
            yield self._chunk(index, form.part(whole))
            yield self._chunk(index, form.end(), whole.finish_reason)
        async with aclosing(merged(firsts, streams)) as outputs:
            async for index, output in outputs:
                delta = self._choices[index].take(output)
                brings = delta.text or delta.told or delta.events or delta.calls
                if brings or (ids and delta.token_ids):
                    entry = form.part(delta) | ({"token_ids": delta.token_ids} if ids else {})
                    yield self._chunk(index, entry, events=delta.events)
                if delta.finish_reason is not None:
                    yield self._chunk(index, form.end(), delta.finish_reason)
        if self._body.includes_usage:
            yield {**self._frame(), "choices": [], "usage": usage(self._asked, self._choices)}

    def _chunk(
        self, index: int, entry: dict[str, Any], reason: str | None = None, events: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        chunk = {**self._frame(), "choices": [{"index": index, **entry, "finish_reason": reason}]}
        if self._body.includes_usage:
            chunk["usage"] = None
        if events:
            chunk["apar"] = {"events": events}
        elif self._body.events and reason is not None:
            chunk["apar"] = {"events": [], "stats": self._choices[index].stats()}
        return chunk

    def _frame(self) -> dict[str, Any]:
        return {**self._head, "object": self._form.chunk_object, "system_fingerprint": None}

    def _unwritten(self) -> list[Delta]:
        """Choices that are nothing but their prompts."""
        return [] if self._choices else [replace(echo, finish_reason="length") for echo in self._echoes]

    def _prompt(self, index: int) -> list[int]:
        return self._asked.prompts[index // self._asked.n]


def _tokens_of(service: Service, body: TokenizeBody) -> list[int]:
    if body.messages is not None:
        with refused("messages"):
            return chat_ids(service.facts, body.messages)
    return text_ids(service.facts, body.prompt or "", body.add_special_tokens is not False)
