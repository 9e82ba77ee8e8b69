/* The chat: conversations at the side, the one that is open, and the answers that are being written, each in its own
   conversation, also while another is looked at. */

import { activeAnswer, canGoOn, lastAnswer, newAnswer, newConversation, titleFrom } from "./conversation.js";
import { announce, byId, icon, make, saveFile } from "./dom.js";
import { ConversationList } from "./list.js";
import { AnswerView, editText, userMessage } from "./message.js";
import { SettingsPanel } from "./settings.js";
import { Turn } from "./turn.js";

const NEAR_END = 80; // pixels: who is so near to the end wants to see what is new
const SAVE_MS = 1000; // while an answer is written
const SHOW_MS = 30; // between two looks at a growing answer
const HIDDEN_MS = 250;
const PACE = 4; // times as long as it takes to show it, at least
const LARGEST_FILE = 64 << 20; // bytes
const HINT_MS = 8000;
const OPEN = "quartet.open";

export class Chat {
  /* `store`: of the conversations; `server`: what is known of the server, {model, suggestions, generates}. */
  constructor(store, server) {
    this.store = store;
    this.server = server;
    this.turns = new Map(); // conversation id → Turn
    this.views = []; // of the messages that are shown
    this.list = new ConversationList(store, {
      open: (conversation) => this.open(conversation),
      rename: (conversation) => this.#save(conversation),
      remove: (conversation) => this.#remove(conversation),
    });
    this.settings = new SettingsPanel((settings) => this.#newSettings(settings));
    this.scroll = byId("scroll");
    this.prompt = byId("prompt");
    this.#listen();
    const known = store.get(remembered()) || store.list()[0];
    this.open(known || newConversation());
  }

  #listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.turn ? this.stop() : this.send();
    });
    this.prompt.addEventListener("input", () => this.#fitPrompt());
    this.prompt.addEventListener("keydown", (event) => this.#promptKey(event));
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !byId("key-dialog").open && this.turn) this.stop();
    });
    byId("new-chat").addEventListener("click", () => this.open(newConversation(this.conversation.settings)));
    byId("to-end").append(icon("down"));
    byId("to-end").addEventListener("click", () => this.#toEnd());
    this.scroll.addEventListener("scroll", () => this.#noteScroll(), { passive: true });
    byId("export").addEventListener("click", () => saveFile("quartet-conversations.json", this.store.exported()));
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", (event) => this.#import(event.target));
    document.addEventListener("visibilitychange", () => this.#catchUp());
    window.addEventListener("pagehide", () => this.turns.forEach((turn) => this.store.save(turn.conversation)));
  }

  /* The answer that is being written in the open conversation. */
  get turn() {
    return this.turns.get(this.conversation.id) || null;
  }

  open(conversation) {
    this.conversation = conversation;
    remember(conversation.id);
    this.settings.show(conversation.settings);
    this.#showAll();
    this.#toEnd();
    document.dispatchEvent(new CustomEvent("quartet:opened"));
    if (matchMedia("(pointer: fine)").matches) this.prompt.focus();
  }

  /* What was said in another tab is shown here too, before somebody goes on from an older state. */
  async #catchUp() {
    if (document.hidden || this.turns.size) return;
    await this.store.open();
    const kept = this.store.get(this.conversation.id);
    if (kept && kept.updated !== this.conversation.updated && !this.turns.size) this.open(kept);
    else if (kept) this.store.all.set(kept.id, this.conversation);
    this.#showList();
  }

  /* What was learned of the server: its name, or that it can be asked now. */
  refresh() {
    this.#showAll();
  }

  /* sending */

  send(text = this.prompt.value) {
    if (!text.trim() || this.turn || !this.server.generates || !this.#settingsAreRight()) return;
    this.prompt.value = "";
    this.#fitPrompt();
    this.conversation.messages.push({ role: "user", text: text.trimEnd() });
    this.conversation.title ||= titleFrom(text);
    this.#ask();
  }

  /* A new answer to what the conversation has. */
  #ask() {
    this.conversation.messages.push({ role: "assistant", versions: [newAnswer()], active: 0 });
    this.#run(false);
  }

  #settingsAreRight() {
    if (!this.settings.problem) return true;
    this.settings.toggle(true);
    announce(this.settings.problem);
    return false;
  }

  /* Have the last answer written: anew, or on from what there is of it. */
  #run(goOn) {
    const { conversation } = this;
    const turn = new Turn(
      conversation,
      lastAnswer(conversation),
      this.server.model,
      () => this.#changed(turn),
      () => this.#ended(turn),
    );
    this.turns.set(conversation.id, turn);
    this.#save(conversation, true);
    this.#showAll();
    this.#toEnd();
    announce("The model is answering.");
    turn.run(goOn);
  }

  stop() {
    this.turn?.stop();
  }

  #changed(turn) {
    if (turn.due) return;
    const wait = Math.max(document.hidden ? HIDDEN_MS : SHOW_MS, PACE * (turn.shownIn || 0));
    turn.due = setTimeout(() => this.#show(turn), wait);
  }

  #show(turn) {
    turn.due = null;
    if (this.turns.get(turn.conversation.id) !== turn) return;
    if (performance.now() - (turn.savedAt || 0) > SAVE_MS) {
      turn.savedAt = performance.now();
      this.store.save(turn.conversation);
    }
    if (turn !== this.turn) return;
    const began = performance.now();
    const follow = this.#isNearEnd();
    this.views.at(-1)?.update?.(turn, true);
    if (follow) this.#toEnd();
    turn.shownIn = performance.now() - began;
  }

  #ended(turn) {
    clearTimeout(turn.due);
    if (this.turns.get(turn.conversation.id) !== turn) return; // its conversation was deleted
    this.turns.delete(turn.conversation.id);
    this.#save(turn.conversation, true);
    if (turn.conversation !== this.conversation) return;
    const follow = this.#isNearEnd();
    this.#updateViews();
    this.#showButton();
    if (follow) this.#toEnd();
    const { answer } = turn;
    announce(
      answer.error
        ? `The answer failed: ${answer.error}`
        : answer.state === "stopped"
          ? "Stopped."
          : answer.text || "The model has called a tool.",
    );
    document.dispatchEvent(new CustomEvent("quartet:answered", { detail: answer }));
  }

  /* what can be done with a message */

  get #actions() {
    return {
      edit: (message, place) => editText(place, message.text, "Send", (text) => this.#resend(message, text)),
      editAnswer: (message, place) =>
        editText(place, activeAnswer(message).text, "Keep", (text) => this.#rewrite(message, text)),
      again: (message) => this.#again(message),
      goOn: () => this.#run(true),
      wantsTokens: () => this.conversation.settings.logprobs,
      canGoOn: (answer) => canGoOn(this.conversation, answer),
      choose: (message, index) => this.#choose(message, index),
      results: (calls, texts) => this.#sendResults(calls, texts),
    };
  }

  #resend(message, text) {
    if (this.turn || !this.#settingsAreRight()) return;
    const { messages } = this.conversation;
    message.text = text;
    messages.splice(messages.indexOf(message) + 1);
    this.#ask();
  }

  #rewrite(message, text) {
    Object.assign(activeAnswer(message), { text, tokens: [], state: "stopped", error: null });
    this.#save(this.conversation);
    this.#showAll();
  }

  /* Another version of an answer; what followed it belonged to the old one. */
  #again(message) {
    if (this.turn || !this.#settingsAreRight()) return;
    const { messages } = this.conversation;
    messages.splice(messages.indexOf(message) + 1);
    const answer = activeAnswer(message);
    if (answer.text || answer.reasoning || answer.calls.length) message.versions.push(newAnswer());
    else message.versions[message.active] = newAnswer();
    message.active = message.versions.length - 1;
    this.#run(false);
  }

  #choose(message, index) {
    if (this.turn) return;
    message.active = index;
    this.#save(this.conversation);
    this.#showAll();
  }

  #sendResults(calls, texts) {
    if (this.turn || !this.#settingsAreRight()) return;
    calls.forEach((call, index) =>
      this.conversation.messages.push({ role: "tool", call: call.id, name: call.name, text: texts[index] }),
    );
    this.#ask();
  }

  #newSettings(settings) {
    this.conversation.settings = settings;
    if (this.conversation.messages.length) this.#save(this.conversation);
  }

  #save(conversation, used = false) {
    if (used) conversation.updated = Date.now();
    this.store.save(conversation).then(() => this.#showList());
  }

  async #import(input) {
    const [file] = input.files;
    input.value = "";
    if (!file) return;
    try {
      if (file.size > LARGEST_FILE) throw new Error("It is larger than 64 MB.");
      const count = await this.store.add(await file.text());
      this.#note(`${count} conversation${count === 1 ? " was" : "s were"} added.`);
    } catch (error) {
      this.#note(`The file was not taken: ${error.message}`);
    }
    this.#showList();
  }

  #note(text) {
    const hint = byId("hint");
    this.usualHint ||= hint.textContent;
    hint.textContent = text;
    announce(text);
    clearTimeout(this.hintTimer);
    this.hintTimer = setTimeout(() => (hint.textContent = this.usualHint), HINT_MS);
  }

  /* what is seen */

  #showAll() {
    const { messages } = this.conversation;
    this.views = messages.map((message) =>
      message.role === "assistant"
        ? new AnswerView(message, this.#actions)
        : { root: userMessage(message, this.#actions) },
    );
    byId("messages").replaceChildren(...(messages.length ? this.views.map((view) => view.root) : [this.#greeting()]));
    this.#updateViews();
    this.#showButton();
    this.#showList();
  }

  #updateViews() {
    this.views.forEach((view, index) => {
      const isLast = index === this.views.length - 1;
      view.update?.(isLast ? this.turn : null, isLast);
    });
  }

  #greeting() {
    const { model, suggestions, generates } = this.server;
    const title = generates ? "What would you like to know?" : "This model serves embeddings";
    const about = generates
      ? `You are talking to ${model || "the model of this server"}.`
      : "It does not chat. Its load and its processes are on the Server page.";
    const offers = generates
      ? suggestions.map((text) =>
          make("button", { type: "button", class: "suggestion", click: () => this.send(text) }, text),
        )
      : [];
    const logo = make("img", { src: "page/icon.svg", alt: "", width: 56, height: 56 });
    return make(
      "div",
      { class: "greeting" },
      logo,
      make("h1", {}, title),
      make("p", {}, about),
      make("div", { class: "suggestions" }, ...offers),
    );
  }

  #showList() {
    this.list.show(this.conversation, this.turns);
  }

  async #remove(conversation) {
    this.turns.get(conversation.id)?.stop();
    this.turns.delete(conversation.id);
    await this.store.remove(conversation.id);
    if (conversation.id === this.conversation.id)
      this.open(this.store.list()[0] || newConversation(conversation.settings));
    else this.#showList();
  }

  #showButton() {
    const busy = this.turn !== null;
    const send = byId("send");
    send.replaceChildren(icon(busy ? "stop" : "send"));
    send.setAttribute("aria-label", busy ? "Stop" : "Send");
    send.title = busy ? "Stop (Esc)" : "Send (Enter)";
    send.classList.toggle("busy", busy);
    send.disabled = !busy && !this.server.generates;
  }

  /* typing and scrolling */

  #promptKey(event) {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      this.send();
    } else if (event.key === "ArrowUp" && !this.prompt.value && !this.turn) {
      const last = this.conversation.messages.findLastIndex((message) => message.role === "user");
      if (last < 0) return;
      event.preventDefault();
      this.views[last].root.querySelector(".actions .icon-button").click();
    }
  }

  #fitPrompt() {
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${Math.min(this.prompt.scrollHeight, 220)}px`;
  }

  #isNearEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroll;
    return scrollHeight - scrollTop - clientHeight < NEAR_END;
  }

  #toEnd() {
    this.scroll.scrollTop = this.scroll.scrollHeight;
    this.#noteScroll();
  }

  #noteScroll() {
    byId("to-end").hidden = this.#isNearEnd();
  }
}

/* The conversation that was open when the page was left, in this tab. */
function remembered() {
  try {
    return sessionStorage.getItem(OPEN);
  } catch {
    return null;
  }
}

function remember(id) {
  try {
    sessionStorage.setItem(OPEN, id);
  } catch {
    /* the latest one is opened then */
  }
}
