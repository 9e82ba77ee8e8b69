/* One answer on its way. When the connection breaks, the same answer goes on with the next one; when a process of the
   server dies, the server's ring sends on by itself, and nothing has to be done here. */

import { ApiError, ConnectionLost, delay, described, events, mayAskAgain, pause, request, unreadiness } from "./api.js";
import { bodyOf, canGoOn } from "./conversation.js";

const MOST_FAILURES = 8; // of connections in a row, about half a minute
const STALLED_MS = 1500; // without a token, before the server is asked why

export class Turn {
  /* `onChange()`: something in the answer is new. `onEnd()`: nothing more will come. */
  constructor(conversation, answer, model, onChange, onEnd) {
    this.conversation = conversation;
    this.answer = answer;
    this.model = model;
    this.onChange = onChange;
    this.onEnd = onEnd;
    this.waiting = ""; // why nothing comes, for people
    this.aborter = new AbortController();
    this.heardAt = performance.now();
    this.failures = 0;
  }

  stop() {
    this.aborter.abort();
  }

  /* Write the answer. `goOn`: from the text that it has. */
  async run(goOn) {
    const answer = this.answer;
    Object.assign(answer, { state: "streaming", error: null, finish: null });
    const watch = setInterval(() => this.#lookAtStall(), 500);
    mayAskAgain();
    this.startedAt = performance.now();
    this.before = answer.stats.totalMs || 0;
    this.madeBefore = goOn ? answer.stats.completion || 0 : 0; // tokens that the user's limit does not count
    try {
      await this.#runWhole(goOn);
      answer.state = "done";
    } catch (error) {
      this.#fail(error);
    } finally {
      clearInterval(watch);
      this.waiting = "";
      answer.stats.totalMs = Math.round(this.before + performance.now() - this.startedAt);
      this.onEnd();
    }
  }

  async #runWhole(goOn) {
    let from = goOn;
    for (;;) {
      try {
        if (!from) this.#clear();
        await this.#attempt(from);
        return;
      } catch (error) {
        from = await this.#recovered(error);
        if (from === null) return;
      }
    }
  }

  /* Whether the next attempt goes on from the text, after a pause; null: none is needed. Throws the error where there is
     to be none. */
  async #recovered(error) {
    if (error instanceof ConnectionLost && this.answer.finish) return null; // all but the usage had come
    const lost = error instanceof ConnectionLost || (this.failures > 0 && error instanceof ApiError && error.passing);
    if (!lost || ++this.failures > MOST_FAILURES) throw error;
    const answer = this.answer;
    const goOn = canGoOn(this.conversation, answer);
    if (!goOn && (answer.text || answer.calls.length)) throw error; // what is there must not vanish unasked
    this.waiting = "The connection broke; connecting again…";
    this.onChange();
    await pause(delay(this.failures), this.aborter.signal);
    if (goOn) answer.resumed++;
    return goOn;
  }

  #clear() {
    Object.assign(this.answer, { text: "", reasoning: "", calls: [], tokens: [], stats: {}, resumed: 0 });
    this.before = this.madeBefore = 0;
  }

  async #attempt(goOn) {
    const answer = this.answer;
    if (goOn) answer.text = answer.text.trimEnd(); // as the prompt will have it
    const made = answer.stats.completion || 0;
    const body = bodyOf(this.conversation, answer, this.model, { goOn, used: made - this.madeBefore });
    const response = await request("v1/chat/completions", { body, signal: this.aborter.signal });
    for await (const event of events(response)) {
      if (event.error) throw described(event, event.error.code || 500);
      this.#take(event, made);
    }
    if (!answer.finish) throw new ConnectionLost("The answer ended without a reason.");
  }

  #take(event, made) {
    const { stats } = this.answer;
    if (event.usage) {
      stats.prompt = event.usage.prompt_tokens;
      stats.completion = made + event.usage.completion_tokens;
      stats.cached = event.usage.prompt_tokens_details?.cached_tokens ?? stats.cached;
    }
    for (const choice of event.choices) this.#takeChoice(choice);
    this.heardAt = performance.now();
    this.failures = 0;
    this.waiting = "";
    this.onChange();
  }

  #takeChoice({ delta, logprobs, finish_reason: finish }) {
    const answer = this.answer;
    const elapsed = Math.round(performance.now() - this.startedAt);
    if (delta.content || delta.reasoning_content || delta.tool_calls) answer.stats.firstMs ??= elapsed;
    if (delta.reasoning_content) {
      answer.reasoning += delta.reasoning_content;
      answer.stats.thoughtMs = elapsed;
    }
    if (delta.content) answer.text += delta.content;
    for (const piece of delta.tool_calls || []) this.#takeCall(piece);
    for (const position of logprobs?.content || []) answer.tokens.push(scored(position));
    if (finish) answer.finish = finish;
  }

  #takeCall(piece) {
    const call = (this.answer.calls[piece.index] ||= { id: "", name: "", arguments: "" });
    call.id ||= piece.id || "";
    call.name ||= piece.function.name || "";
    call.arguments += piece.function.arguments;
  }

  #fail(error) {
    const answer = this.answer;
    if (this.aborter.signal.aborted) answer.state = "stopped";
    else if (error instanceof ConnectionLost) Object.assign(answer, { state: "broken", error: error.message });
    else
      Object.assign(answer, {
        state: "failed",
        error: error.field ? `${error.message} (${error.field})` : error.message,
      });
  }

  /* Nothing comes: ask the server whether it knows why. */
  async #lookAtStall() {
    if (this.asking || performance.now() - this.heardAt < STALLED_MS || this.failures) return;
    this.asking = true;
    try {
      const reason = await unreadiness(this.aborter.signal);
      if (performance.now() - this.heardAt >= STALLED_MS) this.waiting = reason && `${reason}…`;
      this.onChange();
    } catch {
      /* the stream itself will tell */
    } finally {
      this.asking = false;
    }
  }
}

function scored(position) {
  return [position.token, position.logprob, position.top_logprobs.map((other) => [other.token, other.logprob])];
}
