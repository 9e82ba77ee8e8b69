/* The conversations at the side: to open one, to rename it, to delete it. */

import { byId, iconButton, make } from "./dom.js";

export class ConversationList {
  /* `actions`: open, rename and remove, functions of a conversation. */
  constructor(store, actions) {
    this.store = store;
    this.actions = actions;
    this.root = byId("conversations");
  }

  /* Show them all. `open`: the conversation that is looked at; `turns`: ids of those in which an answer is written. */
  show(open, turns) {
    this.opened = open;
    this.turns = turns;
    const items = this.store.list().map((conversation) => this.#item(conversation));
    const said = this.store.lasting ? "No conversations yet." : "This browser keeps no conversations.";
    this.root.replaceChildren(...(items.length ? items : [make("li", { class: "none" }, said)]));
  }

  #item(conversation) {
    const current = conversation.id === this.opened.id;
    const title = conversation.title || "New chat";
    const busy = this.turns.has(conversation.id)
      ? make("span", { class: "busy", role: "img", "aria-label": "An answer is being written" })
      : null;
    const pick = make(
      "button",
      {
        type: "button",
        class: "pick",
        "aria-current": current ? "true" : null,
        click: () => this.actions.open(conversation),
      },
      busy,
      make("span", { class: "title" }, title),
    );
    const rename = iconButton("edit", `Rename “${title}”`, () => this.#rename(conversation, item));
    const remove = iconButton("remove", `Delete “${title}”`, () => this.#remove(conversation, item));
    const item = make("li", { class: current ? "current" : null }, pick, rename, remove);
    return item;
  }

  #rename(conversation, item) {
    const input = make("input", { type: "text", class: "rename", "aria-label": "Title", maxlength: 60 });
    input.value = conversation.title;
    let left = false;
    const leave = (keep) => {
      if (left) return;
      left = true;
      if (keep && input.value.trim()) conversation.title = input.value.trim();
      this.actions.rename(conversation);
    };
    input.addEventListener("blur", () => leave(true));
    input.addEventListener("keydown", (event) => {
      if (event.key === "Enter") leave(true);
      if (event.key === "Escape") {
        event.stopPropagation();
        leave(false);
      }
    });
    item.replaceChildren(input);
    input.select();
  }

  /* Asks first: what is deleted is gone. */
  #remove(conversation, item) {
    const sure = make(
      "button",
      { type: "button", class: "danger", click: () => this.actions.remove(conversation) },
      "Delete",
    );
    const keep = make("button", { type: "button", click: () => this.show(this.opened, this.turns) }, "Keep");
    item.replaceChildren(make("span", { class: "title" }, "Delete for good?"), sure, keep);
    keep.focus();
  }
}
