"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from stars_fast.params import StarsParams
from stars_fast.text.tool_calls import TOOL_CALL_PARSERS


@dataclass(frozen=True)
class ServerSettings:
    """Settings of `create_app`.

    Parameters
    ----------
    model_name
        The only name that ``model`` of a request may have.
    params
        Parameters of a request where it does not say otherwise.
    api_key
        What requests to ``/v1`` must bring as ``Authorization: Bearer KEY``, or several of which
        each will do; None: nothing.
    request_timeout
        Seconds that a request has; None: as many as it takes.
    drain_timeout
        Seconds that unfinished requests have when the server stops.
    max_body_bytes
        Size of a request's body at most.
    max_choices
        Responses drawn for one HTTP request at most: prompts times `n`, times candidates where
        a method chooses among whole responses.
    log_prompts
        Log prompts and responses, too.
    model_path
        Where the model came from, which ``/v1/models`` tells; None: `model_name`.
    allowed_origins
        Origins whose pages may read answers (CORS); ``"*"``: all.
    tool_call_parser
        How calls of tools stand in the text of a chat's answer, one of
        `stars_fast.text.tool_calls.TOOL_CALL_PARSERS`; None: they stay text.
    image_hosts
        Hosts, by name or ``name:port``, from which pictures of chats are fetched.
    """

    model_name: str
    params: StarsParams = field(default_factory=StarsParams)
    api_key: str | tuple[str, ...] | None = None
    request_timeout: float | None = 600.0
    drain_timeout: float = 30.0
    max_body_bytes: int = 1 << 20
    max_choices: int = 128
    log_prompts: bool = False
    model_path: str | None = None
    allowed_origins: tuple[str, ...] = ()
    tool_call_parser: str | None = None
    image_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.tool_call_parser not in (None, *TOOL_CALL_PARSERS):
            known = ", ".join(map(repr, TOOL_CALL_PARSERS))
            raise ValueError(
                f"tool_call_parser must be None or one of {known}, got {self.tool_call_parser!r}"
            )
        if self.api_key == "" or (isinstance(self.api_key, tuple) and not all(self.api_key)):
            raise ValueError("api_key must be text that is not empty, or None")
        if self.request_timeout is not None and self.request_timeout <= 0:
            raise ValueError(f"request_timeout must be above 0 or None, got {self.request_timeout}")
        if self.drain_timeout < 0:
            raise ValueError(f"drain_timeout must be at least 0, got {self.drain_timeout}")
        for name in ("max_body_bytes", "max_choices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
