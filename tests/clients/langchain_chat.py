"""Talk to a server through langchain-openai: python langchain_chat.py URL MODEL."""

import sys

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI

url, model = sys.argv[1:]
server = {"base_url": f"{url}/v1", "api_key": "none", "model": model, "max_retries": 0}
chat = ChatOpenAI(**server, max_tokens=12, seed=7)

answer = chat.invoke("The film")
assert answer.content
assert "".join(chunk.content for chunk in chat.stream("The film")) == answer.content
assert [one.content for one in chat.batch(["The film", "The film"])] == [answer.content] * 2

history = [SystemMessage("Be brief."), HumanMessage("The film", name="someone"), answer]
longer = chat.invoke([*history, HumanMessage("And this kettle")])
assert longer.usage_metadata["input_tokens"] > answer.usage_metadata["input_tokens"]

call = {"name": "look", "args": {"at": "it"}, "id": "1"}
tools = [
    HumanMessage("The film"),
    AIMessage("", tool_calls=[call]),
    ToolMessage("4", tool_call_id="1"),
]
assert chat.invoke(tools).usage_metadata["output_tokens"]

top = chat.bind(logprobs=True, top_logprobs=2).invoke("The film").response_metadata["logprobs"]
assert {len(token["top_logprobs"]) for token in top["content"]} == {2}

stars = {"stars": {"method": "best_of_n", "candidates": 2}}
assert ChatOpenAI(**server, max_tokens=12, extra_body=stars).invoke("The film").content

responses = ChatOpenAI(**server, max_tokens=16, temperature=0, use_responses_api=True)
first = responses.invoke("The film")
assert first.text
assert "".join(chunk.text for chunk in responses.stream("The film")) == first.text
assert responses.invoke([HumanMessage("The film"), first, HumanMessage("This kettle")]).text

assert OpenAI(**server, max_tokens=12).invoke("The film is")
