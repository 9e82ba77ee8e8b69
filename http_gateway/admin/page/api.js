/* Requests to the server that this page came from, with its key where it has one. Addresses are relative, so that the
   page works behind a proxy that gives the server a path of its own. */

const KEY = "quartet.key";
const RETRY_S = 1;

/* The server has answered with an error. */
export class ApiError extends Error {
  constructor(status, message, field = null) {
    super(message);
    this.status = status;
    this.field = field;
  }

  /* The server cannot answer now, and may in a moment. */
  get passing() {
    return this.status === 429 || this.status === 503;
  }
}

/* The connection ended before the answer did. */
export class ConnectionLost extends Error {}

let memory = ""; // where the browser keeps nothing
let asking = null; // the question that is on the screen: all requests wait for one answer
let declined = false; // the user has given none: what asks by itself does not ask again
let ask = async () => null;

/* `question(message)` asks the user for a key; null where there will be none. */
export function whenKeyIsNeeded(question) {
  ask = question;
}

/* The user does something that may need a key. */
export function mayAskAgain() {
  declined = false;
}

export function key() {
  try {
    return sessionStorage.getItem(KEY) || memory;
  } catch {
    return memory;
  }
}

export function setKey(value) {
  memory = value;
  try {
    sessionStorage.setItem(KEY, value);
  } catch {
    /* it lasts until the page is left */
  }
}

/* A header is Latin-1 for browsers, and UTF-8 for the server. */
function authorization() {
  const bytes = new TextEncoder().encode(key());
  return bytes.length ? { authorization: "Bearer " + String.fromCharCode(...bytes) } : {};
}

/* The response to a request; the key is asked for where it is missing or wrong. Throws ApiError, ConnectionLost, and
   AbortError where `signal` says stop. */
export async function request(path, { body, signal } = {}) {
  for (;;) {
    const used = key();
    const response = await send(path, body, signal);
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401) throw error;
    if (used !== key()) continue; // another request has been told the right one
    if (declined) throw error;
    asking ||= ask(used ? "The server does not take this key." : "").finally(() => (asking = null));
    const given = await asking;
    signal?.throwIfAborted();
    declined = given === null;
    if (declined) throw error;
    setKey(given);
  }
}

async function send(path, body, signal) {
  const options = { headers: authorization(), signal, credentials: "same-origin", cache: "no-store" };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["content-type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  try {
    return await fetch(path, options);
  } catch (error) {
    throw lost(error);
  }
}

function lost(error) {
  return error.name === "AbortError" ? error : new ConnectionLost("The server cannot be reached.");
}

async function errorOf(response) {
  let said = {};
  try {
    said = JSON.parse(await response.text());
  } catch {
    /* no JSON, or cut short: the status says enough */
  }
  return described(said, response.status, response.statusText);
}

/* An error from the body of a response, or from an event of a stream. */
export function described(said, status, fallback = "") {
  const inner = said.error && typeof said.error === "object" ? said.error : said;
  const message = inner.message || said.message || said.detail || said.reason || fallback || `Status ${status}.`;
  return new ApiError(status, String(message), inner.param || null);
}

export async function json(path, signal) {
  return (await request(path, { signal })).json();
}

export async function text(path, signal) {
  return (await request(path, { signal })).text();
}

/* The objects of an event stream, up to its [DONE]. Throws ConnectionLost where it ends before, and AbortError. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let whole = false;
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => Promise.reject(lost(error)));
      if (done && whole) return;
      if (done) throw new ConnectionLost("The connection ended before the answer.");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line === "data: [DONE]") whole = true;
        else if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
      }
    }
  } finally {
    if (!whole) reader.cancel().catch(() => {});
  }
}

/* Why the server takes no requests now; empty where it does. Throws where it does not answer. */
export async function unreadiness(signal) {
  const { ok, reason } = await condition("readyz", signal);
  return ok ? "" : reason || "the server is not ready";
}

/* What a health check says: {ok, status, reason}, the last two where it says more than yes. */
export async function condition(path, signal) {
  const response = await fetch(path, { signal, cache: "no-store" });
  const said = await response.text();
  return { ...(said && JSON.parse(said)), ok: response.ok };
}

/* Wait; throws AbortError where `signal` says stop. */
export function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}

/* How long to wait before the next try. */
export function delay(failures) {
  return Math.min(RETRY_S * 1.5 ** (failures - 1), 5);
}
