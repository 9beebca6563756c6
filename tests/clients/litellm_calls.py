"""Talk to a server through LiteLLM as a library: python litellm_calls.py URL MODEL."""

import sys

import litellm

url, model = sys.argv[1:]
server = {"api_base": f"{url}/v1", "api_key": "none"}
turn = {"role": "user", "content": "The film"}

for provider in ("openai", "hosted_vllm"):
    options = {**server, "model": f"{provider}/{model}", "max_tokens": 12, "seed": 7}
    answer = litellm.completion(messages=[turn], **options)
    message = answer.choices[0].message
    assert message.content
    chunks = litellm.completion(messages=[turn], stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content
    for sent in (message, message.model_dump()):
        longer = litellm.completion(messages=[turn, sent, turn], **options)
        assert longer.usage.prompt_tokens > answer.usage.prompt_tokens
    stars = {"method": "best_of_n", "candidates": 2}
    best = litellm.completion(messages=[turn], extra_body={"stars": stars}, **options)
    assert best.choices[0].provider_specific_fields["stars"]["reward"] is not None

vllm = {**server, "model": f"hosted_vllm/{model}", "max_tokens": 12}
extra = {"min_p": 0.1, "ignore_eos": True, "repetition_penalty": 1.0}
full = litellm.completion(messages=[turn], top_k=5, extra_body=extra, **vllm)
assert full.usage.completion_tokens == 12

text = {**server, "model": f"text-completion-openai/{model}", "max_tokens": 12}
assert litellm.text_completion(prompt="The film is", **text).choices[0].text

response = litellm.responses(
    model=f"openai/{model}", input="The film", max_output_tokens=16, **server
)
assert response.usage.output_tokens
