"""schemathesis, where it is installed, makes requests of the server's own OpenAPI description, right and wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serve.conftest import Running

schemathesis = pytest.importorskip("schemathesis")
PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/models")


@pytest.mark.parametrize("path", PATHS)
def test_no_request_of_the_description_breaks_the_server(served: Running, path: str) -> None:
    """Answers are 200, or errors of OpenAI's shape; the description's own requests never make a 500."""
    schema: Any = schemathesis.openapi.from_dict(served.web.get("/openapi.json").json())
    operation = next(iter(schema[path].values()))

    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def ask(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy())
        body = case.body if isinstance(case.body, (dict, list, str, int, float, bool)) else None
        if isinstance(body, dict) and "max_tokens" in body and isinstance(body["max_tokens"], int):
            body = {**body, "max_tokens": min(body["max_tokens"], 4)}
        answer = served.web.request(case.method, path, **({} if body is None else {"json": body}))
        assert answer.status_code in (200, 400, 404, 413, 429), answer.text
        if answer.status_code != 200:
            assert answer.json()["error"].keys() == {"message", "type", "param", "code"}

    ask()
    served.wait_until_idle()
