/* The page: its two views, the question for a key, the appearance, and what is known of the server. */

import { json, whenKeyIsNeeded } from "./api.js";
import { Chat } from "./chat.js";
import { byId, icon } from "./dom.js";
import { ServerView } from "./server.js";
import { Store } from "./store.js";

const THEME = "quartet.theme";
const THEMES = ["system", "light", "dark"];
const AGAIN_MS = 2000;
const SUGGESTIONS = [
  "Explain how a KV cache works.",
  "Write a haiku about the sea.",
  "List three uses of a paper clip as JSON.",
];
const OF_THE_DEMO = [
  "What is the capital of Kenya?",
  "What is 23 + 58?",
  "Count from 3 to 7.",
  "Give the capital of Japan as JSON.",
];

const server = { model: "", suggestions: SUGGESTIONS, generates: true };

/* the key */

function askForKey(message) {
  const dialog = byId("key-dialog");
  const input = byId("key-input");
  byId("key-message").textContent = message;
  input.value = "";
  dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    const end = (value) => {
      answers.abort();
      dialog.close();
      resolve(value);
    };
    const answers = new AbortController();
    const options = { signal: answers.signal };
    byId("key-form").addEventListener("submit", (event) => (event.preventDefault(), end(input.value.trim())), options);
    byId("key-cancel").addEventListener("click", () => end(null), options);
    dialog.addEventListener("cancel", (event) => (event.preventDefault(), end(null)), options);
  });
}

/* the views */

function showView(views) {
  const onServer = location.hash === "#server";
  byId("chat").hidden = onServer;
  byId("sidebar").hidden = onServer;
  byId("menu").hidden = onServer;
  byId("open-settings").hidden = onServer;
  document.body.classList.toggle("on-server", onServer);
  for (const [name, current] of [
    ["tab-chat", !onServer],
    ["tab-server", onServer],
  ]) {
    if (current) byId(name).setAttribute("aria-current", "page");
    else byId(name).removeAttribute("aria-current");
  }
  if (onServer && !byId("settings").hidden) views.chat.settings.toggle(false);
  toggleSidebar(false);
  views.server.show(onServer);
}

function toggleSidebar(open = !document.body.classList.contains("with-sidebar")) {
  document.body.classList.toggle("with-sidebar", open);
  byId("menu").setAttribute("aria-expanded", String(open));
  byId("shade").hidden = !open && byId("settings").hidden;
  if (open) byId("new-chat").focus();
}

/* the appearance */

function theme() {
  return document.documentElement.dataset.theme || "system";
}

function setTheme(value) {
  if (value === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = value;
  byId("theme").setAttribute("aria-label", `Appearance: ${value}`);
  byId("theme").title = `Appearance: ${value}`;
  try {
    localStorage.setItem(THEME, value);
  } catch {
    /* it lasts until the page is left */
  }
}

/* the server */

function showStatus(ok, text) {
  const status = byId("status");
  status.querySelector(".status-text").textContent = text;
  status.querySelector(".dot").className = `dot ${ok ? "ok" : "bad"}`;
  status.title = text;
}

/* Learn which model is served; again, until somebody answers. */
async function learn(chat) {
  try {
    const info = await json("model_info");
    server.model = info.served_model_name || info.model_path;
    server.generates = info.is_generation;
    if (info.model_path === "demo") server.suggestions = OF_THE_DEMO;
    showStatus(true, server.model);
    document.title = `Quartet · ${server.model}`;
    if (!chat.conversation.messages.length) chat.refresh();
  } catch (error) {
    showStatus(false, error.status === 401 ? "A key is needed" : error.message);
    if (error.status !== 401) setTimeout(() => learn(chat), AGAIN_MS);
  }
}

async function start() {
  whenKeyIsNeeded(askForKey);
  byId("menu").append(icon("menu"));
  byId("open-settings").append(icon("settings"));
  byId("new-chat").prepend(icon("plus"));
  byId("theme").append(icon("theme"));
  setTheme(theme());
  byId("theme").addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length]));
  byId("menu").addEventListener("click", () => toggleSidebar());
  const store = new Store();
  await store.open();
  const views = { chat: new Chat(store, server), server: new ServerView() };
  byId("open-settings").addEventListener("click", () => views.chat.settings.toggle());
  byId("skip").addEventListener("click", (event) => (event.preventDefault(), byId("prompt").focus()));
  byId("shade").addEventListener("click", () => (views.chat.settings.toggle(false), toggleSidebar(false)));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || byId("key-dialog").open || byId("shade").checkVisibility() === false) return;
    if (!byId("settings").hidden) views.chat.settings.toggle(false);
    toggleSidebar(false);
  });
  window.addEventListener("hashchange", () => showView(views));
  document.addEventListener("quartet:opened", () => toggleSidebar(false));
  document.addEventListener("quartet:status", ({ detail }) => showStatus(detail.ok, detail.text));
  document.addEventListener("quartet:answered", ({ detail }) => {
    if (!server.model && !detail.error) learn(views.chat);
    else showStatus(!detail.error, detail.error || server.model);
  });
  showView(views);
  await learn(views.chat);
}

start();
