"""The client of the load benchmark: what it reads from a stream, and when it asks what."""

import asyncio
import json
import random

import httpx
import pytest

from medusa_apar.eval.serve_client import Chunk, Exchange, ask, closed_loop, open_loop
from tests.support.clockwork import run


def event(text=None, finish=None, **more):
    choices = [] if text is None else [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]
    return f"data: {json.dumps({'choices': choices, **more}, ensure_ascii=False)}\n\n".encode()


USAGE = {"prompt_tokens": 7, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}}
WHOLE = [event(""), event("Hé"), event(" there"), event("", "length"), event(usage=USAGE), b"data: [DONE]\n\n"]


class Scripted(httpx.AsyncBaseTransport):
    """Answers with given bytes, each after so many seconds."""

    def __init__(self, *parts, status=200, fails=None):
        self.parts, self.status, self.fails, self.closed = parts, status, fails, 0

    async def handle_async_request(self, request):
        script = self

        class Stream(httpx.AsyncByteStream):
            async def __aiter__(self):
                for seconds, part in script.parts:
                    await asyncio.sleep(seconds)
                    yield part
                if script.fails is not None:
                    raise script.fails

            async def aclose(self):
                script.closed += 1

        return httpx.Response(self.status, stream=Stream())


def asked(transport, cut=None):
    exchange = Exchange(0, sent=1.0)

    async def main():
        async with httpx.AsyncClient(transport=transport) as http:
            await asyncio.sleep(1.0)
            talk = asyncio.create_task(ask(http, "http://server", {"stream": True}, exchange))
            if cut is not None:
                await asyncio.sleep(cut)
                talk.cancel()
            await asyncio.gather(talk, return_exceptions=True)

    run(main())
    return exchange


# ---- one question


