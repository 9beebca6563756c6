"""``/v1/responses``: text in, text out; nothing is stored."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from stars_fast.server.answers import StarsAnswer, StarsDelta, to_json
from stars_fast.server.chat import ContentPart
from stars_fast.server.errors import ApiError
from stars_fast.server.generation import Generation
from stars_fast.server.grammar import JsonSchema, ResponseFormat, of_response_format
from stars_fast.server.openapi import RANGES
from stars_fast.server.protocol import Body
from stars_fast.server.transcript import Delta, Transcript
from stars_fast.server.writer import Writer
from stars_fast.text.chats import chat_of


class InputItem(BaseModel):
    """A message, or a tool call or its output, which the chat template reads."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str = Field(
        default="message",
        json_schema_extra={"enum": ["message", "function_call", "function_call_output"]},
    )
    role: str | None = Field(default=None, min_length=1)
    content: str | list[ContentPart] | None = None


class TextFormat(BaseModel):
    """What the text has to be."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: str = Field(json_schema_extra={"enum": ["text", "json_object", "json_schema"]})
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")

    def grammar(self) -> Mapping[str, Any] | None:
        """Return it as `StarsParams.guided`; None: any text."""
        schema = None if self.json_schema is None else JsonSchema(schema=self.json_schema)
        return of_response_format(ResponseFormat(type=self.type, json_schema=schema))


class TextOptions(BaseModel):
    """How the text is made; `verbosity` is a hint without effect."""

    model_config = ConfigDict(extra="ignore", strict=True)

    format: TextFormat | None = None


class ResponsesRequest(Body):
    """Body of ``/v1/responses``."""

    asks_for_nothing: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **Body.asks_for_nothing,
        "background": (False,),
        "conversation": (),
        "include": ([], ["reasoning.encrypted_content"]),
        "max_tool_calls": (),
        "n": (1,),
        "previous_response_id": ("",),
        "prompt": (),
        "store": (False, True),  # of an answer that nobody can ask for again
        "stream_options": ({}, {"include_obfuscation": False}, {"include_obfuscation": True}),
        "top_logprobs": (0,),
        "truncation": ("disabled", "auto"),
    }

    input: str | list[InputItem] = Field(
        description="Text, or messages; an output can be sent back as it came.",
        json_schema_extra={"minItems": 1},
    )
    instructions: str | None = Field(default=None, description="The system's message.")
    max_output_tokens: int | None = Field(
        default=None,
        description="Tokens of the response at most.",
        json_schema_extra=RANGES["max_tokens"],
    )
    reasoning: dict[str, Any] | None = Field(
        default=None, description="Its `effort` is a variable of the chat template, too."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Variables of the chat template."
    )

    text: TextOptions | None = None

    @property
    def format_type(self) -> Any:  # noqa: ANN401 - one of three words by then
        """What the text has to be."""
        return self.text.format.type if self.text and self.text.format else "text"

    def grammars(self) -> list[Mapping[str, Any] | None]:
        """Return what the response has to keep to, as `StarsParams.guided`."""
        asked = self.text.format if self.text is not None else None
        return [*super().grammars(), None if asked is None else asked.grammar()]

    def prompts(self) -> list[dict[str, Any]]:
        """Return the one prompt."""
        if isinstance(self.input, str):
            messages: list[dict[str, Any]] = [{"role": "user", "content": self.input}]
        else:
            messages = [_message(f"input[{i}]", item) for i, item in enumerate(self.input)]
        chat_of(messages, "input")
        if self.instructions:
            messages.insert(0, {"role": "system", "content": self.instructions})
        effort = (self.reasoning or {}).get("effort")
        variables = {} if effort is None else {"reasoning_effort": effort}
        variables |= self.chat_template_kwargs or {}
        return [{"messages": messages, "chat_template_kwargs": variables}]

    def stars_values(self) -> dict[str, Any]:
        """Return the fields of `StarsParams` that the body's own stand for."""
        values = super().stars_values()
        if self.max_output_tokens is not None:
            values["max_tokens"] = self.max_output_tokens
        return values


