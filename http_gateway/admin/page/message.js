/* Shows one message of a conversation: what was said, what the model thought and called, how sure it was. */

import { activeAnswer } from "./conversation.js";
import { copyButton, icon, iconButton, make } from "./dom.js";
import { MarkdownView } from "./markdown.js";

/* A message of the user, or the result of a tool. */
export function userMessage(message, actions) {
  const isTool = message.role === "tool";
  const said = make("div", { class: "bubble" }, isTool ? make("pre", {}, message.text) : message.text);
  const buttons = [copyButton("Copy", () => message.text)];
  if (!isTool) buttons.unshift(iconButton("edit", "Edit and send again", () => actions.edit(message, said)));
  const label = isTool ? make("p", { class: "tool-name" }, icon("tool"), `Result of ${message.name}`) : null;
  return make(
    "article",
    { class: `message user ${isTool ? "tool" : ""}`, "aria-label": isTool ? `Result of ${message.name}` : "You" },
    label,
    said,
    make("div", { class: "actions" }, ...buttons),
  );
}

/* A text area in the place of a text; `done(text)` is called with what it has become. */
export function editText(place, text, label, done) {
  const area = make("textarea", {
    class: "edit-area",
    "aria-label": "Edit the message",
    rows: Math.min(12, text.split("\n").length + 1),
  });
  area.value = text;
  const close = () => form.replaceWith(place);
  const save = () => {
    if (!area.value.trim()) return;
    close();
    done(area.value);
  };
  const form = make(
    "div",
    { class: "edit" },
    area,
    make(
      "div",
      { class: "edit-buttons" },
      make("button", { type: "button", click: close }, "Cancel"),
      make("button", { type: "button", class: "primary", click: save }, label),
    ),
  );
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      close();
    } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
  });
  place.replaceWith(form);
  area.focus();
}

