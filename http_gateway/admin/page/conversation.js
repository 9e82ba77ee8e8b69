/* What a conversation is, and the body of the request for its next answer. No DOM and no network.

   conversation  {id, title, created, updated, settings, messages}
   message       {role: "user", text} | {role: "tool", call, name, text} |
                 {role: "assistant", versions: [answer], active: index of the one that counts}
   answer        {text, reasoning, calls: [{id, name, arguments}], tokens: [[text, logprob, [[text, logprob]]]], state,
                  finish, error, stats, resumed} */

import { newId } from "./dom.js";

const MOST_MESSAGES = 2000;
const LONGEST_TITLE = 60;
export const STATES = ["streaming", "done", "stopped", "broken", "failed"];

export const DEFAULTS = {
  system: "",
  temperature: null,
  top_p: null,
  top_k: null,
  min_p: null,
  max_tokens: null,
  seed: null,
  stop: "",
  frequency_penalty: null,
  presence_penalty: null,
  repetition_penalty: null,
  thinking: "default",
  thinking_budget: null,
  logprobs: false,
  top_logprobs: 3,
  schema: "",
  tools: "",
};
const NUMBERS = [
  "temperature",
  "top_p",
  "top_k",
  "min_p",
  "max_tokens",
  "seed",
  "frequency_penalty",
  "presence_penalty",
  "repetition_penalty",
  "thinking_budget",
];

export function newConversation(settings = DEFAULTS) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, settings: { ...DEFAULTS, ...settings }, messages: [] };
}

export function newAnswer() {
  return {
    text: "",
    reasoning: "",
    calls: [],
    tokens: [],
    state: "streaming",
    finish: null,
    error: null,
    stats: {},
    resumed: 0,
  };
}

export function activeAnswer(message) {
  return message.versions[message.active];
}

/* The last answer, where the conversation ends with one; null otherwise. */
export function lastAnswer(conversation) {
  const last = conversation.messages.at(-1);
  return last?.role === "assistant" ? activeAnswer(last) : null;
}

export function titleFrom(text) {
  const line = text.trim().split("\n")[0];
  return line.length > LONGEST_TITLE ? line.slice(0, LONGEST_TITLE - 1) + "…" : line;
}

/* the request */

/* The body that asks for `answer`, which is of the conversation's last message. Throws Error with what is wrong in the
   settings. `goOn`: the answer's text so far is the beginning of what the server is to go on with; `used`: so many
   of the most tokens have been made. */
export function bodyOf(conversation, answer, model, { goOn = false, used = 0 } = {}) {
  const settings = conversation.settings;
  const messages = wireMessages(conversation, answer);
  const body = { messages, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } };
  if (model) body.model = model;
  for (const name of NUMBERS) if (settings[name] !== null) body[name] = settings[name];
  const stops = settings.stop
    .split("\n")
    .filter(Boolean)
    .map((line) => line.replaceAll("\\n", "\n"));
  if (stops.length) body.stop = stops;
  if (settings.thinking !== "default") body.enable_thinking = settings.thinking === "on";
  if (settings.logprobs) Object.assign(body, { logprobs: true, top_logprobs: settings.top_logprobs });
  const schema = parsedSchema(settings.schema);
  if (schema) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  const tools = parsedTools(settings.tools);
  if (tools) body.tools = tools;
  if (body.max_tokens !== undefined) body.max_tokens = Math.max(1, body.max_tokens - used);
  if (goOn) continueFrom(body, answer);
  return body;
}

function continueFrom(body, answer) {
  const final = { role: "assistant", content: answer.text };
  if (answer.reasoning) final.reasoning_content = answer.reasoning;
  body.messages.push(final);
  body.continue_final_message = true;
}

/* Whether the server can go on from what there is of an answer. A grammar would begin anew, as would a tool call. */
export function canGoOn(conversation, answer) {
  return Boolean(answer.text.trim()) && !answer.calls.length && !conversation.settings.schema.trim();
}

function wireMessages(conversation, until) {
  const system = conversation.settings.system.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const message of conversation.messages) {
    if (message.role === "user") messages.push({ role: "user", content: message.text });
    else if (message.role === "tool")
      messages.push({ role: "tool", tool_call_id: message.call, name: message.name, content: message.text });
    else if (activeAnswer(message) === until) break;
    else messages.push(wireAnswer(activeAnswer(message)));
  }
  return messages;
}