def _message(where: str, item: InputItem) -> dict[str, Any]:
    """Return an item as chats have it."""
    given = item.model_dump(exclude_unset=True, exclude={"type"})
    if item.type == "message":
        return {name: value for name, value in given.items() if name not in ("id", "status")}
    if item.type == "function_call":
        function = {name: given.get(name) for name in ("name", "arguments")}
        call = {"id": given.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    if item.type == "function_call_output":
        return {
            "role": "tool",
            "tool_call_id": given.get("call_id"),
            "content": given.get("output"),
        }
    if item.type == "item_reference":
        raise ValueError(
            f"{where} names an item by its id, and this server stores none: send the item itself"
        )
    raise ValueError(
        f"{where} has type {item.type!r}; taken are message, function_call, function_call_output"
    )


class OutputText(BaseModel):
    """The text of a message."""

    type: Literal["output_text"]
    text: str
    annotations: list[None]
    logprobs: list[None]


class OutputMessage(BaseModel):
    """The model's answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class InputTokensDetails(BaseModel):
    """Of tokens of the prompt."""

    cached_tokens: int = Field(description="Not told for a request by itself.")


class OutputTokensDetails(BaseModel):
    """Of tokens of the response."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Tokens of the request."""

    input_tokens: int = Field(ge=0)
    input_tokens_details: InputTokensDetails
    output_tokens: int = Field(ge=0)
    output_tokens_details: OutputTokensDetails
    total_tokens: int = Field(ge=0)
    discarded_tokens: int = Field(ge=0, description="Drawn and not returned.")
    rm_tokens: int = Field(ge=0, description="Run through the reward model.")


class IncompleteDetails(BaseModel):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseError(BaseModel):
    """Why a response failed."""

    code: str
    message: str


class AnswerFormat(BaseModel):
    """What the text is."""

    type: Literal["text", "json_object", "json_schema"]


class TextConfig(BaseModel):
    """How the text is made."""

    format: AnswerFormat


class ResponsesAnswer(BaseModel):
    """A response, finished or not."""

    id: str
    object: Literal["response"]
    created_at: int = Field(description="Seconds since 1970.")
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool
    previous_response_id: None
    store: Literal[False]
    temperature: float
    text: TextConfig
    tool_choice: Literal["none"]
    tools: list[None]
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    stars: StarsAnswer | None = Field(description="Of the whole response.")


class ResponsesEvent(BaseModel):
    """An event of a streamed response; `type` says which of the other fields it has."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
        "response.incomplete",
        "response.failed",
        "error",
    ]
    sequence_number: int = Field(ge=0)
    response: ResponsesAnswer | None = None
    output_index: int | None = None
    content_index: int | None = None
    item_id: str | None = None
    item: OutputMessage | None = None
    part: OutputText | None = None
    delta: str | None = None
    text: str | None = None
    logprobs: list[None] | None = None
    stars: StarsDelta | None = Field(default=None, description="With a delta: what is new.")
    code: str | None = None
    message: str | None = None
    param: str | None = None


class ResponsesWriter(Writer):
    """Writes a response.

    Parameters
    ----------
    generation
        Of one response.
    body
        What asked for it.

    Raises
    ------
    ValueError
        If more than one response is asked for.
    """

    def __init__(self, generation: Generation, body: ResponsesRequest) -> None:
        super().__init__(generation)
        if generation.params.n != 1:
            raise ValueError(f"n must be 1 at /v1/responses, got {generation.params.n}")
        self._body = body
        self._id = f"resp_{uuid.uuid4().hex}"
        self._item_id = f"msg_{uuid.uuid4().hex}"
        self._sequence = 0
        self._place = {"output_index": 0, "content_index": 0, "item_id": self._item_id}

    def whole(self) -> ResponsesAnswer:
        """Return the whole response; every delta has been read."""
        (transcript,) = self.generation.transcripts
        output = transcript.latest
        cut = output.finish_reason == "length"
        return self._answer(
            "incomplete" if cut else "completed",
            output=[self._item("incomplete" if cut else "completed", output.text)],
            usage=self._usage(),
            incomplete_details=IncompleteDetails(reason="max_output_tokens") if cut else None,
            stars=self.stars(transcript),
        )

    def begin(self) -> bytes:
        """Return the events before the text."""
        answer = self._answer("in_progress")
        return (
            self._event("response.created", response=answer)
            + self._event("response.in_progress", response=answer)
            + self._event(
                "response.output_item.added", output_index=0, item=self._item("in_progress")
            )
            + self._event("response.content_part.added", **self._place, part=_part(""))
        )

    def delta(self, transcript: Transcript, delta: Delta) -> bytes:
        """Return a piece of the text."""
        return self._event(
            "response.output_text.delta",
            **self._place,
            delta=delta.text,
            logprobs=[],
            stars=self.stars_delta(transcript, delta),
        )

    def end(self) -> bytes:
        """Return the events behind the text."""
        answer = self.whole()
        (item,) = answer.output
        text = item.content[0].text
        last = "response.incomplete" if answer.status == "incomplete" else "response.completed"
        return (
            self._event("response.output_text.done", **self._place, text=text, logprobs=[])
            + self._event("response.content_part.done", **self._place, part=_part(text))
            + self._event("response.output_item.done", output_index=0, item=item)
            + self._event(last, response=answer)
        )

    def failed(self, error: ApiError) -> bytes:
        """Return the events of a response that ends with an error."""
        code = error.code or error.type
        told = self._answer("failed", error=ResponseError(code=code, message=error.message))
        return self._event(
            "error", code=code, message=error.message, param=error.param
        ) + self._event("response.failed", response=told)

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = ResponsesEvent(type=kind, sequence_number=self._sequence, **fields)  # type: ignore[arg-type]
        self._sequence += 1
        return f"event: {kind}\ndata: ".encode() + to_json(event) + b"\n\n"

    def _item(
        self, status: Literal["in_progress", "completed", "incomplete"], text: str | None = None
    ) -> OutputMessage:
        return OutputMessage(
            id=self._item_id,
            type="message",
            role="assistant",
            status=status,
            content=[] if text is None else [_part(text)],
        )

    def _answer(
        self, status: Literal["in_progress", "completed", "incomplete", "failed"], **fields: Any
    ) -> ResponsesAnswer:
        params = self.generation.params
        absent = dict.fromkeys(("error", "incomplete_details", "usage", "stars"))
        return ResponsesAnswer(
            id=self._id,
            object="response",
            created_at=self.created,
            status=status,
            instructions=self._body.instructions,
            max_output_tokens=params.max_tokens,
            metadata={},
            model=self.generation.model,
            parallel_tool_calls=False,
            previous_response_id=None,
            store=False,
            temperature=params.temperature,
            text=TextConfig(format=AnswerFormat(type=self._body.format_type)),
            tool_choice="none",
            tools=[],
            top_p=params.top_p,
            truncation="disabled",
            user=self._body.user,
            **{"output": [], **absent, **fields},
        )

    def _usage(self) -> ResponseUsage:
        usage = self.generation.usage()
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=0),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
            total_tokens=usage.total_tokens,
            discarded_tokens=usage.discarded_tokens,
            rm_tokens=usage.rm_tokens,
        )


def _part(text: str) -> OutputText:
    return OutputText(type="output_text", text=text, annotations=[], logprobs=[])
