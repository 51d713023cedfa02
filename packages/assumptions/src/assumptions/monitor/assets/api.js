// The server's routes, and its events as an async iterator.

async function answer(response) {
  if (response.ok) return response;
  const text = await response.text();
  let said = text;
  try {
    const content = JSON.parse(text);
    said = content.error ?? content.detail ?? text;
  } catch { /* not JSON: shown as it is */ }
  throw new Error(typeof said === "string" ? said : JSON.stringify(said));
}

async function request(method, path, body) {
  const options = { method };
  if (body !== undefined) {
    options.headers = { "Content-Type": "application/json" };
    options.body = JSON.stringify(body);
  }
  try {
    return await answer(await fetch(`/api${path}`, options));
  } catch (error) {
    throw named(error);
  }
}

// fetch and its streams fail with a TypeError where nobody answers.
function named(error) {
  return error instanceof TypeError ? new Error("The server does not answer: start `assumptions monitor` again.") : error;
}

export const get = async (path) => (await request("GET", path)).json();
export const post = async (path, body) => (await request("POST", path, body ?? {})).json();
export const remove = (path) => request("DELETE", path);

// Events of a POST: {name, content} each, until the server ends the stream.
export async function* events(path, body) {
  const response = await request("POST", path, body);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => { throw named(error); });
    if (done) return;
    held += value;
    const blocks = held.split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      const [, name, data] = /^event: (.*)\ndata: (.*)$/.exec(block);
      yield { name, content: JSON.parse(data) };
    }
  }
}
