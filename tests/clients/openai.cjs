// Talk to a server through OpenAI's client for JavaScript: node openai.cjs URL MODEL
const assert = require("node:assert");
const { OpenAI } = require("openai");

async function main(url, model) {
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
  const turn = { role: "user", content: "The film" };
  const options = { model, max_tokens: 12, seed: 7 };

  const answer = await client.chat.completions.create({ ...options, messages: [turn] });
  const message = answer.choices[0].message;
  assert.ok(message.content);
  const longer = await client.chat.completions.create({ ...options, messages: [turn, message, turn] });
  assert.ok(longer.usage.prompt_tokens > answer.usage.prompt_tokens);

  const stream = client.chat.completions.stream({ ...options, messages: [turn] });
  assert.equal(await stream.finalContent(), message.content);
  const text = await client.completions.create({ ...options, prompt: "The film is" });
  assert.ok(text.choices[0].text);

  const request = { model, input: "The film", max_output_tokens: 16, temperature: 0 };
  const response = await client.responses.create(request);
  assert.ok(response.output_text);
  const events = client.responses.stream(request);
  assert.equal((await events.finalResponse()).output_text, response.output_text);
  const more = await client.responses.create({
    ...request,
    input: [turn, ...response.output, turn],
  });
  assert.ok(more.usage.input_tokens > response.usage.input_tokens);
}

main(...process.argv.slice(2)).catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