/* An answer of the model, which may still grow: `update` shows what it has become. */
export class AnswerView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.asTokens = null; // coloured by probability, instead of rendered; null: as the conversation's settings say
    this.thoughtText = make("div", { class: "thought-text" });
    this.thoughtTitle = make("summary");
    this.thought = make("details", { class: "thought", hidden: true }, this.thoughtTitle, this.thoughtText);
    this.content = make("div", { class: "content markdown" });
    this.tokens = tokenRow();
    this.tokenAbout = make("p", { class: "remark token-about", "aria-live": "polite" });
    for (const kind of ["focusin", "pointerover"]) {
      this.tokens.addEventListener(kind, ({ target }) => (this.tokenAbout.textContent = target.dataset.about || ""));
    }
    this.calls = make("div", { class: "calls" });
    this.state = make("div", { class: "state" });
    this.foot = make("div", { class: "actions" });
    this.view = new MarkdownView(this.content);
    this.root = make(
      "article",
      { class: "message assistant", "aria-label": "Assistant" },
      this.thought,
      this.content,
      this.tokens,
      this.tokenAbout,
      this.calls,
      this.state,
      this.foot,
    );
  }

  get answer() {
    return activeAnswer(this.message);
  }

  /* `turn`: what writes the answer, null when it is complete; `isLast`: it is the conversation's last message. */
  update(turn, isLast) {
    const answer = this.answer;
    const growing = turn !== null;
    this.root.classList.toggle("growing", growing);
    this.root.setAttribute("aria-busy", String(growing));
    this.#showThought(answer, growing);
    this.view.update(growing ? answer.text : shownText(answer.text), growing);
    const asTokens = answer.tokens.length > 0 && (this.asTokens ?? this.actions.wantsTokens());
    this.content.hidden = asTokens;
    this.tokens.hidden = this.tokenAbout.hidden = !asTokens;
    if (asTokens) this.#showTokens(answer);
    this.#showCalls(answer, growing, isLast);
    this.#showState(answer, turn, isLast);
    this.#showFoot(answer, growing, isLast);
  }

  #showThought(answer, growing) {
    this.thought.hidden = !answer.reasoning;
    if (!answer.reasoning) return;
    const thinking = growing && !answer.text && !answer.calls.length;
    const seconds = Math.max(1, Math.round((answer.stats.thoughtMs || 0) / 1000));
    this.thoughtTitle.textContent = thinking ? "Thinking…" : `Thought for ${seconds} s`;
    this.thought.classList.toggle("thinking", thinking);
    if (this.thoughtText.textContent !== answer.reasoning) this.thoughtText.textContent = answer.reasoning;
  }

  /* Tokens are only added, unless another answer is shown. */
  #showTokens(answer) {
    if (this.shownTokens !== answer.tokens) this.tokens.replaceChildren();
    this.shownTokens = answer.tokens;
    for (const token of answer.tokens.slice(this.tokens.childElementCount)) this.tokens.append(tokenOf(token));
  }

  #showCalls(answer, growing, isLast) {
    const key = JSON.stringify([answer.calls, growing, isLast]);
    if (key === this.shownCalls) return;
    this.shownCalls = key;
    const boxes = answer.calls.map((call) => callOf(call));
    if (boxes.length && isLast && !growing && answer.state === "done") boxes.push(this.#resultForm(answer));
    this.calls.replaceChildren(...boxes);
  }

  #resultForm(answer) {
    const areas = answer.calls.map((call) =>
      make("textarea", { rows: 2, "aria-label": `Result of ${call.name}`, placeholder: `What ${call.name} returns` }),
    );
    const send = () =>
      this.actions.results(
        answer.calls,
        areas.map((area) => area.value),
      );
    return make(
      "div",
      { class: "call-results" },
      ...areas,
      make("button", { type: "button", class: "primary", click: send }, "Send the results"),
    );
  }

  #showState(answer, turn, isLast) {
    const key = JSON.stringify([
      answer.state,
      answer.error,
      answer.finish,
      answer.resumed,
      turn?.waiting,
      turn !== null,
      Boolean(answer.text || answer.reasoning || answer.calls.length),
      isLast,
    ]);
    if (key === this.shownState) return;
    this.shownState = key;
    this.state.replaceChildren(...(turn ? this.#progress(answer, turn) : this.#outcome(answer, isLast)));
  }

  #progress(answer, turn) {
    const empty = !answer.text && !answer.reasoning && !answer.calls.length;
    const dots = make("span", { class: "dots", "aria-hidden": "true" }, make("i"), make("i"), make("i"));
    const parts = empty || turn.waiting ? [dots] : [];
    return turn.waiting ? [...parts, make("span", { class: "waiting", role: "status" }, turn.waiting)] : parts;
  }

  #outcome(answer, isLast) {
    const said = [];
    if (answer.error) said.push(make("p", { class: "problem", role: "alert" }, answer.error));
    else if (answer.state === "broken") said.push(make("p", { class: "problem" }, "This answer was broken off."));
    else if (answer.state === "stopped") said.push(make("p", { class: "remark" }, "Stopped."));
    else if (answer.finish === "abort") said.push(make("p", { class: "remark" }, "The server has ended this answer."));
    else if (answer.finish === "length") said.push(make("p", { class: "remark" }, "The limit of tokens was reached."));
    if (answer.resumed)
      said.push(
        make("p", { class: "remark resumed" }, "The connection broke meanwhile; the answer went on from there."),
      );
    const ended = answer.state === "done" && !["length", "abort"].includes(answer.finish);
    if (!isLast || (ended && !answer.error)) return said;
    const goOn = this.actions.canGoOn(answer);
    const [label, act] = goOn
      ? ["Continue", () => this.actions.goOn()]
      : ["Try again", () => this.actions.again(this.message)];
    return [
      ...said,
      make("button", { type: "button", class: "go-on", click: act }, icon(goOn ? "play" : "again"), label),
    ];
  }

  #showFoot(answer, growing, isLast) {
    const key = JSON.stringify([
      growing,
      isLast,
      this.message.active,
      this.message.versions.length,
      answer.tokens.length > 0,
      this.tokens.hidden,
      answer.stats,
    ]);
    if (key === this.shownFoot) return;
    this.shownFoot = key;
    this.foot.replaceChildren(...(growing ? [] : this.#buttons(answer, isLast)));
  }

  #buttons(answer, isLast) {
    const { message, actions } = this;
    const buttons = [copyButton("Copy the answer", () => answer.text)];
    buttons.push(iconButton("again", "Regenerate", () => actions.again(message)));
    buttons.push(iconButton("edit", "Edit the answer", () => actions.editAnswer(message, this.content)));
    if (answer.tokens.length) {
      const toggle = iconButton("tokens", "Show tokens by their probability", () => this.#toggleTokens(isLast), {
        "aria-pressed": String(!this.tokens.hidden),
      });
      buttons.push(toggle);
    }
    if (message.versions.length > 1) buttons.push(this.#versions(message, actions));
    buttons.push(make("span", { class: "stats" }, statsOf(answer)));
    return buttons;
  }

  #versions(message, actions) {
    const { active, versions } = message;
    const step = (by) => () => actions.choose(message, active + by);
    return make(
      "span",
      { class: "versions" },
      iconButton("left", "Previous version", step(-1), { disabled: active === 0 }),
      make("span", {}, `${active + 1} / ${versions.length}`),
      iconButton("right", "Next version", step(1), { disabled: active === versions.length - 1 }),
    );
  }

  #toggleTokens(isLast) {
    this.asTokens = this.tokens.hidden;
    this.update(null, isLast);
  }
}