function wireAnswer(answer) {
  const message = { role: "assistant", content: answer.text };
  if (answer.reasoning) message.reasoning_content = answer.reasoning;
  if (answer.calls.length) {
    message.tool_calls = answer.calls.map((call) => ({
      id: call.id,
      type: "function",
      function: { name: call.name, arguments: call.arguments },
    }));
  }
  return message;
}

/* The schema that a text describes; null where there is none. Throws Error. */
export function parsedSchema(text) {
  if (!text.trim()) return null;
  const schema = parsed(text, "The JSON schema");
  if (!schema || typeof schema !== "object" || Array.isArray(schema))
    throw new Error("The JSON schema must be an object.");
  return schema;
}

/* The tools that a text describes, with or without the frame of the API around each; null where there are none. */
export function parsedTools(text) {
  if (!text.trim()) return null;
  const tools = parsed(text, "The list of tools");
  const list = Array.isArray(tools) ? tools : [tools];
  if (list.some((tool) => !tool || typeof tool !== "object")) throw new Error("Tools must be JSON objects.");
  return list.map((tool) => (tool.function ? tool : { type: "function", function: tool }));
}

function parsed(text, what) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${what} is not valid JSON: ${error.message}`);
  }
}

/* what comes from files and from the browser's store */

/* The same conversation with nothing in it but what belongs there. Throws Error where something is missing. */
export function checkedConversation(value) {
  const conversation = {
    id: text(value?.id, "id"),
    title: text(value.title, "title"),
    created: number(value.created, "created"),
    updated: number(value.updated, "updated"),
    settings: checkedSettings(value.settings),
    messages: list(value.messages, "messages").slice(0, MOST_MESSAGES).map(checkedMessage),
  };
  if (!/^[\w-]{1,64}$/.test(conversation.id)) throw new Error("A conversation has no proper id.");
  return conversation;
}

function checkedSettings(value) {
  const settings = { ...DEFAULTS };
  for (const [name, standard] of Object.entries(DEFAULTS)) {
    const given = value?.[name];
    const wanted = standard === null ? "number" : typeof standard;
    if (typeof given === wanted && !Number.isNaN(given)) settings[name] = given;
  }
  return settings;
}

function checkedMessage(value) {
  if (value?.role === "user") return { role: "user", text: text(value.text, "text") };
  if (value?.role === "tool") {
    return {
      role: "tool",
      call: text(value.call, "call"),
      name: text(value.name, "name"),
      text: text(value.text, "text"),
    };
  }
  if (value?.role !== "assistant") throw new Error("A message has no known role.");
  const versions = list(value.versions, "versions").map(checkedAnswer);
  if (!versions.length) throw new Error("An answer is missing.");
  const active = Number.isInteger(value.active) ? Math.min(Math.max(value.active, 0), versions.length - 1) : 0;
  return { role: "assistant", versions, active };
}

/* An answer that was being written when the page was left has been broken off. */
function checkedAnswer(value) {
  const state = STATES.includes(value?.state) ? value.state : "done";
  return {
    text: text(value.text, "text"),
    reasoning: text(value.reasoning, "reasoning"),
    calls: list(value.calls, "calls").map(checkedCall),
    tokens: list(value.tokens, "tokens").map(checkedToken),
    state: state === "streaming" ? "broken" : state,
    finish: typeof value.finish === "string" ? value.finish : null,
    error: typeof value.error === "string" ? value.error : null,
    stats: checkedStats(value.stats),
    resumed: Number.isInteger(value.resumed) ? value.resumed : 0,
  };
}

function checkedCall(call) {
  return { id: text(call?.id, "id"), name: text(call.name, "name"), arguments: text(call.arguments, "arguments") };
}

function checkedToken(token) {
  const [said, logprob, others] = list(token, "token");
  const best = list(others, "token").map(([other, value]) => [
    text(other, "token"),
    value === null ? null : number(value, "token"),
  ]);
  return [text(said, "token"), logprob === null ? null : number(logprob, "token"), best];
}

function checkedStats(stats) {
  const found = {};
  for (const name of ["prompt", "completion", "cached", "firstMs", "totalMs", "thoughtMs"]) {
    if (Number.isFinite(stats?.[name])) found[name] = stats[name];
  }
  return found;
}

function text(value, name) {
  if (typeof value !== "string") throw new Error(`${name} is no text.`);
  return value;
}

function number(value, name) {
  if (!Number.isFinite(value)) throw new Error(`${name} is no number.`);
  return value;
}

function list(value, name) {
  if (!Array.isArray(value)) throw new Error(`${name} is no list.`);
  return value;
}