def test_an_answer_is_taken_with_the_times_at_which_its_parts_came():
    exchange = asked(Scripted(*((0.5, part) for part in WHOLE)))
    assert exchange.answered and exchange.error == ""
    assert (exchange.sent, exchange.ended) == (1.0, 4.0)
    assert exchange.chunks == [Chunk(2.0, 3), Chunk(2.5, 6)]  # two bytes are an é's
    assert (exchange.tokens, exchange.prompt_tokens, exchange.cached_tokens) == (4, 7, 2)
    assert (exchange.finish_reason, exchange.finished) == ("length", 3.0)
    assert exchange.texts == ["Hé", " there"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_it_does_not_matter_how_the_bytes_are_cut(size):
    stream = b"".join([*WHOLE[:2], event(" \u2028 \x85 \x1d"), *WHOLE[3:]])  # which end lines for others
    exchange = asked(Scripted(*((0.0, stream[at : at + size]) for at in range(0, len(stream), size))))
    assert exchange.answered and [chunk.size for chunk in exchange.chunks] == [3, len(" \u2028 \x85 \x1d".encode())]


def test_tokens_are_counted_by_chunk_where_the_server_tells():
    counted = [event("a", usage={"completion_tokens": 1}), event("bc", usage={"completion_tokens": 3})]
    exchange = asked(Scripted(*((0.25, part) for part in [*counted, *WHOLE[3:]])))
    assert [chunk.tokens for chunk in exchange.chunks] == [1, 3] and exchange.tokens == 4


@pytest.mark.parametrize(
    ("transport", "error"),
    [
        (Scripted((0, b'{"error": {"message": "the queue  is full"}}'), status=429), "HTTP 429: the queue is full"),
        (Scripted((0, b'{"detail": "no"}'), status=422), "HTTP 422: {'detail': 'no'}"),
        (Scripted((0, b"<html>\xff"), status=502), "HTTP 502: <html>\ufffd"),
        (Scripted((0, WHOLE[1]), (0, b'data: {"error": {"message": "it broke"}}\n\n')), "it broke"),
        (Scripted((0, WHOLE[1]), fails=httpx.ReadError("reset")), "ReadError: reset"),
        (Scripted((0, WHOLE[1])), "the stream ended without usage"),
        (Scripted((0, WHOLE[1]), (0, WHOLE[4])), "the stream ended without finish_reason"),
        (Scripted((0, b"data: {}\n\n")), "a chunk that is none: {}"),
        (Scripted((0, b"data: [1\n\n")), "a chunk that is none: [1"),
    ],
)
def test_what_goes_wrong_is_said_and_is_no_answer(transport, error):
    exchange = asked(transport)
    assert exchange.error == error and not exchange.answered and exchange.ended == 1.0
    assert transport.closed


def test_a_client_that_hangs_up_keeps_what_it_has_and_closes():
    transport = Scripted(*((0.5, part) for part in WHOLE))
    exchange = asked(transport, cut=1.25)
    assert exchange.chunks == [Chunk(2.0, 3)] and exchange.ended is None
    assert exchange.error == "" and not exchange.answered and transport.closed == 1


# ---- many


class Answering:
    """Each question takes its number's seconds; keeps how many were asked at once."""

    def __init__(self, seconds):
        self.seconds, self.now, self.peak, self.cut = seconds, 0, 0, []

    async def __call__(self, exchange):
        clock = asyncio.get_running_loop().time
        self.now += 1
        self.peak = max(self.peak, self.now)
        try:
            await asyncio.sleep(self.seconds(exchange.number))
            exchange.tokens = 1
            exchange.close(clock())
        except asyncio.CancelledError:
            self.cut.append(exchange.number)
            raise
        finally:
            self.now -= 1


def test_a_closed_loop_asks_again_when_answered_and_stays_full_to_the_end():
    answering = Answering(lambda number: (1.0, 4.0, 1.0, 1.0, 1.0, 8.0, 8.0)[number])
    exchanges = run(closed_loop(answering, clients=2, measured=4))
    assert [exchange.sent for exchange in exchanges] == [0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 4.0][: len(exchanges)]
    assert [exchange.measured for exchange in exchanges] == [True] * 4 + [False] * (len(exchanges) - 4)
    assert answering.peak == 2 and answering.cut and min(answering.cut) > 3
    assert max(exchange.ended for exchange in exchanges[:4]) == 4.0


def test_there_are_never_more_clients_than_questions():
    answering = Answering(lambda number: 1.0)
    exchanges = run(closed_loop(answering, clients=16, measured=3))
    assert answering.peak == 3 and [exchange.sent for exchange in exchanges[:3]] == [0.0] * 3


def test_an_open_loop_asks_at_times_drawn_from_its_seed_answered_or_not():
    rng, at, wanted = random.Random(5), 0.0, []
    for _ in range(6):
        wanted.append(at := at + rng.expovariate(2.0))
    slow, quick = Answering(lambda number: 100.0 if number < 6 else 500.0), Answering(lambda number: 0.0)
    exchanges = run(open_loop(slow, rate=2.0, measured=6, seed=5))
    assert [exchange.sent for exchange in exchanges[:6]] == wanted
    assert slow.peak > 100 and len(slow.cut) == len(exchanges) - 6  # nobody waits for the later ones
    exchanges = run(open_loop(quick, rate=2.0, measured=6, seed=5))
    assert [exchange.sent for exchange in exchanges] == wanted and quick.peak == 1
    other = run(open_loop(quick, rate=2.0, measured=6, seed=6))
    assert other[0].sent != wanted[0]


def test_a_question_that_is_asked_late_is_late():
    """The client itself may be held up; who asked has waited all the same."""

    async def main():
        loop = asyncio.get_running_loop()
        loop.call_later(1.0, lambda: setattr(loop, "now", loop.now + 5.0))
        return await open_loop(Answering(lambda number: 0.0), rate=2.0, measured=8, seed=0)

    late = [exchange.ended - exchange.sent for exchange in run(main())[:8]]
    assert min(late) == 0.0 and max(late) > 3.0


def test_rates_are_met_on_average():
    exchanges = run(open_loop(Answering(lambda number: 0.0), rate=8.0, measured=4000, seed=1))
    assert exchanges[3999].sent == pytest.approx(500, rel=0.05)


@pytest.mark.parametrize("loop", [lambda ask: closed_loop(ask, 2, 3), lambda ask: open_loop(ask, 1.0, 3, 0)])
def test_a_fault_of_the_client_itself_ends_the_loop(loop):
    async def broken(exchange):
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        run(loop(broken))
