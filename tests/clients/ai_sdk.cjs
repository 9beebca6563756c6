// Talk to a server through Vercel's AI SDK: node ai_sdk.cjs URL MODEL
const assert = require("node:assert");
const { createOpenAI } = require("@ai-sdk/openai");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
const { generateText, streamText } = require("ai");

async function collected(stream) {
  let text = "";
  for await (const part of stream.textStream) text += part;
  return text;
}

async function main(url, model) {
  const server = { baseURL: `${url}/v1`, apiKey: "none" };
  const compatible = createOpenAICompatible({ ...server, name: "stars", includeUsage: true });
  const openai = createOpenAI(server);
  const turn = { role: "user", content: "The film" };
  // Without it the second turn refers to the first by its id, and the server stores nothing.
  const providerOptions = { openai: { store: false } };
  for (const made of [compatible(model), openai.chat(model), openai.responses(model)]) {
    const limits = { maxOutputTokens: 16, temperature: 0, maxRetries: 0 };
    const options = { ...limits, model: made, providerOptions };
    const answer = await generateText({ ...options, messages: [turn] });
    assert.ok(answer.text);
    assert.ok(answer.usage.outputTokens > 0);
    const stream = streamText({ ...options, messages: [turn] });
    assert.equal(await collected(stream), answer.text);
    const history = [turn, ...answer.response.messages, turn];
    const longer = await generateText({ ...options, messages: history });
    assert.ok(longer.usage.inputTokens > answer.usage.inputTokens);
  }
  const text = await generateText({
    model: compatible.completionModel(model),
    prompt: "The film is",
    maxOutputTokens: 12,
    maxRetries: 0,
  });
  assert.ok(text.usage.outputTokens > 0);
}

main(...process.argv.slice(2)).catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