/* An answer that is JSON as a whole is shown as such. */
function shownText(text) {
  const json = /^\s*[[{]/.test(text) && indented(text);
  return json ? `\`\`\`json\n${json}\n\`\`\`` : text;
}

/* JSON with line ends; null where it is not complete, or no JSON. */
function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return null;
  }
}

function callOf(call) {
  const shown = indented(call.arguments) ?? call.arguments;
  const head = make("p", { class: "tool-name" }, icon("tool"), call.name || "…");
  return make(
    "section",
    { class: "call", "aria-label": `Call of ${call.name}` },
    head,
    make("pre", { tabindex: "0" }, shown),
  );
}

/* A place for tokens: one stop for the keyboard, whose arrows go from token to token. */
function tokenRow() {
  const row = make("div", {
    class: "content tokens",
    hidden: true,
    tabindex: "0",
    role: "group",
    "aria-label": "Tokens. Left and right go from one to the next.",
  });
  row.addEventListener("keydown", (event) => {
    const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = document.activeElement === row ? row.firstElementChild : document.activeElement[step];
    next?.focus();
  });
  return row;
}

/* A token, coloured by its probability. What else it might have been is told when the pointer or the focus is on it. */
function tokenOf([text, logprob, others]) {
  const known = logprob !== null;
  const percent = (value) => (value === null ? "–" : `${(Math.exp(value) * 100).toFixed(1)} %`);
  const rivals = others.map(([other, value]) => `${shownToken(other)} ${percent(value)}`);
  const about = `${shownToken(text)} ${percent(logprob)}${rivals.length ? `; most likely: ${rivals.join(", ")}` : ""}`;
  const shown = text.replaceAll("\n", "↵\n");
  const token = make("span", { class: known ? "token" : "token unknown", "data-about": about, tabindex: "-1" }, shown);
  if (known) token.style.setProperty("--p", Math.exp(logprob).toFixed(3));
  return token;
}

function shownToken(text) {
  return `“${text.replaceAll("\n", "↵")}”`;
}

function statsOf({ stats }) {
  if (!stats.completion) return "";
  const made = stats.totalMs - (stats.firstMs || 0);
  const parts = [`${stats.completion} token${stats.completion === 1 ? "" : "s"}`];
  if (stats.completion > 1 && made > 0) parts.push(`${(((stats.completion - 1) * 1000) / made).toFixed(1)} tok/s`);
  if (stats.firstMs !== undefined) parts.push(`first after ${(stats.firstMs / 1000).toFixed(2)} s`);
  return parts.join(" · ");
}
