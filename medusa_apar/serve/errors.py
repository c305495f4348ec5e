"""What a client is told where it gets no answer, in the shape and words of OpenAI's API."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi.responses import JSONResponse

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """Ends a request; the app answers with it. In the middle of a stream, send `body()` as an event's data.

    Args:
        status: the HTTP status. 499 is for a client that has gone, and nobody reads it.
        message: one sentence.
        type: of the error; by default the one that goes with the status.
        param: the field of the body that is at fault.
        headers: of the answer, such as `Retry-After`.
        code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = _TYPES.get(status, "invalid_request_error") if type is None else type
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


@contextmanager
def refused(param: str | None = None) -> Iterator[None]:
    """What the layers below refuse in one sentence is the client's to read."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        named = re.match(r"(\w+)=", str(error))  # "top_p=0 must be ..."
        raise ApiError(400, str(error), param=named[1] if named else param) from error
